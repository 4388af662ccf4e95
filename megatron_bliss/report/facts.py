"""`report.json`: all that the report shows, finished or not. The page is made from it and from nothing else."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_bliss.artifacts import RunPaths, read_json
from megatron_bliss.data.contamination import contaminated_share
from megatron_bliss.data.inventory import Inventory
from megatron_bliss.report.collect import ArmFiles, Point, RoundFiles, collect
from megatron_bliss.report.curves import columns
from megatron_bliss.report.ledger import ledger
from megatron_bliss.report.rounds import selections
from megatron_bliss.report.summary import summary
from megatron_bliss.report.warnings import warnings
from megatron_bliss.stages.guards import describe, guarded


def report_facts(run_dir: Path, result: dict[str, Any] | None) -> dict[str, Any]:
    """The content of `report.json`.

    :param result: that of `result.json`; None before the first evaluation.
    :raises UserError: if there is no run.
    """
    run = collect(run_dir)
    config = run.config
    main, found = run.arms[0], selections(run.run_dir)
    facts: dict[str, Any] = {
        "schema": 1,
        "name": run.run_dir.name,
        "method": config.method,
        "seed": config.seed,
        "num_rounds": config.rounds,
        "round_steps": config.round_steps,
        "warmup_steps": config.warmup.target_steps,
        "wall_s": run.wall_s if result is None else result["wall_s"],
        "measured_on": "test" if config.data.test else "validation",
        "domains": [domain.name for domain in config.data.pool],
        "main_arm": main.name,
        "ends": [config.round_end(number) for number in range(config.rounds + 1)],  # of the warm-up and each round
        "summary": summary(result) if result else ["Nothing has been evaluated yet."],
        "result": result,
        "arms": {files.name: _arm(files) for files in run.arms},
        "rounds": [_round(entry, found.get(entry.number), main.arm.paths) for entry in main.rounds],
        "ledger": ledger(run),
        "validation_sets": _validation_sets(main.arm.paths),
        "guards": asdict(config.guards),
    }
    return facts | {"warnings": warnings(facts)}


def _validation_sets(paths: RunPaths) -> dict[str, dict[str, Any]]:
    """By name: how large they are, and what of them stands in the pool, as far as it was looked for. Empty before the
    inventory.

    contaminated_share      of the set, in the whole pool; None where less than two sequences were found
    """
    if not paths.inventory.exists():
        return {}
    looked = read_json(paths.contamination)["sets"] if paths.contamination.exists() else {}
    found = {}
    for name, record in Inventory.read(paths.inventory).validation.items():
        one = dict.fromkeys(("found", "read_tokens", "pool_tokens"), 0) | looked.get(name, {})
        one["num_sequences"] = record.num_sequences
        found[name] = one | {"contaminated_share": contaminated_share(one)}
    return found


def _arm(files: ArmFiles) -> dict[str, Any]:
    return {
        "method": files.arm.config.method,
        "curve": [_point(point) for point in files.curve],  # on the main line, learning rate not decayed
        "decays": [_point(entry.decay) | {"round": entry.number} for entry in files.rounds if entry.decay],
        "benchmarks": [
            {"round": entry.number, "tasks": entry.benchmarks} for entry in files.rounds if entry.benchmarks
        ],
        "kept": [_kept(entry) for entry in files.rounds if entry.kept],
        "fidelity": [_fidelity(entry.number, entry.fidelity) for entry in files.rounds if entry.fidelity],
    }


def _fidelity(number: int, found: dict[str, Any]) -> dict[str, Any]:
    """What `fidelity/results.json` of a round says."""
    return {"round": number} | {key: found[key] for key in ("iteration", "sequences", "correlations")}


def _point(point: Point) -> dict[str, Any]:
    return {
        "step": point.iteration,
        "tokens": point.tokens,
        "loss": point.loss,
        "validation_loss": point.validation_loss,
        "domain_loss": point.domain_loss,
    }


def _kept(entry: RoundFiles) -> dict[str, Any]:
    """Tokens by domain, offered and kept, and their shares."""
    offered = sum(counts.slice_tokens for counts in entry.kept.values())
    kept = sum(counts.kept_tokens for counts in entry.kept.values())
    return {
        "round": entry.number,
        "tokens": kept,
        "offered_tokens": offered,
        "offered_share": {domain: counts.slice_tokens / max(offered, 1) for domain, counts in entry.kept.items()},
        "kept_share": {domain: counts.kept_tokens / max(kept, 1) for domain, counts in entry.kept.items()},
    }


def _round(entry: RoundFiles, selection: dict[str, Any] | None, paths: RunPaths) -> dict[str, Any]:
    """:param selection: what `rounds.selections` says of it; None before it has a selection."""
    guard = guarded(paths, entry.number)
    return {
        "round": entry.number,
        "guard": asdict(guard) | {"sentence": describe(guard, entry.number)} if guard else None,
        "selection": selection,
        "target": entry.target,  # with which the score model learned: iteration, staleness in steps
        "bilevel": columns(entry.bilevel) if entry.bilevel else None,
        "training": columns(entry.training) if entry.training else None,  # of the LLM, by domain
    }
