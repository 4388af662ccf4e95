"""Selections as tables, for people who look at them or select with tools of their own: parquet, row group by row group.

What is written has a row for each candidate of a round:

    shard         string    name in the inventory
    shard_digest  string
    id            int32     of the sequence in its shard
    domain        string
    tokens        int32
    score         float32   as the scores were compared, higher is better; null where there is none
    kept          bool

What is read needs `shard` and `id`; `shard_digest` and `kept` are heeded where they are there.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from megatron_bliss.artifacts import atomic_write
from megatron_bliss.data.shards import ShardRecord
from megatron_bliss.errors import UserError

ROW_GROUP = 1 << 18  # rows
_NAMES = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
_SCHEMA = pyarrow.schema(
    [
        ("shard", _NAMES),
        ("shard_digest", _NAMES),
        ("id", pyarrow.int32()),
        ("domain", _NAMES),
        ("tokens", pyarrow.int32()),
        ("score", pyarrow.float32()),
        ("kept", pyarrow.bool_()),
    ]
)


@dataclass(frozen=True)
class Rows:
    """Some candidates of one shard."""

    record: ShardRecord
    ids: np.ndarray  # int32 [n] ascending
    tokens: np.ndarray  # int32 [n]
    scores: np.ndarray  # float32 [n], NaN where there is none
    kept: np.ndarray  # bool [n]


def write_rows(path: Path, parts: Iterable[Rows], facts: Mapping[str, str]) -> int:
    """Write a table; it appears whole.

    :param facts: for the file's metadata.
    :returns: the number of rows.
    :raises UserError: if the file cannot be written.
    """
    count, schema = 0, _SCHEMA.with_metadata({f"megatron_bliss.{name}": value for name, value in facts.items()})
    try:
        with (
            atomic_write(Path(path)) as stream,
            pyarrow.parquet.ParquetWriter(stream, schema, compression="zstd") as writer,
        ):
            for part in parts:
                writer.write_batch(_batch(part, schema), row_group_size=ROW_GROUP)
                count += len(part.ids)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}); give the name of a file, where there is room"
        ) from None
    return count


def _batch(part: Rows, schema: Any) -> Any:
    def same(value: str) -> Any:
        return pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(len(part.ids), np.int32)), [value])

    record, scores = part.record, pyarrow.array(part.scores, from_pandas=True)  # NaN becomes null
    columns = [same(record.name), same(record.digest), part.ids, same(record.domain), part.tokens, scores, part.kept]
    arrays = [pyarrow.array(column) if isinstance(column, np.ndarray) else column for column in columns]
    return pyarrow.record_batch(arrays, schema=schema)


def read_kept(path: Path, records: Iterable[ShardRecord]) -> dict[str, np.ndarray]:
    """Ids of the kept sequences by shard name: int32 ascending, for all of the records; some may be empty.

    :raises UserError: for a file or row that cannot be used; see the module's text.
    """
    by_name = {record.name: record for record in records}
    found: dict[str, list[np.ndarray]] = {name: [] for name in by_name}
    for columns in _read(path):
        for name in np.unique(columns["shard"]):
            record = by_name.get(name)
            if record is None:
                known = ", ".join(list(by_name)[:10]) + (" and more" if len(by_name) > 10 else "")
                raise UserError(f"{path} names shard {name!r}, which is not in the pool; its shards are {known}")
            rows = columns["shard"] == name
            if "shard_digest" in columns and (columns["shard_digest"][rows] != record.digest).any():
                raise UserError(
                    f"{path} was made from another shard {name!r} (its digest is not {record.digest[:12]}…); select "
                    "from the shards of this run"
                )
            ids = columns["id"][rows]
            outside = (ids < 0) | (ids >= record.num_sequences)
            if outside.any():
                raise UserError(
                    f"{path} has id {ids[outside][0]} of shard {name!r}, which has sequences 0 to "
                    f"{record.num_sequences - 1}; ids count the sequences of a shard from 0"
                )
            kept = columns["kept"][rows] if "kept" in columns else np.ones(len(ids), dtype=bool)
            found[name].append(ids[kept].astype(np.int32))
    return {name: _ascending(path, name, parts) for name, parts in found.items()}


def _ascending(path: Path, name: str, parts: list[np.ndarray]) -> np.ndarray:
    ids = np.concatenate([np.empty(0, dtype=np.int32), *parts])
    ids.sort()
    again = ids[1:] == ids[:-1]
    if again.any():
        raise UserError(f"{path} has id {ids[1:][again][0]} of shard {name!r} twice; list each sequence once")
    return ids


def _read(path: Path) -> Iterator[dict[str, np.ndarray]]:
    """Checked columns of each part of the file."""
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the path of a parquet file") from None
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{path} cannot be read as parquet ({_line(error)}); write it again") from None
    with file:
        wanted = _checked_columns(path, file.schema_arrow)
        try:
            for batch in file.iter_batches(batch_size=ROW_GROUP, columns=wanted):
                yield {name: _column(path, name, batch.column(name)) for name in wanted}
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise UserError(f"{path} is damaged ({_line(error)}); write it again") from None


def _checked_columns(path: Path, schema: Any) -> list[str]:
    kinds = {
        "shard": ("strings", _is_string),
        "id": ("integers", pyarrow.types.is_integer),
        "shard_digest": ("strings", _is_string),
        "kept": ("booleans", pyarrow.types.is_boolean),
    }
    for name, (kind, holds) in kinds.items():
        if schema.names.count(name) > 1:
            raise UserError(f"{path} has more than one column {name!r}; leave only one")
        if name not in schema.names:
            if name in ("shard", "id"):
                raise UserError(f"{path} has no column {name!r}; it has {', '.join(schema.names)}")
        elif not holds(schema.field(name).type):
            raise UserError(f"{path}: column {name!r} is {schema.field(name).type}; it must hold {kind}")
    return [name for name in kinds if name in schema.names]


def _is_string(kind: Any) -> bool:
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    return str(kind) in ("string", "large_string", "string_view")


def _column(path: Path, name: str, array: Any) -> np.ndarray:
    if array.null_count:
        raise UserError(f"{path}: column {name!r} has rows without a value; fill or drop them")
    values: np.ndarray = array.to_numpy(zero_copy_only=False)
    return values


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
