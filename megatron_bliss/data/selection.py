"""A selection: which sequences of which shards to train on, and in which blend.

    selection/NAME.npy         int32, ascending ids of the kept sequences of a shard
    selection/blend.txt        the blend for Megatron's --data-args-path: `weight prefix weight prefix …`
    selection/manifest.json    the shards, what was kept of each, the blend, and what the selection came from

A selection is written beside its place and appears there whole.
"""

import io
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bliss.artifacts import digest_file, digest_json, fsync_directory, read_manifest, write_json
from megatron_bliss.data.shards import ShardRecord, verify_shard
from megatron_bliss.errors import UserError

_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Counts:
    """What was kept, of how much."""

    kept_sequences: int
    kept_tokens: int
    slice_sequences: int  # candidates
    slice_tokens: int

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.kept_sequences + other.kept_sequences,
            self.kept_tokens + other.kept_tokens,
            self.slice_sequences + other.slice_sequences,
            self.slice_tokens + other.slice_tokens,
        )


@dataclass(frozen=True)
class KeptShard:
    """The part of a selection that concerns one shard."""

    record: ShardRecord
    ids: np.ndarray  # int32 ascending
    counts: Counts
    weight: float  # in the blend; 0 where nothing is kept, or sequences without a token


def write_selection(
    directory: Path,
    shards: Sequence[KeptShard],
    *,
    method: str,
    seed: int,
    fraction: float | None,
    thresholds: dict[str, float | None],
    blend_policy: str,
    sources: dict[str, str],
    **facts: Any,
) -> None:
    """Write a selection directory from ids in memory. The arguments are those of `write_manifest`.

    :raises UserError: if nothing is kept at all, or the directory cannot be written.
    """
    facts |= {"method": method, "seed": seed, "fraction": fraction, "blend_policy": blend_policy, "sources": sources}
    with replacing(directory) as staging:
        for shard in shards:
            write_ids(staging / f"{shard.record.name}.npy", [shard.ids])
        write_manifest(staging, shards, thresholds, facts)


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """Yield an empty directory that takes the place of `directory` if the block ends without an error; else it is
    removed, and what was there stays.

    :raises UserError: if it cannot be written, or something else than a selection is there.
    """
    directory = Path(os.path.abspath(directory))  # one that has a name
    staging, former = (directory.with_name(f".{directory.name}.{suffix}") for suffix in ("unfinished", "former"))
    try:
        if not _may_be_replaced(directory):
            raise UserError(f"{directory} holds something else than a selection; remove it, or give another directory")
        for left in (staging, former):  # by a kill
            if left.exists():
                shutil.rmtree(left)
        staging.mkdir(parents=True)
        yield staging
        fsync_directory(staging)
        if directory.exists():
            os.replace(directory, former)
        os.replace(staging, directory)
        fsync_directory(directory.parent)
        shutil.rmtree(former, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"{directory} cannot be written ({error.strerror or error}); make room or change its permissions, and "
            "try again"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _may_be_replaced(directory: Path) -> bool:
    """Whether there is nothing, or a selection: scores have a manifest too, and took hours."""
    if not directory.exists():
        return True
    if not directory.is_dir():
        return False
    if not (directory / _MANIFEST).exists():
        return not any(directory.iterdir())
    try:
        read_manifest(directory, "a selection")
    except UserError:
        return False
    return True


def write_ids(path: Path, parts: Iterable[np.ndarray]) -> None:
    """Write ascending ids, given in parts, as one numpy array of int32, and flush it to disk."""
    count = 0
    with open(path, "wb") as stream:
        stream.write(_header(0))
        for ids in parts:
            stream.write(np.ascontiguousarray(ids, dtype=np.int32).data)
            count += len(ids)
        stream.seek(0)
        stream.write(_header(count))
        stream.flush()
        os.fsync(stream.fileno())


def _header(count: int) -> bytes:
    """Of a .npy file of int32; numpy pads it, so that its length is the same for every count."""
    stream = io.BytesIO()
    description = np.lib.format.dtype_to_descr(np.dtype(np.int32))
    np.lib.format.write_array_header_1_0(stream, {"descr": description, "fortran_order": False, "shape": (count,)})
    return stream.getvalue()


def write_manifest(
    directory: Path, shards: Sequence[KeptShard], thresholds: Mapping[str, float | None], facts: Mapping[str, Any]
) -> None:
    """Write the blend and the manifest of a selection whose ids are there.

    :param shards: every shard of the pool, also those nothing is kept of; weights sum to 1.
    :param thresholds: lowest kept score by domain, None where nothing is kept.
    :param facts: what the selection was made by and from, for the manifest; `sources` holds digests by name.
    :raises UserError: if nothing is kept at all.
    """
    if not any(shard.weight for shard in shards):
        raise UserError(
            "the selection would be empty: what is asked for is less than one sequence; use a larger pool, fewer "
            "rounds or a larger share"
        )
    blend = [(shard.weight, shard.record.prefix) for shard in shards if shard.weight]
    if not any(character.isspace() for _, prefix in blend for character in prefix):  # Megatron splits at spaces
        with open(directory / "blend.txt", "w") as stream:
            stream.writelines(f"{weight!r} {prefix}\n" for weight, prefix in blend)
            stream.flush()
            os.fsync(stream.fileno())
    entries = [
        {
            "record": asdict(shard.record),
            "digest": shard.record.digest,
            "ids_sha256": digest_file(directory / f"{shard.record.name}.npy"),
            "weight": shard.weight,
            "counts": asdict(shard.counts),
        }
        for shard in shards
    ]
    finite = {domain: _finite(threshold) for domain, threshold in thresholds.items()}
    domains = {domain: asdict(counts) for domain, counts in by_domain(shards).items()}
    own = {"schema": 1, "thresholds": finite, "blend": blend, "domains": domains, "shards": entries}
    write_json(directory / _MANIFEST, {**facts, **own})


def by_domain(shards: Iterable[KeptShard]) -> dict[str, Counts]:
    """What was kept, by domain."""
    totals: dict[str, Counts] = {}
    for shard in shards:
        totals[shard.record.domain] = totals.get(shard.record.domain, Counts(0, 0, 0, 0)) + shard.counts
    return totals


def _finite(threshold: float | None) -> float | None:
    """JSON has no infinity; the largest float32 stands for it."""
    largest = float(np.finfo(np.float32).max)
    return None if threshold is None else math.copysign(largest, threshold) if math.isinf(threshold) else threshold


class Selection:
    """A selection that was opened and checked. Ids are memory-mapped."""

    def __init__(self, directory: Path, manifest: dict[str, Any], shards: list[KeptShard]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.shards = shards
        self._by_file = {_real_file(shard.record.prefix): shard for shard in shards}

    @classmethod
    def open(cls, directory: str | Path, in_full: bool = True) -> "Selection":
        """:param in_full: as of `verify_shard`; without, the ids are not read either: `verify_ids` does that.
        :raises UserError: if the selection is unfinished or damaged, or a shard is not the one it was made from.
        """
        directory = Path(directory)
        manifest = read_manifest(directory, "a selection")
        shards = []
        for entry in manifest["shards"]:
            record, counts = ShardRecord(**entry["record"]), Counts(**entry["counts"])
            verify_shard(record, in_full)
            shards.append(KeptShard(record, _map_ids(directory, record, counts), counts, entry["weight"]))
        selection = cls(directory, manifest, shards)
        if in_full:
            for shard in shards:
                selection.verify_ids(shard.record.prefix)
        return selection

    def verify_ids(self, prefix: str | Path) -> None:
        """:raises UserError: if the ids of a shard are not those that were written."""
        shard = self.shard(prefix)
        path = self.directory / f"{shard.record.name}.npy"
        [written] = [
            entry["ids_sha256"] for entry in self.manifest["shards"] if entry["record"]["name"] == shard.record.name
        ]
        if digest_file(path) != written:
            raise _changed(path)
        if not (shard.ids[1:] > shard.ids[:-1]).all():
            raise _misfit(path, shard.record, shard.counts)

    @property
    def digest(self) -> str:
        """Of what defines the data (shards by content, ids, weights), wherever the files lie and however they came."""
        keys = ("digest", "ids_sha256", "weight")
        return digest_json(sorted([entry[key] for key in keys] for entry in self.manifest["shards"]))

    def shard(self, prefix: str | Path) -> KeptShard:
        """:raises UserError: if the selection does not know the shard, under whatever path."""
        found = self._by_file.get(_real_file(prefix))
        if found is None:
            raise UserError(
                f"shard {prefix} is not in selection {self.directory}; train on the shards it was made from: "
                f"{', '.join(shard.record.prefix for shard in self.shards)}"
            )
        return found

    def ids(self, prefix: str | Path) -> np.ndarray:
        """Ids of a shard's kept sequences: int32 [num kept], ascending."""
        return self.shard(prefix).ids

    def domain(self, prefix: str | Path) -> str:
        """Of a shard."""
        return self.shard(prefix).record.domain

    @property
    def blend(self) -> list[tuple[float, str]]:
        """(weight, prefix) of every shard of which something is kept; the weights sum to 1."""
        return [(shard.weight, shard.record.prefix) for shard in self.shards if shard.weight]

    @property
    def dropped(self) -> list[str]:
        """Prefixes of the shards of which nothing is kept."""
        return [shard.record.prefix for shard in self.shards if not shard.weight]

    @property
    def domains(self) -> dict[str, Counts]:
        """What was kept, by domain."""
        return by_domain(self.shards)

    @property
    def counts(self) -> Counts:
        """What was kept, in all."""
        return sum(self.domains.values(), Counts(0, 0, 0, 0))


def _map_ids(directory: Path, record: ShardRecord, counts: Counts) -> np.ndarray:
    path = directory / f"{record.name}.npy"
    try:
        ids: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise _changed(path) from None
    fits = ids.dtype == np.int32 and ids.shape == (counts.kept_sequences,)
    if not fits or (len(ids) and not 0 <= ids[0] <= ids[-1] < record.num_sequences):
        raise _misfit(path, record, counts)
    return ids


def _changed(path: Path) -> UserError:
    return UserError(f"{path} is missing or changed since it was written; run the select stage again")


def _misfit(path: Path, record: ShardRecord, counts: Counts) -> UserError:
    return UserError(
        f"{path} does not hold {counts.kept_sequences} ascending int32 ids below {record.num_sequences}; "
        "run the select stage again"
    )


def _real_file(prefix: str | Path) -> str:
    return os.path.realpath(f"{prefix}.bin")
