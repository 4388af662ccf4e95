"""`inspect`: the overview of a round as tables, or as JSON."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_bliss.errors import UserError
from megatron_bliss.inspection.overview import overview
from megatron_bliss.inspection.rounds import Run
from megatron_bliss.wording import counted

_WIDTH = 120  # where there is no terminal
_CHARACTERS = 300  # of a sample's text
_LOWEST = float(np.finfo(np.float32).min)


def show(run_dir: Path, number: int | None, num_samples: int, as_json: bool) -> None:
    """Print the overview of a round; None: of the last one that is selected.

    :raises UserError: if there is none, or the round has no selection.
    """
    run = Run(run_dir)
    if number is None:
        numbers = [one.number for one in run.selected_rounds]
        if not numbers:
            raise UserError(f"{run_dir} has no selection yet; run the select stage first")
        number = numbers[-1]
    facts = overview(run.round(number), num_samples)
    if as_json:
        print(json.dumps(facts, indent=1, allow_nan=False))
    else:
        _print(facts, Console(width=None if os.isatty(1) else _WIDTH, highlight=False))


def _print(facts: dict[str, Any], console: Console) -> None:
    name = f"round {facts['round']}" if facts["round"] else "the warm-up"
    console.print(f"selection of {name} by {facts['method']}, {facts['direction']}, digest {facts['digest'][:12]}")
    console.print(_sizes(facts["sizes"]), _quantiles(facts["score_quantiles"]))
    console.print("shares of tokens by domain", _domains(facts["domains"]))
    console.print("shares of tokens by length", _lengths(facts["lengths"]))
    for other in facts["overlap"]:
        console.print(_overlap(other))
    for name, title in (("best", "best"), ("middle", "on either side of the threshold"), ("worst", "worst")):
        console.rule(title)
        for sample in facts["samples"][name]:
            console.print(_heading(sample), style="bold")
            text = sample["text"]
            console.print(Text(text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]} …"))


def _table(first: str, *columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in (first, *columns):
        table.add_column(column, justify="left" if column == first else "right")
    return table


def _sizes(sizes: dict[str, dict[str, int]]) -> Table:
    table = _table("", "sequences", "tokens")
    for part, size in sizes.items():
        table.add_row(part, f"{size['sequences']:,}", f"{size['tokens']:,}")
    return table


def _quantiles(quantiles: dict[str, dict[str, float] | None]) -> Table:
    """Sequences that could not be scored, or are too short for that, have none."""
    names = next((list(found) for found in quantiles.values() if found), [])
    table = _table("score at", *(f"{float(name):.0%}" for name in names))
    for part, found in quantiles.items():
        if found:
            table.add_row(part, *("none" if value <= _LOWEST else f"{value:.4g}" for value in found.values()))
    return table


def _domains(rows: list[dict[str, Any]]) -> Table:
    table = _table("domain", "pool", "candidates", "kept", "blend", "kept of it", "threshold")
    for row in rows:
        shares = (row["pool_share"], row["candidates_share"], row["kept_share"], row["blend"])
        threshold = "" if row["threshold"] is None else f"{row['threshold']:.6g}"
        table.add_row(row["domain"], *map(_percent, shares), _percent(row["kept_of_candidates"]), threshold)
    return table


def _lengths(rows: list[dict[str, Any]]) -> Table:
    table = _table("tokens a sequence", "pool", "candidates", "kept")
    for row in rows:
        span = str(row["to"]) if row["to"] < 2 else f"{row['from']}-{row['to']}"
        table.add_row(span, *(_percent(row[f"{part}_share"]) for part in ("pool", "candidates", "kept")))
    return table


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _overlap(other: dict[str, Any]) -> str:
    name = f"round {other['round']}" if other["round"] else "the warm-up"
    shared = f"{counted(other['shared_sequences'], 'sequence')} in common with {name}"
    if other["disjoint_slices"]:
        shared += " (their slices have none in common)"
    return f"{shared}; the domains' shares of the kept tokens differ by {_percent(other['domain_drift'])}"


def _heading(sample: dict[str, Any]) -> str:
    kept = "kept" if sample["kept"] else "not kept"
    place = f"{sample['shard']}:{sample['id']}"
    return f"{place} | {sample['domain']} | {sample['tokens']} tokens | score {sample['score']:.6g} | {kept}"
