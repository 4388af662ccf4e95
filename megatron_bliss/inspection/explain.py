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
from megatron_bliss.data.slices import HELD_OUT
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
    print(json.dumps(facts, indent=1, allow_nan=False)) if as_json else _print(facts)


def explain(run: Run, name: str) -> dict[str, Any]:
    """:param name: SHARD:ID, with the shard's name in the inventory or its prefix."""
    record, sequence_id = _find(run, name)
    number = run.slice_of(record, sequence_id)
    length = int(verify_shard(record, in_full=False).sequence_lengths[sequence_id])
    rounds = [
        _round(one, record, sequence_id, length)
        for one in map(run.round, range(run.config.rounds + 1))
        if one.number == number
        or (run.slicing.is_shared and one.number and number != HELD_OUT)
        or (one.is_selected and _is_kept(one, record, sequence_id))
    ]
    return {
        "schema": 1,
        "shard": record.name,
        "prefix": record.prefix,
        "id": sequence_id,
        "domain": record.domain,
        "tokens": length,
        "slice": None if number == HELD_OUT or (run.slicing.is_shared and number) else number,
        "in_every_round": run.slicing.is_shared and number != HELD_OUT,
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
    return bool(one.kept(record, np.array([sequence_id], dtype=np.int32))[0])


def _round(one: Round, record: ShardRecord, sequence_id: int, length: int) -> dict[str, Any]:
    """What became of the sequence in a round."""
    facts: dict[str, Any] = {"round": one.number, "method": one.method.name, "kept": None}
    try:
        facts |= _standing(one, record, sequence_id)
    except UserError as missing:  # scores, or an earlier selection
        return facts | {"why": str(missing)}
    if not one.is_selected:
        return facts | {"why": "nothing is selected for this round yet"}
    facts["kept"] = _is_kept(one, record, sequence_id)
    facts["threshold"] = one.selection.manifest["thresholds"].get(record.domain)
    facts["why"] = _why(one, facts, length)
    return facts | _training(one, record, sequence_id, length) if facts["kept"] else facts


def _standing(one: Round, record: ShardRecord, sequence_id: int) -> dict[str, Any]:
    """Score, and rank (1 is the best) and percentile (the share of candidates with lower scores) by what is compared;
    nothing if the sequence is no candidate."""
    own = one.candidate(record, sequence_id)
    if not len(own.ids):
        return {}
    score, uses = own.scores[0], 0 if own.uses is None else int(own.uses[0])
    rank, below, total = 1, 0, 0
    for other, chunk in one.chunks():
        is_before = chunk.scores > score
        if other.digest < record.digest or other.name == record.name:  # goes before if equal
            is_before |= (chunk.scores == score) & ((other.name != record.name) | (chunk.ids < sequence_id))
        if chunk.uses is not None:
            is_before = (chunk.uses < uses) | ((chunk.uses == uses) & is_before)
        rank += int(is_before.sum())
        below += int((chunk.scores < score).sum())
        total += len(chunk.ids)
    given, compared = np.nan_to_num([one.choice.scores(record, own.ids)[0], score])  # JSON has no infinity
    return {
        "score": float(given),
        "compared": float(compared),
        "uses": uses,
        "rank": rank,
        "of": total,
        "percentile": 100 * below / total,
    }


def _why(one: Round, facts: dict[str, Any], length: int) -> str:
    if facts["kept"]:
        return "it was drawn" if facts["method"] == "random" else "it is among the best"
    settings = one.choice.settings
    if "rank" not in facts:
        if length < settings.min_length:
            return f"it is shorter than selection.min_length={settings.min_length}"
        if settings.max_length is not None and length > settings.max_length:
            return f"it is longer than selection.max_length={settings.max_length}"
        return "it is no candidate of the round"
    if facts["uses"] >= settings.max_repeats:
        return f"{facts['uses']} earlier rounds took it, and selection.max_repeats is {settings.max_repeats}"
    if length < 2:
        return "it has fewer than two tokens: there is nothing to predict, so it comes last"
    if facts["threshold"] is None:
        return "nothing of its domain is kept"
    if facts["compared"] < facts["threshold"]:
        changed = "" if facts["compared"] == facts["score"] else f", as it is compared ({facts['compared']:.6g}),"
        return f"its score{changed} is below the threshold, {facts['threshold']:.6g}"
    if facts["uses"]:
        return "earlier rounds took it, and sequences that none had taken came first"
    return f"its score is the threshold's, {facts['threshold']:.6g}, and equal ones before it used up the tokens"


def _training(one: Round, record: ShardRecord, sequence_id: int, length: int) -> dict[str, Any]:
    """Steps of the LLM that read the sequence, and how many of them it has made so far."""
    config = one.run.config
    start, end = config.round_end(one.number - 1) if one.number else 0, config.round_end(one.number)
    reordered = [word for word in config.target.extra_args if word.partition("=")[0] in _REORDERING]
    if reordered:
        return {"steps": None, "steps_note": f"{reordered[0]} in target.extra_args changes which step reads what"}
    order = TrainingOrder.find(one.home.index_cache, one.selection)
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
    places = ["slice 0 (the warm-up's)"] if facts["slice"] == 0 else []
    places += ["the slice of every round"] if facts["in_every_round"] else []
    place = "held out of every slice" if facts["held_out"] else " and ".join(places) or f"slice {facts['slice']}"
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
