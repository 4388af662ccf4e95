"""In which order Megatron reads a selection, told from its own index files.

    HASH-BlendedDataset-train-dataset_index.npy          which dataset the k-th sample of a phase is of
    HASH-BlendedDataset-train-dataset_sample_index.npy   and which of the dataset's samples; no blend: the k-th
    HASH-KIND-train-shuffle_index.npy                    the place of a dataset's sample in its packed stream
    HASH-KIND-train-sample_index.npy                     where a place begins: (entry of the document index, tokens into
                                                         it); it ends one token behind the beginning of the next
    HASH-KIND-train-document_index.npy                   sequence ids in the order in which they are packed

HASH is that of the description beside them, which names the selection by its digest.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bliss.data.selection import Selection
from megatron_bliss.errors import UserError

_BLOCK = 1 << 22  # entries looked at at a time
_DESCRIPTIONS = "*-train-description.txt"


@dataclass(frozen=True)
class TrainingOrder:
    """The order of one phase. Index files are memory-mapped when they are asked for."""

    stems: dict[str, Path]  # by the shard's file: the path of its index files up to HASH-KIND-train
    blend: Path | None  # the same of the blend; None for a single shard
    datasets: list[str]  # the shards' files as the blend numbers them

    @classmethod
    def find(cls, cache: Path, selection: Selection) -> "TrainingOrder | None":
        """That of a selection, or None where its index files have not been built.

        :raises UserError: if the selection was built for more than one training.
        """
        is_blend = len(selection.blend) > 1
        found: list[tuple[Path, list[dict[str, Any]]]] = []
        for path in sorted(cache.glob(_DESCRIPTIONS)):
            description = json.loads(path.read_text())
            parts = description.get("datasets", [description])
            of_it = {part.get("selection_digest") for part in parts} == {selection.digest}
            if of_it and ("datasets" in description) == is_blend:
                found.append((path, parts))
        if not found:
            return None
        if len(found) > 1:
            raise UserError(
                f"{cache} holds the indices of {len(found)} trainings on this selection, so there is no telling which "
                "one was run; remove the files of the others"
            )
        [(path, parts)] = found
        files = [os.path.realpath(f"{part['dataset_path']}.bin") for part in parts]
        stems = {file: cache / _stem(part) for file, part in zip(files, parts, strict=True)}
        return cls(stems, Path(str(path).removesuffix("-description.txt")) if is_blend else None, files)

    def samples(self, prefix: str, sequence_id: int, length: int) -> np.ndarray:
        """Which samples of the phase hold a token of a sequence, be it the label of a sample's last: int64, ascending.

        :param length: of the sequence; nothing of an empty one is in a sample.
        """
        file = os.path.realpath(f"{prefix}.bin")
        if file not in self.stems or not length:
            return np.empty(0, dtype=np.int64)
        stem = self.stems[file]
        entries = _positions(_load(stem, "document_index"), np.array([sequence_id]))
        starts = _load(stem, "sample_index")[:, 0]  # non-decreasing; of the samples, and behind the last one
        # a sample holds the entries from its own start to the next one's, both included
        entries = entries.astype(starts.dtype)  # of another dtype, all starts would be converted
        first = np.maximum(np.searchsorted(starts, entries, "left") - 1, 0)
        last = np.minimum(np.searchsorted(starts, entries, "right") - 1, len(starts) - 2)
        places = np.unique([place for a, b in zip(first, last, strict=True) for place in range(a, b + 1)])
        of_dataset = _positions(_load(stem, "shuffle_index"), places)
        if self.blend is None:
            return of_dataset
        number = self.datasets.index(file)
        datasets, samples = (_load(self.blend, name) for name in ("dataset_index", "dataset_sample_index"))
        return _positions(samples, of_dataset, datasets, number)


def _stem(description: dict[str, Any]) -> str:
    """Megatron's name for the index files of a dataset so described."""
    digest = hashlib.md5(json.dumps(description, indent=4).encode(), usedforsecurity=False).hexdigest()
    return f"{digest}-{description['class']}-train"


def _load(stem: Path, name: str) -> np.ndarray:
    path = Path(f"{stem}-{name}.npy")
    try:
        indices: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise UserError(f"{path} is missing or cut short; remove it and run the prepare stage again") from None
    return indices


def _positions(
    array: np.ndarray, wanted: np.ndarray, others: np.ndarray | None = None, other: int | None = None
) -> np.ndarray:
    """Where an array holds one of the wanted values (and another array the other one): int64, ascending."""
    found = []
    for block in _blocks(len(array)):
        hits = np.isin(array[block], wanted)
        if others is not None:
            hits &= others[block] == other
        found.append(np.flatnonzero(hits) + block.start)
    return np.concatenate([np.empty(0, dtype=np.int64), *found])


def _blocks(length: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK, length)) for start in range(0, length, _BLOCK))
