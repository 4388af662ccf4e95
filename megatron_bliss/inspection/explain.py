"""`explain SHARD:ID`: all that a run knows of one sequence."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_bliss.data.shards import ShardRecord, verify_shard
from megatron_bliss.data.slices import HELD_OUT, slice_numbers
from megatron_bliss.data.training_order import TrainingOrder
from megatron_bliss.errors import UserError
from megatron_bliss.inspection.rounds import Round, Run
from megatron_bliss.mcore.checkpoint_files import read_iteration
from megatron_bliss.stages.pretrain import line_and_selection

# Flags of Megatron with which a sample's place no longer tells its step.
_REORDERING = (
    *("--dataloader-type", "--global-batch-size", "--rampup-batch-size", "--step-batch-size-schedule"),
    *("--iterations-to-skip", "--phase-transition-iterations", "--decrease-batch-size-if-needed"),
)


def show(run_dir: Path, name: str, as_json: bool) -> None:
    """Print what `explain` finds.

    :raises UserError: for a name that is not one of a sequence in the pool.
    """
    facts = explain(Run(run_dir), name)
    print(json.dumps(facts, indent=1)) if as_json else _print(facts)


def explain(run: Run, name: str) -> dict[str, Any]:
    """:param name: SHARD:ID, with the shard's name in the inventory or its prefix."""
    record, sequence_id = _find(run, name)
    shard = verify_shard(record)
    slicing = run.slicing
    numbers = slice_numbers(record, slicing.seed, slicing.num_slices, slicing.held_out_share(record.domain))
    number = int(numbers[sequence_id])
    length = int(shard.sequence_lengths[sequence_id])
    rounds = [
        _round(one, record, sequence_id, length, number)
        for one in map(run.round, range(run.config.rounds + 1))
        if one.number == number or (one.is_selected and _is_kept(one, record, sequence_id))
    ]
    return {
        "schema": 1,
        "shard": record.name,
        "prefix": record.prefix,
        "id": sequence_id,
        "domain": record.domain,
        "tokens": length,
        "slice": None if number == HELD_OUT else number,
        "held_out": number == HELD_OUT,
        "rounds": rounds,
        "text": run.text(record, sequence_id),
    }


def _find(run: Run, name: str) -> tuple[ShardRecord, int]:
    shard, colon, digits = name.rpartition(":")
    if not colon or not digits.isdecimal():
        raise UserError(f"{name!r} is not SHARD:ID; give a shard's name or prefix, a colon and the sequence's number")
    path = os.path.realpath(f"{shard}.bin")
    for record in run.inventory.pool:
        if shard == record.name or path == os.path.realpath(f"{record.prefix}.bin"):
            if int(digits) >= record.num_sequences:
                raise UserError(f"{shard} has sequences 0 to {record.num_sequences - 1}; there is no {digits}")
            return record, int(digits)
    known = ", ".join(record.name for record in run.inventory.pool[:10])
    more = f" and {len(run.inventory.pool) - 10} more" if len(run.inventory.pool) > 10 else ""
    raise UserError(f"{shard} is not a shard of the pool of {run.paths.root}; it has {known}{more}")


def _is_kept(one: Round, record: ShardRecord, sequence_id: int) -> bool:
    return bool(one.kept(record, np.array([sequence_id]))[0])


def _round(one: Round, record: ShardRecord, sequence_id: int, length: int, number: int) -> dict[str, Any]:
    """What became of the sequence in a round.

    :param number: the sequence's slice.
    """
    facts: dict[str, Any] = {"round": one.number, "method": one.method.name, "kept": None}
    if one.has_scores and one.number == number:
        facts |= _standing(one, record, sequence_id)
    if not one.is_selected:
        return facts | {"why": "nothing is selected for this round yet"}
    facts["kept"] = _is_kept(one, record, sequence_id)
    facts["threshold"] = one.selection.manifest["thresholds"].get(record.domain)
    facts["why"] = _why(facts, length)
    return facts | _training(one, record, sequence_id, length) if facts["kept"] else facts


def _standing(one: Round, record: ShardRecord, sequence_id: int) -> dict[str, Any]:
    """Score, rank (1 is the best; equal ones by shard digest and id) and the share of the slice that is below it."""
    candidates = sorted(one.candidates(), key=lambda part: part[0].digest)
    [own] = [scores[ids == sequence_id][0] for other, ids, scores in candidates if other is record]
    rank, below, total = 1, 0, 0
    for other, ids, scores in candidates:
        ties_before = len(ids) if other.digest < record.digest else 0
        if other is record:
            ties_before = int(np.searchsorted(ids, sequence_id))
        rank += int((scores > own).sum()) + int((scores[:ties_before] == own).sum())
        below += int((scores < own).sum())
        total += len(ids)
    return {"score": float(own), "rank": rank, "of": total, "percentile": 100 * below / total}


def _why(facts: dict[str, Any], length: int) -> str:
    score, threshold = facts.get("score"), facts["threshold"]
    if facts["kept"]:
        return "it is among the best of the slice" if facts["method"] != "random" else "it was drawn"
    if length < 2:
        return "it has fewer than two tokens: there is nothing to predict, so it comes last"
    if threshold is None or score is None:
        return "nothing of its domain is kept" if threshold is None else "it is not among what is kept"
    if score < threshold:
        return "its score is below the threshold"
    return "its score is the threshold's, and the tokens were used up by equal ones before it"


def _training(one: Round, record: ShardRecord, sequence_id: int, length: int) -> dict[str, Any]:
    """Steps of the LLM that read the sequence, and how many of them it has made so far."""
    config = one.run.config
    start, end = config.round_end(one.number - 1) if one.number else 0, config.round_end(one.number)
    reordered = [word for word in config.target.extra_args if word.partition("=")[0] in _REORDERING]
    if reordered:
        return {"steps": None, "steps_note": f"{reordered[0]} in target.extra_args changes which step reads what"}
    order = TrainingOrder.find(one.home.index_cache, one.selection.digest)
    if order is None:
        return {"steps": None, "steps_note": "not known before the prepare stage has run"}
    samples = order.samples(record.prefix, sequence_id, length)
    steps = np.unique(start + samples // config.target.global_batch_size + 1)
    steps = steps[steps <= end]  # Megatron builds a few samples more than it draws
    done = read_iteration(line_and_selection(one.home, one.number)[0]) or 0
    note = "" if len(steps) else f"not read in steps {start + 1} to {end}: fewer samples are drawn than are selected"
    return {"steps": steps.tolist(), "steps_done": int((steps <= done).sum()), "steps_note": note}


def _print(facts: dict[str, Any]) -> None:
    console = Console(width=None if os.isatty(1) else 120, highlight=False)
    place = "held out of every slice" if facts["held_out"] else f"slice {facts['slice']}"
    place += " (the warm-up's)" if facts["slice"] == 0 else ""
    console.print(f"{facts['shard']}:{facts['id']} | {facts['domain']} | {facts['tokens']} tokens | {place}")
    if facts["rounds"]:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column in ("round", "score", "rank", "percentile", "kept", "why", "read in step"):
            table.add_column(column, overflow="fold", justify="right" if column in ("score", "rank") else "left")
        for one in facts["rounds"]:
            table.add_row(*map(Text, _cells(one)))
        console.print(table)
    console.print(Text(facts["text"]))


def _cells(one: dict[str, Any]) -> list[str]:
    cells = [str(one["round"]) if one["round"] else "warm-up"]
    if "score" in one:
        cells += [f"{one['score']:.6g}", f"{one['rank']} of {one['of']}", f"{one['percentile']:.2f}"]
    else:
        cells += ["", "", ""]
    cells += ["" if one["kept"] is None else "yes" if one["kept"] else "no", one["why"]]
    steps = one.get("steps") or []
    shown = ", ".join(map(str, steps[:8])) + (f" and {len(steps) - 8} more" if len(steps) > 8 else "")
    if steps and one["steps_done"] < len(steps):
        shown += f" ({len(steps) - one['steps_done']} to come)"
    return [*cells, shown or one.get("steps_note", "")]
