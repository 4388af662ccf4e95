"""One outer step of the engine beside the authors' loop (`reference_loop.py`): seconds, phases, memory.

All sides have the same models, batch and inner steps and two threads, each in a process of its own; the engine has the
defaults of `BilevelConfig` and, as theirs, the whole batch at once. Fused attention has no second derivative: the
authors' proxy does without. The engine updates z in each of the first steps and then in every `solve_interval`-th: both
kinds are timed, the latter in cycles from one update to the next, and count by their number in a round of
`outer_steps`. `speedup_every_step` is that of the first ones, which do what the authors' steps do.

`speedup` is that of processes one after the other, as they are: the median of ROUNDS, with the smallest and the
largest. A process on a CPU gives memory back at every step and gets it again page by page, which costs the authors'
loop a quarter of its time, or more where memory is short. In `speedup_memory_kept` all sides keep what they had,
as they would on a GPU, and take turns from step to step, so that a machine that gets slower does so for all: the median
of so many turns, with quartiles.

Memory is the peak of the resident set over all steps above what is resident before the first one, when the models are
built (VmHWM in /proc/self/status, set back at that point). `memory_ratio` is that of the authors' loop as it is,
`memory_ratio_plain_target` that of one whose target builds no graph.

`tp2_ok`: on two tensor-parallel processes of one thread each the engine takes the steps it takes on one: losses agree
within LOSS_TOLERANCE, the coefficients c_i and the norm of the hypergradient Σ c_i ∇s_i within
HYPERGRADIENT_TOLERANCE, relative.

`scaling`: the engine at S with larger batches in micro-batches of the same size.
"""

import ctypes
import os
import select
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
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
from tests.distributed import run_ranks, started_ranks

THREADS = 2
TIMEOUT = 600  # seconds that a side waits for its turn
ROUNDS, STEPS, TURNS = 3, 3, {"S": 12, "M": 4}
LABELLED = 4  # last tokens of a validation sequence that carry loss: the answer
LOSS_TOLERANCE, HYPERGRADIENT_TOLERANCE = 1e-5, 2e-3


type Turn = Callable[[], AbstractContextManager[None]]  # held while a process is at work
type Side = Callable[[Size, ParallelContext, Turn, int], dict[str, Any]]  # the last: number of turns that are timed


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
        vocab_size=2048, length=128, batch=8, micro_batch=8,
    ),
    "M": Size(  # 13 M, 55 M
        ModelConfig(preset="pythia-31m"),
        ModelConfig(preset="pythia-70m", num_layers=12),
        vocab_size=16384, length=256, batch=4, micro_batch=4,
    ),
}  # fmt: skip
TINY = Size(ModelConfig(preset="tiny"), ModelConfig(preset="tiny"), vocab_size=256, length=32, batch=2, micro_batch=2)


def measure() -> dict[str, Any]:
    results: dict[str, Any] = {name: compare(name) for name in SIZES}
    alone, shared = (run(engine, SIZES["S"], tensor_parallel=ranks) for ranks in (1, 2))
    loss_error, hypergradient_error = differences(alone, shared)
    results["tp2_ok"] = loss_error < LOSS_TOLERANCE and hypergradient_error < HYPERGRADIENT_TOLERANCE
    results["scaling"] = scaling()
    results["tp2"] = {"loss_error": loss_error, "hypergradient_error": hypergradient_error, **shown(shared)}
    return results


def scaling() -> dict[str, Any]:
    """Seconds and peak memory of the engine at S by the sequences of a batch: linear, and, from the second
    micro-batch on, always the same."""
    found = {batch: shown(run(engine, replace(SIZES["S"], batch=batch))) for batch in (8, 16, 32)}
    return {
        str(batch): {
            "seconds": side["seconds"],
            "seconds_per_sequence": side["seconds"] / batch / 2,
            "peak_mb": side["peak_mb"],
        }
        for batch, side in found.items()
    }


def compare(name: str) -> dict[str, Any]:
    """The sides beside each other on the models of that size."""
    size = SIZES[name]
    with_bf16 = replace(size, target=replace(size.target, bf16=True))
    sides: dict[str, tuple[Side, Size]] = {
        "reference": (authors, size), "engine": (engine, size), "engine_bf16_target": (engine, with_bf16),
    }  # fmt: skip
    rounds = [{side: run(*what) for side, what in sides.items()} for _ in range(ROUNDS)]
    kept = dict(zip(sides, take_turns(list(sides.values()), TURNS[name]), strict=True))
    plain = run(partial(authors, target_graph=False), size)

    def speedup(under: str, figure: str = "seconds") -> dict[str, Any]:
        each = [
            statistics.median(found["reference"]["seconds"]) / statistics.median(found[under][figure])
            for found in rounds
        ]
        return {"median": statistics.median(each), "spread": [min(each), max(each)]}

    def of_turns(under: str) -> dict[str, Any]:
        each = [a / b for a, b in zip(kept["reference"]["seconds"], kept[under]["seconds"], strict=True)]
        low, middle, high = statistics.quantiles(each, n=4)
        return {"median": middle, "quartiles": [low, high]}

    def memory_ratio(beside: Sequence[dict[str, Any]]) -> float:
        return statistics.median(
            found["engine"]["peak_mb"] / other["peak_mb"] for found, other in zip(rounds, beside, strict=True)
        )

    return {
        "speedup": speedup("engine"),
        "speedup_bf16_target": speedup("engine_bf16_target"),
        "speedup_every_step": speedup("engine", "seconds_every_step"),
        "speedup_memory_kept": of_turns("engine"),
        "speedup_memory_kept_bf16_target": of_turns("engine_bf16_target"),
        "memory_ratio": memory_ratio([found["reference"] for found in rounds]),
        "memory_ratio_plain_target": memory_ratio([plain] * ROUNDS),
    } | {side: shown(figures) for side, figures in rounds[0].items()}


def shown(side: dict[str, Any]) -> dict[str, Any]:
    """What the table and the JSON hold of a process."""
    return {"seconds": statistics.median(side["seconds"])} | {
        name: side[name] for name in ("phases", "resident_mb", "peak_mb")
    }


def run(side: Side, size: Size, turns: int = STEPS, tensor_parallel: int = 1) -> dict[str, Any]:
    """What `side` finds on the first of `tensor_parallel` fresh processes."""
    found: dict[str, Any] = run_ranks(_rank, tensor_parallel, tensor_parallel, side, size, turns, timeout=900)[0]
    return found


def take_turns(sides: Sequence[tuple[Side, Size]], turns: int) -> list[dict[str, Any]]:
    """What each side finds in a process of its own, where one waits while another is at work."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as started:
        doors = [Path(folder) / str(number) for number in range(len(sides))]
        for door in doors:
            os.mkfifo(door)
        results = [
            started.enter_context(started_ranks(_rank, 1, 1, side, size, turns, doors[i], doors[(i + 1) % len(sides)]))
            for i, (side, size) in enumerate(sides)
        ]
        open_door(doors[0])
        found, failures = [], []
        for result in results:
            try:
                found += result(3600)
            except AssertionError as failure:
                failures.append(failure)
    if failures:  # of a side, and of those that waited for it
        raise ExceptionGroup("sides of the benchmark failed", failures)
    return found


def open_door(door: Path) -> None:
    """Let the process go on that waits there. A FIFO; what is written waits for as long as someone has it open."""
    with open(door, "wb") as stream:
        stream.write(b"!")


def _rank(
    rank: int,
    tensor_parallel: int,
    side: Side,
    size: Size,
    turns: int,
    own: Path | None = None,
    other: Path | None = None,
) -> dict[str, Any]:
    """:param own: where this process waits before each of its turns. :param other: where the next one does."""
    context = parallel.initialize(tensor_parallel, False, seed=0)
    torch.set_num_threads(THREADS // tensor_parallel)
    if own is not None:
        keep_memory()
    waits = own and os.open(own, os.O_RDWR)
    following = other and os.open(other, os.O_RDWR)

    @contextmanager
    def turn() -> Iterator[None]:
        if waits is not None:
            if not select.select([waits], [], [], TIMEOUT)[0]:
                raise TimeoutError("the side whose turn it was did not pass it on")
            os.read(waits, 1)
        yield
        if following is not None:
            os.write(following, b"!")

    side(TINY, context, nullcontext, 1)  # the pages of the libraries' code, which are not the loop's
    return side(size, context, turn, turns)


def authors(size: Size, context: ParallelContext, turn: Turn, turns: int, target_graph: bool = True) -> dict[str, Any]:
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

    found = timed({"seconds": step}, turn, turns, loop.phases)
    return found | {"phases": {name: total / turns for name, total in loop.phases.seconds.items()}}


def engine(size: Size, context: ParallelContext, turn: Turn, turns: int) -> dict[str, Any]:
    """Timings, and the losses and hypergradient of the last step."""
    proxy, target, score = build(size, context)
    settings = BilevelConfig(batch_size=size.batch, validation_batch_size=size.batch, micro_batch_size=size.micro_batch)
    loop = assemble(settings, proxy, score, target.requires_grad_(False), context, size.vocab_size)
    phases, interval = Phases(), settings.solve_interval
    begin = -(-settings.solve_first // interval) * interval
    last: dict[str, Any] = {}

    def step(number: int) -> None:
        loop.steps_done = number
        parts = [
            micro_batches(batches(size, context, number, is_validation, settings.micro_batch_size), context)
            for is_validation in (False, True)
        ]
        last.update(loop.step(*parts))

    def cycle(number: int) -> None:
        with watched(loop, target, phases):
            for later in range(interval):
                step(begin + number * interval + later)

    def kept(gradient: Callable[..., Any], upper: Any, parts: Any, coefficients: Sequence[torch.Tensor]) -> Any:
        last["coefficients"] = torch.cat(list(coefficients)).tolist()
        return gradient(upper, parts, coefficients)

    with patch.object(loop_module, "score_gradient", partial(kept, score_gradient)):
        found = timed({"seconds_every_step": step, "seconds": cycle}, turn, turns, phases)
    share = settings.solve_first / settings.outer_steps
    both = zip(found["seconds_every_step"], found["seconds"], strict=True)
    return found | {
        "seconds": [share * first + (1 - share) * later / interval for first, later in both],
        "phases": {name: total / turns / interval for name, total in phases.seconds.items()},
        "last": last,
    }


def keep_memory() -> None:
    """Nothing that is freed goes back to the machine (glibc: no mappings of their own for large tensors, no trimming,
    one heap)."""
    libc = ctypes.CDLL(None)
    for parameter, value in ((-4, 0), (-1, -1), (-8, 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX
        assert libc.mallopt(parameter, value) == 1


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


def timed(works: dict[str, Callable[[int], None]], turn: Turn, turns: int, phases: Phases) -> dict[str, Any]:
    """Seconds of each of `works` in each turn, MB.

    :param works: take the 0-based number of the turn. The first of them is done once more before, not counted: memory
        that a process frees may have gone to others while it waited, to come back page by page.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is what is resident now
    resident = memory_mb("VmRSS")
    seconds: dict[str, list[float]] = {name: [] for name in works}
    warm_up = next(iter(works.values()))
    for number in range(turns):
        with turn():
            before = dict(phases.seconds)
            warm_up(number)
            phases.seconds = before
            for name, work in works.items():
                began = time.perf_counter()
                work(number)
                seconds[name].append(time.perf_counter() - began)
    return seconds | {"resident_mb": resident, "peak_mb": memory_mb("VmHWM") - resident}


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
