"""Errors for users: one sentence that names the file or setting, its value and the remedy; exit code 2."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Bad usage or input. The message is all the user sees, so it says what would be right."""


class StageError(Exception):
    """A stage of a run failed or was interrupted; the message says where to look. Exit code 1."""


class StoppedError(Exception):
    """A run was ended on request before it was through; called again, it goes on. Exit code 3."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a `UserError` into its message on stderr and exit code 2, without a traceback."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
