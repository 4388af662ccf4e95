"""Prepares what is needed next while the device is busy with what is needed now."""

import queue
import threading
from collections.abc import Generator, Iterable

_DEPTH = 4  # items that wait at most
_POLL_INTERVAL = 0.1  # seconds, in which a thread with a full queue learns that nobody wants more


class _End:
    """The last entry of the queue."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def read_ahead[T](items: Iterable[T]) -> Generator[T]:
    """The items in their order, made by a thread of their own a few ahead. What goes wrong in it is raised here, where
    the item would have come; when this generator is closed, the thread ends."""
    ready: queue.Queue[T | _End] = queue.Queue(_DEPTH)
    is_closed = threading.Event()
    thread = threading.Thread(target=_fill, args=(items, ready, is_closed), name="read-ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        is_closed.set()
        thread.join()


def _fill[T](items: Iterable[T], ready: "queue.Queue[T | _End]", is_closed: threading.Event) -> None:
    error: BaseException | None = None
    try:
        for item in items:
            if not _put(ready, item, is_closed):
                return
    except BaseException as caught:
        error = caught
    _put(ready, _End(error), is_closed)


def _put[T](ready: "queue.Queue[T]", item: T, is_closed: threading.Event) -> bool:
    """False if nobody wants it any more."""
    while not is_closed.is_set():
        try:
            ready.put(item, timeout=_POLL_INTERVAL)
        except queue.Full:
            continue
        return True
    return False
