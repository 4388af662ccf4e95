"""`score`: every sequence of the round's slice gets a score, from the score model, the proxy's loss or its n-grams.

Several jobs may score the same slice side by side, each on ranks of its own: they share the work chunk by chunk through
the directory of the scores. A job that finds nothing left to do waits until the others are done, so that its end means
that all scores are there.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from megatron_bliss import stopping
from megatron_bliss.artifacts import RunPaths, digest_tree
from megatron_bliss.config import RunConfig, read_saved_config
from megatron_bliss.data.scores import Chunk, ScoreWriter, chunk_of
from megatron_bliss.data.shards import Shard, ShardRecord, verify_shard
from megatron_bliss.data.slices import Slicing
from megatron_bliss.errors import UserError
from megatron_bliss.mcore import checkpoints, parallel
from megatron_bliss.mcore.models import build_language_model
from megatron_bliss.mcore.parallel import ParallelContext, agreed
from megatron_bliss.mcore.score_model import build_score_model
from megatron_bliss.mcore.scorer import Measure, Pass, ShardSequences, loss_measure, means, score_measure
from megatron_bliss.mcore.stopping import Vote
from megatron_bliss.methods import offline_method
from megatron_bliss.methods.offline import OfflineMethod
from megatron_bliss.progress import Progress
from megatron_bliss.stages import guards
from megatron_bliss.stages.inventory import run_inventory
from megatron_bliss.stages.ngrams import FittedNgrams
from megatron_bliss.stages.select import tokenizer_facts
from megatron_bliss.stages.sources import find_model, model_directory

OnProgress = Callable[[int, int], None]

_POLL_INTERVAL = 5.0  # seconds, at most, between two looks at what the other jobs do
_WAIT, _DONE, _STOP = -1, -2, -3  # in place of a shard's index


def run(run_dir: Path, round_number: int) -> None:
    """Write `round-N/scores`, or what is missing of it, and ask the guards about them. All ranks of the job call it.

    :raises UserError: without the checkpoint to score with, where a score is not a number, or nothing can be written.
    :raises StageError: if the guards stop the run.
    """
    paths = RunPaths(Path(run_dir))
    config = read_saved_config(paths.config)
    context = initialize(config)
    with agreed(context):
        checkpoint = score_checkpoint(paths, config, round_number)
        inventory = run_inventory(paths.root, config)
        wanted = SliceIds(Slicing.of(config, inventory), round_number)
        work = ScoringWork(paths.scores(round_number), inventory.pool, wanted, checkpoint, config)
    score(work, context)
    trusted = 0
    with agreed(context):
        if context.is_first:
            found = guards.ask(paths, config, inventory, round_number)
            trusted = found.trusted_round if found and found.action == guards.ROLLBACK else 0
    if trusted := _broadcast(context, [trusted])[0]:
        with agreed(context):
            checkpoint = score_checkpoint(paths, config, trusted)
        score(replace(work, directory=paths.rollback_scores(round_number), checkpoint=checkpoint), context)


def initialize(config: RunConfig) -> ParallelContext:
    """Join the job, at the proxy's layout; n-grams know of data-parallel ranks only.

    :raises UserError: if the number of processes does not fit.
    """
    if offline_method(config).scored_by == "ngrams":
        return parallel.initialize(1, False, config.seed)
    return parallel.initialize(config.proxy.tensor_parallel, config.proxy.sequence_parallel, config.seed)


def score_checkpoint(paths: RunPaths, config: RunConfig, round_number: int) -> Path:
    """The checkpoint a round's scores are made by.

    :raises UserError: if it is not there, or the method has none.
    """
    method = offline_method(config)
    if method.scored_by == "none":
        raise UserError(f"method {method.name!r} scores nothing with a model; go on with the select stage")
    return find_model(model_directory(paths, config, round_number))


class SliceIds(Mapping[str, np.ndarray]):
    """Ids of a slice by shard name, worked out when asked for, so that memory does not grow with the pool."""

    def __init__(self, slicing: Slicing, number: int) -> None:
        self._records = {record.name: record for record in slicing.records}
        self._ids = lru_cache(maxsize=2)(lambda name: slicing.ids(self._records[name], number))

    def __getitem__(self, name: str) -> np.ndarray:
        return self._ids(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


@dataclass(frozen=True)
class ScoringWork:
    """Which sequences get scores, of which checkpoint, and where they go."""

    directory: Path
    records: list[ShardRecord]
    wanted: Mapping[str, np.ndarray]  # ids by shard name, int32 ascending
    checkpoint: Path  # as `sources.find_model` gives it
    config: RunConfig  # its method, proxy, tokenizer, sequence length, seed and `scoring`
    replace: bool = True  # finished scores of another purpose are thrown away

    @property
    def method(self) -> OfflineMethod:
        return offline_method(self.config)

    def open_writer(self) -> ScoreWriter:
        """:raises UserError: if the directory cannot be written, or holds other scores that are to be kept."""
        scoring = self.config.scoring
        return ScoreWriter(
            self.directory,
            self.records,
            self.wanted,
            method=self.method.name,
            model_digest=digest_tree(self.checkpoint),
            seed=self.config.seed,
            chunk_sequences=scoring.chunk_sequences,
            facts={
                "tokenizer": tokenizer_facts(self.config.data.tokenizer),
                "sequence_length": self.config.data.sequence_length,
                "bf16": scoring.bf16 or self.config.proxy.model.bf16,
            },
            claim_timeout=scoring.claim_timeout,
            replace=self.replace,
        )


def score(work: ScoringWork, context: ParallelContext) -> None:
    """Score whatever is missing, beside other jobs that do the same; ends when all of it is there. All ranks of the
    job call it.

    :raises UserError: for a changed shard, a score that is not a number, or a directory that cannot be written.
    """
    writer = None
    with agreed(context):
        shards = [verify_shard(record) for record in work.records]
        if context.is_first:
            writer = work.open_writer()
    if _broadcast(context, [int(writer.is_complete) if writer else 0])[0]:
        if writer:
            print(f"[score] done: {writer.num_wanted} sequences, all scored before", flush=True)
        return
    score_chunks(work, shards, writer, load_scorer(work, context), context)


class Scorer(Protocol):
    def __call__(self, shard: Shard, ids: np.ndarray, on_progress: OnProgress | None) -> np.ndarray:
        """Scores as the method's `from_output` takes them, float32 [n], the same on all ranks. All ranks call it.

        :param on_progress: called now and then with the tokens done on all ranks, about, without and with padding.
        """
        ...


def load_scorer(work: ScoringWork, context: ParallelContext) -> Scorer:
    """What scores sequences, by the checkpoint's model or n-grams."""
    if work.method.scored_by == "ngrams":
        return NgramScorer(FittedNgrams(work.checkpoint, work.config), context)
    return model_scorer(work.config, load_measure(work, context), context)


def model_scorer(config: RunConfig, measure: Measure, context: ParallelContext) -> Scorer:
    """Means of what a model says of a sequence."""
    forward = Pass(context, config.data.sequence_length, config.scoring.batch_tokens)

    def score(shard: Shard, ids: np.ndarray, on_progress: OnProgress | None) -> np.ndarray:
        return means(forward.totals(measure, ShardSequences([(shard, ids)]), on_progress))

    return score


class NgramScorer:
    """Sums of the log-ratio over a sequence's n-grams; data-parallel ranks share the sequences."""

    def __init__(self, fitted: FittedNgrams, context: ParallelContext) -> None:
        self._fitted, self._context = fitted, context

    def __call__(self, shard: Shard, ids: np.ndarray, on_progress: OnProgress | None) -> np.ndarray:
        rank, ranks = self._context.dp_rank, self._context.dp_size
        first, last = len(ids) * rank // ranks, len(ids) * (rank + 1) // ranks
        found, done = np.zeros(len(ids)), 0
        with agreed(self._context):
            for part, num_tokens in self._fitted.sums(shard, ids[first:last]):
                found[first:last] += part
                done += num_tokens * ranks
                if on_progress is not None:
                    on_progress(done, done)
        if ranks > 1:
            everything = torch.from_numpy(found).to(self._context.device)
            dist.all_reduce(everything, group=self._context.dp_group)
            found = everything.cpu().numpy()
        return found.astype(np.float32)


def load_measure(work: ScoringWork, context: ParallelContext) -> Measure:
    """What is asked of a batch, by the checkpoint's model."""
    config = work.config
    model = replace(config.proxy.model, bf16=config.proxy.model.bf16 or config.scoring.bf16)
    if work.method.scored_by == "score_model":
        score_model = build_score_model(model, config.data.tokenizer.vocab_size, context).eval()
        checkpoints.load_model(work.checkpoint, score_model, checkpoints.SCORE)
        return score_measure(score_model)
    proxy = build_language_model(model, config.data.tokenizer.vocab_size, context).eval()
    checkpoints.load_model(work.checkpoint, proxy)
    return loss_measure(proxy)


def score_chunks(
    work: ScoringWork, shards: list[Shard], writer: ScoreWriter | None, scorer: Scorer, context: ParallelContext
) -> None:
    """Claim chunks and score them until all are done, by whichever job. All ranks of the job call it.

    :param shards: of the records.
    :param writer: on the job's first rank, None on the others.
    """
    scoring = work.config.scoring
    report, vote = _Report(writer) if writer else None, Vote(context.device)
    while True:
        order, stops = [0, 0], vote()
        with agreed(context):
            if writer:
                order = _claim(writer, work.records, stops)
        index, number = _broadcast(context, order)
        if index == _DONE:
            break
        if index == _STOP:
            stopping.leave("score", writer.num_scored if writer else 0, writer.num_wanted if writer else 0, "sequences")
        if index == _WAIT:
            if report:
                report.show()
            time.sleep(min(_POLL_INTERVAL, scoring.claim_timeout / 10))
            continue
        record = work.records[index]
        chunk = chunk_of(record, work.wanted[record.name], number, scoring.chunk_sequences)
        try:
            _score_chunk(chunk, shards[index], work, scorer, context, report)
        finally:
            if writer:
                writer.give_back(chunk)  # one that was written has been given back already
    if report:
        report.finish()


def _claim(writer: ScoreWriter, records: list[ShardRecord], stops: bool) -> list[int]:
    """Index of the shard and number of the chunk to do next; or why there is none, and 0."""
    chunk = None if stops else writer.claim()
    if chunk is None:
        return [_DONE if writer.is_complete else _STOP if stops else _WAIT, 0]
    return [records.index(chunk.record), chunk.number]


def _broadcast(context: ParallelContext, numbers: list[int]) -> list[int]:
    """The first rank's numbers, on all ranks."""
    tensor = torch.tensor(numbers, device=context.device)
    dist.broadcast(tensor, src=0)
    broadcast: list[int] = tensor.tolist()
    return broadcast


def _score_chunk(
    chunk: Chunk,
    shard: Shard,
    work: ScoringWork,
    scorer: Scorer,
    context: ParallelContext,
    report: "_Report | None",
) -> None:
    lengths = shard.sequence_lengths[chunk.ids]
    on_progress = report.begin(chunk, lengths) if report else None
    scores = work.method.from_output(scorer(shard, chunk.ids, on_progress))
    if work.config.guards.action != "none":  # they count these scores, and decide
        scores = np.where(np.isnan(scores), np.finfo(np.float32).min, scores)
    scores = lowest_where_nothing_is_predicted(scores, lengths)
    with agreed(context):
        if report:
            report.writer.write(chunk, scores)
            report.end(lengths)


def lowest_where_nothing_is_predicted(scores: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Scores with the lowest finite float32 for sequences of fewer than two tokens, which no model can judge: float32
    [n]. They come last in a selection, whatever the method keeps."""
    return np.where(lengths < 2, np.finfo(np.float32).min, scores)


class _Report:
    """Progress of all jobs in sequences, of this job in tokens."""

    def __init__(self, writer: ScoreWriter) -> None:
        self.writer = writer
        self._done = writer.num_scored  # sequences, by all jobs
        self._progress = Progress("score", writer.num_wanted, "sequences", start=self._done)
        self._began = time.monotonic()
        self._sequences = self._tokens = self._positions = self._padded = 0  # by this job

    def begin(self, chunk: Chunk, lengths: np.ndarray) -> Callable[[int, int], None]:
        """What to call while the chunk is worked on, with the positions that are done, without and with padding."""
        num_tokens = max(int(lengths.sum(dtype=np.int64)), 1)
        positions, padded = self._positions, self._padded

        def on_progress(done: int, done_padded: int) -> None:
            self.writer.renew(chunk)
            self._positions, self._padded = positions + done, padded + done_padded
            sequences = min(len(lengths) * done // num_tokens, len(lengths) - 1)  # the last one is not there yet
            self._progress.report(self._done + sequences, self._tokens + done)

        return on_progress

    def end(self, lengths: np.ndarray) -> None:
        """The chunk is written."""
        self._sequences += len(lengths)
        self._tokens += int(lengths.sum(dtype=np.int64))
        self.show()

    def show(self) -> None:
        self._done = self.writer.num_scored
        self._progress.report(self._done, self._tokens)

    def finish(self) -> None:
        self.show()
        seconds = max(time.monotonic() - self._began, 1e-9)
        padding = 1 - self._positions / max(self._padded, 1) if self._padded else 0.0
        print(
            f"[score] done: {self._progress.total} sequences, {self._sequences} of them by this job: {self._tokens} "
            f"tokens, {self._tokens / seconds:.0f} tokens/s, padding {100 * padding:.1f} %",
            flush=True,
        )
