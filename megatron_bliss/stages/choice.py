"""What a selection is chosen from and by, and the choosing: counting passes, then the ids that are kept."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bliss.config import SelectionConfig
from megatron_bliss.data.blend import BlendPart, blend_weights, score_weights
from megatron_bliss.data.candidates import Filters, ShardCandidates
from megatron_bliss.data.ledger import Ledger
from megatron_bliss.data.ranks import mean_ranks, median
from megatron_bliss.data.scores import DIRECTION
from megatron_bliss.data.selection import Counts, KeptShard, replacing, write_ids, write_manifest
from megatron_bliss.data.shards import ShardRecord, verify_shard
from megatron_bliss.data.topk import Chunk, Counted, Limits, Passes
from megatron_bliss.errors import UserError
from megatron_bliss.methods.offline import OfflineMethod
from megatron_bliss.progress import Progress

_MAX_THREADS = 16


@dataclass(frozen=True)
class Choice:
    """Everything that decides what is selected."""

    stage: str  # for the lines that are printed
    records: list[ShardRecord]  # the pool
    method: OfflineMethod
    settings: SelectionConfig
    wanted: Callable[[ShardRecord, tuple[int, int]], np.ndarray]  # ids of the slice in a span: int32 ascending
    scores: Callable[[ShardRecord, np.ndarray], np.ndarray]  # of ids, float32, as the method gave them
    seed: int
    verify_scores: Callable[[ShardRecord], None] = lambda record: None  # refuses a shard's if they changed on disk
    ledger: Ledger = field(default_factory=Ledger)
    weights: dict[str, float] | None = None  # the domains' own, for the blend
    facts: dict[str, Any] = field(default_factory=dict)  # further ones for the manifest

    @cached_property
    def domains(self) -> list[str]:
        return list(dict.fromkeys(record.domain for record in self.records))

    def candidates(self, with_noise: bool = True) -> list[ShardCandidates]:
        """Of every shard, with the scores that are compared."""
        middle = self._median
        return self._candidates(
            lambda record, ids: self.method.compared(self.scores(record, ids), middle),
            self.settings.temperature if with_noise else 0.0,
        )

    @cached_property
    def _median(self) -> np.float32:
        if not self.method.needs_median:
            return np.float32(0)
        return median(self.passes(self._candidates(self.scores, 0.0), [0] * len(self.records)))

    def _candidates(
        self, scores: Callable[[ShardRecord, np.ndarray], np.ndarray], temperature: float
    ) -> list[ShardCandidates]:
        filters = Filters(self.settings.min_length, self.settings.max_length)
        return [
            ShardCandidates(
                record,
                partial(self.wanted, record),
                partial(scores, record),
                filters,
                self.ledger,
                temperature,
                self.seed,
            )
            for record in self.records
        ]

    def passes(self, candidates: Sequence[ShardCandidates], groups: Sequence[int]) -> Passes:
        num_uses = min(self.settings.max_repeats, self.ledger.num_rounds + 1)
        return Passes(candidates, groups, num_uses, _threads(), self._report)

    @cached_property
    def _report(self) -> Callable[[int], None]:
        """Sums up the sequences read by all passes."""
        num_passes = 4 if self.settings.threshold is None else 2
        num_passes += 2 * self.method.needs_median + 3 * (self.settings.blend == "score")
        progress = Progress(self.stage, num_passes * sum(record.num_sequences for record in self.records), unit="reads")
        done = 0

        def report(count: int) -> None:
            nonlocal done
            done += count
            progress.report(done)

        return report


@dataclass(frozen=True)
class Chosen:
    """What a choice came to."""

    counts: list[Counts]  # of each shard
    weights: list[float]  # of each shard in the blend
    thresholds: dict[str, float | None]  # the lowest score that was kept, by domain
    requested_tokens: int | None  # None: all above a threshold
    repeated_tokens: int  # of what is kept: tokens that earlier rounds had taken


def every_sequence(record: ShardRecord, span: tuple[int, int]) -> np.ndarray:
    """`wanted` where there are no slices: int32 ids."""
    return np.arange(*span, dtype=np.int32)


def choose(choice: Choice, directory: Path | None) -> Chosen:
    """Select, and write the selection unless `directory` is None.

    :raises UserError: if a shard changed, a score is missing, less than is asked for would be kept, or the directory
        cannot be written.
    """
    for record in choice.records:
        verify_shard(record)
    if directory is None:
        return _choose(choice, None)
    with replacing(directory) as staging:
        chosen = _choose(choice, staging)
        shards = [
            KeptShard(record, np.load(_ids_path(staging, record), mmap_mode="r", allow_pickle=False), counts, weight)
            for record, counts, weight in zip(choice.records, chosen.counts, chosen.weights, strict=True)
        ]
        settings = choice.settings
        facts = {
            "direction": DIRECTION,
            "method": choice.method.name,
            "seed": choice.seed,
            "settings": asdict(settings),
            "fraction": settings.fraction,
            "blend_policy": settings.blend,
            "requested_tokens": chosen.requested_tokens,
            "repeated_tokens": chosen.repeated_tokens,
        }
        write_manifest(staging, shards, chosen.thresholds, facts | choice.facts)
    return chosen


def _ids_path(directory: Path, record: ShardRecord) -> Path:
    return directory / f"{record.name}.npy"


def _choose(choice: Choice, staging: Path | None) -> Chosen:
    settings, domains = choice.settings, choice.domains
    groups = group_numbers(settings, domains)
    candidates = choice.candidates()
    passes = choice.passes(candidates, [groups[record.domain] for record in choice.records])
    counted = passes.count()
    requested = None
    if settings.threshold is not None:
        threshold = settings.threshold

        def kept(index: int) -> Iterator[Chunk]:
            return passes.at_least(index, threshold)
    else:
        limits, requested = limits_of(settings, domains, _tokens_by_domain(choice, counted))
        _check_enough(choice, groups, limits, counted, requested)
        cuts = passes.cuts(counted, limits, requested)

        def kept(index: int) -> Iterator[Chunk]:
            return passes.kept(index, cuts[index])

    tallies = [_Tally() for _ in candidates]

    def keep(index: int) -> None:
        ids = tallies[index].counting(kept(index))
        if staging is None:
            for _ in ids:
                pass
        else:
            choice.verify_scores(choice.records[index])
            write_ids(_ids_path(staging, choice.records[index]), ids)

    passes.each_shard(keep)
    counts = [
        Counts(tally.sequences, tally.tokens, int(sequences), int(tokens))
        for tally, sequences, tokens in zip(tallies, counted.sequences, counted.tokens, strict=True)
    ]
    if not any(count.kept_tokens for count in counts):
        raise UserError(
            f"the selection would be empty: {_asked(settings)} of {counted.sequences.sum()} candidates with "
            f"{counted.tokens.sum()} tokens is less than one sequence; use a larger pool, fewer rounds or ask for more"
        )
    return Chosen(
        counts,
        _weights(choice, counts),
        _thresholds(choice, groups, tallies),
        requested,
        sum(tally.repeated_tokens for tally in tallies),
    )


@dataclass
class _Tally:
    """What is kept of a shard."""

    sequences: int = 0
    tokens: int = 0
    repeated_tokens: int = 0
    lowest: float = math.inf

    def counting(self, chunks: Iterable[Chunk]) -> Iterator[np.ndarray]:
        """The ids of the chunks, which are added up on the way."""
        for chunk in chunks:
            self.sequences += len(chunk.ids)
            self.tokens += int(chunk.lengths.sum(dtype=np.int64))
            if chunk.uses is not None:
                self.repeated_tokens += int(chunk.lengths[chunk.uses > 0].sum(dtype=np.int64))
            self.lowest = min(self.lowest, float(chunk.scores.min(initial=np.float32(np.inf))))
            yield chunk.ids


def group_numbers(settings: SelectionConfig, domains: Sequence[str]) -> dict[str, int]:
    """Which domains share a budget: with `blend: pool`, all that have no quota; with others, each has its own."""
    if settings.blend != "pool":
        return {domain: number for number, domain in enumerate(domains)}
    alone = [domain for domain in domains if domain in settings.quotas]
    rest = 0 if len(alone) == len(domains) else 1
    return {domain: alone.index(domain) + rest if domain in alone else 0 for domain in domains}


def limits_of(settings: SelectionConfig, domains: Sequence[str], tokens: dict[str, int]) -> tuple[Limits, int]:
    """What each group may keep, and all together.

    :param tokens: of the candidates, by domain.
    :returns: limits of the groups of `group_numbers`, and the budget in tokens.
    """
    total = sum(tokens.values())
    if settings.blend != "pool":  # the same share of each
        if settings.fraction is not None:
            shares = [round(settings.fraction * tokens[domain]) for domain in domains]
        else:
            assert settings.tokens is not None
            shares = [settings.tokens * tokens[domain] // max(total, 1) for domain in domains]
        return Limits(np.array(shares), np.array(shares)), sum(shares)
    budget = settings.tokens if settings.fraction is None else round(settings.fraction * total)
    assert budget is not None
    groups = group_numbers(settings, domains)
    minimum = np.zeros(max(groups.values()) + 1, dtype=np.int64)
    maximum = np.full_like(minimum, budget)
    for domain, quota in settings.quotas.items():
        minimum[groups[domain]] = math.floor(quota.minimum * budget)
        maximum[groups[domain]] = math.floor(quota.maximum * budget)
    return Limits(minimum, maximum), min(budget, int(maximum.sum()))  # rounded down, they may be a few tokens less


def _tokens_by_domain(choice: Choice, counted: Counted) -> dict[str, int]:
    tokens = dict.fromkeys(choice.domains, 0)
    for record, count in zip(choice.records, counted.tokens, strict=True):
        tokens[record.domain] += int(count)
    return tokens


def _check_enough(choice: Choice, groups: dict[str, int], limits: Limits, counted: Counted, budget: int) -> None:
    """:raises UserError: if there are not as many tokens as are asked for."""
    reachable = int(np.minimum(limits.maximum, counted.available).sum())
    if reachable >= budget:
        return
    settings, remedy, untaken = choice.settings, "use a larger pool or ask for less", ""
    if choice.ledger.num_rounds:
        untaken = (
            f": of the {counted.tokens.sum()} of all candidates, {counted.available.sum()} were taken by fewer than "
            f"{settings.max_repeats} earlier rounds"
        )
        remedy = f"raise selection.max_repeats ({settings.max_repeats}), use a larger pool or ask for less"
    scarce = [domain for domain, group in groups.items() if counted.available[group] < limits.maximum[group]]
    if settings.quotas:
        remedy = f"there is too little of {', '.join(scarce)}; raise the maximums of selection.quotas, or ask for less"
    raise UserError(f"{_asked(settings)} asks for {budget} tokens, and {reachable} are to be had{untaken}; {remedy}")


def _asked(settings: SelectionConfig) -> str:
    name = next(name for name in ("fraction", "tokens", "threshold") if getattr(settings, name) is not None)
    return f"selection.{name}={getattr(settings, name)}"


def _thresholds(choice: Choice, groups: dict[str, int], tallies: Sequence[_Tally]) -> dict[str, float | None]:
    """The lowest kept score of each domain's group; None where nothing is kept."""
    lowest: dict[int, float] = {}
    for record, tally in zip(choice.records, tallies, strict=True):
        if tally.sequences:
            group = groups[record.domain]
            lowest[group] = min(lowest.get(group, math.inf), tally.lowest)
    return {domain: lowest.get(groups[domain]) for domain in choice.domains}


def _weights(choice: Choice, counts: Sequence[Counts]) -> list[float]:
    parts = [
        BlendPart(record.domain, record.num_tokens, count.kept_tokens)
        for record, count in zip(choice.records, counts, strict=True)
    ]
    weights = choice.weights
    if choice.settings.blend == "score":
        numbers = [choice.domains.index(record.domain) for record in choice.records]
        ranks = mean_ranks(choice.passes(choice.candidates(with_noise=False), numbers))
        weights = score_weights(
            [part.domain for part in parts],
            [part.pool_tokens for part in parts],
            dict(zip(choice.domains, map(float, ranks), strict=True)),
        )
    return blend_weights(choice.settings.blend, parts, weights)


def _threads() -> int:
    return min(len(os.sched_getaffinity(0)), _MAX_THREADS)
