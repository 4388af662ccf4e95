"""`comparison.json`: the arms of all seeds of a comparison, finished or not.

Every arm is measured at the main arm's last iteration: after a decay branch if the baseline has one there, else on the
main line, whose learning rate is not decayed. Differences to the baseline are paired, seed by seed.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bliss.artifacts import read_json, write_json
from megatron_bliss.data.correlation import spearman
from megatron_bliss.data.inventory import Inventory
from megatron_bliss.errors import UserError
from megatron_bliss.orchestration import state
from megatron_bliss.orchestration.compare import seed_dirs
from megatron_bliss.orchestration.cost import online_flops, selection_flops, train_flops
from megatron_bliss.orchestration.plan import plan
from megatron_bliss.report.collect import ArmFiles, Point, RunFiles, collect
from megatron_bliss.report.result import AFTER_DECAY, BEFORE_DECAY, interpolate
from megatron_bliss.report.speedup import Speedup, speedup
from megatron_bliss.report.statistics import spread, verdict

_SHARED = ("inventory", "warmup-select", "prepare", "warmup-target", "pretrain", "evaluate", "report")


@dataclass(frozen=True)
class SeedRun:
    """A run of one seed, and where its arms are compared."""

    seed: int
    run: RunFiles
    iteration: int
    measure: str

    def arm(self, name: str) -> ArmFiles | None:
        return next((files for files in self.run.arms if files.name == name), None)

    def point(self, files: ArmFiles) -> Point | None:
        """The arm where all are compared, or None if it has not been measured there."""
        if self.measure == AFTER_DECAY:
            return next((point for point in files.decays if point.iteration == self.iteration), None)
        return interpolate(files.curve, self.iteration)


def result_path(out: Path) -> Path:
    return out / "comparison.json"


def write(out: Path) -> dict[str, Any]:
    """Write `comparison.json`, and return what is in it.

    :raises UserError: if the directory holds no comparison, or none of its arms has been evaluated.
    """
    found = comparison(seed_runs(out))
    write_json(result_path(out), found)
    return found


def seed_runs(out: Path) -> list[SeedRun]:
    """:raises UserError: if the directory holds no comparison."""
    runs = {seed: collect(path) for seed, path in seed_dirs(out.absolute()).items()}
    if not runs:
        raise UserError(f"{out} holds no comparison; give a directory that `megatron-bliss compare` has made")
    found = []
    for seed, run in runs.items():
        iteration = run.config.round_end(run.config.rounds)
        base = baseline(run, "random") or run.arms[0]
        is_decayed = iteration in _ends(base)
        found.append(SeedRun(seed, run, iteration, AFTER_DECAY if is_decayed else BEFORE_DECAY))
    return found


def _ends(files: ArmFiles) -> list[int]:
    """Iterations that decay branches of an arm leave from."""
    config = files.arm.config
    return [config.round_end(number) for number in range(1, config.rounds + 1)]


def baseline(run: RunFiles, method: str) -> ArmFiles | None:
    """The arm of plain training on what a method takes; of several, the one that is trained longest."""
    found = [files for files in run.arms if files.arm.config.method == method and _is_plain(files)]
    return max(found, key=lambda files: files.arm.config.round_steps, default=None)


def _is_plain(files: ArmFiles) -> bool:
    return files.arm.config.online.method == "none"


def comparison(runs: list[SeedRun]) -> dict[str, Any]:
    """The content of `comparison.json`.

    :raises UserError: if nothing has been measured.
    """
    names = list(dict.fromkeys(files.name for one in runs for files in one.run.arms))
    bases = {
        method: next((b.name for one in runs if (b := baseline(one.run, method))), None) for method in ("random", "all")
    }
    arms = {name: _arm(name, runs, bases) for name in names}
    if not any(arm["seeds"] for arm in arms.values()):
        raise UserError("no arm has been evaluated yet where arms are compared; run `megatron-bliss compare` on")
    first = runs[0]
    return {
        "schema": 1,
        "seeds": [one.seed for one in runs],
        "main_arm": first.run.arms[0].name,
        "baselines": bases,
        "iteration": first.iteration,
        "measure": first.measure,
        "measured_on": "test" if first.run.config.data.test else "validation",
        "arms": arms,
        "rank_correlation": rank_correlations(runs, names),
    }


def _arm(name: str, runs: list[SeedRun], bases: dict[str, str | None]) -> dict[str, Any]:
    seeds = {str(one.seed): found for one in runs if (found := _one_seed(name, one, bases))}
    differences = [found["difference"] for found in seeds.values() if found["difference"] is not None]
    first = next(files for one in runs if (files := one.arm(name)))
    domains = sorted({domain for found in seeds.values() for domain in found["domain_loss"]})

    def over(values: Iterable[float | None]) -> dict[str, Any] | None:
        known = spread([value for value in values if value is not None])
        return asdict(known) if known else None

    def each(key: str) -> dict[str, Any] | None:
        return over(found[key] for found in seeds.values())

    return {
        "method": first.arm.config.method,
        "seeds": seeds,
        "test_loss": each("test_loss"),
        "loss_before_decay": each("loss_before_decay"),
        "difference": over(differences),
        "verdict": verdict(differences),
        "domain_loss": {d: over(found["domain_loss"].get(d) for found in seeds.values()) for d in domains},
        "domain_difference": {d: over(found["domain_difference"].get(d) for found in seeds.values()) for d in domains},
        **{f"speedup_over_{method}": _with_bound(f"speedup_over_{method}", seeds.values(), over) for method in bases},
        "influence_correlation": each("influence_correlation"),
        "tokens": each("tokens"),
        "selection_flops": each("selection_flops"),
        "train_flops": each("train_flops"),
        "selection_s": each("selection_s"),
        "train_s": each("train_s"),
    }


def _with_bound(
    key: str, seeds: Iterable[dict[str, Any]], over: Callable[[Iterable[float | None]], dict[str, Any] | None]
) -> dict[str, Any] | None:
    """Mean and spread of a speed-up; a lower bound where it is one for any seed."""
    known = [found[key] for found in seeds if found[key] is not None]
    means = over(gain["value"] for gain in known)
    return means | {"lower_bound": any(gain["lower_bound"] for gain in known)} if means else None


def _one_seed(name: str, one: SeedRun, bases: dict[str, str | None]) -> dict[str, Any] | None:
    """What an arm has measured with one seed; None if it has not come as far."""
    files = one.arm(name)
    point = one.point(files) if files else None
    if files is None or point is None:
        return None
    config, (spent, training) = files.arm.config, stage_seconds(one, files)
    on_line = interpolate(files.curve, one.iteration)
    base = one.arm(bases["random"]) if bases["random"] else None
    theirs = one.point(base) if base else None
    is_same = base is files
    start = config.round_end(0)
    part = (one.iteration - start) / max(config.round_end(config.rounds) - start, 1)  # of an arm that goes on longer
    return {
        "test_loss": point.loss,
        "validation_loss": point.validation_loss,
        "loss_before_decay": on_line.loss if on_line else None,
        "domain_loss": point.domain_loss,
        "difference": None if theirs is None or is_same else point.loss - theirs.loss,
        "domain_difference": {} if theirs is None or is_same else _minus(point.domain_loss, theirs.domain_loss),
        **{
            f"speedup_over_{method}": asdict(gain) if (gain := _speedup(one, files, bases[method])) else None
            for method in bases
        },
        "influence_correlation": files.influence_correlation,
        "tokens": one.iteration * config.target.global_batch_size * config.data.sequence_length,
        "selection_flops": _selection_flops(one, files),
        "train_flops": train_flops(config, one.iteration),
        "selection_s": spent,
        "train_s": training * part,
    }


def _selection_flops(one: SeedRun, files: ArmFiles) -> float | None:
    """Of proxy, bilevel loop and scores, and of the reference of online selection."""
    offline, config = selection_flops(files.arm, one.run.pool), files.arm.config
    return None if offline is None else offline + online_flops(config, one.iteration - config.round_end(0))


def _minus(ours: dict[str, float | None], theirs: dict[str, float | None]) -> dict[str, float]:
    return {
        name: loss - other
        for name, loss in ours.items()
        if loss is not None and (other := theirs.get(name)) is not None
    }


def _speedup(one: SeedRun, files: ArmFiles, name: str | None) -> Speedup | None:
    """Steps since the warm-up that another arm needs for this one's loss, both on the main line."""
    other = one.arm(name) if name else None
    ours = interpolate(files.curve, one.iteration)
    if other is None or other is files or ours is None or not other.curve:
        return None
    curve = [(point.iteration, point.loss) for point in other.curve]
    return speedup(curve, ours.loss, one.iteration, files.arm.config.round_end(0))


def stage_seconds(one: SeedRun, files: ArmFiles) -> tuple[float, float]:
    """Wall time of an arm's selection (all that its trainings waited for, without the LLM's warm-up), and of its
    trainings. Of a stage that was interrupted, the last attempt's.
    """
    stages = {stage.name: stage for stage in plan(one.run.config, one.run.run_dir)}
    records = state.read_state(one.run.run_dir)
    trainings = [files.arm.stage_name("pretrain", number) for number in range(1, files.arm.config.rounds + 1)]
    needed, left = set(), list(trainings)
    while left:
        if (name := left.pop()) not in needed:
            needed.add(name)
            left += stages[name].needs

    def took(name: str) -> float:
        record = records.get(name)
        if record is None or record.started is None or record.finished is None:
            return 0.0
        return record.finished - record.started

    spent = sum(took(name) for name in needed if stages[name].command[0] not in _SHARED)
    return spent, sum(took(name) for name in trainings)


# --- which domains arms prefer


def rank_correlations(runs: list[SeedRun], names: list[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Spearman's correlation over domains between every two arms that choose: of the share of a domain that is kept,
    and of the mean score of its sequences; mean over seeds."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    kept = {name: [_kept_shares(one.arm(name)) for one in runs] for name in names}
    scores = {name: [_mean_scores(one.arm(name)) for one in runs] for name in names}
    for place, name in enumerate(names):
        for other in names[place + 1 :]:
            pair = {
                "kept": _correlation(kept[name], kept[other]),
                "score": _correlation(scores[name], scores[other]),
            }
            if any(pair.values()):
                found.setdefault(name, {})[other] = pair
    return found


def _correlation(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> dict[str, Any] | None:
    values = []
    for one, other in zip(ours, theirs, strict=True):
        domains = sorted(one.keys() & other.keys())
        if len(domains) > 1:
            values.append(spearman([one[d] for d in domains], [other[d] for d in domains]))
    known = spread([value for value in values if value is not None])
    return asdict(known) if known else None


def _kept_shares(files: ArmFiles | None) -> dict[str, float]:
    """Share of the tokens that were offered of each domain, over all rounds."""
    kept: dict[str, int] = {}
    offered: dict[str, int] = {}
    for entry in files.rounds if files else []:
        for domain, counts in entry.kept.items():
            kept[domain] = kept.get(domain, 0) + counts.kept_tokens
            offered[domain] = offered.get(domain, 0) + counts.slice_tokens
    return {domain: kept[domain] / tokens for domain, tokens in offered.items() if tokens}


def _mean_scores(files: ArmFiles | None) -> dict[str, float]:
    """Of the sequences of each domain, mean of the rounds; empty without finished scores."""
    if files is None:
        return {}
    paths, rounds = files.arm.paths, []
    for entry in files.rounds:
        directory = paths.scores(entry.number)
        if (directory / "manifest.json").exists():
            rounds.append(_round_scores(directory, files.arm.warmup.inventory))
    domains = set(rounds[0]).intersection(*rounds) if rounds else set()
    return {domain: float(np.mean([found[domain] for found in rounds])) for domain in sorted(domains)}


def _round_scores(directory: Path, inventory: Path) -> dict[str, float]:
    sums: dict[str, tuple[float, int]] = {}
    for record in Inventory.read(inventory).pool:
        path = directory / f"{record.name}.npy"
        if path.exists():
            values = np.load(path, mmap_mode="r", allow_pickle=False)
            values = values[values > np.finfo(np.float32).min]  # the least: too short to score; NaN: another slice
            total, count = sums.get(record.domain, (0.0, 0))
            sums[record.domain] = total + float(values.sum(dtype=np.float64)), count + len(values)
    return {domain: total / count for domain, (total, count) in sums.items() if count}


def read(out: Path) -> dict[str, Any]:
    """:raises UserError: if it is not there."""
    return read_json(result_path(out))
