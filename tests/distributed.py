"""Runs a test's function on several ranks (gloo on CPU), with ranks that hang killed and named.

    def work(rank: int, value: int) -> float: ...          # at module level: ranks import it
    results = run_ranks(work, 2, 5, timeout=60)             # one result a rank

Ranks find the usual variables of torchrun, so `parallel.initialize()` or `init_process_group()` work in them.
Results travel by pickle: return numbers, strings and numpy arrays, not tensors.

Ranks are forks of a process that has imported torch and Megatron, which takes five seconds, and nothing of this
project: what they do with either, they do alone.
"""

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any
from unittest.mock import patch

from torch.distributed import TCPStore

_ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # read when torch is imported
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "megatron.training.training"])


def meeting_place() -> tuple[TCPStore, dict[str, str]]:
    """A store for ranks to meet at, and what tells them of it, as torchrun's agent does. Its port is taken for as long
    as it is held; one that is looked for before it is used may be gone by then."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return store, told


def forked(target: Callable[..., None], *args: Any) -> ForkServerProcess:
    """A process at work on `target(*args)`, in which torch and Megatron are imported already."""
    process = _CONTEXT.Process(target=target, args=args)
    with patch.dict(os.environ, _ONE_THREAD):  # of the process that is forked, if it is started now
        process.start()
    return process


def run_ranks(function: Callable[..., Any], num_ranks: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call `function(rank, *args)` on every rank.

    :param timeout: seconds for all ranks together; those that still run then are killed.
    :raises AssertionError: with the traceback of the first rank that failed, or the ranks that hung.
    """
    with started_ranks(function, num_ranks, *args) as results:
        return results(timeout)


@contextmanager
def started_ranks(function: Callable[..., Any], num_ranks: int, *args: Any) -> Iterator[Callable[[float], list[Any]]]:
    """`run_ranks` in two parts, for groups that are there at the same time: what is given waits for the results, as
    many seconds as it is told. Ranks that are there at the end are killed."""
    _store, told = meeting_place()
    environment = dict(os.environ) | told | _ONE_THREAD
    environment |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(num_ranks)]
    work = pickle.dumps((function, args))
    processes = []
    for rank, (_, sender) in enumerate(pipes):
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(forked(_rank, rank, own, sender, work))
    for _, sender in pipes:
        sender.close()
    receivers = [receiver for receiver, _ in pipes]
    try:
        yield lambda timeout: _collect(receivers, time.monotonic() + timeout)
    finally:
        # those that gave their result are gone already or about to be
        for process in processes:
            process.kill()
            process.join()


def _rank(rank: int, environment: dict[str, str], sender: Connection, work: bytes) -> None:
    os.environ.clear()
    os.environ.update(environment)  # before the function's module is imported
    try:
        function, args = pickle.loads(work)
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
