"""From documents to shards: what is read, what is refused, how it is cut, and that workers change nothing."""

import json
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bliss.artifacts import read_json
from megatron_bliss.data.corpus import Cutting, Encoder, build_shard, cut_document, ensure_shard
from megatron_bliss.data.documents import Corpus, Document, corpus_from_files, corpus_from_texts, read_documents
from megatron_bliss.data.shards import Shard
from megatron_bliss.data.tokenizers import Tokenizer, load_tokenizer, train_sentencepiece
from megatron_bliss.errors import UserError
from megatron_bliss.progress import parse
from tests.small_text import documents, sentences, write_jsonl, write_tokenizer_json


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_sentencepiece(documents(200), tmp_path_factory.mktemp("corpus") / "tokenizer.model", 360)


def read_back(prefix: Path, tokenizer: Tokenizer) -> list[str]:
    """The text of each document of a shard; checks that eod ends each and stands nowhere else."""
    shard = Shard(prefix)
    starts = shard.document_starts.tolist()
    found = []
    for first, last in pairwise(starts):
        ids = np.concatenate([shard[i] for i in range(first, last)]).tolist()
        assert ids.index(tokenizer.eod) == len(ids) - 1
        found.append(tokenizer.decode(ids[:-1]))
    return found


@settings(max_examples=100, deadline=None)
@given(length=st.integers(0, 40), cut=st.one_of(st.none(), st.integers(1, 12)))
def test_cutting_loses_and_mixes_nothing(length: int, cut: int | None) -> None:
    tokens = np.arange(length)
    sequences = cut_document(tokens, Cutting(cut))
    assert [i for sequence in sequences for i in sequence] == tokens.tolist()
    assert all(len(sequence) == (cut or length) for sequence in sequences[:-1])
    assert all(0 < len(sequence) <= (cut or length) for sequence in sequences)


@pytest.mark.parametrize("cut", [None, 7, 64])
def test_documents_come_back(tmp_path: Path, tokenizer: Tokenizer, cut: int | None) -> None:
    texts = documents(30)
    summary = build_shard(corpus_from_texts("web", texts), tmp_path / "web", Encoder(tokenizer), Cutting(cut))
    assert read_back(tmp_path / "web", tokenizer) == texts
    shard = Shard(tmp_path / "web")
    assert shard.sequence_lengths.max() <= (cut or 10**6)
    assert (summary.num_sequences, summary.num_tokens) == (len(shard), shard.num_tokens)
    assert summary.num_documents == 30
    if cut is None:
        assert len(shard) == 30
    saved = read_json(tmp_path / "web.json")
    assert (saved["tokenizer_digest"], saved["vocab_size"]) == (tokenizer.digest, 360)
    assert saved["cutting"] == {"cut": cut, "min_tokens": 1}


def test_workers_change_nothing(tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    # a few batches: long and short documents, so that workers finish out of order
    texts = [sentences(2500 if index % 3 == 0 else 10, index) for index in range(24)]
    for workers in (1, 3):
        with Encoder(tokenizer, workers) as encoder:
            build_shard(corpus_from_texts("web", texts), tmp_path / f"w{workers}", encoder, Cutting(50))
    for suffix in ("bin", "idx", "json"):
        assert (tmp_path / f"w1.{suffix}").read_bytes() == (tmp_path / f"w3.{suffix}").read_bytes()
    assert read_back(tmp_path / "w3", tokenizer) == texts
    readings = [reading for line in capsys.readouterr().out.splitlines() if (reading := parse(line))]
    assert readings[-1].done == readings[-1].total == sum(map(len, texts)) // 1000


def test_a_tokenizer_json_works_in_workers(tmp_path: Path) -> None:
    texts = documents(20)
    tokenizer = load_tokenizer(write_tokenizer_json(tmp_path / "hf", "<stop>"), "<stop>")
    with Encoder(tokenizer, 2) as encoder:
        build_shard(corpus_from_texts("web", texts), tmp_path / "web", encoder, Cutting(16))
    assert read_back(tmp_path / "web", tokenizer) == texts


def test_reading_stays_close_to_writing(tokenizer: Tokenizer) -> None:
    read = 0

    def endless() -> Iterator[Document]:
        nonlocal read
        while True:
            read += 1
            yield Document("word " * 60_000, 1)  # a batch of its own

    with Encoder(tokenizer, 2) as encoder:
        stream = encoder.encode(endless())
        for _ in range(5):
            next(stream)
    assert read <= 5 + 2 * 4


def test_short_tails_are_dropped_only_when_asked_for_and_counted(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = corpus_from_texts("web", documents(30))
    everything = build_shard(corpus, tmp_path / "all", Encoder(tokenizer), Cutting(20))
    lengths = Shard(tmp_path / "all").sequence_lengths
    short = lengths[lengths < 12]
    some = build_shard(corpus, tmp_path / "some", Encoder(tokenizer), Cutting(20, min_tokens=12))
    assert everything.num_dropped_sequences == 0
    assert 0 < len(short) == some.num_dropped_sequences
    assert some.num_dropped_tokens == short.sum()
    assert some.num_tokens + some.num_dropped_tokens == everything.num_tokens
    assert Shard(tmp_path / "some").sequence_lengths.min() >= 12
    assert f"dropped {len(short)} sequences shorter than 12 tokens" in capsys.readouterr().out


def test_empty_documents_are_left_out_and_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = corpus_from_texts("web", ["", "some words", ""])
    summary = build_shard(corpus, tmp_path / "web", Encoder(tokenizer), Cutting())
    assert (summary.num_documents, summary.num_empty_documents, summary.num_sequences) == (1, 2, 1)


@pytest.mark.parametrize(
    ("texts", "cutting", "message"),
    [([], Cutting(), "no documents"), (["", ""], Cutting(), "no text in 2 documents"),
     (["a"], Cutting(40, 30), "shorter than 30")],
)  # fmt: skip
def test_nothing_to_write_is_an_error(
    tmp_path: Path, tokenizer: Tokenizer, texts: list[str], cutting: Cutting, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build_shard(corpus_from_texts("web", texts), tmp_path / "web", Encoder(tokenizer), cutting)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("cut", "min_tokens"), [(0, 1), (-3, 1), (4, 5)])
def test_impossible_cutting_is_refused(cut: int, min_tokens: int) -> None:
    with pytest.raises(UserError):
        Cutting(cut, min_tokens)


@pytest.mark.parametrize(
    "line",
    [b"{not json", b'["text"]', b'{"other": "x"}', b'{"text": 3}', b'{"text": null}', b'{"text": "\xff"}',
     b'{"text": "\\ud800"}'],
)  # fmt: skip
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path: Path, tokenizer: Tokenizer, line: bytes) -> None:
    path = tmp_path / "in" / "web.jsonl"
    path.parent.mkdir()
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=r"web\.jsonl:3"):
        build_shard(corpus_from_files("web", [path]), tmp_path / "out" / "web", Encoder(tokenizer), Cutting())
    assert list((tmp_path / "out").iterdir()) == []


def test_files_of_every_kind(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_jsonl(folder / "b" / "x.jsonl", ["one", "two"])
    (folder / "a.txt").write_text("three\nlines\n")
    (folder / ".hidden").write_bytes(b"\xff")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["four", "five"], "id": [1, 2]}), folder / "c.parquet")
    corpus = corpus_from_files("mix", [folder])
    assert [document.text for document in corpus.documents] == ["three\nlines\n", "one", "two", "four", "five"]
    assert sum(document.source_bytes for document in corpus.documents) == pytest.approx(corpus.num_bytes)
    digest = corpus.digest
    os.utime(folder / "a.txt", ns=(1, 1))
    assert corpus_from_files("mix", [folder]).digest != digest


def test_other_fields_and_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "x"}) + "\n")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["y", None]}), tmp_path / "b.parquet")
    assert [document.text for document in read_documents(tmp_path / "a.jsonl", "body")] == ["x"]
    with pytest.raises(UserError, match=r"b\.parquet has no column 'text'; it has body"):
        list(read_documents(tmp_path / "b.parquet"))
    with pytest.raises(UserError, match=r"b\.parquet, row 2"):
        list(read_documents(tmp_path / "b.parquet", "body"))


@pytest.mark.parametrize(("name", "message"), [("a.txt", "byte 2"), ("a.parquet", "not a parquet file")])
def test_files_that_are_not_text_are_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(b"ab\xff\xfe")
    with pytest.raises(UserError, match=message):
        list(read_documents(tmp_path / name))


def test_missing_and_empty_inputs_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("none", "empty"):
        with pytest.raises(UserError, match=name):
            corpus_from_files("web", [tmp_path / name])


def test_a_finished_shard_is_kept_and_any_change_builds_it_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prefix = tmp_path / "web"

    def built(corpus: Corpus, cutting: Cutting) -> bool:
        """Whether the shard was written by this call."""
        before = prefix.with_suffix(".idx").stat().st_mtime_ns if prefix.with_suffix(".idx").exists() else None
        ensure_shard(corpus, prefix, Encoder(tokenizer), cutting)
        return prefix.with_suffix(".idx").stat().st_mtime_ns != before

    corpus = corpus_from_texts("web", documents(5))
    assert built(corpus, Cutting(20))
    assert not built(corpus, Cutting(20))
    assert built(corpus, Cutting(21))
    assert built(corpus_from_texts("web", documents(5, seed=1)), Cutting(21))
    content = prefix.with_suffix(".bin").read_bytes()
    prefix.with_suffix(".bin").write_bytes(content[:-2] + b"\x09\x00")
    assert built(corpus_from_texts("web", documents(5, seed=1)), Cutting(21))
    assert prefix.with_suffix(".bin").read_bytes() == content
    prefix.with_suffix(".bin").unlink()
    assert built(corpus_from_texts("web", documents(5, seed=1)), Cutting(21))
