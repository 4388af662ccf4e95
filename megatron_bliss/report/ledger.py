"""What each part of the work took, arm by arm: estimated from sizes, and measured as far as stages have run.

FLOPs and tokens are those of all rounds that are planned; hours, memory and bytes on disk those of what has been done.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_bliss.artifacts import RunPaths
from megatron_bliss.orchestration import state
from megatron_bliss.orchestration.cost import Cost, arm_costs, online_flops
from megatron_bliss.orchestration.plan import Arm, Stage, plan
from megatron_bliss.report.collect import RunFiles, json_lines

LLM_WARMUP, PRETRAINING, REFERENCE = "LLM: warm-up", "LLM: rounds", "reference of online selection"
_SELECTING = "selection: choosing"
_PARTS = {
    "warmup-proxy": "proxy: warm-up",
    "cache-target": "selection: bilevel loop",
    "bilevel": "selection: bilevel loop",
    "influence": "selection: influence",
    "fit-influence": "selection: influence",
    "ngrams": "selection: scoring",
    "score": "selection: scoring",
    "fidelity": "measuring fidelity",
    "inventory": _SELECTING,
    "warmup-select": _SELECTING,
    "select": _SELECTING,
    "prepare": "index files",
    "warmup-target": LLM_WARMUP,
    "pretrain": PRETRAINING,
    "evaluate": "LLM: evaluation",
}


def ledger(run: RunFiles) -> dict[str, list[dict[str, Any]]]:
    """By arm, a row a part of the work; the warm-up, which arms share, is in each.

    tokens, flops           estimated, None where the pool's size is not known; tokens 0 where no model sees them
    share                   of the arm's training in FLOPs
    device_hours            measured, of all processes, with or without a GPU; None where nothing has run
    peak_device_bytes       of the rank that took most; None without a GPU
    peak_host_bytes         the same of the main memory
    disk_bytes              of the files that are there
    """
    stages = plan(run.config, run.run_dir)
    records = state.read_state(run.run_dir)
    return {files.name: _arm(files.arm, run, stages, records) for files in run.arms}


def _arm(arm: Arm, run: RunFiles, stages: list[Stage], records: dict[str, state.Record]) -> list[dict[str, Any]]:
    costs = arm_costs(arm, run.pool)
    parts: dict[str, list[Stage]] = {}
    for stage in _stages_of(arm, stages):
        if stage.command[0] != "report":
            parts.setdefault(_PARTS.get(stage.command[0], "selection: other"), []).append(stage)
    rows = []
    for part, found in parts.items():
        planned = [costs.get(_cost_name(arm, stage), Cost()) for stage in found]
        rows.append({"part": part, **_estimated(planned), **_measured(found, records)})
    if reference := online_flops(arm.config, arm.config.rounds * arm.config.round_steps):
        for row in rows:
            if row["part"] == PRETRAINING:
                row["flops"] -= reference
        measured = dict.fromkeys(("device_hours", "peak_device_bytes", "peak_host_bytes", "disk_bytes"))
        rows.append({"part": REFERENCE, "tokens": None, "flops": reference, **measured})
    training = sum(row["flops"] or 0.0 for row in rows if row["part"] in (LLM_WARMUP, PRETRAINING))
    for row in rows:
        row["share"] = None if row["flops"] is None or not training else row["flops"] / training
    return rows


def _stages_of(arm: Arm, stages: list[Stage]) -> Iterator[Stage]:
    """An arm's own, and those of the main arm's warm-up that it starts from."""
    shared = {"warmup-select", "warmup-prepare", "warmup-target"}
    if arm.method.needs_proxy:
        shared.add(arm.proxy[0])
    for stage in stages:
        if stage.run_dir == arm.paths.root or stage.name in shared:
            yield stage


def _cost_name(arm: Arm, stage: Stage) -> str:
    """Costs are by the arm's own names, shared stages among them."""
    return stage.name if stage.name.startswith(arm.prefix) else f"{arm.prefix}{stage.name}"


def _estimated(planned: list[Cost]) -> dict[str, Any]:
    """:returns: tokens that models see, and FLOPs."""
    tokens: list[int | None] = [0 if cost.flops == 0 else cost.tokens for cost in planned]
    flops = [cost.flops for cost in planned]
    is_known = None not in tokens and None not in flops
    return {
        "tokens": sum(number or 0 for number in tokens) if is_known else None,
        "flops": float(sum(number or 0.0 for number in flops)) if is_known else None,
    }


def _measured(stages: list[Stage], records: dict[str, state.Record]) -> dict[str, Any]:
    lines = [line for stage in stages for line in _usage(stage, records)]
    outputs = [path for stage in stages for path in stage.outputs if path.exists()]
    return {
        "device_hours": sum(line["seconds"] * line["ranks"] for line in lines) / 3600 if lines else None,
        "peak_device_bytes": _largest(line.get("peak_device_bytes") for line in lines),
        "peak_host_bytes": _largest(line.get("peak_host_bytes") for line in lines),
        "disk_bytes": sum(map(_size, outputs)) if outputs else None,
    }


def _usage(stage: Stage, records: dict[str, state.Record]) -> list[dict[str, Any]]:
    """What the calls of a stage noted; of one that noted nothing, the time in the run's state."""
    if lines := json_lines(RunPaths(stage.run_dir).usage(stage.command[0], stage.round_number or 0)):
        return lines
    record = records.get(stage.name)
    if record is None or record.started is None or record.finished is None:
        return []
    return [{"seconds": record.finished - record.started, "ranks": stage.num_ranks}]


def _largest(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())
