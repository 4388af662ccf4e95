"""Where Megatron's checkpoints lie, told from names alone: nothing here imports torch or Megatron.

DIRECTORY/iter_0000010/                       one checkpoint, whole when its metadata.json is there
DIRECTORY/latest_checkpointed_iteration.txt   the newest one's iteration, written last
DIRECTORY-stops.json                          which of them were made only because the training was stopped there
"""

import re
import shutil
from pathlib import Path

from megatron_bliss.artifacts import atomic_write, read_json, write_json
from megatron_bliss.errors import UserError

LATEST = "latest_checkpointed_iteration.txt"


def read_iteration(directory: Path) -> int | None:
    """Iteration of the newest checkpoint, or None."""
    try:
        text = (Path(directory) / LATEST).read_text().strip()
    except FileNotFoundError:
        return None
    if text.isdecimal():
        return int(text)
    # Megatron writes the file in place, as its last act: it was killed there
    return max(iterations(directory), default=None)


def mend_latest(directory: Path) -> None:
    """Name the newest checkpoint again where a kill left that file empty, which Megatron cannot read."""
    latest = Path(directory) / LATEST
    if latest.is_file() and not latest.read_text().strip():
        if (iteration := read_iteration(directory)) is None:
            latest.unlink()
            return
        write_iteration(directory, iteration)


def write_iteration(directory: Path, iteration: int) -> None:
    """Name the newest checkpoint."""
    with atomic_write(Path(directory) / LATEST, "w") as stream:
        stream.write(str(iteration))


def find(directory: Path) -> Path:
    """The iter_… directory of the newest checkpoint, or `directory` if it is one itself.

    :raises UserError: if there is none.
    """
    directory = Path(directory)
    if (directory / "metadata.json").is_file():
        return directory
    iteration = read_iteration(directory)
    if iteration is None or not (iteration_path(directory, iteration) / "metadata.json").is_file():
        raise UserError(f"{directory} holds no complete checkpoint; run the stage that writes it first")
    return iteration_path(directory, iteration)


def iteration_path(directory: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration lies."""
    return Path(directory) / f"iter_{iteration:07d}"


def iterations(directory: Path) -> list[int]:
    """Of all complete checkpoints, ascending."""
    found = [re.fullmatch(r"iter_(\d+)", path.parent.name) for path in Path(directory).glob("iter_*/metadata.json")]
    return sorted(int(match[1]) for match in found if match)


def passing(directory: Path) -> list[int]:
    """Iterations whose checkpoints were made only because the training was stopped there; they do not stay."""
    path = _stops(directory)
    return list(read_json(path)["iterations"]) if path.exists() else []


def note_passing(directory: Path, iteration: int) -> None:
    """To be called before such a checkpoint is written."""
    write_json(_stops(directory), {"schema": 1, "iterations": sorted({*passing(directory), iteration})})


def remove_passing(directory: Path) -> None:
    """Remove those checkpoints, but the newest of all, which a training goes on from."""
    if not (known := passing(directory)):
        return
    newest = read_iteration(directory)
    for iteration in known:
        if iteration != newest:
            shutil.rmtree(iteration_path(directory, iteration), ignore_errors=True)
    if newest in known:
        write_json(_stops(directory), {"schema": 1, "iterations": [newest]})
    else:
        _stops(directory).unlink()


def _stops(directory: Path) -> Path:
    return Path(directory).with_name(f"{Path(directory).name}-stops.json")
