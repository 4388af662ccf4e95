"""A selection: which sequences of which shards to train on, and in which blend.

    selection/NAME.npy         int32, ascending ids of the kept sequences of a shard
    selection/manifest.json    the shards, what was kept of each, the blend, and what the selection came from

A selection is whole when its manifest is there: the manifest is written last and removed first.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bliss.artifacts import atomic_write, digest_file, digest_json, read_json, write_json
from megatron_bliss.data.shards import ShardRecord, verify_shard
from megatron_bliss.errors import UserError


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
    weight: float  # in the blend; 0 where nothing is kept


def write_selection(
    directory: Path,
    shards: Sequence[KeptShard],
    *,
    method: str,
    seed: int,
    fraction: float,
    thresholds: dict[str, float | None],
    blend_policy: str,
    sources: dict[str, str],
) -> None:
    """Write a selection directory.

    :param shards: every shard of the pool, also those nothing is kept of; weights sum to 1.
    :param fraction: of the slice's tokens that was asked for.
    :param thresholds: lowest kept score by domain, None where nothing is kept.
    :param sources: digests of what the selection was made from, by name.
    :raises UserError: if nothing is kept at all.
    """
    if not any(len(shard.ids) for shard in shards):
        raise UserError(
            f"selection {directory} would be empty: {fraction} of the slice's tokens is less than one sequence; "
            "use a larger pool, fewer rounds or a larger fraction"
        )
    manifest_path = Path(directory) / "manifest.json"
    manifest_path.unlink(missing_ok=True)
    entries = []
    for shard in shards:
        path = Path(directory) / f"{shard.record.name}.npy"
        with atomic_write(path) as stream:
            np.lib.format.write_array(stream, shard.ids.astype(np.int32), allow_pickle=False)
        entries.append(
            {
                "record": asdict(shard.record),
                "digest": shard.record.digest,
                "ids_sha256": digest_file(path),
                "weight": shard.weight,
                "counts": asdict(shard.counts),
            }
        )
    write_json(
        manifest_path,
        {
            "schema": 1,
            "method": method,
            "seed": seed,
            "fraction": fraction,
            "thresholds": {domain: _finite(threshold) for domain, threshold in thresholds.items()},
            "blend_policy": blend_policy,
            "sources": sources,
            "shards": entries,
        },
    )


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
        """:param in_full: as of `verify_shard`.
        :raises UserError: if the selection is unfinished or damaged, or a shard is not the one it was made from.
        """
        directory = Path(directory)
        manifest = read_json(directory / "manifest.json")
        shards = []
        for entry in manifest["shards"]:
            record = ShardRecord(**entry["record"])
            verify_shard(record, in_full)
            path = directory / f"{record.name}.npy"
            if not path.is_file() or digest_file(path) != entry["ids_sha256"]:
                raise UserError(f"{path} is missing or changed since it was written; run the select stage again")
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
            counts = Counts(**entry["counts"])
            fits = ids.dtype == np.int32 and ids.shape == (counts.kept_sequences,) and (ids[1:] > ids[:-1]).all()
            if not fits or (len(ids) and not 0 <= ids[0] <= ids[-1] < record.num_sequences):
                raise UserError(
                    f"{path} does not hold {counts.kept_sequences} ascending int32 ids below {record.num_sequences}; "
                    "run the select stage again"
                )
            shards.append(KeptShard(record, ids, counts, entry["weight"]))
        return cls(directory, manifest, shards)

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

    @property
    def blend(self) -> list[tuple[float, str]]:
        """(weight, prefix) of every shard of which something is kept; the weights sum to 1."""
        return [(shard.weight, shard.record.prefix) for shard in self.shards if len(shard.ids)]

    @property
    def dropped(self) -> list[str]:
        """Prefixes of the shards of which nothing is kept."""
        return [shard.record.prefix for shard in self.shards if not len(shard.ids)]

    @property
    def domains(self) -> dict[str, Counts]:
        """What was kept, by domain."""
        totals: dict[str, Counts] = {}
        for shard in self.shards:
            totals[shard.record.domain] = totals.get(shard.record.domain, Counts(0, 0, 0, 0)) + shard.counts
        return totals

    @property
    def counts(self) -> Counts:
        """What was kept, in all."""
        return sum(self.domains.values(), Counts(0, 0, 0, 0))


def _real_file(prefix: str | Path) -> str:
    return os.path.realpath(f"{prefix}.bin")
