"""`cache-target`: what the target says of a round's bilevel sample, written once at the target's own layout.

For a target that does not fit beside the proxy. Tensor × pipeline × data parallel, as `target` is trained; sequences
are short enough to do without context parallelism here.
"""

from pathlib import Path

from megatron_bliss import stopping
from megatron_bliss.artifacts import RunPaths, digest_tree
from megatron_bliss.config import RunConfig, read_saved_config
from megatron_bliss.data.target_cache import CacheWriter, Purpose
from megatron_bliss.mcore import checkpoints, parallel
from megatron_bliss.mcore.checkpoint_files import find
from megatron_bliss.mcore.stopping import Vote
from megatron_bliss.mcore.target_outputs import TargetOutputs
from megatron_bliss.progress import Progress
from megatron_bliss.stages.bilevel_data import BilevelDraws
from megatron_bliss.stages.inventory import run_inventory
from megatron_bliss.stages.sources import pin_target, target_checkpoint


def run(run_dir: Path, round_number: int) -> None:
    """Write `round-N/target-cache`, or finish it, or start it afresh for another target or sample. All ranks call it.

    Data-parallel replicas share out its chunks.

    :raises UserError: without the target's checkpoint, or where the ranks do not make whole models.
    """
    paths = RunPaths(Path(run_dir))
    config = read_saved_config(paths.config)
    layout = config.target
    context = parallel.initialize(
        layout.tensor_parallel, layout.sequence_parallel, config.seed, layout.pipeline_parallel
    )
    with parallel.agreed(context):
        if context.is_first:
            pin_target(paths, config, round_number)
    with parallel.agreed(context):
        draws = BilevelDraws(config, run_inventory(paths.root, config), round_number)
        purpose = purpose_of(paths, config, draws, round_number)
        writer = CacheWriter(paths.target_cache(round_number), purpose)
        if context.is_first:
            writer.start()
    with parallel.agreed(context):
        pending = writer.pending()
    if parallel.same(context, len(pending), f"the number of chunks that are missing in {writer.directory}"):
        vocab_size, settings = config.data.tokenizer.vocab_size, config.bilevel
        checkpoint = target_checkpoint(paths, config, round_number)
        target = checkpoints.load_target(checkpoint, context, layout.model, vocab_size)
        outputs = TargetOutputs(
            target, context, vocab_size, settings.kl_top_k, layout.micro_batch_size, config.data.sequence_length
        )
        total, before = purpose.num_chunks, purpose.num_chunks - len(pending)
        progress = Progress("cache-target", total, "chunks", start=before) if context.is_first else None
        num_tokens, vote = 0, Vote(context.device)
        for first in range(0, len(pending), context.dp_size):
            for chunk in pending[first : first + context.dp_size][context.dp_rank :][:1]:  # none is left for some
                sequences = [tokens for step in purpose.steps_of(chunk) for tokens in draws.pool(step)]
                known = outputs(sequences)
                if context.is_last_stage and context.tp_rank == 0:
                    writer.write(chunk, known)
                num_tokens += context.dp_size * sum(len(tokens) - 1 for tokens in sequences)
            done = min(before + first + context.dp_size, total)
            if progress is not None:
                progress.report(done, num_tokens)
            if vote() and done < total:
                stopping.leave("cache-target", done, total, "chunks")
    with parallel.agreed(context):  # all are written
        pass
    if context.is_first:
        writer.finish()


def purpose_of(paths: RunPaths, config: RunConfig, draws: BilevelDraws, round_number: int) -> Purpose:
    """What the round's cache has to be of."""
    return Purpose(
        target=digest_tree(find(target_checkpoint(paths, config, round_number))),
        sample=draws.pool_digest,
        steps=config.bilevel.outer_steps,
        batch_size=config.bilevel.batch_size,
        top_k=config.bilevel.kl_top_k,
        vocab_size=config.data.tokenizer.vocab_size,
    )
