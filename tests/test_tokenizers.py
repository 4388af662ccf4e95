"""Tokenizers: trained or given, lossless, and the same to Megatron as to us."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.tokenizers import MegatronTokenizer

from megatron_bliss.data.tokenizers import Tokenizer, load_tokenizer, train_sentencepiece
from megatron_bliss.errors import UserError
from tests.small_text import documents, sentences, write_tokenizer_json

# surrogates are no text, and SentencePiece writes a space as U+2581
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def sentencepiece(folder: Path) -> Tokenizer:
    return train_sentencepiece(documents(200), folder / "tokenizer.model", 360)


@pytest.fixture(scope="module")
def hugging_face(folder: Path) -> Tokenizer:
    return load_tokenizer(write_tokenizer_json(folder / "hf"))


@settings(max_examples=150, deadline=None)
@given(text=st.one_of(texts, st.just("def f(x):\n\treturn  x\r\n\n    # é 漢\x00</s><|endoftext|> ")))
def test_text_survives_and_no_text_ends_a_document(
    sentencepiece: Tokenizer, hugging_face: Tokenizer, text: str
) -> None:
    for tokenizer in (sentencepiece, hugging_face):
        (ids,) = tokenizer.encode_batch([text])
        assert tokenizer.decode(ids) == text
        assert tokenizer.eod not in ids
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_training_is_deterministic_and_learns_more_than_bytes(sentencepiece: Tokenizer, folder: Path) -> None:
    again = train_sentencepiece(documents(200), folder / "again.model", 360)
    assert again.digest == sentencepiece.digest
    assert again.path.read_bytes() == sentencepiece.path.read_bytes()
    assert sentencepiece.vocab_size == 360
    text = sentences(20, seed=9)
    assert len(sentencepiece.encode_batch([text])[0]) < 0.5 * len(text)


def test_training_reads_no_more_than_the_cap(folder: Path) -> None:
    read = []

    def counted() -> object:
        for text in documents(2000):
            read.append(len(text))
            yield text

    train_sentencepiece(counted(), folder / "capped.model", 340, max_characters=20_000)
    assert 20_000 <= sum(read) < 21_000


def test_megatron_finds_the_same_ids_and_end_of_document(sentencepiece: Tokenizer) -> None:
    theirs = MegatronTokenizer.from_pretrained(str(sentencepiece.path), metadata_path={"library": "sentencepiece"})
    text = "  " + sentences(3, seed=5) + "\n\n  x\t é"
    assert theirs.tokenize(text) == sentencepiece.encode_batch([text])[0]
    assert theirs.eod == sentencepiece.eod == 2
    assert theirs.vocab_size == sentencepiece.vocab_size
    assert (theirs.unk_id, theirs.bos_id, theirs.pad_id) == (0, 1, 3)


def test_cutting_and_padding_of_a_tokenizer_json_are_ignored(hugging_face: Tokenizer) -> None:
    short, long = hugging_face.encode_batch(["a", sentences(30)])
    assert len(short) == 1
    assert len(long) > 100


def test_end_of_document_token_of_a_tokenizer_json(folder: Path) -> None:
    path = write_tokenizer_json(folder / "odd", eod_token="<stop>")
    with pytest.raises(UserError, match="--eod"):
        load_tokenizer(path)
    with pytest.raises(UserError, match="<end>"):
        load_tokenizer(path, "<end>")
    assert load_tokenizer(path.parent, "<stop>").eod == 0
    (path.parent / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    assert load_tokenizer(path).eod == 0


@pytest.mark.parametrize("name", ["bad.model", "bad.json"])
def test_damaged_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{no model")
    with pytest.raises(UserError, match=name):
        load_tokenizer(tmp_path / name)


def test_missing_file_and_needless_eod_are_refused(tmp_path: Path, sentencepiece: Tokenizer) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "none.model")
    with pytest.raises(UserError, match="leave out --eod"):
        load_tokenizer(sentencepiece.path, "</s>")


@pytest.mark.parametrize(("texts", "vocab_size"), [([], 300), (["few words"], 5000), (documents(20), 50)])
def test_impossible_training_is_refused(tmp_path: Path, texts: list[str], vocab_size: int) -> None:
    with pytest.raises(UserError):
        train_sentencepiece(texts, tmp_path / "a.model", vocab_size)
    assert list(tmp_path.iterdir()) == []
