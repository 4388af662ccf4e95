"""Token shards in Megatron's IndexedDataset format, read and written with numpy alone.

A shard is a pair PREFIX.bin (token ids, one after the other) and PREFIX.idx:

    9 bytes  b"MMIDIDX\\0\\0"     8  version = 1       1  dtype code (4: int32, 8: uint16, ...)
    8        num_sequences       8  num_documents + 1
    int32 [num_sequences] lengths, int64 [num_sequences] byte offsets, int64 [num_documents + 1] document starts

The unit of selection is a sequence. A document may be cut into several sequences.
"""

import os
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bliss.artifacts import (
    atomic_write,
    digest_blocks,
    digest_bytes,
    digest_file,
    fsync_directory,
)
from megatron_bliss.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_HEADER_BYTES = 34


def token_dtype(vocab_size: int) -> type[np.generic]:
    """The dtype Megatron's own tools choose for a vocabulary: uint16 where it fits, int32 elsewhere."""
    return np.uint16 if vocab_size < 65500 else np.int32


class Shard:
    """One shard, memory-mapped. Opening checks that both files fit together.

    :raises UserError: if a file is missing, truncated or not in the format.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.idx_path, self.bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise UserError(f"shard {prefix}: {path} does not exist (give the path without .bin or .idx)")
        with open(self.idx_path, "rb") as stream:
            header = stream.read(_HEADER_BYTES)
        if len(header) < _HEADER_BYTES or header[:9] != _MAGIC:
            raise UserError(f"{self.idx_path} is not a Megatron index (bad header); build the shard again")
        version, code, num_sequences, num_document_ends = struct.unpack("<QBQQ", header[9:])
        if version != 1 or code not in _DTYPES:
            raise UserError(
                f"{self.idx_path} has version {version} and dtype code {code}; only version 1 with "
                f"integer tokens (codes {sorted(_DTYPES)}) can be read"
            )
        expected = _HEADER_BYTES + 12 * num_sequences + 8 * num_document_ends
        if self.idx_path.stat().st_size != expected:
            raise UserError(
                f"{self.idx_path} has {self.idx_path.stat().st_size} bytes, its header promises {expected}: "
                "the file is truncated or damaged; copy or build the shard again"
            )
        self.dtype = np.dtype(_DTYPES[code])
        self.sequence_lengths: np.ndarray = _map(self.idx_path, np.int32, _HEADER_BYTES, num_sequences)
        self.sequence_offsets: np.ndarray = _map(
            self.idx_path, np.int64, _HEADER_BYTES + 4 * num_sequences, num_sequences
        )
        self.document_starts: np.ndarray = _map(
            self.idx_path, np.int64, _HEADER_BYTES + 12 * num_sequences, num_document_ends
        )
        # the last sequence ends the file; a sum would read the lengths of the whole pool at every start
        self.num_tokens = (
            int(self.sequence_offsets[-1]) // self.dtype.itemsize + int(self.sequence_lengths[-1]) if len(self) else 0
        )
        bin_bytes = self.bin_path.stat().st_size
        if bin_bytes != self.num_tokens * self.dtype.itemsize:
            raise UserError(
                f"{self.bin_path} has {bin_bytes} bytes, its index promises "
                f"{self.num_tokens * self.dtype.itemsize}: one of the two was truncated or replaced"
            )
        self.tokens: np.ndarray = _map(self.bin_path, self.dtype, 0, self.num_tokens)

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def __getitem__(self, sequence_id: int) -> np.ndarray:
        """Token ids of a sequence: [length], the shard's dtype, a view of the memory map."""
        start = int(self.sequence_offsets[sequence_id]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.sequence_lengths[sequence_id])]


def _map(path: Path, dtype: Any, offset: int, count: int) -> np.ndarray:
    if count == 0:
        return np.empty(0, dtype=dtype)
    # a plain view of it: each index into a np.memmap itself goes through Python
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,)).view(np.ndarray)


def read_lengths(prefix: str | Path, start: int, stop: int) -> np.ndarray:
    """Tokens of the sequences with ids in [start, stop) of a shard that was opened before: int32 [stop - start].

    Read, not mapped: what goes through all lengths of a pool would hold all of them in memory.
    """
    offset = _HEADER_BYTES + 4 * start
    lengths: np.ndarray = np.fromfile(f"{prefix}.idx", dtype=np.int32, count=stop - start, offset=offset)
    return lengths


class ShardWriter:
    """Writes a shard; both files appear, complete and fsynced, only when the `with` block ends without an error."""

    def __init__(self, prefix: str | Path, dtype: Any) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        self._lengths: list[int] = []
        self._document_starts = [0]

    def __enter__(self) -> "ShardWriter":
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._temporary = Path(f"{self.prefix}.bin.{os.getpid()}.tmp")
        self._stream = open(self._temporary, "wb")
        return self

    def add_document(self, sequences: Iterable[Sequence[int] | np.ndarray]) -> None:
        """Append a document as the sequences it was cut into; each is [length] token ids."""
        for sequence in sequences:
            tokens = np.asarray(sequence, dtype=self.dtype)
            self._stream.write(tokens.tobytes())
            self._lengths.append(len(tokens))
        self._document_starts.append(len(self._lengths))

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            self._stream.close()
            self._temporary.unlink(missing_ok=True)
            return
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        lengths = np.array(self._lengths, dtype=np.int32)
        offsets = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1], out=offsets[1:], dtype=np.int64)
        with atomic_write(Path(f"{self.prefix}.idx")) as stream:
            stream.write(_MAGIC)
            stream.write(struct.pack("<QBQQ", 1, _CODES[self.dtype.type], len(lengths), len(self._document_starts)))
            stream.write(lengths.tobytes())
            stream.write((offsets * self.dtype.itemsize).tobytes())
            stream.write(np.array(self._document_starts, dtype=np.int64).tobytes())
            # the index names the tokens, so they must be in place before it
            os.replace(self._temporary, f"{self.prefix}.bin")
        fsync_directory(Path(self.prefix).parent)


@dataclass(frozen=True)
class ShardRecord:
    """What a run remembers of a shard, to notice when it changes."""

    name: str
    domain: str
    prefix: str
    dtype: str
    num_sequences: int
    num_tokens: int
    idx_sha256: str
    bin_sha256: str
    stat: list[int]  # bytes and mtime_ns of .idx, bytes and mtime_ns of .bin
    mask_sha256: str | None = None  # of PREFIX.mask, for a validation or test set that has one
    blocks_sha256: str | None = None  # of evenly spaced blocks of .idx and .bin

    @property
    def digest(self) -> str:
        """Of the tokens, whatever carries loss among them."""
        return digest_bytes(self.idx_sha256.encode(), self.bin_sha256.encode())


def _stat(prefix: str) -> list[int]:
    idx, data = os.stat(f"{prefix}.idx"), os.stat(f"{prefix}.bin")
    return [idx.st_size, idx.st_mtime_ns, data.st_size, data.st_mtime_ns]


def _digests(prefix: str) -> tuple[str, str]:
    return digest_file(Path(f"{prefix}.idx")), digest_file(Path(f"{prefix}.bin"))


def _blocks(prefix: str) -> str:
    return digest_bytes(*(digest_blocks(Path(f"{prefix}{suffix}")).encode() for suffix in (".idx", ".bin")))


def _check_lengths(shard: Shard) -> None:
    """:raises UserError: if the sequences do not follow one another without a gap."""
    total = int(shard.sequence_lengths.sum(dtype=np.int64))
    if total != shard.num_tokens:
        raise UserError(
            f"{shard.idx_path} has sequences of {total} tokens in all, but the last one ends at token "
            f"{shard.num_tokens}; build the shard again"
        )


def take_inventory(prefixes_by_domain: dict[str, list[str]], num_threads: int = 4) -> list[ShardRecord]:
    """Open, check and hash every shard of the pool. Names are the files' own; equal ones get part of their digest.

    :raises UserError: for a bad shard, or one that is listed twice.
    """
    entries = [
        (domain, os.path.abspath(prefix)) for domain, prefixes in prefixes_by_domain.items() for prefix in prefixes
    ]
    with ThreadPoolExecutor(num_threads) as pool:
        shards = list(pool.map(lambda entry: Shard(entry[1]), entries))
        digests = list(pool.map(lambda entry: _digests(entry[1]), entries))
    basenames = [Path(prefix).name for _, prefix in entries]
    records: list[ShardRecord] = []
    seen: dict[str, str] = {}
    for (domain, prefix), shard, (idx, data), base in zip(entries, shards, digests, basenames, strict=True):
        name = base if basenames.count(base) == 1 else f"{base}-{digest_bytes(idx.encode(), data.encode())[:12]}"
        if name in seen:
            raise UserError(f"shards {seen[name]} and {prefix} are the same data: list it once")
        seen[name] = prefix
        _check_lengths(shard)
        sizes = (shard.dtype.name, len(shard), shard.num_tokens)
        records.append(
            ShardRecord(name, domain, prefix, *sizes, idx, data, _stat(prefix), blocks_sha256=_blocks(prefix))
        )
    return records


def verify_shard(record: ShardRecord, in_full: bool = True) -> Shard:
    """Open a shard and make sure that it is the one of the inventory: size and time, or else the digest.

    :param in_full: whether the digest is that of all bytes. Evenly spaced blocks take no time, whatever the size, and
        tell other data from the same; they are enough where every rank of a training looks at a shard that was copied.
    :raises UserError: if its bytes changed.
    """
    shard = Shard(record.prefix)
    if _stat(record.prefix) == record.stat:
        return shard
    if in_full or record.blocks_sha256 is None:
        is_same = _digests(record.prefix) == (record.idx_sha256, record.bin_sha256)
    else:
        is_same = _blocks(record.prefix) == record.blocks_sha256
    if not is_same:
        raise UserError(
            f"shard {record.prefix} is not the one this run was started with (its digest changed); restore it, "
            "or start a new run directory"
        )
    return shard
