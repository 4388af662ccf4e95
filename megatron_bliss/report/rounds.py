"""What a round of the main arm chose and from what: scores and their drift, domains, lengths, text."""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_bliss.data.correlation import spearman
from megatron_bliss.data.shards import ShardRecord
from megatron_bliss.errors import UserError
from megatron_bliss.inspection.overview import overview
from megatron_bliss.inspection.rounds import Run

_SAMPLES = 3  # sequences of each kind
_CHARACTERS = 700  # of a sequence's text
_COMPARED = 100_000  # sequences, about, whose scores in two rounds are compared


def selections(run_dir: Path) -> dict[int, dict[str, Any]]:
    """By round, what `inspect` tells of it, and how it stands to the round before; or a `note` why there is nothing to
    tell. Empty before the inventory.

    drift       of the scores from the round before:
        distance            Kolmogorov-Smirnov distance of the two distributions, 0 to 1, to about 0.01
        rank_correlation    over sequences that have a score in both; None where the slices are disjoint
    previous    what the two selections have in common (`inspection.overview`)
    """
    try:
        run = Run(run_dir)
    except UserError:
        return {}
    found: dict[int, dict[str, Any]] = {}
    for one in run.selected_rounds:
        if one.number == 0:
            continue
        try:
            facts = overview(one, _SAMPLES)
        except UserError as missing:
            found[one.number] = {"note": str(missing)}
            continue
        before = found.get(one.number - 1, {}).get("score_distribution")
        facts["drift"] = None
        if before and facts["score_distribution"]:
            directories = run.paths.scores(one.number - 1), run.paths.scores(one.number)
            facts["drift"] = {
                "distance": distance(before["percentiles"], facts["score_distribution"]["percentiles"]),
                "rank_correlation": rank_correlation(*directories, run.inventory.pool),
            }
        facts["previous"] = next((other for other in facts["overlap"] if other["round"] == one.number - 1), None)
        for samples in facts["samples"].values():
            for sample in samples:
                sample["text"] = readable(sample["text"])
        found[one.number] = facts
    return found


def distance(first: list[float], second: list[float]) -> float:
    """Largest difference of two distribution functions, each given by its percentiles 0 to 100."""
    places = np.array([*first, *second])
    below, other = (np.searchsorted(percentiles, places, side="right") / 101 for percentiles in (first, second))
    return float(np.abs(below - other).max())


def rank_correlation(first: Path, second: Path, records: list[ShardRecord]) -> float | None:
    """Spearman's, over evenly spaced sequences that have a score in both directories; None without any."""
    stride = -(-max(sum(record.num_sequences for record in records), 1) // _COMPARED)
    ours, theirs = [np.empty(0, np.float32)], [np.empty(0, np.float32)]
    for record in records:
        paths = [directory / f"{record.name}.npy" for directory in (first, second)]
        if all(path.exists() for path in paths):
            one, other = (np.load(path, mmap_mode="r", allow_pickle=False)[::stride] for path in paths)
            both = (one > np.finfo(np.float32).min) & (other > np.finfo(np.float32).min)  # NaN: not scored
            ours.append(one[both])
            theirs.append(other[both])
    return spearman(np.concatenate(ours).tolist(), np.concatenate(theirs).tolist())


def readable(text: str) -> str:
    """Cut to a size that a page can show; signs that cannot be printed as one that can."""
    shown = "".join(sign if sign.isprintable() or sign in "\n\t" else "�" for sign in text[:_CHARACTERS])
    return f"{shown} …" if len(text) > _CHARACTERS else shown
