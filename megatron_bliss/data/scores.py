"""Score files: one float32 number a sequence, higher is better, NaN where nothing was scored.

    scores/NAME.npy        float32 [num_sequences], one file a shard, written in place through a memory map
    scores/manifest.json   what the numbers are, whose they are, and which chunks are on disk

A chunk is `chunk_sequences` of the wanted ids of one shard, in ascending order. It is written, flushed to disk, and
then recorded, so that after a kill nothing recorded is missing; chunks need not come in order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bliss.artifacts import atomic_write, digest_bytes, digest_json, read_json, write_json
from megatron_bliss.data.shards import ShardRecord
from megatron_bliss.errors import UserError

DIRECTION = "higher is better"
_FILL_CHUNK = 1 << 20


@dataclass(frozen=True)
class Chunk:
    """A piece of scoring work."""

    record: ShardRecord
    number: int
    ids: np.ndarray  # int32 ascending


class ScoreWriter:
    """Writes score files, by one process; continues what a directory already holds of the same scores.

    Whatever was scored for another purpose (method, model, seed, data) is thrown away and started afresh.

    :param wanted: ids to score, int32 ascending, by shard name; shards without any get no file.
    :param model_digest: of the checkpoint whose output the scores are.
    """

    def __init__(
        self,
        directory: Path,
        records: list[ShardRecord],
        wanted: dict[str, np.ndarray],
        *,
        method: str,
        model_digest: str,
        seed: int,
        chunk_sequences: int,
    ) -> None:
        self.directory = Path(directory)
        self._records = [record for record in records if len(wanted.get(record.name, ()))]
        self._wanted = wanted
        self._chunk_sequences = chunk_sequences
        purpose: dict[str, Any] = {
            "schema": 1,
            "direction": DIRECTION,
            "method": method,
            "model_digest": model_digest,
            "seed": seed,
            "chunk_sequences": chunk_sequences,
        }
        shards = {
            record.name: {
                "digest": record.digest,
                "num_sequences": record.num_sequences,
                "num_wanted": len(wanted[record.name]),
                "wanted_sha256": digest_bytes(np.ascontiguousarray(wanted[record.name], dtype=np.int32).tobytes()),
            }
            for record in self._records
        }
        self._manifest = self._continued(purpose, shards) or self._started(purpose, shards)

    def _continued(self, purpose: dict[str, Any], shards: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
        """The manifest on disk if it is about these very scores."""
        if not _manifest_path(self.directory).exists():
            return None
        manifest = read_json(_manifest_path(self.directory))
        same = {key: manifest.get(key) for key in purpose} == purpose and manifest["shards"].keys() == shards.keys()
        if not same or any(manifest["shards"][name] | shards[name] != manifest["shards"][name] for name in shards):
            return None
        for record in self._records:
            _map_scores(self.directory, record)
        return manifest

    def _started(self, purpose: dict[str, Any], shards: dict[str, dict[str, Any]]) -> dict[str, Any]:
        _manifest_path(self.directory).unlink(missing_ok=True)  # it must never describe files of another purpose
        for record in self._records:
            _create(_scores_path(self.directory, record), record.num_sequences)
        progress = {"num_scored": 0, "complete": False, "chunks_done": []}
        manifest = purpose | {"shards": {name: shard | progress for name, shard in shards.items()}}
        write_json(_manifest_path(self.directory), manifest)
        return manifest

    def pending(self) -> Iterator[Chunk]:
        """Chunks that are not on disk yet, shard by shard, ids ascending."""
        for record in self._records:
            ids, done = self._wanted[record.name], set(self._manifest["shards"][record.name]["chunks_done"])
            for number, start in enumerate(range(0, len(ids), self._chunk_sequences)):
                if number not in done:
                    yield Chunk(record, number, ids[start : start + self._chunk_sequences])

    def write(self, chunk: Chunk, scores: np.ndarray) -> None:
        """Put a chunk on disk, then record it.

        :param scores: float32 [len(chunk.ids)].
        :raises UserError: if a score is NaN.
        """
        assert scores.dtype == np.float32
        assert scores.shape == chunk.ids.shape
        if np.isnan(scores).any():
            sequence_id = int(chunk.ids[np.isnan(scores)][0])
            raise UserError(
                f"sequence {sequence_id} of shard {chunk.record.prefix} got NaN as its score; look for a diverged "
                "model or a sequence without any token to predict"
            )
        file = _map_scores(self.directory, chunk.record, mode="r+")
        file[chunk.ids] = scores
        file.flush()
        shard = self._manifest["shards"][chunk.record.name]
        shard["chunks_done"] = sorted({*shard["chunks_done"], chunk.number})
        num_chunks = -(-shard["num_wanted"] // self._chunk_sequences)
        shard["complete"] = len(shard["chunks_done"]) == num_chunks
        shard["num_scored"] = sum(
            min(self._chunk_sequences, shard["num_wanted"] - number * self._chunk_sequences)
            for number in shard["chunks_done"]
        )
        write_json(_manifest_path(self.directory), self._manifest)

    @property
    def num_scored(self) -> int:
        """Sequences on disk, in all shards."""
        return sum(shard["num_scored"] for shard in self._manifest["shards"].values())

    @property
    def num_wanted(self) -> int:
        return sum(shard["num_wanted"] for shard in self._manifest["shards"].values())


class ScoreFiles:
    """Finished score files, opened for reading.

    :raises UserError: if they are missing or unfinished.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self._manifest = read_json(_manifest_path(self.directory))
        for name, shard in self._manifest["shards"].items():
            if not shard["complete"]:
                raise UserError(
                    f"{self.directory}: {shard['num_scored']} of {shard['num_wanted']} sequences of {name} are scored; "
                    "run the score stage again to finish it"
                )
        self.method: str = self._manifest["method"]
        self.model_digest: str = self._manifest["model_digest"]

    @property
    def digest(self) -> str:
        """Of what the scores are of and made by."""
        return digest_json(self._manifest)

    def read(self, record: ShardRecord, ids: np.ndarray) -> np.ndarray:
        """Scores of a shard's sequences: float32 [len(ids)], without NaN.

        :raises UserError: if the file is of another shard, has another length, or lacks one of the scores.
        """
        if not len(ids):
            return np.empty(0, dtype=np.float32)
        shard = self._manifest["shards"].get(record.name)
        if shard is None or shard["digest"] != record.digest:
            raise UserError(
                f"{self.directory} has no scores of shard {record.prefix} as it is now; run the score stage again"
            )
        scores: np.ndarray = _map_scores(self.directory, record)[ids]
        if (num_missing := int(np.isnan(scores).sum())) > 0:
            raise UserError(
                f"{_scores_path(self.directory, record)} has no score for {num_missing} of the {len(ids)} sequences of "
                "the slice; remove the directory and run the score stage again"
            )
        return np.asarray(scores)


def _manifest_path(directory: Path) -> Path:
    return directory / "manifest.json"


def _scores_path(directory: Path, record: ShardRecord) -> Path:
    return directory / f"{record.name}.npy"


def _create(path: Path, num_sequences: int) -> None:
    """A .npy file of NaN; it appears whole."""
    nan = np.full(min(num_sequences, _FILL_CHUNK), np.nan, dtype=np.float32)
    with atomic_write(path) as stream:
        header = {"descr": np.lib.format.dtype_to_descr(nan.dtype), "fortran_order": False, "shape": (num_sequences,)}
        np.lib.format.write_array_header_1_0(stream, header)
        for start in range(0, num_sequences, _FILL_CHUNK):
            stream.write(nan[: num_sequences - start].tobytes())


def _map_scores(directory: Path, record: ShardRecord, mode: Any = "r") -> np.memmap:
    """:raises UserError: if the file is missing, damaged, or does not fit the shard."""
    path = _scores_path(directory, record)
    remedy = f"remove {directory} and run the score stage again"
    try:
        scores = np.load(path, mmap_mode=mode, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read as a numpy file ({error}); {remedy}") from None
    if scores.dtype != np.float32 or scores.shape != (record.num_sequences,):
        raise UserError(
            f"{path} is {scores.dtype} {list(scores.shape)}, its shard needs float32 [{record.num_sequences}]; {remedy}"
        )
    return scores
