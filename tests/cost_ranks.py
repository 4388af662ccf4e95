"""Measures what stages take: bytes of all tensors at the peak, and floating-point operations."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from megatron_bliss.artifacts import RunPaths
from megatron_bliss.config import (
    BilevelConfig,
    DataConfig,
    DomainConfig,
    EvaluationConfig,
    FidelityConfig,
    LaunchConfig,
    ModelConfig,
    ProxyConfig,
    RunConfig,
    ScoringConfig,
    SelectionConfig,
    TargetConfig,
    TokenizerConfig,
    WarmupConfig,
    read_saved_config,
    save_config,
)
from megatron_bliss.data.shards import ShardWriter
from megatron_bliss.mcore import checkpoints
from megatron_bliss.mcore.architectures import padded_vocab_size
from megatron_bliss.mcore.losses import CHUNK
from megatron_bliss.mcore.output_layer import BLOCK_TOKENS
from megatron_bliss.orchestration.cost import arm_costs, measure
from megatron_bliss.orchestration.memory import stage_memory
from megatron_bliss.orchestration.plan import arms
from megatron_bliss.stages import bilevel, fidelity, inventory, pretrain, score, select, warmup_proxy
from tests.distributed import run_ranks

LENGTH, STEPS = 256, 2
_WORKSHOP: dict[str, Callable[[Path], None]] = {
    "warmup-proxy": warmup_proxy.run,
    "bilevel": lambda run: bilevel.run(run, 1),
    "score": lambda run: score.run(run, 1),
    "fidelity": lambda run: fidelity.run(run, 1),
    "warmup-target": lambda run: pretrain.run(run, 0),
}
# Of stages in a plan, where not the command's.
NAMES = {command: f"round-0001/{command}" for command in ("bilevel", "score", "fidelity")}


def write_run(folder: Path, model: ModelConfig, vocab_size: int, num_ranks: int, tensor_parallel: int) -> Path:
    """A run of sequences that fill the models' windows; with data-parallel ranks the optimizers are shared out."""
    folder.mkdir(parents=True)
    for name, count in (("pool", 64), ("valid", 16)):
        random = np.random.default_rng(count)
        with ShardWriter(folder / name, np.uint16) as writer:
            for _ in range(count):
                writer.add_document([random.integers(0, vocab_size - 1, LENGTH + 1)])
    is_shared = num_ranks > tensor_parallel
    flags = ["--transformer-impl", "local"] + (["--use-distributed-optimizer"] if is_shared else [])
    config = RunConfig(
        seed=1, rounds=1, round_steps=STEPS,
        data=DataConfig(
            pool=[DomainConfig("pool", [str(folder / "pool")])], validation=str(folder / "valid"),
            tokenizer=TokenizerConfig("NullTokenizer", vocab_size=vocab_size), sequence_length=LENGTH, held_out=0,
        ),
        target=TargetConfig(
            model, global_batch_size=8, micro_batch_size=4, lr_warmup_steps=1, save_interval=STEPS, log_interval=1,
            tensor_parallel=tensor_parallel, extra_args=flags,
        ),
        proxy=ProxyConfig(model, tensor_parallel, tensor_parallel > 1, is_shared),
        warmup=WarmupConfig(fraction=1.0, target_steps=STEPS, proxy_steps=STEPS, proxy_batch_size=8),
        bilevel=BilevelConfig(
            outer_steps=3, batch_size=16, validation_batch_size=8, micro_batch_size=4, checkpoint_interval=3,
            gradient_average=0.0, solve_interval=2,  # z is updated in the first and the third step
        ),
        selection=SelectionConfig(pool="all", fraction=0.2),
        scoring=ScoringConfig(batch_tokens=4 * LENGTH),
        evaluation=EvaluationConfig(decay_steps=0),
        fidelity=FidelityConfig(sequences=16),
        launch=LaunchConfig(nproc_per_node=num_ranks),
    )  # fmt: skip
    run = folder / "run"
    save_config(config, RunPaths(run).config)
    inventory.run(run)
    select.run(run, None)
    return run


def compare(run: Path, *launches: list[str]) -> dict[str, dict[str, float]]:
    """For each stage what was predicted and measured of its ranks: the largest peak in bytes, the sum of the FLOPs.

    :param launches: commands of stages that run one after the other in one set of processes.
    """
    config = read_saved_config(RunPaths(run).config)
    costs = arm_costs(arms(config, run)[0], measure(config)[0])
    num_ranks = config.launch.nproc_per_node
    measured: dict[str, tuple[int, int]] = {}
    for commands in launches:
        for found in run_ranks(_measure, num_ranks, run, commands, timeout=900):
            for command, (peak, flops) in found.items():
                before = measured.get(command, (0, 0))
                measured[command] = max(before[0], peak), before[1] + flops
    found = {}
    for command, (peak, flops) in measured.items():
        columns = padded_vocab_size(config.data.tokenizer.vocab_size) // config.proxy.tensor_parallel
        memory = stage_memory(config, command, CHUNK, BLOCK_TOKENS * columns)
        assert memory is not None
        predicted = costs[NAMES.get(command, command)].flops
        assert predicted is not None
        found[command] = {
            "predicted_bytes": memory.total, "measured_bytes": peak, "memory_ratio": memory.total / peak,
            "predicted_flops": predicted, "measured_flops": flops, "flops_ratio": predicted / flops,
        }  # fmt: skip
    return found


def _measure(rank: int, run: Path, commands: list[str]) -> dict[str, tuple[int, int]]:
    """Peak in bytes and FLOPs of each stage on this rank."""
    results = {}
    for command in commands:
        watch = _Watch()
        with _host_memory(watch), watch:
            _WORKSHOP[command](run)
        results[command] = watch.peak, watch.flops
    return results


@contextlib.contextmanager
def _host_memory(watch: "_Watch") -> Iterator[None]:
    """Inside, what a GPU's memory is not used for is not watched: writing checkpoints, and drawing the weights of new
    models."""
    from megatron.core.models.gpt import GPTModel
    from megatron.training import training

    def unwatched(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            watch.is_on_host = True
            try:
                return function(*args, **kwargs)
            finally:
                watch.is_on_host = False

        return call

    places: list[tuple[Any, str]] = [
        (checkpoints, "save"), (training, "save_checkpoint_and_time"), (GPTModel, "__init__"),
    ]  # fmt: skip
    originals = [getattr(module, name) for module, name in places]
    for (module, name), original in zip(places, originals, strict=True):
        setattr(module, name, unwatched(original))
    try:
        yield
    finally:
        for (module, name), original in zip(places, originals, strict=True):
            setattr(module, name, original)


class _Watch(TorchDispatchMode):
    """Bytes of the tensors that are there at a time, and FLOPs.

    torch's profiler would not do: it does not see memory that is released by the threads of a collective, and its
    `FlopCounterMode` would keep graphs alive that are gone without it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak, self.flops, self.is_on_host = 0, 0, False
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}  # made since the start
        self._total = 0  # of all of them, gone or not

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf.untyped_storage())
        if not self.is_on_host and self._total > self.peak:
            self._forget_released()
            self.peak = max(self.peak, self._total)
        packet = func._overloadpacket
        if packet in _COUNTED:
            self.flops += _COUNTED[packet](*args)
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._storages:  # no other storage gets the number of one that is referred to
            self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            self._total += storage.nbytes()

    def _forget_released(self) -> None:
        self._storages = {key: entry for key, entry in self._storages.items() if not entry[0].expired()}
        self._total = sum(size for _, size in self._storages.values())


def _attention(query: torch.Tensor, *_: Any) -> int:
    """Two products over the pairs that causal attention looks at."""
    batch, heads, length, size = query.shape
    return 2 * batch * heads * length * length * size


def _attention_backward(gradient: torch.Tensor, query: torch.Tensor, *_: Any) -> int:
    """Four; the scores that a fused kernel makes again do not count, as is usual."""
    return 2 * _attention(query)


def _added_product(_: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> int:
    return 2 * one.shape[0] * one.shape[1] * other.shape[1]


_COUNTED: dict[Any, Callable[..., int]] = {  # what torch's registry lacks, or counts otherwise
    torch.ops.aten.addmm_: _added_product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
