"""The shards of a run, as `inventory.json` keeps them: the pool, the validation sets and the test set."""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_bliss.artifacts import digest_json, read_json, write_json
from megatron_bliss.data.shards import ShardRecord


@dataclass(frozen=True)
class Inventory:
    """Names are unique over the pool."""

    pool: list[ShardRecord]
    validation: dict[str, ShardRecord]  # by the name of the set, see `DataConfig.validation_prefixes`
    test: ShardRecord | None

    @classmethod
    def read(cls, path: Path) -> "Inventory":
        """:raises UserError: if the file is missing or not an inventory."""
        content = read_json(path)
        test: dict[str, Any] | None = content["test"]
        sets = content.get("validation_sets") or {"validation": content["validation"]}
        return cls(
            pool=[ShardRecord(**record) for record in content["shards"]],
            validation={name: ShardRecord(**record) for name, record in sets.items()},
            test=ShardRecord(**test) if test else None,
        )

    def write(self, path: Path) -> None:
        """Several validation sets are under `validation_sets`, one alone under `validation`."""
        sets: dict[str, Any] = {name: asdict(record) for name, record in self.validation.items()}
        content = {"schema": 1, "shards": [asdict(record) for record in self.pool]}
        content |= sets if list(sets) == ["validation"] else {"validation_sets": sets}
        write_json(path, content | {"test": asdict(self.test) if self.test else None})

    @property
    def records(self) -> list[ShardRecord]:
        """All of them: pool, validation, test."""
        return [*self.pool, *self.validation.values(), *([self.test] if self.test else [])]

    @cached_property
    def digest(self) -> str:
        """Of the data alone, wherever it lies: shards, and masks of the sets that have one."""
        masks = [[record.name, record.mask_sha256] for record in self.records if record.mask_sha256]
        return digest_json([*([record.name, record.domain, record.digest] for record in self.records), *masks])
