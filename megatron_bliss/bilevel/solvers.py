"""Solvers of (H + δI) z = ∇f, which keep z from one outer step to the next.

Nothing here waits for the device: decisions are masks, and counts are tensors that are read with the metrics.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_bliss.bilevel.space import ParameterSpace, Vector

Product = Callable[[Vector], Vector | None]  # v -> Hv on this step's batch; None where no curvature is used


@dataclass
class Solution:
    """What is reported of one step's solve; float64 scalar tensors."""

    norm: Tensor  # ‖z‖
    residual: Tensor  # ‖(H + δI) z − b‖ / ‖b‖ at the z the step began with
    contained: Tensor  # steps whose product or right-hand side was not used


class Solver(Protocol):
    """Holds z. `is_simultaneous` says when the loop calls it.

    True: once at the point where g_i and the inner gradient are taken, which all use the z of before (SOBA,
    arXiv 2201.13409), so `first_product`, Hz, is there already. False: after the inner steps, and before g_i.
    """

    z: Vector
    is_simultaneous: bool

    def step(self, product: Product, gradient: Vector, first_product: Vector | None = None) -> Solution: ...

    def state_dict(self) -> dict[str, Any]:
        """`vectors`: lists of tensors like the parameters, by name; `scalars`: numbers, by name."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def running_average_(average: Vector, new: Vector, beta: float) -> None:
    """average ← β average + (1 − β) new."""
    torch._foreach_lerp_(average, new, 1 - beta)


class Averaged:
    """One or more damped steps on a z that is never restarted, with a running average of ∇f on the right.

        b ← β b + (1 − β) ∇f, divided by 1 − βᵗ                     bias-corrected exponential average
        z ← z − α ((H + δI) z − b),  α = min(lr, 1 / (δ + λ))
        λ ← max(‖Hz‖²/zᵀHz, 0.99 λ)

    ‖Hz‖²/zᵀHz is at most the largest eigenvalue of a positive semi-definite H, so α is a stable step along z whatever
    the lr, and every step satisfies ‖z'‖ ≤ (1 − αδ)‖z‖ + α‖b‖. Curvature that breaks this (zᵀHz < 0, or a product
    that is not finite) is not applied: that step takes H = 0, which keeps the bound, and is counted. A right-hand side
    that is not finite is replaced by the average so far, and is counted.

    Without curvature z is b itself.
    """

    is_simultaneous = True

    def __init__(self, space: ParameterSpace, lr: float, damping: float, beta: float, steps: int = 1) -> None:
        self.space, self.lr, self.damping, self.beta, self.steps = space, lr, damping, beta, steps
        self.z, self.average = space.zeros(), space.zeros()
        self.largest = torch.zeros((), dtype=torch.float64, device=space.masters[0].device)  # λ
        self.count = 0

    def step(self, product: Product, gradient: Vector, first_product: Vector | None = None) -> Solution:
        space = self.space
        is_sound = torch.isfinite(space.norm(gradient))
        self.count += 1
        # an unsound ∇f enters as a repetition of the average so far, so that nothing of it is kept
        correction = 1 - self.beta ** (self.count - 1) if self.count > 1 else 1.0
        replacement = torch._foreach_div(self.average, correction)
        gradient = [torch.where(is_sound, new, old) for new, old in zip(gradient, replacement, strict=True)]
        running_average_(self.average, gradient, self.beta)
        b = list(torch._foreach_div(self.average, 1 - self.beta**self.count))
        b_norm = space.norm(b)
        residual, contained = torch.zeros_like(b_norm), (~is_sound).to(b_norm.dtype)
        for index in range(self.steps):
            hz = first_product if index == 0 and first_product is not None else product(self.z)
            if hz is None:
                self.z = b
                break
            curvature, size = space.dot(self.z, hz), space.norm(hz)
            is_used = torch.isfinite(size) & (curvature >= 0)
            contained += (~is_used).to(contained.dtype)
            estimate = torch.where(is_used & (curvature > 0), size**2 / curvature, 0.0)
            self.largest = torch.maximum(estimate, 0.99 * self.largest)
            alpha = (1 / (self.damping + self.largest)).clamp_max(self.lr)
            remainder = [
                torch.where(is_used, part, 0.0) + self.damping * z - rhs
                for part, z, rhs in zip(hz, self.z, b, strict=True)
            ]
            if index == 0:
                residual = space.norm(remainder) / b_norm.clamp_min(1e-30)
            for z, part in zip(self.z, remainder, strict=True):
                z.addcmul_(part, -alpha.to(z.dtype))
        return Solution(space.norm(self.z), residual, contained)

    def state_dict(self) -> dict[str, Any]:
        return {
            "vectors": {"z": self.z, "average": self.average},
            "scalars": {"count": self.count, "largest": float(self.largest)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.z, self.average = list(state["vectors"]["z"]), list(state["vectors"]["average"])
        self.count = int(state["scalars"]["count"])
        self.largest.fill_(state["scalars"]["largest"])


class Paper:
    """The authors' procedure: from the constant 1/numel, a few gradient steps, clipped, with this batch's ∇f.

    A z that is not finite is replaced by zero, which trains the score model on nothing, and is counted.
    """

    is_simultaneous = False

    def __init__(self, space: ParameterSpace, lr: float, damping: float, max_norm: float, steps: int) -> None:
        self.space, self.lr, self.damping, self.max_norm, self.steps = space, lr, damping, max_norm, steps
        self.z = space.zeros()

    def step(self, product: Product, gradient: Vector, first_product: Vector | None = None) -> Solution:
        space = self.space
        start = 1 / space.numel()
        z = [torch.ones_like(part) * start.to(part.dtype) for part in self.z]
        residual = torch.zeros_like(start)
        for index in range(self.steps):
            hz = product(z)
            remainder = [self.damping * part - rhs for part, rhs in zip(z, gradient, strict=True)]
            if hz is not None:
                torch._foreach_add_(remainder, hz)
            size = space.clip(remainder, self.max_norm)
            if index == 0:
                residual = size / space.norm(gradient).clamp_min(1e-30)
            torch._foreach_add_(z, remainder, alpha=-self.lr)
        is_sound = torch.isfinite(space.norm(z))
        self.z = [torch.where(is_sound, part, 0.0) for part in z]
        return Solution(space.norm(self.z), residual, (~is_sound).to(start.dtype))

    def state_dict(self) -> dict[str, Any]:
        return {"vectors": {}, "scalars": {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
