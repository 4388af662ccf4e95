"""Reads what wandb wrote offline: run-ID.wandb is a LevelDB log of protocol buffers."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_FILE_HEADER, _BLOCK, _CHUNK_HEADER = 7, 32768, 7
_LAST_KINDS = (1, 4)  # of a chunk: a whole record, the last part of one


@dataclass
class OfflineRun:
    """What was sent of one process."""

    run: Any
    history: list[dict[str, Any]] = field(default_factory=list)
    artifacts: list[Any] = field(default_factory=list)


def read(path: Path) -> OfflineRun:
    found = OfflineRun(None)
    for content in _records(path.read_bytes()):
        record = Record.FromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
        elif kind == "history":
            line = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found.history.append({"step": record.history.step.num} | line)
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            found.artifacts.append(record.request.log_artifact.artifact)
        elif kind == "artifact":
            found.artifacts.append(record.artifact)
    return found


def _records(data: bytes) -> Iterator[bytes]:
    place, parts = _FILE_HEADER, b""
    while place + _CHUNK_HEADER <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _CHUNK_HEADER:  # a block's end is padded
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + _CHUNK_HEADER : place + _CHUNK_HEADER + length]
        place += _CHUNK_HEADER + length
        if kind in _LAST_KINDS:
            yield parts
            parts = b""
