"""What a run and its control arms have measured so far, read from their files."""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_bliss.artifacts import RunPaths, read_json
from megatron_bliss.config import RunConfig, read_saved_config
from megatron_bliss.data.inventory import Inventory
from megatron_bliss.data.selection import Counts
from megatron_bliss.orchestration import state
from megatron_bliss.orchestration.cost import PoolSize
from megatron_bliss.orchestration.plan import Arm, arms


@dataclass(frozen=True)
class Point:
    """Losses of the LLM at one iteration, in nats a token; None where there is nothing to measure."""

    iteration: int
    tokens: int
    validation_loss: float
    test_loss: float | None
    domain_loss: dict[str, float | None]
    validation_sets: dict[str, dict[str, float | None]] = field(default_factory=dict)  # of several: loss and weight

    @property
    def loss(self) -> float:
        """On the test set, or on the validation set of a run without one."""
        return self.validation_loss if self.test_loss is None else self.test_loss


@dataclass(frozen=True)
class RoundFiles:
    """One round of one arm; parts that do not exist yet are empty."""

    number: int
    decay: Point | None  # at the end of the decay branch; `iteration` is where the branch left
    curve: list[Point]  # on the main line, learning rate not decayed
    kept: dict[str, Counts]  # by domain
    bilevel: list[dict[str, float]]  # one entry an outer step
    training: list[dict[str, float]]  # of the LLM, by domain; one entry a line of Megatron's log
    influence_correlation: float | None  # of `mates`: predicted with measured, of sequences that were held out
    target: dict[str, int] | None  # the checkpoint that the score model learned with: iteration, staleness in steps
    benchmarks: dict[str, dict[str, float | None]]  # by task, as in evaluation/benchmarks.json
    fidelity: dict[str, Any] | None  # as in fidelity/results.json


@dataclass(frozen=True)
class ArmFiles:
    """The rounds of one arm."""

    arm: Arm
    rounds: list[RoundFiles]

    @property
    def name(self) -> str:
        return self.arm.name

    @property
    def curve(self) -> list[Point]:
        return sorted((point for entry in self.rounds for point in entry.curve), key=lambda point: point.iteration)

    @property
    def influence_correlation(self) -> float | None:
        """Mean over the rounds that have one."""
        found = [entry.influence_correlation for entry in self.rounds if entry.influence_correlation is not None]
        return statistics.fmean(found) if found else None

    @property
    def decays(self) -> list[Point]:
        return [entry.decay for entry in self.rounds if entry.decay is not None]


@dataclass(frozen=True)
class RunFiles:
    """A run: the main arm first, then its controls."""

    run_dir: Path
    config: RunConfig
    arms: list[ArmFiles]
    pool: PoolSize | None  # None before the inventory
    pool_tokens: dict[str, int]  # by domain
    wall_s: float  # seconds from the first stage's start to the last one's end


def collect(run_dir: Path) -> RunFiles:
    """:raises UserError: if there is no run, or a file of it cannot be read."""
    run_dir = run_dir.absolute()
    paths = RunPaths(run_dir)
    config = read_saved_config(paths.config)
    pool_tokens: dict[str, int] = {}
    pool = None
    if paths.inventory.exists():
        records = Inventory.read(paths.inventory).pool
        for record in records:
            pool_tokens[record.domain] = pool_tokens.get(record.domain, 0) + record.num_tokens
        pool = PoolSize(sum(record.num_sequences for record in records), sum(pool_tokens.values()))
    found = [
        ArmFiles(arm, [_round(arm.paths, number) for number in range(1, config.rounds + 1)])
        for arm in arms(config, run_dir)
    ]
    return RunFiles(run_dir, config, found, pool, pool_tokens, _wall_seconds(run_dir))


def _round(paths: RunPaths, number: int) -> RoundFiles:
    decay, curve = None, []
    results_path = paths.evaluation(number) / "results.json"
    if results_path.exists():
        results = read_json(results_path)
        place = {"iteration": results["iteration"], "tokens": results["tokens_trained"]}
        decay = Point(**place, **results["decay"])
        curve = [Point(**point) for point in results["curve"]]
    bilevel, training = paths.bilevel(number) / "metrics.jsonl", paths.training_metrics(number)
    fit, manifest = paths.influence_model(number) / "fit.json", paths.selection(number) / "manifest.json"
    correlation = read_json(fit)["held_out_spearman"] if fit.exists() else None
    target = read_json(manifest).get("target") if manifest.exists() else None
    kept = _kept(paths.selection(number))
    measured = paths.evaluation(number) / "benchmarks.json"
    benchmarks = read_json(measured)["tasks"] if measured.exists() else {}
    metrics = _metrics(bilevel), _metrics(training)
    faithful = paths.fidelity(number) / "results.json"
    fidelity = read_json(faithful) if faithful.exists() else None
    return RoundFiles(number, decay, curve, kept, *metrics, correlation, target, benchmarks, fidelity)


def _kept(directory: Path) -> dict[str, Counts]:
    manifest = directory / "manifest.json"
    totals: dict[str, Counts] = {}
    if manifest.exists():
        for shard in read_json(manifest)["shards"]:
            domain, counts = shard["record"]["domain"], Counts(**shard["counts"])
            totals[domain] = totals.get(domain, Counts(0, 0, 0, 0)) + counts
    return totals


def _metrics(path: Path) -> list[dict[str, float]]:
    """The numbers of metrics.jsonl, line by line."""
    return [
        {key: value for key, value in entry.items() if isinstance(value, int | float) and not isinstance(value, bool)}
        for entry in json_lines(path)
    ]


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a .jsonl file, if it is there; a last line that is still being written is left out."""
    entries: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def _wall_seconds(run_dir: Path) -> float:
    records = state.read_state(run_dir).values()
    started = [record.started for record in records if record.started is not None]
    finished = [record.finished for record in records if record.finished is not None]
    return max(finished) - min(started) if started and finished else 0.0
