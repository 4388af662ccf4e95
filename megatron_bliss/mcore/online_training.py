"""The steps that bring BLADE's reference up to date: w ← u, then some AdamW steps on L_val(w) + λ L_train(α, w).

The model is wrapped in Megatron's DDP and has Megatron's optimizer, distributed if the training's is, both made afresh
and gone afterwards. Losses are means over a micro-batch's tokens, then over micro-batches, as Megatron's training takes
them.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.utils import unwrap_model
from megatron.training import training as megatron_training
from torch import Tensor

from megatron_bliss.errors import UserError
from megatron_bliss.mcore import platform
from megatron_bliss.mcore.online_data import Stream
from megatron_bliss.mcore.online_reference import Call, as_evaluated, loss_mask_of, recorded
from megatron_bliss.progress import Progress

# The tokens that keep their loss, [b, s] in the mask's dtype: (losses of the model, the call, its loss mask).
Choose = Callable[[Tensor, Call, Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """What the reference is trained on."""

    forward_step: Any  # the script's
    validation: Stream
    training: Stream
    lambda_: float
    choose: Choose | None  # α, by the outgoing reference; None: all tokens


class Trainee:
    """The coming reference with what trains it.

    :param module: like the model in training, without DDP.
    :param model: the model in training, in DDP; its parameters are whole on every rank.
    :param optimizer: its optimizer, whose present learning rates and weight decay hold.
    :param args: Megatron's.
    """

    def __init__(self, module: Any, model: Any, optimizer: Any, args: Any) -> None:
        with torch.no_grad():
            for mine, given in zip(module.parameters(), unwrap_model(model).parameters(), strict=True):
                mine.copy_(given)
        config, overrides = megatron_training.get_megatron_optimizer_config(args)
        # without overlap, gradients and parameters are exchanged where this module says so
        config = dataclasses.replace(config, overlap_param_gather=False, overlap_param_gather_with_optimizer_step=False)
        # the checks are for Megatron's own forward and backward passes; `train` looks at the losses instead
        ddp_config = dataclasses.replace(
            model.ddp_config, overlap_grad_reduce=False, overlap_param_gather=False, bucket_size=None,
            check_for_nan_in_grad=False, check_for_large_grads=False,
        )  # fmt: skip
        self._config = megatron_training.get_model_config(module)
        wrapped = megatron_training.wrap_model_chunks_with_ddp([module], self._config, ddp_config)
        self.model = wrapped[0]
        # after the copy, so that its float32 masters start from these parameters
        self._optimizer = get_megatron_optimizer(
            config, wrapped, config_overrides=overrides, use_gloo_process_groups=args.use_gloo_process_groups
        )
        for mine, given in zip(self._optimizer.param_groups, optimizer.param_groups, strict=True):
            mine["lr"], mine["weight_decay"] = given["lr"], given["weight_decay"]

    def step(self, objective: Objective, position: int, original: Any) -> Tensor:
        """One step.

        :param position: which of all reference steps it is, from 0.
        :param original: the model in training, for α.
        :returns: this rank's L_val and L_train, float32 [2].
        """
        self.model.zero_grad_buffer()
        self._optimizer.zero_grad()
        validation = self._add_gradient(objective.forward_step, objective.validation, position, 1.0)
        training = torch.zeros_like(validation)
        if objective.lambda_:
            choose = None if objective.choose is None else partial(_alpha, objective.choose, original)
            training = self._add_gradient(
                objective.forward_step, objective.training, position, objective.lambda_, choose
            )
        # with --calculate-per-token-loss DDP sums over its ranks, where it averages otherwise
        sums = self._config.calculate_per_token_loss
        count = torch.ones([], dtype=torch.int, device=validation.device) if sums else None
        finalize_model_grads([self.model], count)
        self._optimizer.step()
        return torch.stack([validation, training])

    def _add_gradient(
        self, forward_step: Any, stream: Stream, position: int, weight: float, choose: Any | None = None
    ) -> Tensor:
        """Add the gradient of `weight` times the stream's mean loss; returns that mean, of this rank, unweighted."""
        batches, total = stream.iterator(position), torch.zeros([], device=platform.device())
        for _ in range(stream.num_micro_batches):
            with recorded(self.model) as calls:
                losses, loss_func = forward_step(batches, self.model)
            mask = loss_mask_of(loss_func, losses, calls)
            mask = mask.view_as(losses).float()
            if choose is not None:
                mask = choose(calls[0], mask)
            mean = (losses.float() * mask).sum() / mask.sum().clamp_min(1)
            (mean * (weight / stream.num_micro_batches)).backward()
            total += mean.detach() / stream.num_micro_batches
        return total


def _alpha(choose: Choose, original: Any, call: Call, mask: Tensor) -> Tensor:
    with as_evaluated(original):
        losses = original(*call.args, **call.kwargs)
    return choose(losses, call, mask)


def train(trainee: Trainee, objective: Objective, original: Any, start: int, num_steps: int, shows: bool) -> Tensor:
    """:param start: reference steps done before.
    :param shows: whether this rank prints progress.
    :returns: mean L_val and L_train of the first and of the last step, over all ranks: float32 [2, 2].
    :raises UserError: if they are not finite.
    """
    progress = Progress("online", num_steps, "reference-steps") if shows else None
    first = last = torch.empty(0)
    for step in range(num_steps):
        last = trainee.step(objective, start + step, original)
        if step == 0:
            first = last
        if progress is not None:
            progress.report(step + 1)
    figures = torch.stack([first, last])
    dist.all_reduce(figures, group=parallel_state.get_data_parallel_group())
    figures /= parallel_state.get_data_parallel_world_size()
    if not figures.isfinite().all():
        raise UserError(
            f"the reference's loss is not finite after {num_steps} steps from the model in training; lower the "
            "learning rate or online.reference_steps, and go on from the last checkpoint"
        )
    return figures
