"""Importance weights from hashed n-grams, against a few plain lines that do what the authors' package does."""

import re
from collections.abc import Iterator
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron_bliss.artifacts import RunPaths
from megatron_bliss.data import ngrams
from megatron_bliss.data.ngrams import Hashing, token_reader, word_reader
from megatron_bliss.data.selection import Selection
from megatron_bliss.data.shards import Shard, ShardWriter
from megatron_bliss.data.tokenizers import Tokenizer, load_tokenizer, train_sentencepiece
from megatron_bliss.errors import UserError
from megatron_bliss.stages import inventory as inventory_stage
from megatron_bliss.stages import ngrams as stage
from megatron_bliss.stages import select as select_stage
from tests.launch import run
from tests.small_text import documents, write_tokenizer_json
from tests.toy_shards import VOCAB_SIZE, write_run

NUM_BUCKETS = 97
TEXTS = [*documents(12, seed=1), "", "It's <b>2</b>, isn't it?\n\n\tX_1+=y; (UPPER case)  done.", "!"]


def grams_of(text: str) -> list[str]:
    """Words and pairs of words: nltk's WordPunct, in lower case."""
    words = re.findall(r"\w+|[^\w\s]+", text.lower())
    return words + [" ".join(pair) for pair in pairwise(words)]


def bucket_of(gram: str) -> int:
    return int(sha256(gram.encode()).hexdigest(), 16) % NUM_BUCKETS


def counts_of(texts: list[str]) -> np.ndarray:
    buckets = [bucket_of(gram) for text in texts for gram in grams_of(text)]
    return np.bincount(np.array(buckets, dtype=np.int64), minlength=NUM_BUCKETS)


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "byte-level":
        return load_tokenizer(write_tokenizer_json(folder))
    model = folder / "tokenizer.model"
    train_sentencepiece(documents(200), model, 400)
    return load_tokenizer(model)


def shard_of(prefix: Path, texts: list[str], tokenizer: Tokenizer) -> tuple[Shard, list[str]]:
    """A sequence a text, and the texts that the sequences stand for."""
    encoded = [np.array([*tokenizer.encode_batch([text])[0], tokenizer.eod]) for text in texts]
    with ShardWriter(prefix, np.uint16) as writer:
        for ids in encoded:
            writer.add_document([ids])
    return Shard(prefix), [tokenizer.decode(ids[:-1].tolist()) for ids in encoded]


def test_words_are_those_of_the_package(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shard, texts = shard_of(tmp_path / "shard", TEXTS, tokenizer)
    hashing = Hashing(word_reader(tokenizer.pieces(), NUM_BUCKETS), 2, NUM_BUCKETS, tokenizer.vocab_size)
    for ids in (np.arange(len(texts)), np.array([1, 4, 13])):
        total = sum(counts for counts, _ in ngrams.count(hashing, shard, ids))
        np.testing.assert_array_equal(total, counts_of([texts[i] for i in ids]))


def test_scores_are_sums_of_log_ratios(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """log p − log q over a sequence's n-grams, each smoothed by 1e-8 (float64, 1e-12), however blocks are cut."""
    shard, texts = shard_of(tmp_path / "shard", TEXTS, tokenizer)
    hashing = Hashing(word_reader(tokenizer.pieces(), NUM_BUCKETS), 2, NUM_BUCKETS, tokenizer.vocab_size)
    target, raw = counts_of(documents(5, seed=2)), counts_of(texts)
    log_ratio = ngrams.log_ratio(target, raw)
    p, q = target / target.sum() + 1e-8, raw / raw.sum() + 1e-8
    expected = [sum(np.log(p[bucket_of(gram)] / q[bucket_of(gram)]) for gram in grams_of(text)) for text in texts]
    for block in (1 << 18, 50, 1):
        monkeypatch.setattr(ngrams, "BLOCK_TOKENS", block)
        found = sum(part for part, _ in ngrams.sums(hashing, log_ratio, shard, np.arange(len(texts))))
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_ngrams_of_tokens_share_buckets_if_they_are_the_same(tmp_path: Path) -> None:
    sequences = [[1, 2, 3, 1, 2], [2, 3], [7], [1, 2, 3, 1, 2]]
    with ShardWriter(tmp_path / "shard", np.uint16) as writer:
        for ids in sequences:
            writer.add_document([np.array(ids)])
    hashing = Hashing(token_reader(10, 1 << 16), 3, 1 << 16, 10)
    ((buckets, places, num_tokens),) = hashing.grams(Shard(tmp_path / "shard"), np.arange(4))
    grams = [(place, tuple(ids[i : i + n])) for n in (1, 2, 3) for place, ids in enumerate(sequences)
             for i in range(len(ids) - n + 1)]  # fmt: skip
    assert places.tolist() == [place for place, _ in grams]
    by_gram: dict[tuple[int, ...], set[int]] = {}
    for bucket, (_, gram) in zip(buckets.tolist(), grams, strict=True):
        by_gram.setdefault(gram, set()).add(bucket)
    assert all(len(found) == 1 for found in by_gram.values())
    assert len({min(found) for found in by_gram.values()}) == len(by_gram)  # 65,536 buckets for nine of them
    assert num_tokens == 13


def test_a_token_that_is_not_in_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "shard", np.uint16) as writer:
        writer.add_document([np.array([3, 12])])
    hashing = Hashing(token_reader(10, 100), 2, 100, 10)
    with pytest.raises(UserError, match="holds token ids from 3 to 12, the vocabulary has 10"):
        list(hashing.grams(Shard(tmp_path / "shard"), np.arange(1)))


# --- the stage


def start(run_dir: Path, *settings: str) -> RunPaths:
    write_run(run_dir, {"a": [400, 300], "bb": [500]}, ["scoring.chunk_sequences=100", *settings])
    inventory_stage.run(run_dir)
    return RunPaths(run_dir)


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_kill_loses_a_chunk_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, killed = (start(tmp_path / name, "method=dsir", "dsir.features=tokens") for name in ("whole", "killed"))
    stage.run(whole.root, 1)
    expected = files_of(whole.ngrams(1))
    assert set(expected) == {"log-ratio.npy", "manifest.json", "sources.json"}
    count, seen = ngrams.count, []

    def dies(*args: object) -> Iterator[tuple[np.ndarray, int]]:
        seen.append(args)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return count(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(ngrams, "count", dies)
    with pytest.raises(KeyboardInterrupt):
        stage.run(killed.root, 1)
    stage.run(killed.root, 1)
    assert len(seen) == 6 + 7 + 1  # the rest of the twelve chunks, and the validation set
    assert files_of(killed.ngrams(1)) == expected


def test_words_need_a_tokenizer(tmp_path: Path) -> None:
    paths = start(tmp_path / "run", "method=dsir")
    with pytest.raises(UserError, match=r"set dsir\.features=tokens"):
        stage.run(paths.root, 1)


def test_one_and_two_ranks_score_the_same_bytes(tmp_path: Path) -> None:
    runs = {ranks: start(tmp_path / f"run{ranks}", "method=dsir", "dsir.features=tokens") for ranks in (1, 2)}
    for ranks, paths in runs.items():
        stage.run(paths.root, 1)
        log = tmp_path / f"log{ranks}"
        run("megatron_bliss.cli", ["score", "--run", paths.root, "--round", "1"], log, num_ranks=ranks)
        select_stage.run(paths.root, 1)
        assert 0.15 < Selection.open(paths.selection(1)).counts.kept_tokens / _slice_tokens(paths) <= 0.2
    one, two = (files_of(paths.scores(1)) for paths in runs.values())
    assert len(one) == 4
    assert one == two


def _slice_tokens(paths: RunPaths) -> int:
    return Selection.open(paths.selection(1)).counts.slice_tokens


# --- all


def test_all_keeps_the_whole_slice_in_the_users_proportions(tmp_path: Path) -> None:
    paths = start(tmp_path / "run", "method=all", "selection.tokens=10", f"data.tokenizer.vocab_size={VOCAB_SIZE}")
    select_stage.run(paths.root, 1)
    selection = Selection.open(paths.selection(1))
    assert selection.counts.kept_sequences == selection.counts.slice_sequences > 300
    tokens = {shard.record.prefix: shard.counts.kept_tokens for shard in selection.shards}
    by_domain = {domain: sum(s.record.num_tokens for s in selection.shards if s.record.domain == domain)
                 for domain in ("a", "bb")}  # fmt: skip
    weights: dict[str, float] = dict.fromkeys(by_domain, 0.0)
    for weight, prefix in selection.blend:
        weights[next(s.record.domain for s in selection.shards if s.record.prefix == prefix)] += weight
        assert tokens[prefix] > 0
    for domain, weight in weights.items():
        assert weight == pytest.approx(by_domain[domain] / sum(by_domain.values()), rel=0.05)
