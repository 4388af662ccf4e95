"""Score files: one float32 number a sequence, higher is better, NaN where nothing was scored.

    scores/NAME.npy        float32 [num_sequences], one file a shard, to be memory-mapped
    scores/manifest.json   what the numbers are, whose they are and digests of both; there when all is scored
    scores/.unfinished-…   until then: the same .npy files, a record of each chunk that is on disk, claims

A chunk is `chunk_sequences` of the wanted ids of one shard, in ascending order. It is the unit that workers claim
(`data/claims.py`). Its scores are written straight into the shard's file, flushed to disk, and then recorded with
their digest, so that a kill loses the chunk in work and nothing else. Whoever sees the last chunk recorded checks all
of them against their digests and finishes: files that lost something are mended by scoring those chunks again.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bliss.artifacts import (
    digest_bytes,
    digest_file,
    digest_json,
    fsync_directory,
    read_json,
    read_manifest,
    write_json,
)
from megatron_bliss.data.claims import Claims
from megatron_bliss.data.shards import ShardRecord
from megatron_bliss.data.spans import write_span, writing_to
from megatron_bliss.errors import UserError

DIRECTION = "higher is better"
SCHEMA = 3
_FINISH = "finish"  # the claim of who finishes
_RECORD = ".done"


@dataclass(frozen=True)
class Chunk:
    """A piece of scoring work."""

    record: ShardRecord
    number: int
    ids: np.ndarray  # int32 ascending
    span: tuple[int, int]  # the part of the shard's file that is this chunk's: its ids and those not wanted after them

    @property
    def name(self) -> str:
        return f"{self.record.name}.{self.number}"


class ScoreWriter:
    """Writes score files, alone or beside other processes that do the same; continues what a directory already holds
    of the same scores.

    :param wanted: ids to score, int32 ascending, by shard name; shards without any get no file. Asked for a shard at a
        time, so that it may make them up when asked.
    :param model_digest: of the checkpoint whose output the scores are.
    :param facts: whatever else tells these scores from others, for the manifest.
    :param claim_timeout: seconds without a sign of life after which another worker's chunk is taken over.
    :param replace: finished scores of another purpose (method, model, seed, facts, data) are thrown away.
    :raises UserError: if the directory cannot be written, or holds scores of another purpose that are to be kept.
    """

    def __init__(
        self,
        directory: Path,
        records: list[ShardRecord],
        wanted: Mapping[str, np.ndarray],
        *,
        method: str,
        model_digest: str,
        seed: int,
        chunk_sequences: int,
        facts: Mapping[str, Any] | None = None,
        claim_timeout: float = 300,
        replace: bool = True,
    ) -> None:
        self.directory = Path(directory)
        self._wanted = wanted
        self._chunk_sequences = chunk_sequences
        self._purpose: dict[str, Any] = {
            "schema": SCHEMA,
            "direction": DIRECTION,
            "method": method,
            "model_digest": model_digest,
            "seed": seed,
            "chunk_sequences": chunk_sequences,
            **(facts or {}),
            "shards": {record.name: _described(record, ids) for record in records if len(ids := self._ids(record))},
        }
        self._shards: dict[str, dict[str, Any]] = self._purpose["shards"]
        self._records = [record for record in records if record.name in self._shards]
        self._work = self.directory / f".unfinished-{digest_json(self._purpose)[:16]}"
        with writing_to(self.directory):
            self._start(replace)
        self._claims = Claims(self._work, claim_timeout)

    def _ids(self, record: ShardRecord) -> np.ndarray:
        return self._wanted.get(record.name, np.empty(0, dtype=np.int32))

    def _start(self, replace: bool) -> None:
        if self.is_complete:
            for record in self._records:
                _map_scores(self.directory, record)
            shutil.rmtree(self._work, ignore_errors=True)  # left by a kill after the manifest was written
            return
        if (manifest := self.directory / "manifest.json").exists():
            if not replace:
                what = ", ".join(self._differences(self._manifest() or {})) or "shards"
                raise UserError(f"{self.directory} holds other scores ({what}); give a directory of its own for these")
            manifest.unlink(missing_ok=True)  # nobody may take them for those of this purpose
        self._work.mkdir(parents=True, exist_ok=True)

    def _manifest(self) -> dict[str, Any] | None:
        try:
            return read_manifest(self.directory, "scores", SCHEMA)
        except UserError:
            return None

    def _differences(self, manifest: dict[str, Any]) -> list[str]:
        """What the manifest says otherwise than this purpose, shards aside."""
        return sorted(key for key in self._purpose.keys() - {"shards"} if manifest.get(key) != self._purpose[key])

    @property
    def is_complete(self) -> bool:
        """Whether the directory holds all scores of this purpose, finished."""
        manifest = self._manifest()
        if manifest is None or self._differences(manifest):
            return False
        shards = manifest["shards"]
        return shards.keys() == self._shards.keys() and all(
            shards[name] | shard == shards[name] for name, shard in self._shards.items()
        )

    # --- work

    def pending(self) -> Iterator[Chunk]:
        """Chunks that are not on disk yet, shard by shard, ids ascending, whoever works on them."""
        if self.is_complete:
            return
        recorded = self._recorded()
        for record in self._records:
            for number in range(self._num_chunks(record)):
                if f"{record.name}.{number}" not in recorded:
                    yield self.chunk(record, number)

    def claim(self) -> Chunk | None:
        """A chunk that nobody else works on, to be written or given back; None if there is none, for good
        (`is_complete`) or as long as others do not fail.

        :raises UserError: if the directory cannot be written.
        """
        with self._beside_others():
            return self._claim()
        return None

    def _claim(self) -> Chunk | None:
        if self.is_complete:
            return None
        recorded, claimed = self._recorded(), self._names(".claim")
        for fresh in (True, False):  # first what nobody ever began, then what may have been left
            for record in self._records:
                for number in range(self._num_chunks(record)):
                    name = f"{record.name}.{number}"
                    if name in recorded or (name in claimed) == fresh or not self._claims.take(name):
                        continue
                    if self._record_path(name).exists():  # it was finished in between
                        self._claims.release(name)
                        continue
                    return self.chunk(record, number)
        self._finish_if_all_recorded()
        return None

    def renew(self, chunk: Chunk) -> None:
        """Tell other workers that this one goes on; to be called often."""
        with self._beside_others():
            self._claims.renew(chunk.name)

    def give_back(self, chunk: Chunk) -> None:
        """Let others have a chunk that was claimed and not written."""
        self._claims.release(chunk.name)

    def write(self, chunk: Chunk, scores: np.ndarray) -> None:
        """Put a chunk on disk, then record it; with the last one, finish.

        :param scores: float32 [len(chunk.ids)].
        :raises UserError: if a score is NaN, or the directory cannot be written.
        """
        assert scores.dtype == np.float32
        assert scores.shape == chunk.ids.shape
        if np.isnan(scores).any():
            sequence_id = int(chunk.ids[np.isnan(scores)][0])
            raise UserError(
                f"sequence {sequence_id} of shard {chunk.record.prefix} got NaN as its score; look for a diverged "
                "model or a sequence without any token to predict"
            )
        if self.is_complete:  # by another worker, who took this one for dead
            return
        start, stop = chunk.span
        dense = np.full(stop - start, np.nan, dtype=np.float32)
        dense[chunk.ids - start] = scores
        with self._beside_others():
            write_span(_scores_path(self._work, chunk.record), chunk.record.num_sequences, start, dense)
            write_json(self._record_path(chunk.name), {"schema": 1, "sha256": digest_bytes(dense.tobytes())})
            self._claims.release(chunk.name)
            self._finish_if_all_recorded()

    @contextmanager
    def _beside_others(self) -> Iterator[None]:
        """Another worker may finish at any moment, who removes the directory of work: then there is nothing to do."""
        try:
            with writing_to(self.directory):
                yield
        except FileNotFoundError:
            if not self.is_complete:
                raise

    def chunk(self, record: ShardRecord, number: int) -> Chunk:
        """:param number: 0-based within the shard."""
        return chunk_of(record, self._ids(record), number, self._chunk_sequences)

    def _num_chunks(self, record: ShardRecord) -> int:
        return -(-self._shards[record.name]["num_wanted"] // self._chunk_sequences)

    # --- what is on disk

    def _names(self, suffix: str) -> set[str]:
        """Of the files in work with that suffix, which is left out."""
        return {name.removesuffix(suffix) for name in os.listdir(self._work) if name.endswith(suffix)}

    def _recorded(self) -> set[str]:
        try:
            return self._names(_RECORD)
        except FileNotFoundError:  # finished
            return set()

    def _record_path(self, name: str) -> Path:
        return self._work / f"{name}{_RECORD}"

    @property
    def num_scored(self) -> int:
        """Sequences on disk, in all shards, by all workers."""
        recorded = self._recorded()
        if self.is_complete:
            return self.num_wanted
        return sum(
            min(self._chunk_sequences, self._shards[record.name]["num_wanted"] - number * self._chunk_sequences)
            for record in self._records
            for number in range(self._num_chunks(record))
            if f"{record.name}.{number}" in recorded
        )

    @property
    def num_wanted(self) -> int:
        return sum(shard["num_wanted"] for shard in self._shards.values())

    # --- the end

    def _finish_if_all_recorded(self) -> None:
        """Check every chunk, move the files to their place, write the manifest. One worker does it at a time; where it
        is killed, the next goes on."""
        if len(self._recorded()) < sum(map(self._num_chunks, self._records)) or not self._claims.take(_FINISH):
            return
        try:
            if self.is_complete:  # another worker had the claim before
                return
            digests = {record.name: self._checked(record) for record in self._records}
            if None in digests.values():
                return  # some chunks are to be done again
            for record in self._records:
                with suppress(FileNotFoundError):  # moved before a kill
                    os.replace(_scores_path(self._work, record), _scores_path(self.directory, record))
            fsync_directory(self.directory)
            shards = {name: shard | {"scores_sha256": digests[name]} for name, shard in self._shards.items()}
            write_json(self.directory / "manifest.json", self._purpose | {"shards": shards})
        finally:
            self._claims.release(_FINISH)
        for left in self.directory.glob(".unfinished-*"):
            shutil.rmtree(left, ignore_errors=True)

    def _checked(self, record: ShardRecord) -> str | None:
        """Digest of a shard's file; None if a chunk is not what was recorded, whose record is then removed."""
        place = self._work
        if not _scores_path(place, record).exists() and _scores_path(self.directory, record).exists():
            place = self.directory  # moved before a kill
        try:
            scores = _map_scores(place, record)
        except UserError:
            scores = None  # gone, or too short
        is_whole = True
        for number in range(self._num_chunks(record)):
            self._claims.renew(_FINISH)
            start, stop = self.chunk(record, number).span
            expected = read_json(self._record_path(f"{record.name}.{number}"))["sha256"]
            if scores is None or digest_bytes(scores[start:stop].tobytes()) != expected:
                self._record_path(f"{record.name}.{number}").unlink(missing_ok=True)
                is_whole = False
        return digest_file(_scores_path(place, record)) if is_whole else None


def chunk_of(record: ShardRecord, wanted: np.ndarray, number: int, chunk_sequences: int) -> Chunk:
    """:param wanted: ids of the shard that are to be scored, int32 ascending.
    :param number: 0-based within the shard.
    """
    first, last = number * chunk_sequences, (number + 1) * chunk_sequences
    start = int(wanted[first]) if number else 0
    stop = int(wanted[last]) if last < len(wanted) else record.num_sequences
    return Chunk(record, number, wanted[first:last], (start, stop))


class ScoreFiles:
    """Finished score files, opened for reading.

    :raises UserError: if they are missing or unfinished.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        if not (self.directory / "manifest.json").exists() and list(self.directory.glob(".unfinished-*")):
            raise UserError(f"{self.directory} is not scored to its end; run the score stage again to finish it")
        self._manifest = read_manifest(self.directory, "scores", SCHEMA)
        self.method: str = self._manifest["method"]
        self.model_digest: str = self._manifest["model_digest"]
        self.tokenizer: dict[str, Any] | None = self._manifest.get("tokenizer")

    @property
    def digest(self) -> str:
        """Of the scores, of what they are of and made by."""
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

    def verify(self, record: ShardRecord) -> None:
        """:raises UserError: if a shard's scores, where it has any, are not those that were written."""
        if record.name not in self._manifest["shards"]:
            return
        _map_scores(self.directory, record)  # says what is wrong with a file of another size
        path = _scores_path(self.directory, record)
        if digest_file(path) != self._manifest["shards"][record.name]["scores_sha256"]:
            raise UserError(
                f"{path} has changed since it was scored; remove {self.directory} and run the score stage again"
            )


def _described(record: ShardRecord, ids: np.ndarray) -> dict[str, Any]:
    """A shard's entry in the manifest."""
    return {
        "digest": record.digest,
        "num_sequences": record.num_sequences,
        "num_wanted": len(ids),
        "wanted_sha256": digest_bytes(np.ascontiguousarray(ids, dtype=np.int32).tobytes()),
    }


def _scores_path(directory: Path, record: ShardRecord) -> Path:
    return directory / f"{record.name}.npy"


def _map_scores(directory: Path, record: ShardRecord) -> np.memmap:
    """:raises UserError: if the file is missing, damaged, or does not fit the shard."""
    path = _scores_path(directory, record)
    remedy = f"remove {directory} and run the score stage again"
    try:
        scores = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {remedy}") from None
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read as a numpy file ({error}); {remedy}") from None
    if scores.dtype != np.float32 or scores.shape != (record.num_sequences,):
        raise UserError(
            f"{path} is {scores.dtype} {list(scores.shape)}, its shard needs float32 [{record.num_sequences}]; {remedy}"
        )
    return scores
