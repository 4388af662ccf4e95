"""Process groups of side processes: tensor × data parallel; × pipeline where a target only answers (cache-target)."""

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_bliss.errors import StageError, UserError
from megatron_bliss.mcore import platform
from megatron_bliss.wording import counted


@dataclass(frozen=True)
class ParallelContext:
    """This rank's place in the job."""

    tp_group: Any
    dp_group: Any
    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
    device: torch.device
    sequence_parallel: bool
    pp_rank: int = 0
    pp_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that prints and writes what is written once."""
        return self.tp_rank == 0 and self.dp_rank == 0 and self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the end of the model."""
        return self.pp_rank == self.pp_size - 1

    @property
    def length_multiple(self) -> int:
        """Padded lengths are multiples of it, as sequence parallelism needs."""
        return self.tp_size if self.sequence_parallel else 1


def initialize(tensor_parallel: int, sequence_parallel: bool, seed: int, pipeline_parallel: int = 1) -> ParallelContext:
    """Join the job that torchrun described, or be one on our own, with `tensor_parallel` × `pipeline_parallel` ranks a
    model.

    A second call in a process changes the layout.

    :raises UserError: if the number of processes is not a multiple of the ranks of a model.
    """
    platform.install()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size % (tensor_parallel * pipeline_parallel):
        pipeline = f" × pipeline_parallel = {pipeline_parallel}" if pipeline_parallel > 1 else ""
        raise UserError(
            f"{counted(world_size, 'process')} cannot be divided into groups of tensor_parallel = "
            f"{tensor_parallel}{pipeline}; start a multiple of it (launch.nproc_per_node) or lower tensor_parallel"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        backend = platform.backend()
        if "MASTER_ADDR" in os.environ and "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        atexit.register(shutdown)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel, pipeline_model_parallel_size=pipeline_parallel
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return ParallelContext(
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        device=platform.device(),
        sequence_parallel=sequence_parallel and tensor_parallel > 1,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=pipeline_parallel,
    )


def shutdown() -> None:
    """Leave the job; runs by itself when the process ends."""
    if dist.is_initialized():
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def agree(context: ParallelContext, error: Exception | None) -> None:
    """Let every rank learn that one failed, so that none waits for it. All ranks call it.

    :param error: what went wrong on this rank.
    :raises Exception: the error, on the lowest rank that has one; the others leave quietly with the same exit code.
    """
    outcome = torch.zeros(dist.get_world_size(), dtype=torch.int32, device=context.device)
    if error is not None:
        outcome[dist.get_rank()] = 2 if isinstance(error, UserError) else 1
    dist.all_reduce(outcome)
    codes = outcome.tolist()
    first_failed = next((rank for rank, code in enumerate(codes) if code), None)
    if first_failed is None:
        return
    if error is not None and first_failed == dist.get_rank():
        raise error
    raise SystemExit(codes[first_failed])


@contextmanager
def agreed(context: ParallelContext) -> Iterator[None]:
    """`agree` about the block, which must not hold collectives of its own: reading files, opening shards."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    agree(context, error)


def same(context: ParallelContext, number: int, what: str) -> int:
    """A number that each rank has read from files for itself. All ranks call it.

    :raises StageError: on the lowest rank, if it is not the same on all of them, as on a file system that shows late
        what another node has written; the others leave quietly.
    """
    bounds = torch.tensor([number, -number], dtype=torch.int64, device=context.device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    high, low = int(bounds[0]), -int(bounds[1])
    differs = StageError(
        f"the ranks do not see the same files: {what} is {low} on some and {high} on others. A file system that shows "
        "changes late does so for seconds: start the stage again"
    )
    agree(context, differs if high != low else None)
    return number
