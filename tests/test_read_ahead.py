"""The thread that prepares batches: order, errors, and its end."""

import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from megatron_bliss.mcore.read_ahead import _DEPTH, read_ahead


def threads() -> int:
    return sum(thread.name == "read-ahead" for thread in threading.enumerate())


def test_items_come_in_order_and_a_few_ahead() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(50):
            made.append(number)
            yield number

    with closing(read_ahead(items())) as ahead:
        assert next(ahead) == 0
        deadline = time.monotonic() + 10
        while len(made) < _DEPTH + 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert _DEPTH < len(made) <= _DEPTH + 2  # the queue, one in hand, one given out
        assert list(ahead) == list(range(1, 50))
    assert not threads()


def test_an_error_comes_where_the_item_would() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("damaged")

    ahead = read_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="damaged"):
        next(ahead)
    assert not threads()


def test_the_thread_ends_with_its_reader() -> None:
    with closing(read_ahead(iter(range(10**9)))) as ahead:
        next(ahead)
        assert threads() == 1
    assert not threads()
