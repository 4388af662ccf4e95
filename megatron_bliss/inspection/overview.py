"""What a round's selection looks like as a whole: figures, in one pass over the candidates and one over the pool."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_bliss.data.shards import ShardRecord, read_lengths
from megatron_bliss.data.topk import CHUNK, Chunk
from megatron_bliss.inspection.rounds import Round

QUANTILES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
_MAX_SCORES = 1 << 24  # of larger rounds, the quantiles are those of evenly spaced candidates
_BUCKETS = 32  # of lengths: 0, 1, 2-3, 4-7, ...
_PARTS = ("pool", "candidates", "kept")
_NONE = np.empty(0, dtype=np.float32)
_BINS = 40  # of the histogram of scores, which leaves out the lowest and the highest 0.5 %


@dataclass
class Shares:
    """Sequences and tokens by (domain, length bucket): int64 [num_domains, _BUCKETS]."""

    num_domains: int
    sequences: np.ndarray = field(init=False)
    tokens: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.sequences, self.tokens = np.zeros((2, self.num_domains, _BUCKETS), dtype=np.int64)

    def add(self, domain: int, lengths: np.ndarray) -> None:
        buckets = np.frexp(lengths.astype(np.float64))[1]  # n of 2^(n-1) <= length < 2^n; 0 of 0
        self.sequences[domain] += np.bincount(buckets, minlength=_BUCKETS)
        # weights are float64: exact up to 2^53 tokens in a chunk
        self.tokens[domain] += np.bincount(buckets, weights=lengths, minlength=_BUCKETS).astype(np.int64)


@dataclass(frozen=True)
class Sample:
    """A candidate that is shown."""

    key: float  # the highest are shown
    record: ShardRecord
    sequence_id: int
    tokens: int
    score: float
    is_kept: bool


class Best:
    """The candidates with the highest keys, so many at most."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.samples: list[Sample] = []

    def add(self, record: ShardRecord, chunk: Chunk, kept: np.ndarray, keys: np.ndarray, among: np.ndarray) -> None:
        """:param keys: float [n] of the chunk.
        :param among: bool [n], which of the chunk count.
        """
        places = np.flatnonzero(among)
        if len(places) > self.count:
            places = places[np.argpartition(keys[places], -self.count)[-self.count :]]
        found = [
            Sample(
                float(keys[i]), record, int(chunk.ids[i]), int(chunk.lengths[i]), float(chunk.scores[i]), bool(kept[i])
            )
            for i in places.tolist()
        ]
        ordered = sorted([*self.samples, *found], key=lambda each: (-each.key, each.record.name, each.sequence_id))
        self.samples = ordered[: self.count]


def overview(one: Round, num_samples: int) -> dict[str, Any]:
    """Figures of a round with a selection, as JSON holds them.

    :param num_samples: of the best, the borderline on either side, and the worst candidates.
    :raises UserError: if the round has no selection, or its scores are gone.
    """
    records, selection = one.run.inventory.pool, one.selection
    domains = list(dict.fromkeys(record.domain for record in records))
    shares = {part: Shares(len(domains)) for part in _PARTS}
    for record in records:
        for lengths in _all_lengths(record):
            shares["pool"].add(domains.index(record.domain), lengths)
    scores: dict[str, list[np.ndarray]] = {"candidates": [], "kept": []}
    best, above, below, worst = (Best(num_samples) for _ in range(4))
    thresholds = selection.manifest["thresholds"]
    total = sum(counts.slice_sequences for counts in selection.domains.values())
    stride = -(-max(total, 1) // _MAX_SCORES)
    for record, chunk in one.chunks():
        kept, domain, threshold = one.kept(record, chunk.ids), domains.index(record.domain), thresholds[record.domain]
        shares["candidates"].add(domain, chunk.lengths)
        shares["kept"].add(domain, chunk.lengths[kept])
        scores["candidates"].append(chunk.scores[::stride])
        scores["kept"].append(chunk.scores[::stride][kept[::stride]])
        best.add(record, chunk, kept, chunk.scores, kept)
        worst.add(record, chunk, kept, -chunk.scores, ~kept & (chunk.lengths > 1))  # shorter ones have no score
        if threshold is not None:
            distance = -np.abs(chunk.scores.astype(np.float64) - threshold)
            above.add(record, chunk, kept, distance, kept)
            below.add(record, chunk, kept, distance, ~kept)
    middle = [*reversed(above.samples), *below.samples]
    samples = {"best": best.samples, "middle": middle, "worst": worst.samples[::-1]}
    return {
        "schema": 1,
        "round": one.number,
        "method": one.method.name,
        "direction": "higher is better",
        "digest": selection.digest,
        "sizes": {part: _size(shares[part]) for part in _PARTS},
        "score_quantiles": {part: _quantiles(found) for part, found in scores.items()},
        "score_distribution": distribution(
            *(np.concatenate([_NONE, *scores[part]]) for part in ("candidates", "kept"))
        ),
        "domains": [_domain(one, domain, number, shares) for number, domain in enumerate(domains)],
        "lengths": list(_length_rows(shares)),
        "overlap": [_overlap(one, other, domains) for other in one.run.selected_rounds if other.number != one.number],
        "samples": {name: [_sample(one, each) for each in found] for name, found in samples.items()},
    }


def _all_lengths(record: ShardRecord) -> Iterator[np.ndarray]:
    for start in range(0, record.num_sequences, CHUNK):
        yield read_lengths(record.prefix, start, min(start + CHUNK, record.num_sequences))


def _size(shares: Shares) -> dict[str, int]:
    return {"sequences": int(shares.sequences.sum()), "tokens": int(shares.tokens.sum())}


def _quantiles(found: Sequence[np.ndarray]) -> dict[str, float] | None:
    values = np.sort(np.concatenate([_NONE, *found]))
    if not len(values):
        return None
    places = [round(quantile * (len(values) - 1)) for quantile in QUANTILES]  # values that occur, none between two
    finite = np.nan_to_num(values[places])  # JSON has no infinity
    return {f"{quantile:g}": float(value) for quantile, value in zip(QUANTILES, finite, strict=True)}


def distribution(candidates: np.ndarray, kept: np.ndarray) -> dict[str, Any] | None:
    """How scores are spread; None without any. Those of sequences that are too short to have one are left out.

    :param candidates: float32 [n], `kept` [m] among them.
    """
    candidates, kept = (values[values > np.finfo(np.float32).min].astype(np.float64) for values in (candidates, kept))
    if not len(candidates):
        return None
    percentiles = np.percentile(candidates, np.arange(101))
    low, high = np.percentile(candidates, [0.5, 99.5])
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    counts = {
        name: np.histogram(values.clip(edges[0], edges[-1]), edges)[0].tolist()
        for name, values in (("candidates", candidates), ("kept", kept))
    }
    return {
        "mean": float(candidates.mean()),
        "std": float(candidates.std()),
        "percentiles": percentiles.tolist(),  # 0 to 100
        "edges": edges.tolist(),  # of bins; what lies beyond counts to the outermost
        **counts,
    }


def _domain(one: Round, domain: str, number: int, shares: dict[str, Shares]) -> dict[str, Any]:
    shards = [shard for shard in one.selection.shards if shard.record.domain == domain]
    parts = {part: _share(shares[part].tokens[number], shares[part]) for part in _PARTS}
    candidates = int(shares["candidates"].tokens[number].sum())
    return {
        "domain": domain,
        **{f"{part}_share": share for part, share in parts.items()},
        "blend": sum(shard.weight for shard in shards),
        "kept_of_candidates": int(shares["kept"].tokens[number].sum()) / max(candidates, 1),
        "threshold": one.selection.manifest["thresholds"][domain],
    }


def _length_rows(shares: dict[str, Shares]) -> Iterator[dict[str, Any]]:
    for bucket in np.flatnonzero(shares["pool"].sequences.sum(axis=0)).tolist():
        parts = {f"{part}_share": _share(shares[part].tokens[:, bucket], shares[part]) for part in _PARTS}
        of_sequences = {f"{part}_sequences": int(shares[part].sequences[:, bucket].sum()) for part in _PARTS}
        yield {"from": 1 << bucket - 1 if bucket else 0, "to": (1 << bucket) - 1, **parts, **of_sequences}


def _share(tokens: np.ndarray, of: Shares) -> float:
    return int(tokens.sum()) / max(int(of.tokens.sum()), 1)


def _overlap(one: Round, other: Round, domains: Sequence[str]) -> dict[str, Any]:
    """What two selections have in common, and how far their domains' shares of the kept tokens are apart: half the sum
    of the differences, 0 for equal shares and 1 for none in common."""
    shared = 0
    for record in one.run.inventory.pool:
        ids = one.selection.ids(record.prefix)
        for start in range(0, len(ids), CHUNK):
            shared += int(other.kept(record, ids[start : start + CHUNK]).sum())
    shares = []
    for selection in (one.selection, other.selection):
        kept = [selection.domains[domain].kept_tokens for domain in domains]
        shares.append(np.array(kept) / max(sum(kept), 1))
    return {
        "round": other.number,
        "shared_sequences": shared,
        "disjoint_slices": not one.run.slicing.is_shared,
        "domain_drift": float(np.abs(shares[0] - shares[1]).sum() / 2),
    }


def _sample(one: Round, sample: Sample) -> dict[str, Any]:
    return {
        "shard": sample.record.name,
        "id": sample.sequence_id,
        "domain": sample.record.domain,
        "tokens": sample.tokens,
        "score": float(np.nan_to_num(np.float32(sample.score))),
        "kept": sample.is_kept,
        "text": one.run.text(sample.record, sample.sequence_id),
    }
