"""`prepare`: Megatron's index files for a round's training, built by a CPU job before the GPU job starts.

`round-N/indices.json` is written when all of them are in place, and says what they were built from.
"""

from pathlib import Path

from megatron_bliss.artifacts import RunPaths, digest_json, read_json, write_json
from megatron_bliss.config import read_saved_config
from megatron_bliss.data.selection import Selection
from megatron_bliss.mcore.arguments import Files, training_arguments
from megatron_bliss.mcore.build_ahead import build_ahead
from megatron_bliss.mcore.script import PACKAGED_SCRIPT
from megatron_bliss.stages.pretrain import line_and_selection, write_blends


def run(run_dir: Path, round_number: int) -> None:
    """Build the files that `pretrain` will look for, unless they are there; round 0 is the warm-up.

    :raises UserError: if the selection or settings cannot be used.
    """
    paths = RunPaths(Path(run_dir))
    config = read_saved_config(paths.config)
    save, selection = line_and_selection(paths, round_number)
    record = paths.indices(round_number)
    # of its own: the training of an earlier round may be reading its file
    blends = record.with_name("indices-data.json")
    arguments = training_arguments(config, Files(blends, paths.index_cache, save))
    sources = {
        "selection": Selection.open(selection).digest,
        "arguments": digest_json([config.target.script, arguments]),
    }
    if _is_complete(record, sources, paths.index_cache):
        print(f"[prepare] the index files of {selection} are there", flush=True)
        return
    record.unlink(missing_ok=True)
    write_blends(blends, selection, config)
    start = config.round_end(round_number - 1) if round_number else 0
    built = build_ahead(Path(config.target.script or PACKAGED_SCRIPT), arguments, selection, start)
    sizes = {path.name: path.stat().st_size for path in built}
    write_json(record, {"schema": 1, "sources": sources, "files": sizes})
    print(f"[prepare] {len(sizes)} index files, {sum(sizes.values()) / 1e6:.1f} MB, in {paths.index_cache}", flush=True)


def _is_complete(record: Path, sources: dict[str, str], cache: Path) -> bool:
    """Whether all files were built from these sources, and are still there."""
    if not record.exists():
        return False
    known = read_json(record)
    return bool(known.get("sources") == sources) and all(
        (cache / name).is_file() and (cache / name).stat().st_size == size for name, size in known["files"].items()
    )
