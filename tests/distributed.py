"""Runs a test's function on several ranks (gloo on CPU), with ranks that hang killed and named.

    def work(rank: int, value: int) -> float: ...          # at module level: ranks are fresh processes
    results = run_ranks(work, 2, 5, timeout=60)             # one result a rank

Ranks find the usual variables of torchrun, so `parallel.initialize()` or `init_process_group()` work in them.
Results travel by pickle: return numbers, strings and numpy arrays, not tensors.
"""

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any
from unittest.mock import patch


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_ranks(function: Callable[..., Any], num_ranks: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call `function(rank, *args)` on every rank.

    :param timeout: seconds for all ranks together; those that still run then are killed.
    :raises AssertionError: with the traceback of the first rank that failed, or the ranks that hung.
    """
    context = multiprocessing.get_context("spawn")
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port() if num_ranks > 1 else 0),
        "OMP_NUM_THREADS": "1",
    }
    environment |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    pipes = [context.Pipe(duplex=False) for _ in range(num_ranks)]
    processes = [context.Process(target=_rank, args=(rank, pipe[1], function, args)) for rank, pipe in enumerate(pipes)]
    for rank, process in enumerate(processes):
        # inherited, so that it is there before the function's module is imported
        with patch.dict(os.environ, environment, RANK=str(rank), LOCAL_RANK=str(rank)):
            process.start()
    for _, sender in pipes:
        sender.close()
    try:
        return _collect([receiver for receiver, _ in pipes], time.monotonic() + timeout)
    finally:
        # those that gave their result are gone already or about to be
        for process in processes:
            process.kill()
            process.join()


def _rank(rank: int, sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        sender.send((True, function(rank, *args)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    finally:
        # nothing of this rank may wait for one that is gone
        sender.close()
        os._exit(0)


def _collect(receivers: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        for rank, receiver in enumerate(receivers):
            if rank in results or not receiver.poll(0.02):
                continue
            try:
                succeeded, result = receiver.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} died without a result") from None
            if not succeeded:
                raise AssertionError(f"rank {rank} failed:\n{result}")
            results[rank] = result
        if time.monotonic() > deadline:
            hung = sorted(set(range(len(receivers))) - set(results))
            raise AssertionError(f"ranks {hung} hung and were killed")
    return [results[rank] for rank in range(len(receivers))]
