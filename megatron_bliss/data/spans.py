"""Writes parts of .npy files in place, for processes that may write other parts at the same time."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from megatron_bliss.errors import UserError


@contextmanager
def writing_to(directory: Path) -> Iterator[None]:
    """Say in a sentence what a file system refuses: a full disk, a directory that is read-only."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(
            f"{directory} cannot be written ({error.strerror}); make room or change its permissions and run this "
            "again: it goes on where it stopped"
        ) from None


def write_span(path: Path, num_sequences: int, start: int, values: np.ndarray) -> None:
    """Put float32 values into a .npy file of `num_sequences` of them, from element `start` on, and flush them to disk.

    Through write(), not through a memory map: workers on several hosts may write parts of one page, a network file
    system merges those byte by byte, and a full disk is an error instead of the end of the process.
    """
    header = _npy_header(num_sequences)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DSYNC, 0o644)
    try:
        if os.fstat(handle).st_size < len(header):
            _write_all(handle, header, 0)  # the same bytes, whoever comes first
        _write_all(handle, values.tobytes(), len(header) + values.itemsize * start)
    finally:
        os.close(handle)


def _write_all(handle: int, content: bytes, offset: int) -> None:
    rest = memoryview(content)
    while rest:
        count = os.pwrite(handle, rest, offset)
        rest, offset = rest[count:], offset + count


def _npy_header(num_sequences: int) -> bytes:
    stream = io.BytesIO()
    description = np.lib.format.dtype_to_descr(np.dtype(np.float32))
    np.lib.format.write_array_header_1_0(
        stream, {"descr": description, "fortran_order": False, "shape": (num_sequences,)}
    )
    return stream.getvalue()
