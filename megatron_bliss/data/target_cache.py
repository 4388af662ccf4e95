"""What a target says of a round's bilevel sample: the k largest log-probabilities of every token and that of the rest.

A directory holds chunks of outer steps. A chunk is three numpy files, read through memory maps:

    chunk-00000.ids.npy          [tokens, k]       uint16, int32 where the vocabulary needs it; most likely first
    chunk-00000.log_probs.npy    [tokens, k + 1]   float32; the last is that of all other ids together
    chunk-00000.offsets.npy      [sequences + 1]   int64; where each sequence's tokens begin

Sequences lie in the order the loop draws them, step by step; a sequence of L tokens has L − 1 predicted ones.
`chunk-00000.json` is written after the three, with their digests; `purpose.json` says before all else what the cache is
of, and `manifest.json`, when all chunks are there, repeats it with a digest over them. A killed writer goes on with the
chunks that have no record.

Megatron's cached-logits distillation streams archives of pickled tensors in the order of its own training run; these
files are plain arrays, are found by outer step, and name the target and the sample they are of.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bliss.artifacts import atomic_write, digest_file, digest_json, read_json, write_json
from megatron_bliss.errors import UserError

CHUNK_STEPS = 8  # outer steps in a chunk: what a killed writer does again at most
_PARTS = ("ids", "log_probs", "offsets")

Known = tuple[np.ndarray, np.ndarray]  # ids [tokens, k], log-probabilities [tokens, k + 1]


@dataclass(frozen=True)
class Purpose:
    """What a cache is of; another one is of no use."""

    target: str  # digest of the checkpoint
    sample: str  # digest of what the draws are a function of
    steps: int  # outer steps
    batch_size: int  # sequences of an outer step
    top_k: int
    vocab_size: int

    @property
    def num_chunks(self) -> int:
        return -(-self.steps // CHUNK_STEPS)

    def steps_of(self, chunk: int) -> range:
        return range(chunk * CHUNK_STEPS, min((chunk + 1) * CHUNK_STEPS, self.steps))


def id_dtype(vocab_size: int) -> type[np.generic]:
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


def bytes_per_token(top_k: int, vocab_size: int) -> int:
    """On disk."""
    return top_k * np.dtype(id_dtype(vocab_size)).itemsize + 4 * (top_k + 1)


class CacheWriter:
    """Writes a cache, by any number of processes that share out the chunks."""

    def __init__(self, directory: Path, purpose: Purpose) -> None:
        self.directory, self.purpose = Path(directory), purpose

    def start(self) -> None:
        """Make the directory ready; a cache of another purpose is removed. One process calls it, before all others."""
        path = self.directory / "purpose.json"
        found = read_json(path)["purpose"] if path.exists() else None
        if found == asdict(self.purpose):
            return
        if self.directory.exists():
            if found is not None:
                changed = sorted(name for name, value in asdict(self.purpose).items() if found.get(name) != value)
                print(f"[cache-target] starting afresh: {self.directory} was of another {' and '.join(changed)}")
            shutil.rmtree(self.directory)
        write_json(path, {"schema": 1, "purpose": asdict(self.purpose)})

    def pending(self) -> list[int]:
        """Chunks without a record."""
        return [n for n in range(self.purpose.num_chunks) if not _path(self.directory, n, "json").exists()]

    def write(self, chunk: int, known: list[Known]) -> None:
        """:param known: of every sequence of the chunk, in the order they are drawn."""
        assert len(known) == len(self.purpose.steps_of(chunk)) * self.purpose.batch_size
        arrays = {
            "ids": np.concatenate([ids for ids, _ in known]).astype(id_dtype(self.purpose.vocab_size)),
            "log_probs": np.concatenate([log_probs for _, log_probs in known]).astype(np.float32),
            "offsets": np.cumsum([0, *(len(ids) for ids, _ in known)], dtype=np.int64),
        }
        for part, array in arrays.items():
            with atomic_write(_path(self.directory, chunk, part)) as stream:
                np.save(stream, array, allow_pickle=False)
        digests = {part: digest_file(_path(self.directory, chunk, part)) for part in _PARTS}
        write_json(_path(self.directory, chunk, "json"), {"schema": 1, "sha256": digests})

    def finish(self) -> None:
        """Write the manifest. One process calls it, after all chunks are written."""
        assert not self.pending()
        manifest = self.directory / "manifest.json"
        if not manifest.exists():
            records = [_record(self.directory, chunk) for chunk in range(self.purpose.num_chunks)]
            write_json(manifest, {"schema": 1, "purpose": asdict(self.purpose), "sha256": digest_json(records)})


class TargetCache:
    """A finished cache, opened for reading.

    :param purpose: what it has to be of.
    :raises UserError: if it is missing, unfinished, or of something else.
    """

    def __init__(self, directory: Path, purpose: Purpose) -> None:
        self.directory, self.purpose = Path(directory), purpose
        if not (self.directory / "manifest.json").exists():
            raise UserError(f"{directory} is missing or not finished; run the stage cache-target for this round")
        self._manifest = read_json(self.directory / "manifest.json")
        found, wanted = self._manifest["purpose"], asdict(purpose)
        if changed := sorted(name for name, value in wanted.items() if found.get(name) != value):
            raise UserError(
                f"{directory} was made with another {' and '.join(changed)}; run the stage cache-target again for "
                "this round"
            )
        self._chunk: tuple[int, dict[str, np.ndarray]] = (-1, {})

    @property
    def digest(self) -> str:
        return digest_json(self._manifest)

    def read(self, step: int, rows: range) -> list[Known]:
        """Of some sequences of a 0-based outer step, views of the memory maps.

        :raises UserError: if a file is not what was written.
        """
        chunk, first = step // CHUNK_STEPS, step % CHUNK_STEPS * self.purpose.batch_size
        if self._chunk[0] != chunk:
            self._chunk = (chunk, self._open(chunk))
        maps = self._chunk[1]
        spans = [slice(*maps["offsets"][first + row : first + row + 2].tolist()) for row in rows]
        return [(maps["ids"][span], maps["log_probs"][span]) for span in spans]

    def _open(self, chunk: int) -> dict[str, np.ndarray]:
        """Memory maps of a chunk, whose bytes are read once before: digests are compared, and the pages are there."""
        expected = _record(self.directory, chunk)
        for part in _PARTS:
            path = _path(self.directory, chunk, part)
            if not path.exists() or digest_file(path) != expected[part]:
                raise UserError(
                    f"{path} is not what was written; remove {self.directory} and run the stage cache-target again"
                )
        return {part: np.load(_path(self.directory, chunk, part), mmap_mode="r", allow_pickle=False) for part in _PARTS}


def _path(directory: Path, chunk: int, part: str) -> Path:
    suffix = part if part == "json" else f"{part}.npy"
    return directory / f"chunk-{chunk:05d}.{suffix}"


def _record(directory: Path, chunk: int) -> dict[str, Any]:
    return dict(read_json(_path(directory, chunk, "json"))["sha256"])
