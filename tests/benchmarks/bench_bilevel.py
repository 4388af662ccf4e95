"""One outer step of the engine beside the authors' loop (`reference_loop.py`): seconds, phases, memory.

Both sides have the same models, batch and inner steps and two threads, each in a process of its own; the engine has the
defaults of `BilevelConfig` and micro-batches of 512 tokens. Fused attention has no second derivative: the authors'
proxy does without. Seconds of an outer step: the median of REPEATS after WARM_UP, in each of ROUNDS processes a side.
The engine updates z in each of the first steps and then every `solve_interval`-th: both are timed, the latter in cycles
from one update to the next, and count by their number in a round of `outer_steps`. `speedup_every_step` is that of the
first ones, which do what the authors' steps do. Memory is the peak of the resident set over all steps above what is
resident before the first one, when the models are built
(VmHWM in /proc/self/status, set back at that point). `memory_ratio` is that of the authors' loop as it is,
`memory_ratio_plain_target` that of one whose target builds no graph.

`tp2_ok`: on two tensor-parallel processes of one thread each the engine takes the steps it takes on one: losses agree
within LOSS_TOLERANCE, the coefficients c_i and the norm of the hypergradient Σ c_i ∇s_i within
HYPERGRADIENT_TOLERANCE, relative.

`scaling`: the engine at S with larger batches in micro-batches of the same size.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from megatron_bliss.bilevel import loop as loop_module
from megatron_bliss.bilevel.hypergradient import score_gradient
from megatron_bliss.config import BilevelConfig, ModelConfig
from megatron_bliss.mcore import models, parallel
from megatron_bliss.mcore.batches import Batch, make_batch
from megatron_bliss.mcore.lower_level import micro_batches
from megatron_bliss.mcore.parallel import ParallelContext
from megatron_bliss.mcore.score_model import build_score_model
from megatron_bliss.stages.bilevel import assemble
from tests.benchmarks.reference_loop import Models, Phases, ReferenceLoop, Settings
from tests.distributed import run_ranks

WARM_UP, REPEATS, ROUNDS, THREADS = 2, 3, 3, 2
LABELLED = 4  # last tokens of a validation sequence that carry loss: the answer
LOSS_TOLERANCE, HYPERGRADIENT_TOLERANCE = 1e-5, 2e-3


@dataclass(frozen=True)
class Size:
    proxy: ModelConfig
    target: ModelConfig
    vocab_size: int
    length: int  # predicted tokens of a sequence
    batch: int  # sequences, of the pool and of the validation set
    micro_batch: int  # of the engine


SIZES = {
    "S": Size(  # proxy 1.3 M parameters, target 7.4 M
        ModelConfig(preset="small"),
        ModelConfig(preset="small", num_layers=8, hidden_size=256, num_attention_heads=8),
        vocab_size=2048, length=128, batch=8, micro_batch=4,
    ),
    "M": Size(  # 13 M, 55 M
        ModelConfig(preset="pythia-31m"),
        ModelConfig(preset="pythia-70m", num_layers=12),
        vocab_size=16384, length=256, batch=4, micro_batch=2,
    ),
}  # fmt: skip


def measure() -> dict[str, Any]:
    results: dict[str, Any] = {name: compare(size) for name, size in SIZES.items()}
    alone, shared = (run(engine, SIZES["S"], tensor_parallel) for tensor_parallel in (1, 2))
    loss_error, hypergradient_error = differences(alone, shared)
    results["tp2_ok"] = loss_error < LOSS_TOLERANCE and hypergradient_error < HYPERGRADIENT_TOLERANCE
    results["scaling"] = scaling()
    results["tp2"] = {"loss_error": loss_error, "hypergradient_error": hypergradient_error, **shown(shared)}
    return results


def scaling() -> dict[str, Any]:
    """Seconds and peak memory of the engine at S by the sequences of a batch: linear, and always the same."""
    found = {batch: run(engine, replace(SIZES["S"], batch=batch)) for batch in (8, 16, 32)}
    return {
        str(batch): {
            "seconds": side["seconds"],
            "seconds_per_sequence": side["seconds"] / batch / 2,
            "peak_mb": side["peak_mb"],
        }
        for batch, side in found.items()
    }


def compare(size: Size, rounds: int = ROUNDS) -> dict[str, Any]:
    """The sides take turns, so that a machine that gets slower for a while does so for all of them; ratios are those
    of a round, and their median is given with the smallest and the largest."""
    makers: dict[str, Callable[[], dict[str, Any]]] = {
        "reference": lambda: run(authors, size),
        "engine": lambda: run(engine, size),
        "engine_bf16_target": lambda: run(engine, replace(size, target=replace(size.target, bf16=True))),
    }
    found = [{name: make() for name, make in makers.items()} for _ in range(rounds)]
    plain = run(partial(authors, target_graph=False), size)

    def ratios(over: str, under: str, figure: str) -> list[float]:
        return sorted(sides[over][figure] / sides[under][figure] for sides in found)

    speedups, with_bf16 = ratios("reference", "engine", "seconds"), ratios("reference", "engine_bf16_target", "seconds")
    every_step = sorted(sides["reference"]["seconds"] / sides["engine"]["seconds_every_step"] for sides in found)
    return {
        "reference_s": statistics.median(sides["reference"]["seconds"] for sides in found),
        "engine_s": statistics.median(sides["engine"]["seconds"] for sides in found),
        "speedup": statistics.median(speedups),
        "speedup_spread": [speedups[0], speedups[-1]],
        "speedup_bf16_target": statistics.median(with_bf16),
        "speedup_bf16_target_spread": [with_bf16[0], with_bf16[-1]],
        "speedup_every_step": statistics.median(every_step),
        "speedup_every_step_spread": [every_step[0], every_step[-1]],
        "memory_ratio": statistics.median(ratios("engine", "reference", "peak_mb")),
        "memory_ratio_plain_target": found[0]["engine"]["peak_mb"] / plain["peak_mb"],
    } | {name: shown(found[0][name]) for name in makers}


def shown(side: dict[str, Any]) -> dict[str, Any]:
    """What the table and the JSON hold of a process."""
    return {name: side[name] for name in ("seconds", "seconds_all", "phases", "resident_mb", "peak_mb")}


def run(
    side: Callable[..., dict[str, Any]], size: Size, tensor_parallel: int = 1, repeats: int = REPEATS
) -> dict[str, Any]:
    """What `side` finds on the first of `tensor_parallel` fresh processes."""
    found: dict[str, Any] = run_ranks(_rank, tensor_parallel, tensor_parallel, side, size, repeats, timeout=900)[0]
    return found


def _rank(
    rank: int, tensor_parallel: int, side: Callable[..., dict[str, Any]], size: Size, repeats: int
) -> dict[str, Any]:
    context = parallel.initialize(tensor_parallel, False, seed=0)
    torch.set_num_threads(THREADS // tensor_parallel)
    return side(size, context, repeats)


def authors(size: Size, context: ParallelContext, repeats: int, target_graph: bool = True) -> dict[str, Any]:
    proxy, target, score = build(size, context, plain_proxy=True)  # fused attention has no second derivative
    settings, ours = Settings(target_graph=target_graph), BilevelConfig()
    assert settings.inner_steps == ours.inner_steps

    def every_token(hidden_states: torch.Tensor, output_layer: Any, **_: Any) -> torch.Tensor:
        return output_layer(hidden_states)[0].transpose(0, 1)[..., : size.vocab_size]

    def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens, models.positions(tokens), None, output_processor=every_token)

    loop = ReferenceLoop(Models(proxy, partial(logits, proxy), partial(logits, target), score, score), settings)

    def step(number: int) -> None:
        loop.step(
            *(batch for is_validation in (False, True) for batch in batches(size, context, number, is_validation))
        )

    return timed(step, loop.phases, repeats)


def engine(size: Size, context: ParallelContext, repeats: int) -> dict[str, Any]:
    """Timings, and the losses and hypergradient of the last step."""
    proxy, target, score = build(size, context)
    settings = BilevelConfig(batch_size=size.batch, validation_batch_size=size.batch, micro_batch_size=size.micro_batch)
    loop = assemble(settings, proxy, score, target.requires_grad_(False), context, size.vocab_size)
    phases = Phases()
    last: dict[str, Any] = {}

    def step(number: int) -> None:
        parts = [
            micro_batches(batches(size, context, number, is_validation, settings.micro_batch_size), context)
            for is_validation in (False, True)
        ]
        last.update(loop.step(*parts))

    def kept(gradient: Callable[..., Any], upper: Any, parts: Any, coefficients: Sequence[torch.Tensor]) -> Any:
        last["coefficients"] = torch.cat(list(coefficients)).tolist()
        return gradient(upper, parts, coefficients)

    with (
        patch.object(loop_module, "score_gradient", partial(kept, score_gradient)),
        watched(loop, target, phases),
    ):
        first = timed(step, phases, repeats)
        loop.steps_done = settings.solve_first
        later = timed(step, phases, repeats, settings.solve_interval)
    share = settings.solve_first / settings.outer_steps

    return later | {
        "seconds": share * first["seconds"] + (1 - share) * later["seconds"],
        "seconds_every_step": first["seconds"],
        "peak_mb": max(first["peak_mb"], later["resident_mb"] - first["resident_mb"] + later["peak_mb"]),
        "resident_mb": first["resident_mb"],
        "last": last,
    }


@contextmanager
def watched(loop: Any, target: torch.nn.Module, phases: Phases) -> Iterator[None]:
    """Count the loop's parts by phase."""
    parts = [
        (loop_module, "score_logits", "score model"),
        (loop_module, "score_gradient", "score model"),
        (loop.curvature, "evaluate", "inner gradient, product and g_i"),
        (loop_module.NoCurvature, "evaluate", "inner gradient and g_i"),  # where z is not updated
        (loop.curvature, "product", "further products"),
        (target, "forward", "target forward"),
        (loop.lower, "add_validation_gradient", "validation gradient"),
        (loop.solver, "step", "solver"),
        (loop.proxy_optimizer, "step", "update"),
        (loop.score_optimizer, "step", "update"),
    ]
    with ExitStack() as patches:
        for owner, name, phase in parts:
            patches.enter_context(patch.object(owner, name, counted(getattr(owner, name), phases, phase)))
        yield


def counted(function: Callable[..., Any], phases: Phases, phase: str) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with phases(phase):
            return function(*args, **kwargs)

    return wrapper


def build(size: Size, context: ParallelContext, plain_proxy: bool = False) -> tuple[Any, Any, Any]:
    """Proxy, target and score model with a head that is not zero, the same for every side and layout."""
    proxy = models.build_language_model(size.proxy, size.vocab_size, context, plain_kernels=plain_proxy)
    target = models.build_language_model(size.target, size.vocab_size, context)
    score = build_score_model(size.proxy, size.vocab_size, context)
    head = score.score_head.weight
    with torch.no_grad():
        head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(0)) / 10)
    return proxy, target, score


def batches(
    size: Size, context: ParallelContext, number: int, is_validation: bool, micro_batch_size: int | None = None
) -> list[Batch]:
    """A step's batch of the pool or of the validation set, in parts of `micro_batch_size` sequences or as one."""
    random = np.random.default_rng([number, is_validation])
    rows = list(random.integers(0, size.vocab_size, (size.batch, size.length + 1)))
    mask = np.arange(size.length + 1) > size.length - LABELLED
    return [
        make_batch(part, context.device, loss_masks=[mask] * len(part) if is_validation else None)
        for part in (
            rows[i : i + (micro_batch_size or size.batch)] for i in range(0, size.batch, micro_batch_size or size.batch)
        )
    ]


def timed(step: Callable[[int], None], phases: Phases, repeats: int, cycle: int = 1) -> dict[str, Any]:
    """Seconds a step, MB.

    :param step: takes its 0-based number.
    :param cycle: steps that are timed together and count as their mean.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is what is resident now
    resident = memory_mb("VmRSS")
    warm_up = -(-WARM_UP // cycle) * cycle
    for number in range(warm_up):
        step(number)
    phases.seconds.clear()
    seconds = []
    for first in range(warm_up, warm_up + repeats * cycle, cycle):
        began = time.perf_counter()
        for number in range(first, first + cycle):
            step(number)
        seconds.append((time.perf_counter() - began) / cycle)
    return {
        "seconds": statistics.median(seconds),
        "seconds_all": sorted(seconds),
        "phases": {name: total / repeats / cycle for name, total in phases.seconds.items()},
        "resident_mb": resident,
        "peak_mb": memory_mb("VmHWM") - resident,
    }


def memory_mb(name: str) -> float:
    """:param name: VmRSS, what is resident; VmHWM, its high-water mark."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024 / 1e6


def differences(alone: dict[str, Any], shared: dict[str, Any]) -> tuple[float, float]:
    """Largest relative error of the losses, and of the hypergradient, in the last step."""
    one, two = alone["last"], shared["last"]

    def error(name: str) -> float:
        expected = np.asarray(one[name])
        return float(np.linalg.norm(two[name] - expected) / np.linalg.norm(expected))

    losses = ("train_loss", "validation_loss", "weighted_loss", "kl")
    return max(map(error, losses)), max(map(error, ("coefficients", "score_gradient_norm")))
