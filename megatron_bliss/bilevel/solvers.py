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


class RunningAverage:
    """The right-hand side b: a bias-corrected exponential average of ∇f.

        a ← β a + (1 − β) ∇f,  b = a / (1 − βᵗ)

    A ∇f that is not finite is replaced by the average so far.
    """

    def __init__(self, space: ParameterSpace, beta: float) -> None:
        self.space, self.beta = space, beta
        self.average = space.zeros()
        self.count = 0

    def add(self, gradient: Vector) -> tuple[Vector, Tensor]:
        """b, and whether the gradient was sound: a boolean scalar."""
        is_sound = torch.isfinite(self.space.norm(gradient))
        self.count += 1
        # an unsound ∇f enters as a repetition of the average so far, so that nothing of it is kept
        correction = 1 - self.beta ** (self.count - 1) if self.count > 1 else 1.0
        replacement = torch._foreach_div(self.average, correction)
        gradient = [torch.where(is_sound, new, old) for new, old in zip(gradient, replacement, strict=True)]
        torch._foreach_lerp_(self.average, gradient, 1 - self.beta)
        return list(torch._foreach_div(self.average, 1 - self.beta**self.count)), is_sound


class Averaged:
    """One or more damped steps on a z that is never restarted, with a running average b of ∇f on the right.

        z ← z − α ((H + δI) z − b),  α = min(lr, 1 / (δ + λ))
        λ ← max(‖Hz‖²/zᵀHz, 0.99 λ)

    ‖Hz‖²/zᵀHz is at most the largest eigenvalue of a positive semi-definite H, so α is a stable step along z whatever
    the lr, and every step satisfies ‖z'‖ ≤ (1 − αδ)‖z‖ + α‖b‖. Curvature that breaks this (zᵀHz < 0, or a product
    that is not finite) is not applied: that step takes H = 0, which keeps the bound, and is counted.

    Without curvature z is b itself.
    """

    is_simultaneous = True

    def __init__(self, space: ParameterSpace, lr: float, damping: float, beta: float, steps: int = 1) -> None:
        self.space, self.lr, self.damping, self.steps = space, lr, damping, steps
        self.z, self.right = space.zeros(), RunningAverage(space, beta)
        self.largest = torch.zeros((), dtype=torch.float64, device=space.masters[0].device)  # λ

    def step(self, product: Product, gradient: Vector, first_product: Vector | None = None) -> Solution:
        space = self.space
        b, is_sound = self.right.add(gradient)
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
            "vectors": {"z": self.z, "average": self.right.average},
            "scalars": {"count": self.right.count, "largest": float(self.largest)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.z, self.right.average = list(state["vectors"]["z"]), list(state["vectors"]["average"])
        self.right.count = int(state["scalars"]["count"])
        self.largest.fill_(state["scalars"]["largest"])


class ConjugateGradient:
    """A few conjugate-gradient iterations a step on (H + δI) z = b, H of this step's batch, from the z of before.

    It is made for a positive semi-definite H, for which every iterate satisfies ‖z'‖ ≤ 2‖b‖/δ + ‖z‖. The iterations
    end where the curvature along a direction is not positive; a z beyond that bound, or not finite, is not taken. Both
    are counted, and leave the z that was there.

    :param steps: iterations, one product each.
    """

    is_simultaneous = True

    def __init__(self, space: ParameterSpace, damping: float, beta: float, steps: int) -> None:
        self.space, self.damping, self.steps = space, damping, steps
        self.z, self.right = space.zeros(), RunningAverage(space, beta)

    def step(self, product: Product, gradient: Vector, first_product: Vector | None = None) -> Solution:
        space = self.space
        b, is_sound = self.right.add(gradient)
        b_norm, z_norm = space.norm(b), space.norm(self.z)
        hz = first_product if first_product is not None else product(self.z)
        assert hz is not None, "settings_check asks for a curvature product"
        z = [part.clone() for part in self.z]
        r = [rhs - h - self.damping * part for rhs, h, part in zip(b, hz, z, strict=True)]
        p = [part.clone() for part in r]
        size = space.dot(r, r)
        residual = size.sqrt() / b_norm.clamp_min(1e-30)
        is_going = torch.isfinite(size)
        for index in range(self.steps):
            hp = product(p)
            assert hp is not None
            torch._foreach_add_(hp, p, alpha=self.damping)
            curvature = space.dot(p, hp)
            is_going = is_going & ((curvature > 0) & torch.isfinite(curvature) | (size == 0))
            alpha = torch.where(is_going & (size > 0), size / curvature, 0.0)
            _add_(z, p, alpha, is_going)
            if index == self.steps - 1:
                break
            _add_(r, hp, -alpha, is_going)
            new_size = space.dot(r, r)
            factor = torch.where(is_going & (size > 0), new_size / size, 0.0)
            p = [part + along * factor.to(part.dtype) for part, along in zip(r, p, strict=True)]
            size = new_size
        norm = space.norm(z)
        bound = 2 * b_norm / self.damping + z_norm if self.damping else torch.full_like(norm, torch.inf)
        is_taken = torch.isfinite(norm) & (norm <= bound)
        self.z = [torch.where(is_taken, new, old) for new, old in zip(z, self.z, strict=True)]
        contained = (~is_sound).to(b_norm.dtype) + (~(is_going & is_taken)).to(b_norm.dtype)
        return Solution(space.norm(self.z), residual, contained)

    def state_dict(self) -> dict[str, Any]:
        return {"vectors": {"z": self.z, "average": self.right.average}, "scalars": {"count": self.right.count}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.z, self.right.average = list(state["vectors"]["z"]), list(state["vectors"]["average"])
        self.right.count = int(state["scalars"]["count"])


def _add_(total: Vector, part: Vector, factor: Tensor, is_used: Tensor) -> None:
    """total += factor part where `is_used`; a part that is not finite leaves no trace otherwise."""
    for one, other in zip(total, part, strict=True):
        one.add_(torch.where(is_used, other, 0.0) * factor.to(one.dtype))


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
