"""Scoring beside a bare forward pass over the same batches already in memory, and beside a plain loop that pads every
sequence to the maximum length.

The pool is a part of the demo's text, the same share of each domain, with its proxy and batch size; each rank
has one thread. `bare_forward_ratio` is the scorer's throughput over the bare pass's, files and claims included.

How much padding costs depends on the lengths. The demo cuts whole files into pieces of 128 tokens, so that nearly all
are full (`pool_as_the_demo_cuts_it`); collections of web text are not like that. The headline figures are of the same
text with a paragraph a sequence, of at most 256 tokens. The plain loop has as many positions a batch as the scorer.
"""

import contextlib
import io
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bliss.config import DataConfig, ModelConfig, ProxyConfig, RunConfig, ScoringConfig, TokenizerConfig
from megatron_bliss.data import demo_corpus
from megatron_bliss.data.scores import ScoreWriter
from megatron_bliss.data.shards import ShardWriter, take_inventory, verify_shard
from megatron_bliss.data.tokenizers import Tokenizer, train_sentencepiece
from megatron_bliss.demo import SEQUENCE_LENGTH, VOCAB_SIZE
from tests.distributed import run_ranks

SHARE = 0.016  # of the demo's text
PARAGRAPH_TOKENS = 256  # of a paragraph, at most
REPEATS = 5


def write_pools(folder: Path) -> None:
    """Shards demo/all and paragraphs/all: the first documents of each domain, up to SHARE of its characters."""
    texts = []
    for name, documents in demo_corpus.collect(seed=1).items():
        left = round(SHARE * sum(map(len, documents))) if name not in demo_corpus.HELD_OUT else 0
        for document in documents:
            texts.append(document[:left])
            left -= len(texts[-1])
    paragraphs = [part for text in texts for part in text.split("\n\n") if part.strip()]
    tokenizer = train_sentencepiece(texts, folder / "tokenizer.model", VOCAB_SIZE)
    write_shard(folder / "demo" / "all", list(filter(None, texts)), tokenizer, SEQUENCE_LENGTH)
    write_shard(folder / "paragraphs" / "all", paragraphs, tokenizer, PARAGRAPH_TOKENS)


def write_shard(prefix: Path, texts: list[str], tokenizer: Tokenizer, cut: int) -> None:
    with ShardWriter(prefix, np.uint16) as writer:
        for ids in tokenizer.encode_batch(texts):
            ids.append(tokenizer.eod)
            writer.add_document([ids[start : start + cut] for start in range(0, len(ids), cut)])


def settings(sequence_length: int) -> RunConfig:
    """As the demo's, but for what no score depends on."""
    return RunConfig(
        data=DataConfig(tokenizer=TokenizerConfig(vocab_size=VOCAB_SIZE), sequence_length=sequence_length),
        proxy=ProxyConfig(model=ModelConfig(preset="tiny")),
        scoring=ScoringConfig(batch_tokens=4096, chunk_sequences=4096),
    )


def rank_seconds(rank: int, folder: str, sequence_length: int) -> dict[str, Any]:
    """Seconds of each way through a pool, one after the other, REPEATS times; the same on all ranks."""
    import torch
    import torch.distributed as dist

    from megatron_bliss.mcore import parallel
    from megatron_bliss.mcore.batches import make_batch
    from megatron_bliss.mcore.score_model import build_score_model
    from megatron_bliss.mcore.scorer import Pass, ShardSequences, Windows, score_measure
    from megatron_bliss.stages import score

    config = settings(sequence_length)
    context = parallel.initialize(1, False, seed=1)
    measure = score_measure(build_score_model(config.proxy.model, VOCAB_SIZE, context).eval())
    records = take_inventory({"": [f"{folder}/all"]})
    shard = verify_shard(records[0])
    ids = np.arange(len(shard), dtype=np.int32)
    scores = Path(f"{folder}-scores")
    work = score.ScoringWork(scores, records, {"all": ids}, Path(folder), config)
    forward, sequences = Pass(context, sequence_length, config.scoring.batch_tokens), ShardSequences([(shard, ids)])
    windows = Windows.of(sequences.lengths, sequence_length, config.scoring.batch_tokens, 1)
    mine = windows.batches[context.dp_rank :: context.dp_size]
    prepared = [batch for _, batch in forward._load(sequences, windows, mine)]
    padded = sum(len(batch) * int(windows.positions[batch[0]]) for batch in windows.batches)

    @torch.no_grad()
    def bare() -> None:
        for batch in prepared:
            measure(batch)

    writer: ScoreWriter | None = None

    def scorer() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            score.score_chunks(work, [shard], writer, score.model_scorer(config, measure, context), context)

    @torch.no_grad()
    def plain_loop() -> None:
        size = config.scoring.batch_tokens // sequence_length
        for first in range(0, len(shard), size):
            some = [shard[index] for index in range(first, min(first + size, len(shard)))]
            measure(make_batch(some, context.device, sequence_length))

    def timed(way: Callable[[], None]) -> float:
        dist.barrier()
        began = time.perf_counter()
        way()
        dist.barrier()
        return time.perf_counter() - began

    ways = [bare, scorer] + ([plain_loop] if context.dp_size == 1 else [])
    seconds: dict[str, list[float]] = {way.__name__: [] for way in ways}
    for repeat in range(REPEATS + 1):
        for way in ways:
            if way is scorer and context.is_first:
                shutil.rmtree(scores, ignore_errors=True)
                writer = work.open_writer()
            elapsed = timed(way)
            if repeat:  # the first warms up
                seconds[way.__name__].append(elapsed)
    return {"seconds": seconds, "tokens": shard.num_tokens, "padding": 1 - int(windows.positions.sum()) / padded}


def ratio(over: list[float], under: list[float]) -> tuple[float, list[float]]:
    """Median and range of one measure after another's, pair by pair."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return statistics.median(ratios), [round(min(ratios), 4), round(max(ratios), 4)]


def of_pool(folder: Path, sequence_length: int, most_ranks: int) -> dict[str, Any]:
    one, *more = (
        run_ranks(rank_seconds, ranks, str(folder), sequence_length, timeout=600)[0]
        for ranks in range(1, most_ranks + 1)
    )
    compared = {
        "bare_forward_ratio": (one["seconds"]["bare"], one["seconds"]["scorer"]),
        "speedup_over_padding": (one["seconds"]["plain_loop"], one["seconds"]["scorer"]),
    }
    for two in more:
        compared["bare_forward_ratio_2ranks"] = two["seconds"]["bare"], two["seconds"]["scorer"]
    ratios = {name: ratio(*both) for name, both in compared.items()}
    return {name: median for name, (median, _) in ratios.items()} | {
        "spread": {name: spread for name, (_, spread) in ratios.items()},
        "padding_waste": one["padding"],
        "tokens_per_s": one["tokens"] / statistics.median(one["seconds"]["scorer"]),
        "tokens": one["tokens"],
    }


def measure() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pools(folder)
        results = of_pool(folder / "paragraphs", PARAGRAPH_TOKENS, most_ranks=2)
        return results | {"pool_as_the_demo_cuts_it": of_pool(folder / "demo", SEQUENCE_LENGTH, most_ranks=1)}
