"""Tokenizers behind one small protocol: SentencePiece models, trained here or given, and Hugging Face tokenizer.json.

A model trained here reserves the ids 0 to 3 for unk, bos, eos and pad. Megatron's SentencePieceTokenizer takes eos as
the end of a document (eod), so the shards do too. Text survives encoding and decoding unchanged, but for U+2581,
which SentencePiece uses for the space.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

from megatron_bliss.artifacts import atomic_write, digest_bytes, digest_file
from megatron_bliss.errors import UserError

_BLOCK_CHARACTERS = 2000  # of text a training sentence: whole lines, so that newlines and indentation are learnt too
_CHARACTER_COVERAGES = (0.9995, 0.99, 0.97, 0.9)  # of the text, by characters with a piece of their own
_SENTENCEPIECE_SPACE = "\u2581"
_EOD_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]")


def _byte_level() -> dict[str, int]:
    """The byte behind each character of a byte-level vocabulary: printable bytes are themselves, others in order from
    U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level()


class Tokenizer(Protocol):
    """What corpus building needs of a tokenizer."""

    path: Path
    megatron_type: str  # what Megatron's --tokenizer-type calls it
    vocab_size: int  # every id is below it
    eod: int  # id put after each document
    eod_token: str | None  # its name, where the user or a file beside the tokenizer chose it
    digest: str

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without any special token."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def pieces(self) -> list[bytes]:
        """UTF-8 bytes that each id stands for; none for special tokens."""
        ...


class SentencePiece:
    """A SentencePiece model file."""

    megatron_type = "SentencePieceTokenizer"
    eod_token: str | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(path.read_bytes())
        except RuntimeError:
            raise UserError(f"{path} is not a SentencePiece model; give a .model file or a tokenizer.json") from None
        self.vocab_size: int = self._processor.GetPieceSize()
        self.eod: int = self._processor.eos_id()
        if self.eod < 0:
            raise UserError(f"{path} has no end-of-sentence id, which ends a document; train it with an eos_id")
        self.digest = digest_file(path)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._processor.Encode(list(texts), num_threads=1)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.Decode([int(i) for i in ids])
        return text

    def pieces(self) -> list[bytes]:
        model = self._processor

        def piece(index: int) -> bytes:
            if model.IsControl(index) or model.IsUnknown(index) or model.IsUnused(index):
                return b""
            name: str = model.IdToPiece(index)
            if model.IsByte(index):  # <0x0A>
                return bytes([int(name[3:-1], 16)])
            return name.replace(_SENTENCEPIECE_SPACE, " ").encode()

        return [piece(index) for index in range(self.vocab_size)]


class HuggingFace:
    """A tokenizer.json. Names of special tokens inside a text are encoded as text: data cannot end a document."""

    megatron_type = "HuggingFaceTokenizer"

    def __init__(self, path: Path, eod_token: str | None) -> None:
        self.path = path
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{path} is not a Hugging Face tokenizer.json ({error}); export it again") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eod_token = eod_token or self._find_eod_token()
        eod = self._tokenizer.token_to_id(self.eod_token) if self.eod_token else None
        if eod is None:
            tried = self.eod_token or f"none of {', '.join(_EOD_NAMES)}"
            raise UserError(f"{path} has no end-of-document token ({tried}); name one it has with --eod")
        self.eod: int = eod
        self.digest = digest_bytes(digest_file(path).encode(), str(self.eod).encode())

    def _find_eod_token(self) -> str | None:
        """The eos_token of the tokenizer_config.json beside the file, which Megatron takes too; or a usual name."""
        beside = self.path.with_name("tokenizer_config.json")
        if beside.is_file():
            named = json.loads(beside.read_text(encoding="utf-8")).get("eos_token")
            named = named.get("content") if isinstance(named, dict) else named
            if isinstance(named, str):
                return named
        return next((name for name in _EOD_NAMES if self._tokenizer.token_to_id(name) is not None), None)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def pieces(self) -> list[bytes]:
        decoder = json.loads(self._tokenizer.to_str())["decoder"] or {}
        kinds = {decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", []))}
        added = self._tokenizer.get_added_tokens_decoder()
        special = {index for index, token in added.items() if token.special}

        def piece(index: int) -> bytes:
            name = self._tokenizer.id_to_token(index)
            if name is None or index in special:
                return b""
            if index in added:
                return name.encode()
            if "ByteLevel" in kinds:
                return bytes(_BYTE_LEVEL[character] for character in name)
            if "ByteFallback" in kinds and re.fullmatch(r"<0x[0-9A-F]{2}>", name):
                return bytes([int(name[3:-1], 16)])
            if "WordPiece" in kinds:
                return name[2:].encode() if name.startswith("##") else f" {name}".encode()
            return name.replace(_SENTENCEPIECE_SPACE, " ").encode()

        return [piece(index) for index in range(self.vocab_size)]


def load_tokenizer(path: str | Path, eod_token: str | None = None) -> Tokenizer:
    """Load a SentencePiece model, a tokenizer.json, or the tokenizer.json of a directory.

    :param eod_token: the token that ends a document, for a tokenizer.json where it cannot be found out.
    :raises UserError: if the file is missing, is neither, or has no end-of-document token.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"tokenizer {path} does not exist; give a SentencePiece .model or a tokenizer.json")
    if path.suffix == ".json":
        return HuggingFace(path, eod_token)
    if eod_token is not None:
        raise UserError(f"{path} is a SentencePiece model, whose eos ends a document; leave out --eod {eod_token}")
    return SentencePiece(path)


def train_sentencepiece(
    texts: Iterable[str], path: str | Path, vocab_size: int, max_characters: int = 5_000_000
) -> Tokenizer:
    """Train a byte-pair encoding with byte fallback and write it atomically; equal texts give equal bytes.

    :param texts: documents, read until `max_characters` of them were seen.
    :param vocab_size: pieces in all, 4 reserved ids and 256 bytes included.
    Characters get a piece of their own, most frequent first, as far as there is room; bytes stand for the others.

    :raises UserError: if there is no text, or too little for that many pieces.
    """
    path = Path(path)
    blocks = list(_blocks(texts, max_characters))
    if not blocks:
        raise UserError(f"no text to train {path} on; the input has no documents")
    reason = ""
    for coverage in _CHARACTER_COVERAGES:
        try:
            model = _train(blocks, vocab_size, coverage)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            continue
        with atomic_write(path) as stream:
            stream.write(model)
        return SentencePiece(path)
    raise UserError(
        f"no tokenizer with {vocab_size} pieces can be trained on this text ({reason}); change the vocabulary size"
    )


def _train(blocks: list[str], vocab_size: int, coverage: float) -> bytes:
    """:raises RuntimeError: if the text has not enough pieces, or too many characters, for the vocabulary."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(blocks),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=coverage,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        max_sentence_length=8 * _BLOCK_CHARACTERS,
        num_threads=1,  # the number is stored in the model, whose bytes shall not depend on the machine
        minloglevel=2,
    )
    return model.getvalue()


def _blocks(texts: Iterable[str], max_characters: int) -> Iterator[str]:
    left = max_characters
    for text in texts:
        start = 0
        while start < len(text) and left > 0:
            end = min(start + _BLOCK_CHARACTERS, len(text))
            newline = text.rfind("\n", start, end)
            if end < len(text) and newline >= 0:
                end = newline + 1
            yield text[start:end]
            left -= end - start
            start = end
        if left <= 0:
            return
