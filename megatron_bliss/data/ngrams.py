"""Hashed n-grams of sequences: how often each comes, and sums over them (DSIR, arXiv 2302.03169).

An n-gram is of words or of token ids. Words and their buckets are those of the authors' package: nltk's WordPunct in
lower case (runs of letters, digits and _; runs of other signs) and SHA-256 of their text, taken from the bytes that the
tokens stand for; bytes above ASCII count as letters and keep their case. All of it is array operations on a block of
sequences, with no loop over tokens; SHA-256 is asked for once for each distinct n-gram.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Protocol

import numpy as np

from megatron_bliss.data.seeds import derive, hash_positions
from megatron_bliss.data.shards import Shard
from megatron_bliss.errors import UserError

BLOCK_TOKENS = 1 << 18  # handled at a time; memory is that of a block, or of the longest sequence
_KNOWN_GRAMS = 1 << 22  # n-grams whose buckets are remembered, 12 bytes each; then all are forgotten
_SMOOTHING = 1e-8  # added to probabilities, as the authors' package does
_FACTOR = np.uint64(derive(0, "n-gram") | 1)  # of the polynomials that are hashes of words and n-grams, modulo 2^64
_SPACE, _LETTER, _SIGN = 0, 1, 2


class Units(Protocol):
    """The words or tokens of some sequences, one sequence after the other."""

    @property
    def hashes(self) -> np.ndarray:
        """uint64 [u]"""
        ...

    @property
    def owners(self) -> np.ndarray:
        """Which sequence each is of: int64 [u], ascending."""
        ...

    def buckets(self, grams: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
        """Of n-grams: int64 [g].

        :param grams: their hashes, uint64 [g].
        :param starts: their first units, int64 [g].
        :param length: units of each.
        """
        ...


class Reader(Protocol):
    def __call__(self, tokens: np.ndarray, owners: np.ndarray) -> Units:
        """:param tokens: [t]. :param owners: which sequence each is of, int64 [t], ascending."""
        ...


@dataclass(frozen=True)
class _Tokens:
    hashes: np.ndarray
    owners: np.ndarray
    num_buckets: int

    def buckets(self, grams: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
        high = grams >> np.uint64(32)
        return (high * np.uint64(self.num_buckets) >> np.uint64(32)).astype(np.int64)


def token_reader(vocab_size: int, num_buckets: int) -> Reader:
    """Units are tokens."""
    hashes = hash_positions(derive(0, "token"), np.arange(vocab_size))
    return lambda tokens, owners: _Tokens(hashes[tokens], owners, num_buckets)


@dataclass
class _Known:
    """Buckets of n-grams that were met before."""

    num_buckets: int
    grams: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint64))  # ascending
    buckets: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int32))

    def add(self, grams: np.ndarray, buckets: np.ndarray) -> None:
        if len(self.grams) + len(grams) > _KNOWN_GRAMS:
            self.grams, self.buckets = self.grams[:0], self.buckets[:0]
        places = np.searchsorted(self.grams, grams)
        self.grams, self.buckets = np.insert(self.grams, places, grams), np.insert(self.buckets, places, buckets)

    def find(self, grams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Buckets, and which are known: int32 and bool, like `grams`."""
        if not len(self.grams):
            return np.zeros(len(grams), dtype=np.int32), np.zeros(len(grams), dtype=bool)
        places = np.minimum(np.searchsorted(self.grams, grams), len(self.grams) - 1)
        return self.buckets[places], self.grams[places] == grams


@dataclass(frozen=True)
class _Words:
    hashes: np.ndarray
    owners: np.ndarray
    text: np.ndarray  # uint8, in lower case
    starts: np.ndarray  # of each word in it
    stops: np.ndarray
    known: _Known

    def buckets(self, grams: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
        distinct, firsts, inverse = np.unique(grams, return_index=True, return_inverse=True)
        found, is_known = self.known.find(distinct)
        new = np.flatnonzero(~is_known)
        found[new] = [self._bucket(first, length) for first in starts[firsts[new]].tolist()]
        self.known.add(distinct[new], found[new])
        return found[inverse].astype(np.int64)

    def _bucket(self, first: int, length: int) -> int:
        words = range(first, first + length)
        text = b" ".join(self.text[self.starts[word] : self.stops[word]].tobytes() for word in words)
        return int.from_bytes(sha256(text).digest()) % self.known.num_buckets


def word_reader(pieces: Sequence[bytes], num_buckets: int) -> Reader:
    """Units are words.

    :param pieces: what each token id stands for.
    """
    sizes = np.array([len(piece) for piece in pieces], dtype=np.int64)
    firsts = np.cumsum(sizes) - sizes
    all_text = np.frombuffer(b"".join(pieces).lower(), dtype=np.uint8)  # of bytes: ASCII letters alone
    kinds, hashes, known = _kinds(), hash_positions(derive(0, "byte"), np.arange(256)), _Known(num_buckets)

    def read(tokens: np.ndarray, owners: np.ndarray) -> Units:
        counts = sizes[tokens]
        places = np.repeat(firsts[tokens] - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        text, owner = all_text[places], np.repeat(owners, counts)
        kind = kinds[text]
        begins = np.ones(len(text), dtype=bool)  # of a word, or of a run of spaces
        begins[1:] = (kind[1:] != kind[:-1]) | (owner[1:] != owner[:-1])
        starts = np.flatnonzero(begins)
        lengths = np.diff(starts, append=len(text))
        powers = np.multiply.accumulate(np.full(int(lengths.max(initial=0)), _FACTOR, dtype=np.uint64))
        terms = hashes[text] * powers[np.arange(len(text)) - np.repeat(starts, lengths)]
        words = hash_positions(derive(0, "word"), np.add.reduceat(terms, starts)) if len(starts) else terms
        real = kind[starts] != _SPACE
        return _Words(words[real], owner[starts][real], text, starts[real], (starts + lengths)[real], known)

    return read


def _kinds() -> np.ndarray:
    """Of each byte: uint8 [256]."""
    letters = [byte for byte in range(256) if byte >= 128 or chr(byte).isalnum() or byte == ord("_")]
    kinds = np.full(256, _SIGN, dtype=np.uint8)
    kinds[letters] = _LETTER
    kinds[[byte for byte in range(128) if chr(byte).isspace()]] = _SPACE
    return kinds


@dataclass(frozen=True)
class Hashing:
    """Which bucket an n-gram falls into."""

    reader: Reader
    ngrams: int  # units of the longest
    num_buckets: int
    vocab_size: int

    def grams(self, shard: Shard, ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Of some sequences of a shard, block by block: the bucket of every n-gram of 1 to `ngrams` units, int64 [g],
        the place of its sequence in `ids`, int64 [g], and the number of tokens.

        :param ids: [n], ascending.
        :raises UserError: for a token id that is not below the vocabulary size.
        """
        for tokens, owners in _blocks(shard, ids):
            self._check(shard, tokens)
            units = self.reader(tokens, owners)
            buckets, places = [], []
            mixed = np.zeros(len(units.hashes), dtype=np.uint64)
            for length in range(1, self.ngrams + 1):
                count = max(len(units.hashes) - length + 1, 0)
                mixed = mixed[:count] * _FACTOR + units.hashes[length - 1 :]
                inside = np.flatnonzero(units.owners[:count] == units.owners[length - 1 :])
                buckets.append(units.buckets(mixed[inside], inside, length))
                places.append(units.owners[inside])
            yield np.concatenate(buckets), np.concatenate(places), len(tokens)

    def _check(self, shard: Shard, tokens: np.ndarray) -> None:
        if int(tokens.max()) >= self.vocab_size or int(tokens.min()) < 0:
            raise UserError(
                f"shard {shard.prefix} holds token ids from {tokens.min()} to {tokens.max()}, the vocabulary has "
                f"{self.vocab_size}; give the tokenizer that the shard was made with"
            )


def count(hashing: Hashing, shard: Shard, ids: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """N-grams in each bucket, int64 [num_buckets], and the number of tokens, block by block."""
    for buckets, _, num_tokens in hashing.grams(shard, ids):
        yield np.bincount(buckets, minlength=hashing.num_buckets), num_tokens


def sums(hashing: Hashing, values: np.ndarray, shard: Shard, ids: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """Sum of a value of each bucket over the n-grams of each sequence: float64 [n], as far as the block goes and 0
    elsewhere, and the number of tokens, block by block.

    :param values: float64 [num_buckets].
    """
    for buckets, places, num_tokens in hashing.grams(shard, ids):
        yield np.bincount(places, weights=values[buckets], minlength=len(ids)), num_tokens


def log_ratio(target: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """log p − log q of each bucket, float64 [num_buckets], p and q being the shares of the counts."""
    p, q = target / target.sum(), raw / raw.sum()
    return np.log(p + _SMOOTHING) - np.log(q + _SMOOTHING)


def _blocks(shard: Shard, ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens of the sequences, and the place in `ids` of each one's sequence."""
    lengths = shard.sequence_lengths[ids].astype(np.int64)
    numbers = np.cumsum(lengths) // BLOCK_TOKENS
    bounds = np.flatnonzero(np.diff(numbers, prepend=-1, append=-1))
    for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        sizes = lengths[first:last]
        if not (total := int(sizes.sum())):
            continue
        origins = shard.sequence_offsets[ids[first:last]] // shard.dtype.itemsize - (np.cumsum(sizes) - sizes)
        yield shard.tokens[np.repeat(origins, sizes) + np.arange(total)], np.repeat(np.arange(first, last), sizes)
