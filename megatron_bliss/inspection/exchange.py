"""`export` and `import`: a round's candidates as a table, and a selection from a table that was made elsewhere."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_bliss.artifacts import digest_file
from megatron_bliss.data.blend import BlendPart, blend_weights
from megatron_bliss.data.parquet import Rows, read_kept, write_rows
from megatron_bliss.data.selection import Counts, KeptShard, Selection, write_selection
from megatron_bliss.data.shards import verify_shard
from megatron_bliss.errors import UserError
from megatron_bliss.inspection.rounds import Round, Run
from megatron_bliss.stages.select import tokenizer_facts
from megatron_bliss.wording import counted

METHOD = "imported"


def export(run_dir: Path, number: int, path: Path) -> None:
    """Write a round's candidates with their scores, and whether they are kept, to a parquet file.

    :raises UserError: if the round has no selection, or the file cannot be written.
    """
    one = Run(run_dir).round(number)
    selection = one.selection
    facts = {"method": one.method.name, "round": str(number), "selection": selection.digest}
    count = write_rows(path, _rows(one), facts)
    print(f"[export] {count} candidates, {selection.counts.kept_sequences} of them kept, in {path}", flush=True)


def _rows(one: Round) -> Iterator[Rows]:
    for record, chunk in one.chunks():
        if len(chunk.ids):
            yield Rows(record, chunk.ids, chunk.lengths, chunk.scores, one.kept(record, chunk.ids))


def import_selection(run_dir: Path, path: Path, directory: Path) -> None:
    """Make a selection of a run's shards from a parquet file. Its blend follows the kept tokens.

    :raises UserError: if the file does not fit the shards, or the directory is there already.
    """
    run = Run(run_dir)
    if directory.exists():
        raise UserError(f"{directory} is there already; give the name of a new directory")
    kept = read_kept(path, run.inventory.pool)
    if not any(map(len, kept.values())):
        raise UserError(f"{path} keeps no sequence at all; mark at least one as kept")
    counts, held_out = [], 0
    for record in run.inventory.pool:
        ids = kept[record.name]
        tokens = int(verify_shard(record).sequence_lengths[ids].sum(dtype=np.int64))
        counts.append(Counts(len(ids), tokens, record.num_sequences, record.num_tokens))
        held_out += run.num_held_out(record, ids)
    parts = [
        BlendPart(record.domain, record.num_tokens, count.kept_tokens)
        for record, count in zip(run.inventory.pool, counts, strict=True)
    ]
    total = sum(count.kept_tokens for count in counts)
    if not total:
        raise UserError(f"{path} keeps only sequences without a token; mark others as kept")
    weights = blend_weights("pool", parts, None)
    shards = [
        KeptShard(record, kept[record.name], count, weight)
        for record, count, weight in zip(run.inventory.pool, counts, weights, strict=True)
    ]
    write_selection(
        directory,
        shards,
        method=METHOD,
        seed=run.config.seed,
        fraction=total / sum(record.num_tokens for record in run.inventory.pool),
        thresholds={record.domain: None for record in run.inventory.pool},
        blend_policy="pool",
        sources={"inventory": run.inventory.digest, "table": digest_file(path)},
        round=None,
        score_model=None,
        tokenizer=tokenizer_facts(run.config.data.tokenizer),
    )
    selection = Selection.open(directory)
    print(
        f"[import] {counted(selection.counts.kept_sequences, 'sequence')}, {counted(total, 'token')}, in {directory}; "
        f"digest {selection.digest[:12]}" + (f"; {held_out} of them are held out by the run" if held_out else ""),
        flush=True,
    )
