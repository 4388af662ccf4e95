"""Runs a Megatron training script, unmodified, on this machine and on a selection: one code path for `hooks.py` and
the stages. It imports neither torch nor Megatron before the script's own surroundings are in place."""

import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_bliss.errors import UserError
from megatron_bliss.mcore.arguments import refuse_flags

PACKAGED_SCRIPT = Path(__file__).with_name("pretrain_gpt.py")


def run_script(
    script: Path, arguments: Sequence[str], selection: Path | None, before: Callable[[], None] | None = None
) -> None:
    """Run `script` as `__main__` with `arguments`; its training data is the selection, or all of it for None.

    :param before: called when Megatron can be imported, and the script has not been yet.
    :raises UserError: if the script does not exist, it or an argument bypasses the selection, or the two do not fit.
    :raises SystemExit: where the script ends with one, as Megatron does at a phase transition (code 0).
    """
    if not script.is_file():
        raise UserError(f"script {script} does not exist; give the path of a training script such as pretrain_gpt.py")
    if selection is not None:
        refuse_flags(arguments)
    if script != PACKAGED_SCRIPT:
        # as for `python SCRIPT`: what lies beside the script is found first, a Megatron of its own included
        sys.path.insert(0, str(script.resolve().parent))
    describe_single_process()

    from megatron_bliss.mcore import platform

    platform.install()
    if selection is not None:
        from megatron_bliss.data.selection import Selection
        from megatron_bliss.mcore import dataset

        dataset.install(Selection.open(selection, in_full=False))
    if before is not None:
        before()
    added = platform.training_flags(arguments)
    if added and os.environ["RANK"] == "0":
        print(f"> added for what this machine has: {' '.join(added)}", flush=True)
    sys.argv = [str(script), *arguments, *added]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise
        _check_selection_used(script, selection)
        raise
    _check_selection_used(script, selection)


def _check_selection_used(script: Path, selection: Path | None) -> None:
    # other ranks of a tensor-parallel group need not build datasets
    if selection is not None and os.environ["RANK"] == "0":
        from megatron_bliss.mcore import dataset

        dataset.check_used(str(script))


def describe_single_process() -> None:
    """What torchrun tells its processes, for a script that was started without it."""
    if "RANK" in os.environ:
        return
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    # port 0: the store takes a free one as it opens it; one that is looked for before may be gone by then
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
