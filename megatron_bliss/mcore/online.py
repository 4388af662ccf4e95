"""Online token selection in Megatron's training loop, around an unmodified training script.

`install()` stands between the script and `megatron.training.pretrain`. Wrapped are the script's `forward_step` (the
per-token losses come back from the model, the loss mask is bound in the returned partial, a forward pre-hook sees the
batch), its dataset provider (the reference draws its samples there), `train_step` (what is due between two steps), and
what a checkpoint is made of. With keep = 1 the losses are those of plain training to the bit.

Layouts: tensor parallel (sequence parallel too), data parallel, the distributed optimizer. The rest is refused.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_bliss.config import OnlineConfig
from megatron_bliss.errors import UserError


class OnlineMethod(Protocol):
    """What happens to the reference, and when it decides. The methods are in `methods/`."""

    @property
    def name(self) -> str: ...

    @property
    def given(self) -> Path | None:
        """Directory of a checkpoint that the reference is loaded from, once."""

    @property
    def upkeep(self) -> Literal["train", "tune", "average", "none"]:
        """What a synchronisation does: train on validation set and pool, on the validation set alone, or average."""

    def is_due(self, iteration: int, num_syncs: int) -> bool:
        """Whether the reference, synchronised so often, is synchronised before the step that follows `iteration`
        steps."""

    def selects(self, num_syncs: int) -> bool:
        """Whether tokens are chosen against a reference that was synchronised so often."""


@dataclass(frozen=True)
class OnlineJob:
    """What is asked for."""

    config: OnlineConfig
    method: OnlineMethod
    validation: Sequence[tuple[float, str]]  # weight and prefix of each validation set that a reference is trained on
    metrics: Path | None = None  # metrics.jsonl; None: SAVE/online/metrics.jsonl, SAVE as in --save
    holds: bool = False  # the reference stays as the checkpoint has it: for a decay branch

    @property
    def trains(self) -> bool:
        """Whether the reference is trained here."""
        return self.method.upkeep in ("train", "tune")


# Megatron's flags that change what a script's forward step or a model's parameters are: (flag, its name in the
# arguments, whether a value is refused).
_REFUSED: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("--pipeline-model-parallel-size", "pipeline_model_parallel_size", lambda value: value > 1),
    ("--context-parallel-size", "context_parallel_size", lambda value: value > 1),
    ("--num-experts", "num_experts", bool),
    ("--mtp-num-layers", "mtp_num_layers", bool),
    ("--use-megatron-fsdp", "use_megatron_fsdp", bool),
    ("--use-torch-fsdp2", "use_torch_fsdp2", bool),
    ("--fp16", "fp16", bool),
    ("--fp8-param-gather", "fp8_param_gather", bool),
    ("--cuda-graph-impl", "cuda_graph_impl", lambda value: value not in (None, "none")),
    ("--non-persistent-ckpt-type", "non_persistent_ckpt_type", lambda value: value == "local"),
    ("--perform-rl-step", "perform_rl_step", bool),
)


def check_arguments(job: OnlineJob, args: Any) -> None:
    """:param args: Megatron's, parsed.
    :raises UserError: for a layout or format that online selection does not have, or a batch that cannot be shared.
    """
    for flag, name, is_refused in _REFUSED:
        if is_refused(value := getattr(args, name, None)):
            raise UserError(
                f"{flag} is {value}, which online token selection ({job.method.name}) does not support: it runs with "
                "dense models in fp32 or bf16 under tensor and data parallelism; leave the flag out, or --online"
            )
    if args.save and args.ckpt_format != "torch_dist":
        raise UserError(
            f"--ckpt-format is {args.ckpt_format}; with online token selection checkpoints are torch_dist, which hold "
            "the reference too: use --ckpt-format torch_dist"
        )
    if job.trains:
        if not job.validation:
            raise UserError(
                f"{job.method.name} trains its reference on a validation set: name its shard with --validation PREFIX"
            )
        size, multiple = batch_size(job, args), args.micro_batch_size * args.data_parallel_size
        if size % multiple:
            raise UserError(
                f"online.reference_batch_size is {size}; it must be a multiple of {multiple}, the micro-batch size × "
                "data-parallel ranks"
            )


def batch_size(job: OnlineJob, args: Any) -> int:
    """Sequences of a reference step, of the pool and of the validation set each."""
    return int(job.config.reference_batch_size or args.global_batch_size)


def install(job: OnlineJob) -> None:
    """Put the selection between every script that is imported from now on and `pretrain()`."""
    import megatron.training
    import megatron.training.training as training

    pretrain = training.pretrain
    signature = inspect.signature(pretrain)

    @functools.wraps(pretrain)
    def selecting(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        from megatron_bliss.mcore.online_session import OnlineSession

        check_arguments(job, get_args())
        bound = signature.bind(*args, **kwargs)
        with OnlineSession(job, bound.arguments).in_place():
            return pretrain(*bound.args, **bound.kwargs)

    megatron.training.pretrain = training.pretrain = selecting
