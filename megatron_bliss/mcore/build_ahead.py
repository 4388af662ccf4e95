"""Builds Megatron's index files of a training's data before the training starts: one process, no GPU, no model.

The training script itself runs, with its own arguments, up to where it calls Megatron's `pretrain()`. In its place the
datasets are built for as many samples as `pretrain()` would ask for, and the script ends. The files are made aside and
take their names when they are whole, the description that makes Megatron look for the others last.
"""

import inspect
import math
import os
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from megatron_bliss.artifacts import fsync_directory
from megatron_bliss.errors import UserError
from megatron_bliss.mcore.checkpoint_files import read_iteration
from megatron_bliss.mcore.script import run_script

_DESCRIPTION = "-description.txt"


def build_ahead(
    script: Path, arguments: Sequence[str], selection: Path | None, iteration: int | None = None
) -> list[Path]:
    """The index files that the training will look for: made, or made anew, in its --data-cache-path.

    WORLD_SIZE in the environment is taken for the number of ranks of the training, which Megatron's defaults depend
    on; without it, there are as many as hold one copy of the model.

    :param iteration: that the training will start at, which decides its phase where the data changes on the way; None:
        that of the newest checkpoint in --load.
    :raises UserError: for bad input, arguments that leave the number of samples open, or a script that does not call
        `pretrain()`.
    """
    _describe_first_rank(arguments)
    builder = _Builder(iteration)
    try:
        run_script(script, arguments, selection, builder.take_the_place_of_pretrain)
    except SystemExit as ended:
        if ended.code:
            raise
    finally:
        builder.remove_partial()
    if builder.built is None:
        raise UserError(
            f"{script} did not call megatron.training.pretrain, so its data cannot be built ahead; "
            "start it without --prepare-only"
        )
    return builder.built


def _describe_first_rank(arguments: Sequence[str]) -> None:
    """Make this process the first rank of a training as the arguments describe it."""
    if "WORLD_SIZE" not in os.environ and _value(arguments, "--global-batch-size") is None:
        raise UserError(
            "--global-batch-size is missing, so the number of samples depends on the number of ranks; give it, or set "
            "WORLD_SIZE to the number of ranks of the training"
        )
    os.environ.setdefault("WORLD_SIZE", str(_ranks_of_a_copy(arguments)))
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WANDB_MODE": "disabled"}


def _ranks_of_a_copy(arguments: Sequence[str]) -> int:
    """Ranks that hold one copy of the model: whole groups both of its dense layers and of its experts."""

    def size(name: str, otherwise: int = 1) -> int:
        return int(_value(arguments, f"--{name}-parallel-size") or otherwise)

    tensor, pipeline = size("tensor-model"), size("pipeline-model")
    experts = size("expert-model") * size("expert-tensor", tensor)
    return pipeline * math.lcm(tensor * size("context"), experts)


def _value(arguments: Sequence[str], flag: str) -> str | None:
    """Of a flag's last appearance, as `--flag value` or `--flag=value`."""
    found = None
    for word, following in zip(arguments, [*arguments[1:], None], strict=False):
        name, equals, value = word.partition("=")
        if name == flag:
            found = value if equals else following
    return found


class _Builder:
    """Stands in for Megatron's `pretrain()`."""

    def __init__(self, iteration: int | None) -> None:
        self.built: list[Path] | None = None
        self._iteration = iteration
        self._partial: Path | None = None

    def take_the_place_of_pretrain(self) -> None:
        """Put it between every script that is imported from now on and `pretrain()`."""
        import megatron.training
        import megatron.training.training

        signature = inspect.signature(megatron.training.pretrain)

        def pretrain(*args: Any, **kwargs: Any) -> None:
            self._build(signature.bind(*args, **kwargs).arguments["train_valid_test_dataset_provider"])
            raise SystemExit(0)

        megatron.training.pretrain = megatron.training.training.pretrain = pretrain

    def _build(self, provider: Any) -> None:
        from megatron.core.datasets.utils import compile_helpers
        from megatron.training import get_args
        from megatron.training.initialize import setup_logging
        from megatron.training.training import build_train_valid_test_datasets, update_train_iters

        args = get_args()
        if args.data_cache_path is None:
            raise UserError("--data-cache-path is missing; say where the training will look for its index files")
        setup_logging()
        compile_helpers()
        update_train_iters(args)
        args.iteration = self._iteration if self._iteration is not None else _start(args)
        cache = Path(args.data_cache_path)
        try:
            self._partial = _partial(cache)
            args.data_cache_path = str(self._partial)
            build_train_valid_test_datasets(provider)
            self.built = _publish(self._partial, cache)
        except OSError as error:
            raise UserError(
                f"index files cannot be written to {cache} ({error.strerror or error}); make room, or name another "
                "directory with --data-cache-path"
            ) from None

    def remove_partial(self) -> None:
        if self._partial is not None:
            shutil.rmtree(self._partial, ignore_errors=True)


def _partial(cache: Path) -> Path:
    """An empty directory inside `cache`; what killed preparations of this machine left there is removed."""
    before, behind = ".prepare-", f"@{socket.gethostname()}"  # no other machine's name ends so
    for left in cache.glob(f"{before}*{behind}"):
        if not psutil.pid_exists(int(left.name.removeprefix(before).removesuffix(behind))):
            shutil.rmtree(left, ignore_errors=True)
    directory = cache / f"{before}{os.getpid()}{behind}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def _start(args: Any) -> int:
    """Iteration that the training will start at."""
    if args.load is None:
        return 0
    return int(args.ckpt_step or read_iteration(Path(args.load)) or 0)


def _publish(partial: Path, cache: Path) -> list[Path]:
    """Move whole files to where the training looks for them."""
    files = sorted(partial.iterdir(), key=lambda path: (path.name.endswith(_DESCRIPTION), path.name))
    for path in files:
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
    for path in files:
        os.replace(path, cache / path.name)
    fsync_directory(cache)
    return [cache / path.name for path in files]
