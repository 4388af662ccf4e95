"""Adam steps on a parameter space, from gradients that are vectors, and the schedule of their learning rate."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_bliss.bilevel.space import ParameterSpace, Vector

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class AdamSettings:
    """AdamW with decoupled weight decay."""

    lr: float = 1e-5  # at the top of the schedule
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_grad: float = 1.0  # norm that gradients are cut to; 0: none


def lr_factor(step: int, steps: int, warmup_fraction: float) -> float:
    """Linear warm-up over a fraction of the steps, then a cosine to zero, at a 0-based step."""
    warmup = round(steps * warmup_fraction)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


class Optimizer:
    """Steps on a space's masters.

    :param inner: torch's AdamW, or one that calls its moments the same (those of Apex and Transformer Engine do).
    :param held: for each master the tensor of the same memory that `inner` holds; without elements where it holds
        none.
    """

    def __init__(
        self, space: ParameterSpace, inner: torch.optim.Optimizer, held: Sequence[Tensor], settings: AdamSettings
    ) -> None:
        self.space, self.inner, self.held, self.settings = space, inner, list(held), settings

    def step(self, gradient: Vector, factor: float) -> Tensor:
        """:param gradient: reduced; overwritten. :param factor: of the learning rate.

        A gradient that is not finite takes no part: it counts as zero.

        :returns: the gradient's norm before clipping.
        """
        norm = self.space.clip(gradient, self.settings.clip_grad)
        for parameter, part in zip(self.held, gradient, strict=True):
            parameter.grad = part
        for group in self.inner.param_groups:
            group["lr"] = self.settings.lr * factor
        self.inner.step()
        for parameter in self.held:
            parameter.grad = None
        self.space.push()
        return norm

    def moments(self) -> dict[str, Vector]:
        """The two running averages as vectors; zeros before the first step."""
        states = [self.inner.state.get(parameter, {}) for parameter in self.held]
        return {
            name: [state.get(name, zero) for state, zero in zip(states, self.space.zeros(), strict=True)]
            for name in MOMENTS
        }

    @torch.no_grad()
    def load(self, vectors: Mapping[str, Vector], count: int) -> None:
        """Put masters and moments to saved ones.

        :param vectors: `master` and the moments, this rank's own.
        :param count: optimizer steps taken so far.
        """
        torch._foreach_copy_(self.space.masters, vectors["master"])
        self.space.push()
        for index, parameter in enumerate(self.held):
            if parameter.numel():
                state = {name: vectors[name][index].clone() for name in MOMENTS}
                # where a fused kernel looks for it
                self.inner.state[parameter] = {"step": torch.tensor(float(count), device=parameter.device), **state}
        if not isinstance(self.inner, torch.optim.AdamW):
            for group in self.inner.param_groups:
                group["step"] = count  # fused optimizers count by group
