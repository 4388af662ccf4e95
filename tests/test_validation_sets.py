"""Validation sets of prompts and answers: which tokens carry loss, and what does not fit."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bliss.data.corpus import Cutting, Encoder, build_shard
from megatron_bliss.data.documents import corpus_from_texts
from megatron_bliss.data.tokenizers import Tokenizer, train_sentencepiece
from megatron_bliss.data.validation import ValidationSet, build_pairs
from megatron_bliss.errors import UserError
from tests.small_text import documents

Pairs = list[tuple[str, str]]
LENGTH = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("validation")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return train_sentencepiece(documents(200), folder / "tokenizer.model", 360)


def write_pairs(path: Path, pairs: Pairs) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in pairs))
    return path


words = st.lists(st.sampled_from(["strand", "plort", "quell", "meex", "a", "é"]), min_size=1, max_size=20).map(" ".join)
answers = st.sampled_from([" strand", "ort", " x", "!", " quell plax"])


@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(words, answers), min_size=1, max_size=5))
def test_just_the_answers_carry_loss(folder: Path, tokenizer: Tokenizer, pairs: Pairs) -> None:
    summary = build_pairs(write_pairs(folder / "a.jsonl", pairs), folder / "a", tokenizer, LENGTH)
    found = ValidationSet.open(folder / "a")
    assert len(found) == summary.num_sequences == len(pairs)
    truncated = 0
    for index, (prompt, answer) in enumerate(pairs):
        tokens, mask = found.get(index)
        (whole,) = tokenizer.encode_batch([prompt + answer])
        assert tokens.tolist() == whole[-LENGTH:]
        assert mask.dtype == bool
        # one run of ones at the end, after at least one token of context
        assert not mask[0]
        assert mask[-1]
        assert np.flatnonzero(np.diff(mask.astype(int))).size == 1
        # from the first token that the prompt alone does not have
        assert tokenizer.decode(tokens[mask].tolist()).endswith(answer)
        (alone,) = tokenizer.encode_batch([prompt])
        first = len(whole) - int(mask.sum())
        assert whole[:first] == alone[:first]
        assert first == len(alone) or whole[first] != alone[first]
        truncated += len(whole) > LENGTH
    assert summary.num_truncated_prompts == truncated
    assert summary.num_loss_tokens == sum(found.get(i)[1].sum() for i in range(len(found)))
    assert found.loss_share == pytest.approx(summary.num_loss_tokens / summary.num_tokens)


def test_known_pair(folder: Path, tokenizer: Tokenizer) -> None:
    build_pairs(write_pairs(folder / "b.jsonl", [("strand plort", " quell")]), folder / "b", tokenizer, LENGTH)
    tokens, mask = ValidationSet.open(folder / "b").get(0)
    assert tokenizer.decode(tokens[mask].tolist()) == " quell"
    assert tokenizer.decode(tokens[~mask].tolist()) == "strand plort"


def test_a_token_that_spans_prompt_and_answer_carries_loss(folder: Path, tokenizer: Tokenizer) -> None:
    build_pairs(write_pairs(folder / "g.jsonl", [("quell str", "and plort")]), folder / "g", tokenizer, LENGTH)
    tokens, mask = ValidationSet.open(folder / "g").get(0)
    assert tokens.tolist() == tokenizer.encode_batch(["quell strand plort"])[0]
    assert tokenizer.decode(tokens[~mask].tolist()) == "quell"
    assert tokenizer.decode(tokens[mask].tolist()) == " strand plort"


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (("short", " é" * LENGTH), r"c\.jsonl:2: the answer's"),
        (("", "x"), r"c\.jsonl:2 has an empty prompt"),
        (("x", ""), r"c\.jsonl:2 has an empty answer"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, tokenizer: Tokenizer, second: tuple[str, str], message: str
) -> None:
    path = write_pairs(tmp_path / "c.jsonl", [("strand", " plort"), second])
    with pytest.raises(UserError, match=message):
        build_pairs(path, tmp_path / "c", tokenizer, LENGTH)
    assert list(tmp_path.iterdir()) == [path]


def test_missing_answers_and_empty_files_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(UserError, match=r"d\.jsonl:1 has no field 'answer'"):
        build_pairs(tmp_path / "d.jsonl", tmp_path / "d", tokenizer, LENGTH)
    (tmp_path / "d.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no prompts"):
        build_pairs(tmp_path / "d.jsonl", tmp_path / "d", tokenizer, LENGTH)


def test_text_carries_loss_everywhere_and_an_old_mask_does_not_stay(tmp_path: Path, tokenizer: Tokenizer) -> None:
    build_pairs(write_pairs(tmp_path / "e.jsonl", [("strand", " plort")]), tmp_path / "e", tokenizer, LENGTH)
    pairs = ValidationSet.open(tmp_path / "e")
    build_shard(corpus_from_texts("e", documents(3)), tmp_path / "e", Encoder(tokenizer), Cutting(LENGTH))
    text = ValidationSet.open(tmp_path / "e")
    assert text.loss_share == 1.0
    assert text.get(1)[1].all()
    assert text.digest != pairs.digest


def test_the_mask_counts_in_the_digest_and_must_fit(tmp_path: Path, tokenizer: Tokenizer) -> None:
    build_pairs(write_pairs(tmp_path / "f.jsonl", [("strand quell", " plort")]), tmp_path / "f", tokenizer, LENGTH)
    path = tmp_path / "f.mask"
    digest = ValidationSet.open(tmp_path / "f").digest
    mask = np.load(path)

    def save(values: np.ndarray) -> None:
        with open(path, "wb") as stream:
            np.save(stream, values)

    save(1 - mask)
    assert ValidationSet.open(tmp_path / "f").digest != digest
    for bad in (mask[:-1], mask.astype(np.int64), mask * 2, mask * 0):
        save(bad)
        with pytest.raises(UserError, match=r"f\.mask"):
            ValidationSet.open(tmp_path / "f")
    path.write_bytes(b"no numpy")
    with pytest.raises(UserError, match=r"f\.mask"):
        ValidationSet.open(tmp_path / "f")
