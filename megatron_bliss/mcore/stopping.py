"""Ranks that agree on the step after which they stop, in loops of our own and in Megatron's."""

import functools
import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_bliss import stopping

_INTERVAL = 2.0  # seconds between two votes, about, where steps are shorter


class Vote:
    """Asked at every step boundary by all ranks of the job, in step, it gives all of them the same answer.

    A vote is one reduction of two numbers that is waited for. How many steps may pass until the next one is voted on as
    well, by each rank's pace, so ranks never differ on when that is. The first boundary has one.
    """

    def __init__(self, device: torch.device, interval: float = _INTERVAL) -> None:
        self._device, self._interval = device, interval
        self._since, self._asked, self._span = time.monotonic(), 0, 1

    def __call__(self) -> bool:
        """Whether to stop here."""
        self._asked += 1
        if self._asked < self._span:
            return False
        pace = (time.monotonic() - self._since) / self._asked
        # a span at most doubles, as the first steps of a process may be its slowest
        span = max(1, min(int(self._interval / max(pace, 1e-9)), 2 * self._span))
        ballot = torch.tensor([int(stopping.requested()), -span], device=self._device)
        dist.all_reduce(ballot, op=dist.ReduceOp.MAX)
        stops, shortest = ballot.tolist()
        self._since, self._asked, self._span = time.monotonic(), 0, -shortest
        return bool(stops)


def install(before_extra: Callable[[int], None]) -> None:
    """Let the next `pretrain()` save and leave its loop, with exit code 0, after the step at which ranks agree to stop.

    :param before_extra: called on all ranks with the iteration when its checkpoint is one that is saved for this only.
    """
    import megatron.training.training as training
    from megatron.training import get_args

    from megatron_bliss.mcore.platform import device

    decide = training.checkpoint_and_decide_exit
    votes: list[Vote] = []
    taken = inspect.signature(decide)

    @functools.wraps(decide)
    def deciding(*args: Any, **kwargs: Any) -> Any:
        if not votes:  # the process group is there by now
            votes.append(Vote(device()))
        settings, iteration = get_args(), taken.bind(*args, **kwargs).arguments["iteration"]
        if not votes[0]():
            return decide(*args, **kwargs)
        if settings.save_interval is None or iteration % settings.save_interval:
            before_extra(iteration)
        kept, settings.exit_interval = settings.exit_interval, 1  # Megatron saves, if it has not yet, and leaves
        try:
            return decide(*args, **kwargs)
        finally:
            settings.exit_interval = kept

    training.checkpoint_and_decide_exit = deciding
