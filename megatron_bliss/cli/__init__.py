"""The command line. Thin: it reads words, calls one function and turns errors into exit codes (0 to 3)."""

import os
import sys

import typer

from megatron_bliss import stopping
from megatron_bliss.cli import runs, selections, stages
from megatron_bliss.errors import StageError, StoppedError, user_errors

app = typer.Typer(
    help="Data selection for LLM pretraining on Megatron-Core: BLISS rounds over binary token shards.",
    epilog="To begin: demo. Or copy configs/bliss-410m.yaml to MY.yaml and fill in the data; then doctor MY.yaml, "
    "run MY.yaml --dry-run, run MY.yaml, inspect RUN. README, 'Where to begin': shards, text, scores alone, Slurm.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for commands in (runs, selections, stages):  # the order of --help
    app.add_typer(commands.app)


def main() -> None:
    """Exit codes: 0 done, 1 failed, 2 bad usage or input, 3 stopped before the end: call again."""
    if "MEGATRON_BLISS_STAGE" in os.environ:
        from megatron_bliss.orchestration.bound import die_with_parent

        die_with_parent()
    with user_errors():
        try:
            app()
        except StageError as failure:
            print(failure, file=sys.stderr, flush=True)
            raise SystemExit(1) from None
        except StoppedError as end:
            print(end, file=sys.stderr, flush=True)
            raise SystemExit(stopping.EXIT_CODE) from None
