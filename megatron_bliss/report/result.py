"""`result.json`: the arms of a run side by side at the last iteration that all of them have reached.

Like is compared with like: losses after the decay branch where every arm has one at that iteration, else losses of the
main line, whose learning rate is not decayed, for every arm.
"""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_bliss.artifacts import RunPaths, read_json, write_json
from megatron_bliss.data.inventory import Inventory
from megatron_bliss.data.scores import ScoreFiles
from megatron_bliss.errors import UserError
from megatron_bliss.orchestration.cost import selection_flops, train_flops
from megatron_bliss.report.collect import ArmFiles, Point, RunFiles, collect
from megatron_bliss.report.speedup import Speedup, auc, speedup

AFTER_DECAY, BEFORE_DECAY = "after decay", "before decay"


def result_path(run_dir: Path) -> Path:
    return run_dir / "result.json"


def write(run_dir: Path) -> None:
    """Write `result.json` if any arm has been evaluated; the target domain and the time of an earlier one are kept.

    :raises UserError: if there is no run.
    """
    if not any(files.decays or files.curve for files in collect(run_dir).arms):
        return
    earlier = read_json(result_path(run_dir)) if result_path(run_dir).exists() else {}
    kept = {key: earlier[key] for key in ("target_domain", "wall_s") if earlier.get(key) is not None}
    write_json(result_path(run_dir), demo_result(run_dir, **kept))


def demo_result(
    run_dir: Path, *, seed: int | None = None, target_domain: str | None = None, wall_s: float | None = None
) -> dict[str, Any]:
    """The content of `result.json`.

    :param seed: the run's own by default.
    :param target_domain: whose sequences should score highest, for the AUC over the last round's scores.
    :param wall_s: seconds; by default from the first stage's start to the last one's end.
    :raises UserError: if there is no run, no arm has been evaluated yet, or the domain is not in the pool.
    """
    run = collect(run_dir)
    evaluated = [files for files in run.arms if files.decays or files.curve]
    if not evaluated:
        raise UserError(f"{run_dir} has no evaluation yet; run it until its first `evaluate` stage is done")
    iteration = common_iteration(evaluated)
    measure, points = measure_at(evaluated, iteration)
    gain = speedup_over_random(run)
    return {
        "schema": 1,
        "seed": run.config.seed if seed is None else seed,
        "main_arm": run.arms[0].name,
        "iteration": iteration,
        "measure": measure,
        "arms": {files.name: _arm(run, files, points[files.name], iteration) for files in evaluated},
        "speedup_over_random": gain.value if gain else None,
        "speedup_is_lower_bound": gain.lower_bound if gain else None,
        "target_domain": target_domain,
        "auc_target_domain": target_domain_auc(run, target_domain) if target_domain else None,
        "wall_s": run.wall_s if wall_s is None else wall_s,
    }


def _arm(run: RunFiles, files: ArmFiles, point: Point | None, iteration: int) -> dict[str, Any]:
    config, last = files.arm.config, files.decays[-1] if files.decays else None
    return {
        "method": config.method,
        "test_loss": point.loss if point else None,
        "validation_loss": point.validation_loss if point else None,
        "domain_loss": point.domain_loss if point else {},
        "tokens": iteration * config.target.global_batch_size * config.data.sequence_length,
        "selection_flops": selection_flops(files.arm, run.pool),
        "train_flops": train_flops(config, iteration),
        "influence_correlation": files.influence_correlation,
        "last_decay": {"iteration": last.iteration, "test_loss": last.loss} if last else None,
    }


def common_iteration(evaluated: list[ArmFiles]) -> int:
    """The last iteration that every arm has been measured at or beyond."""
    return min(max(point.iteration for point in (*files.decays, *files.curve)) for files in evaluated)


def measure_at(evaluated: list[ArmFiles], iteration: int) -> tuple[str, dict[str, Point | None]]:
    """Every arm at an iteration, all measured in the same way, and which way that is."""
    decayed = {
        files.name: next((point for point in files.decays if point.iteration == iteration), None) for files in evaluated
    }
    if all(decayed.values()):
        return AFTER_DECAY, decayed
    on_line = {files.name: interpolate(files.curve, iteration) for files in evaluated}
    if all(on_line.values()):
        return BEFORE_DECAY, on_line
    return AFTER_DECAY, decayed


def interpolate(curve: list[Point], iteration: int) -> Point | None:
    """A point of the curve, or between two of its points on a straight line; None outside."""
    before = [point for point in curve if point.iteration <= iteration]
    after = [point for point in curve if point.iteration >= iteration]
    if not before or not after:
        return None
    first, second = before[-1], after[0]
    share = (iteration - first.iteration) / max(second.iteration - first.iteration, 1)

    def between(low: float | None, high: float | None) -> float | None:
        return None if low is None or high is None else low + share * (high - low)

    return Point(
        iteration=iteration,
        tokens=round(first.tokens + share * (second.tokens - first.tokens)),
        validation_loss=first.validation_loss + share * (second.validation_loss - first.validation_loss),
        test_loss=between(first.test_loss, second.test_loss),
        domain_loss={name: between(loss, second.domain_loss.get(name)) for name, loss in first.domain_loss.items()},
    )


def speedup_over_random(run: RunFiles) -> Speedup | None:
    """Steps that the random arm needs to reach the main arm's last loss; both on the main line where both have a
    curve there, else both after decay. None without a random arm, or before there is anything to compare."""
    main = run.arms[0]
    random = next((files for files in run.arms[1:] if files.arm.config.method == "random"), None)
    if random is None:
        return None
    start = main.arm.config.round_end(0)
    for ours, theirs in ((main.curve, random.curve), (main.decays, random.decays)):
        if ours and theirs:
            curve = [(point.iteration, point.loss) for point in theirs]
            return speedup(curve, ours[-1].loss, ours[-1].iteration, start)
    return None


def target_domain_auc(run: RunFiles, target_domain: str) -> float | None:
    """AUC of a domain's sequences against all others, by the main arm's newest complete scores; None without scores.

    :raises UserError: if the pool has no such domain.
    """
    paths = run.arms[0].arm.paths
    if target_domain not in run.pool_tokens:
        raise UserError(f"target domain {target_domain!r} is not in the pool; it has {', '.join(run.pool_tokens)}")
    scored = [paths.scores(n) for n in range(run.config.rounds, 0, -1) if (paths.scores(n) / "manifest.json").exists()]
    if not scored:
        return None
    inside, outside = scores_by_membership(paths, scored[0], target_domain)
    return auc(inside, outside) if len(inside) and len(outside) else None


def scores_by_membership(paths: RunPaths, scores: Path, target_domain: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the sequences of a domain and of all others, float32 [n] and [m]."""
    ScoreFiles(scores)  # refuses unfinished ones
    parts: dict[bool, list[np.ndarray]] = {True: [np.empty(0, np.float32)], False: [np.empty(0, np.float32)]}
    for record in Inventory.read(paths.inventory).pool:
        path = scores / f"{record.name}.npy"
        if path.exists():
            values = np.load(path, mmap_mode="r", allow_pickle=False)
            parts[record.domain == target_domain].append(values[~np.isnan(values)])
    return np.concatenate(parts[True]), np.concatenate(parts[False])
