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

    def take_in(self, gradient: Vector) -> None:
        """:param gradient: ∇f of this step, reduced; the solver's from here on."""
        ...

    def step(self, product: Product, first_product: Vector | None = None) -> Solution:
        """:param first_product: Hz, where it is known; overwritten."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """`vectors`: lists of tensors like the parameters, by name; `scalars`: numbers, by name."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class RunningAverage:
    """The right-hand side b: a bias-corrected exponential average of ∇f.

        a ← β a + (1 − β) ∇f,  b = a / (1 − βᵗ)

    A ∇f that is not finite is left out: b stays what it was.
    """

    def __init__(self, space: ParameterSpace, beta: float) -> None:
        self.space, self.beta = space, beta
        self.average = space.zeros()
        self.count = 0
        self.is_sound = torch.ones((), dtype=torch.bool, device=space.masters[0].device)  # the latest ∇f

    @property
    def correction(self) -> float:
        """b = correction · a."""
        return 1 / (1 - self.beta**self.count) if self.count else 1.0

    def take_in(self, gradient: Vector) -> None:
        self.is_sound = torch.isfinite(self.space.norm(gradient))
        before = self.correction
        self.count += 1
        # what keeps b where ∇f is left out; nothing is known before the first that is sound
        sound = self.is_sound.double()
        kept = self.beta * sound + before / self.correction * (1 - sound)
        for average, new in zip(self.average, gradient, strict=True):
            average.mul_(kept.to(average.dtype))
            average.add_(torch.where(self.is_sound, new, 0.0), alpha=1 - self.beta)

    def norm(self) -> Tensor:
        """‖b‖, a float64 scalar."""
        return self.space.norm(self.average) * self.correction

    def state_dict(self) -> dict[str, Any]:
        return {"vectors": {"average": self.average}, "scalars": {"count": self.count}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average, self.count = list(state["vectors"]["average"]), int(state["scalars"]["count"])


class Averaged:
    """One or more damped steps on a z that is never restarted, with a running average b of ∇f on the right.

        z ← z − α ((H + δI) z − b),  α = min(lr, 1 / (δ + λ))
        λ ← max(‖Hz‖²/zᵀHz, 0.99 λ)

    ‖Hz‖²/zᵀHz is at most the largest eigenvalue of a positive semi-definite H, so α is a stable step along z whatever
    the lr, and every step satisfies ‖z'‖ ≤ (1 − αδ)‖z‖ + α‖b‖. Curvature that breaks this (zᵀHz < 0, or a product
    that is not finite) is not applied: that step takes H = 0, which keeps the bound, and is counted.

    Without curvature z is b itself. Memory: z, the average, and one product.
    """

    is_simultaneous = True

    def __init__(self, space: ParameterSpace, lr: float, damping: float, beta: float, steps: int = 1) -> None:
        self.space, self.lr, self.damping, self.steps = space, lr, damping, steps
        self.z, self.right = space.zeros(), RunningAverage(space, beta)
        self.largest = torch.zeros((), dtype=torch.float64, device=space.masters[0].device)  # λ
        self.take_in = self.right.take_in

    def step(self, product: Product, first_product: Vector | None = None) -> Solution:
        space, correction = self.space, self.right.correction
        b_norm = self.right.norm()
        residual, contained = torch.zeros_like(b_norm), (~self.right.is_sound).to(b_norm.dtype)
        for index in range(self.steps):
            hz = first_product if index == 0 and first_product is not None else product(self.z)
            if hz is None:
                torch._foreach_copy_(self.z, self.right.average)
                torch._foreach_mul_(self.z, correction)
                break
            curvature, size = space.dot(self.z, hz), space.norm(hz)
            is_used = torch.isfinite(size) & (curvature >= 0)
            contained += (~is_used).to(contained.dtype)
            estimate = torch.where(is_used & (curvature > 0), size**2 / curvature, 0.0)
            self.largest = torch.maximum(estimate, 0.99 * self.largest)
            alpha = (1 / (self.damping + self.largest)).clamp_max(self.lr)
            remainder = hz  # in its memory: (H + δI) z − b
            for part, z, average in zip(remainder, self.z, self.right.average, strict=True):
                part.copy_(torch.where(is_used, part, 0.0))
                part.add_(z, alpha=self.damping).sub_(average, alpha=correction)
            if index == 0:
                residual = space.norm(remainder) / b_norm.clamp_min(1e-30)
            for z, part in zip(self.z, remainder, strict=True):
                z.addcmul_(part, -alpha.to(z.dtype))
        return Solution(space.norm(self.z), residual, contained)

    def state_dict(self) -> dict[str, Any]:
        right = self.right.state_dict()
        return {
            "vectors": {"z": self.z} | right["vectors"],
            "scalars": {"largest": float(self.largest)} | right["scalars"],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.z = list(state["vectors"]["z"])
        self.right.load_state_dict(state)
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
        self.take_in = self.right.take_in

    def step(self, product: Product, first_product: Vector | None = None) -> Solution:
        space, right = self.space, self.right
        b_norm, z_norm = right.norm(), space.norm(self.z)
        r = first_product if first_product is not None else product(self.z)
        assert r is not None, "settings_check asks for a curvature product"
        for part, old, average in zip(r, self.z, right.average, strict=True):  # in the memory of Hz: b − (H + δI) z
            part.add_(old, alpha=self.damping).sub_(average, alpha=right.correction).neg_()
        z = [part.clone() for part in self.z]
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
            for along, part in zip(p, r, strict=True):
                along.mul_(factor.to(along.dtype)).add_(part)
            size = new_size
        norm = space.norm(z)
        bound = 2 * b_norm / self.damping + z_norm if self.damping else torch.full_like(norm, torch.inf)
        is_taken = torch.isfinite(norm) & (norm <= bound)
        for old, new in zip(self.z, z, strict=True):
            old.copy_(torch.where(is_taken, new, old))
        contained = (~right.is_sound).to(b_norm.dtype) + (~(is_going & is_taken)).to(b_norm.dtype)
        return Solution(space.norm(self.z), residual, contained)

    def state_dict(self) -> dict[str, Any]:
        right = self.right.state_dict()
        return {"vectors": {"z": self.z} | right["vectors"], "scalars": right["scalars"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.z = list(state["vectors"]["z"])
        self.right.load_state_dict(state)


def _add_(total: Vector, part: Vector, factor: Tensor, is_used: Tensor) -> None:
    """total += factor part where `is_used`; a part that is not finite leaves no trace otherwise."""
    for one, other in zip(total, part, strict=True):
        one.addcmul_(torch.where(is_used, other, 0.0), factor.to(one.dtype))


class Paper:
    """The authors' procedure: from the constant 1/numel, a few gradient steps, clipped, with this batch's ∇f.

    A z that is not finite is replaced by zero, which trains the score model on nothing, and is counted.
    """

    is_simultaneous = False

    def __init__(self, space: ParameterSpace, lr: float, damping: float, max_norm: float, steps: int) -> None:
        self.space, self.lr, self.damping, self.max_norm, self.steps = space, lr, damping, max_norm, steps
        self.z = space.zeros()
        self.gradient = space.zeros()

    def take_in(self, gradient: Vector) -> None:
        self.gradient = gradient

    def step(self, product: Product, first_product: Vector | None = None) -> Solution:
        space, gradient = self.space, self.gradient
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
        return {"vectors": {"z": self.z}, "scalars": {}}  # outer steps may use it before the next update

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.z = list(state["vectors"]["z"])
