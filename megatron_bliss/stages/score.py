"""`score`: every sequence of the round's slice gets a score, from the score model or from the proxy's loss."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_bliss.artifacts import RunPaths, digest_tree
from megatron_bliss.config import RunConfig, read_saved_config
from megatron_bliss.data.scores import Chunk, ScoreWriter
from megatron_bliss.data.shards import ShardRecord, verify_shard
from megatron_bliss.data.slices import Slicing
from megatron_bliss.errors import UserError
from megatron_bliss.mcore import checkpoint_files, checkpoints, parallel
from megatron_bliss.mcore.models import build_language_model
from megatron_bliss.mcore.parallel import ParallelContext, agreed
from megatron_bliss.mcore.score_model import build_score_model
from megatron_bliss.mcore.scorer import Measure, Pass, ShardSequences, loss_measure, means, score_measure
from megatron_bliss.methods import offline_method
from megatron_bliss.progress import Progress
from megatron_bliss.stages.inventory import run_inventory
from megatron_bliss.stages.warmup_proxy import proxy_directory


def run(run_dir: Path, round_number: int) -> None:
    """Write `round-N/scores`, or what is missing of it. All ranks of the job call it.

    :raises UserError: without the checkpoint to score with, or where a score is not a number.
    """
    paths = RunPaths(Path(run_dir))
    config = read_saved_config(paths.config)
    method = offline_method(config)
    context = parallel.initialize(config.proxy.tensor_parallel, config.proxy.sequence_parallel, config.seed)
    with agreed(context):
        if method.scored_by == "none":
            raise UserError(f"method {method.name!r} scores nothing with a model; go on with the select stage")
        checkpoint = checkpoint_files.find(_checkpoint_directory(paths, config, method.scored_by, round_number))
        inventory = run_inventory(paths.root, config)
        wanted = Slicing.of(config, inventory).ids_by_name(round_number)
        shards = {record.name: verify_shard(record) for record in inventory.pool}
        writer = None
        if context.is_first:
            writer = ScoreWriter(
                paths.scores(round_number),
                inventory.pool,
                wanted,
                method=method.name,
                model_digest=digest_tree(checkpoint),
                seed=config.seed,
                chunk_sequences=config.scoring.chunk_sequences,
            )
    chunks = _pending(writer, inventory.pool, wanted, config.scoring.chunk_sequences, context)
    if not chunks:
        return
    measure = _measure(method.scored_by, checkpoint, config, context)
    forward = Pass(context, config.data.sequence_length, config.scoring.batch_tokens)
    report = None
    if writer is not None:
        report = _Report(Progress("score", writer.num_wanted, "sequences", start=writer.num_scored), writer.num_scored)
    for chunk in chunks:
        sequences = ShardSequences([(shards[chunk.record.name], chunk.ids)])
        on_progress = report.within(sequences.lengths) if report is not None else None
        scores = method.from_output(means(forward.totals(measure, sequences, on_progress)))
        scores = lowest_where_nothing_is_predicted(scores, sequences.lengths)
        with agreed(context):
            if writer is not None and report is not None:
                writer.write(chunk, scores)
                report.finish(sequences.lengths)


def lowest_where_nothing_is_predicted(scores: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Scores with the lowest finite float32 for sequences of fewer than two tokens, which no model can judge: float32
    [n]. They come last in a selection, whatever the method keeps."""
    return np.where(lengths < 2, np.finfo(np.float32).min, scores)


@dataclass
class _Report:
    """Progress in sequences and tokens over all chunks."""

    progress: Progress
    sequences: int  # done
    tokens: int = 0  # done by this call of the stage

    def within(self, lengths: np.ndarray) -> Callable[[int], None]:
        """What to call with the tokens of a chunk that are done."""
        total = max(int(lengths.sum()), 1)

        def report(tokens: int) -> None:
            tokens = min(tokens, total)
            sequences = min(len(lengths) * tokens // total, len(lengths) - 1)  # the last one is not there yet
            self.progress.report(self.sequences + sequences, self.tokens + tokens)

        return report

    def finish(self, lengths: np.ndarray) -> None:
        self.sequences += len(lengths)
        self.tokens += int(lengths.sum())
        self.progress.report(self.sequences, self.tokens)


def _checkpoint_directory(paths: RunPaths, config: RunConfig, scored_by: str, round_number: int) -> Path:
    return paths.bilevel(round_number) if scored_by == "score_model" else proxy_directory(paths, config)


def _measure(scored_by: str, checkpoint: Path, config: RunConfig, context: ParallelContext) -> Measure:
    vocab_size = config.data.tokenizer.vocab_size
    if scored_by == "score_model":
        score_model = build_score_model(config.proxy.model, vocab_size, context).eval()
        checkpoints.load_model(checkpoint, score_model, checkpoints.SCORE)
        return score_measure(score_model)
    proxy = build_language_model(config.proxy.model, vocab_size, context).eval()
    checkpoints.load_model(checkpoint, proxy)
    return loss_measure(proxy)


def _pending(
    writer: ScoreWriter | None,
    pool: list[ShardRecord],
    wanted: dict[str, np.ndarray],
    chunk_sequences: int,
    context: ParallelContext,
) -> list[Chunk]:
    """The chunks that the writer on the first rank has not got yet, on every rank."""
    names = [record.name for record in pool]
    missing = [[names.index(chunk.record.name), chunk.number] for chunk in writer.pending()] if writer else []
    count = torch.tensor([len(missing)], device=context.device)
    dist.broadcast(count, src=0)
    if not count:
        return []
    table = torch.zeros(int(count), 2, dtype=torch.int64, device=context.device)
    if missing:
        table.copy_(torch.tensor(missing))
    dist.broadcast(table, src=0)
    return [
        Chunk(pool[index], number, wanted[names[index]][number * chunk_sequences : (number + 1) * chunk_sequences])
        for index, number in table.tolist()
    ]
