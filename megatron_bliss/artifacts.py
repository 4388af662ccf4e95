"""Every file of a run: where it lies, how it is written so that a kill never leaves half of it, digests, the lock.

A run is one directory (DESIGN: RUN/). A control arm is a run of its own under RUN/controls/NAME, with the same
layout, that starts from the warm-up of the run above it.
"""

import fcntl
import hashlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_bliss.errors import UserError

_BLOCK = 1 << 22
_KINDS = {  # a key that only manifests of this kind have, and what writes them
    "a selection": ("blend", "`megatron-bliss select`"),
    "scores": ("chunk_sequences", "`megatron-bliss score` or tools/score_shards.py"),
}


@dataclass(frozen=True)
class RunPaths:
    """Names of everything inside a run directory; creates nothing."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "run.yaml"

    @property
    def state(self) -> Path:
        return self.root / "state.json"

    @property
    def lock(self) -> Path:
        return self.root / "run.lock"

    @property
    def slurm(self) -> Path:
        """Which Slurm jobs were submitted."""
        return self.root / "slurm.json"

    @property
    def stop(self) -> Path:
        """The file that asks stages to stop (`stopping`); the launcher makes and removes it."""
        return self.root / "stop"

    @property
    def nodes(self) -> Path:
        """What the first of several machines tells the others (`orchestration.nodes`)."""
        return self.root / "nodes.json"

    @property
    def inventory(self) -> Path:
        return self.root / "inventory.json"

    @property
    def contamination(self) -> Path:
        """What of the validation sets stands in the pool."""
        return self.root / "contamination.json"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def index_cache(self) -> Path:
        """Megatron's document, sample and shuffle indices."""
        return self.root / "index-cache"

    @property
    def warmup_selection(self) -> Path:
        return self.root / "warmup" / "selection"

    @property
    def warmup_target(self) -> Path:
        return self.root / "warmup" / "target"

    @property
    def warmup_proxy(self) -> Path:
        return self.root / "warmup" / "proxy"

    @property
    def target(self) -> Path:
        return self.root / "target"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def tracking(self) -> Path:
        """wandb's files."""
        return self.root / "tracking"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    def round(self, number: int) -> Path:
        """:param number: 1-based number of the round."""
        return self.root / f"round-{number:04d}"

    def bilevel(self, number: int) -> Path:
        return self.round(number) / "bilevel"

    def influence(self, number: int) -> Path:
        """What steps on single sequences do to the validation loss, measured."""
        return self.round(number) / "influence"

    def influence_model(self, number: int) -> Path:
        """The score model fitted to that."""
        return self.round(number) / "influence-model"

    def ngrams(self, number: int) -> Path:
        return self.round(number) / "ngrams"

    def target_cache(self, number: int) -> Path:
        return self.round(number) / "target-cache"

    def pinned_target(self, number: int) -> Path:
        """Which checkpoint of the LLM a round's selection is made with, where that is not the last of the round before
        (`stages.sources.pin_target`)."""
        return self.round(number) / "target.json"

    def scores(self, number: int) -> Path:
        return self.round(number) / "scores"

    def rollback_scores(self, number: int) -> Path:
        """By an earlier score model, where guards do not trust the round's own."""
        return self.round(number) / "rollback-scores"

    def fidelity(self, number: int) -> Path:
        """What training on single sequences is worth to the LLM and to the proxy, measured on a sample."""
        return self.round(number) / "fidelity"

    def guard(self, number: int) -> Path:
        """What guards did in a round; there only if they did something."""
        return self.round(number) / "guard.json"

    def selection(self, number: int) -> Path:
        return self.round(number) / "selection"

    def indices(self, number: int) -> Path:
        """Which index files were built ahead for a round; 0 is the warm-up."""
        return (self.round(number) if number else self.root / "warmup") / "indices.json"

    def online(self, number: int) -> Path:
        return self.round(number) / "online"

    def training_metrics(self, number: int) -> Path:
        """The LLM's loss by domain while it trains; 0 is the warm-up."""
        return (self.round(number) if number else self.root / "warmup") / "pretrain" / "metrics.jsonl"

    def evaluation(self, number: int) -> Path:
        return self.round(number) / "evaluation"

    def usage(self, command: str, number: int = 0) -> Path:
        """What the calls of a stage took, a line each; 0 for the stages before the first round."""
        return (self.round(number) if number else self.root) / "usage" / f"{command}.jsonl"

    def control(self, name: str) -> "RunPaths":
        return RunPaths(self.root / "controls" / name)


@contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Yield a file beside `path` that takes its name, fsynced, only when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, mode) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make a rename inside `path` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write atomically; `content` must hold `schema`."""
    assert "schema" in content, "every JSON file of a run names its schema"
    with atomic_write(path, "w") as stream:
        json.dump(content, stream, indent=1, sort_keys=True, allow_nan=False)
        stream.write("\n")


def read_manifest(directory: Path, kind: str, schema: int = 1) -> dict[str, Any]:
    """The manifest of a directory of some kind: a key of `_KINDS`.

    :raises UserError: if it is missing, is not JSON, is of another kind or schema.
    """
    path = Path(directory) / "manifest.json"
    content = _read_object(path)
    found = [name for name, (key, _) in _KINDS.items() if key in content]
    if not found:
        _check_schema(path, content, schema)
    if kind not in found:
        what = f"holds {found[0]}, not {kind}" if found else f"does not hold {kind}"
        raise UserError(f"{directory} {what}; give a directory that {_KINDS[kind][1]} has written")
    _check_schema(path, content, schema)
    return content


def read_json(path: Path, schema: int = 1) -> dict[str, Any]:
    """:raises UserError: if the file is missing, is not JSON, or has another schema."""
    content = _read_object(path)
    _check_schema(path, content, schema)
    return content


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run the stage that writes it first") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give the directory that holds it") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); remove it and run its stage again") from None
    return content if isinstance(content, dict) else {}


def _check_schema(path: Path, content: dict[str, Any], schema: int) -> None:
    if content.get("schema") != schema:
        raise UserError(
            f"{path} has schema {content.get('schema')!r}, this version of megatron-bliss reads schema {schema}"
        )


def digest_bytes(*parts: bytes) -> str:
    """SHA-256 (hex) of the parts, each preceded by its length, so that no two lists of parts collide."""
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()


def digest_json(content: Any) -> str:
    return digest_bytes(json.dumps(content, sort_keys=True).encode())


def digest_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    state = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK):
            state.update(block)
    return state.hexdigest()


def digest_tree(path: Path) -> str:
    """Digest of a checkpoint directory: names and sizes of its files and 64 evenly spaced blocks of each.

    Trained weights differ everywhere, so blocks tell two checkpoints apart, and a checkpoint of any size takes no time.
    """
    files = sorted(file for file in Path(path).rglob("*") if file.is_file())
    return digest_json([[str(file.relative_to(path)), file.stat().st_size, digest_blocks(file)] for file in files])


def digest_blocks(path: Path, num_blocks: int = 64, block: int = 4096) -> str:
    """Digest of evenly spaced blocks of a file, its first and its last among them; of all of a small file."""
    last = max(path.stat().st_size - block, 0)
    state = hashlib.sha256()
    with open(path, "rb") as stream:
        for start in sorted({last * index // (num_blocks - 1) for index in range(num_blocks)}):
            stream.seek(start)
            state.update(stream.read(block))
    return state.hexdigest()


@contextmanager
def run_lock(path: Path) -> Iterator[None]:
    """Hold the run for this process.

    :raises UserError: naming host and process of whoever holds it already.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stream.seek(0)
            holder = stream.read().strip() or "another process"
            raise UserError(f"{path.parent} is in use by {holder}; wait for it, or stop it and run again") from None
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}")
        stream.flush()
        yield
