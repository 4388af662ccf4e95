"""Rank agreement of `dsir` with the authors' package on the demo's pool, and how fast both kinds of n-grams are read.

The package (PyPI: data-selection) is installed into an environment of its own below build/, as it pins nothing that
fits ours. It reads the text that our shards' sequences decode to, fits to all of it, and gives its log-ratios.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bliss.data import demo_corpus, experiment_corpus, ngrams
from megatron_bliss.data.ngrams import Hashing, Reader, token_reader, word_reader
from megatron_bliss.data.shards import Shard
from megatron_bliss.data.tokenizers import Tokenizer, load_tokenizer

PACKAGE = "data-selection==1.0.3"
NUM_BUCKETS, NGRAMS = 10_000, 2  # the package's defaults
VOCAB_SIZE, CUT, SEED = 2048, 128, 1  # the demo's
_RUN_PACKAGE = """
import sys
from data_selection import HashedNgramDSIR
raw, target, out = sys.argv[1:]
dsir = HashedNgramDSIR([raw], [target], cache_dir=out, num_proc=1)
dsir.fit_importance_estimator(num_tokens_to_fit="all")
dsir.compute_importance_weights()
"""


def measure() -> dict[str, Any]:
    folder = Path("build/bench/dsir")
    demo_corpus.build(folder / "text", seed=SEED)
    texts = folder / "text"
    corpus = experiment_corpus.prepare(
        texts / "pool", texts / "validation.jsonl", texts / "test.jsonl", folder,
        vocab_size=VOCAB_SIZE, cut=CUT, seed=SEED,
    )  # fmt: skip
    tokenizer = load_tokenizer(corpus.tokenizer)
    shards = {name: Shard(Path(prefix)) for name, prefix in corpus.pool.items()}
    validation = Shard(Path(corpus.validation))
    reference = _package(folder / "package", list(shards.values()), validation, tokenizer)
    results: dict[str, Any] = {"sequences": len(reference)}
    domains = np.concatenate([np.full(len(shard), index) for index, shard in enumerate(shards.values())])
    readers = {
        "words": word_reader(tokenizer.pieces(), NUM_BUCKETS),
        "tokens": token_reader(tokenizer.vocab_size, NUM_BUCKETS),
    }
    for kind, reader in readers.items():
        began = time.perf_counter()
        scores = _ours(reader, tokenizer.vocab_size, list(shards.values()), validation)
        num_tokens = 2 * sum(shard.num_tokens for shard in shards.values())  # read once to count, once to score
        results[kind] = {
            "spearman": _spearman(scores, reference),
            "tokens_per_second": num_tokens / (time.perf_counter() - began),
            "shared_of_top_fifth": _shared(scores, reference),
            "spearman_within": {
                name: _spearman(scores[domains == index], reference[domains == index])
                for index, name in enumerate(shards)
            },
        }
    return results


def _package(folder: Path, pool: list[Shard], validation: Shard, tokenizer: Tokenizer) -> np.ndarray:
    """The package's log-ratio of each sequence."""
    folder.mkdir(parents=True, exist_ok=True)
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", PACKAGE], check=True)
    weights = folder / "out" / "log_importance_weights" / "0.npy"
    if not weights.exists():
        for name, shards in (("raw", pool), ("target", [validation])):
            with open(folder / f"{name}.jsonl", "w") as stream:
                for shard in shards:
                    for number in range(len(shard)):
                        stream.write(json.dumps({"text": tokenizer.decode(shard[number].tolist())}) + "\n")
        words = [folder / "raw.jsonl", folder / "target.jsonl", folder / "out"]
        subprocess.run([python, "-c", _RUN_PACKAGE, *words], check=True)
    found: np.ndarray = np.load(weights, allow_pickle=False)
    return found.ravel()


def _ours(reader: Reader, vocab_size: int, pool: list[Shard], validation: Shard) -> np.ndarray:
    hashing = Hashing(reader, NGRAMS, NUM_BUCKETS, vocab_size)

    def counts(shards: list[Shard]) -> np.ndarray:
        total = np.zeros(NUM_BUCKETS)
        for shard in shards:
            for part, _ in ngrams.count(hashing, shard, np.arange(len(shard))):
                total += part
        return total

    log_ratio = ngrams.log_ratio(counts([validation]), counts(pool))
    scores = []
    for shard in pool:
        found = np.zeros(len(shard))
        for part, _ in ngrams.sums(hashing, log_ratio, shard, np.arange(len(shard))):
            found += part
        scores.append(found)
    return np.concatenate(scores)


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """0 … n-1; ties in the order they come in, which are too few here to matter."""
    ranks = np.empty(len(values))
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    return ranks


def _shared(a: np.ndarray, b: np.ndarray) -> float:
    size = len(a) // 5
    return len(set(np.argsort(-a)[:size].tolist()) & set(np.argsort(-b)[:size].tolist())) / size
