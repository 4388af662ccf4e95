"""Curvature of the lower level along a vector: H v with H = ∇²_pp G on one global batch.

Every kind offers two things. `evaluate` is what one step needs at one point, along the z of that moment: the gradient
of G, Hz and g_i, sharing what is the same computation. `product` is Hv alone, for solvers that need more of them.

    none                 H taken as 0: the control that every other kind must beat, and what a step needs that keeps z
    finite-difference    (∇G(θ + εz) − ∇G(θ − εz)) / 2ε. The losses of the same two passes give g_i, and the mean of
                         their gradients is ∇G(θ) up to O(ε²‖z‖²): within 1e-3 on a float32 model. Parameters in 16
                         bits need an ε so large that it is not (19 % off on a trained bfloat16 model), so ∇G(θ) has
                         a forward-backward pass of its own there: three in all instead of two
    gauss-newton         JᵀBJ v, J the derivative of the logits, B the curvature of the loss in them: what is left of H
                         without the curvature of the logits, positive semi-definite whatever the parameters. Jv is
                         (logits(θ + εv) − logits(θ − εv)) / 2ε, two forward passes; g_i follows from Jz without more;
                         ∇G and the product are two backward passes through one graph at θ itself
    exact                double backward through plain torch operations, on one rank: the oracle

λ‖θ‖² is added in closed form.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from megatron_bliss.bilevel.hypergradient import central_differences, difference_step, directional_derivatives
from megatron_bliss.bilevel.levels import LowerLevel, LowerTerms
from megatron_bliss.bilevel.space import ParameterSpace, Vector, group_size, group_sum_
from megatron_bliss.errors import UserError


@dataclass
class Pool[Batch]:
    """The lower level at one step: a global batch with its weights."""

    level: LowerLevel[Batch]
    batches: Sequence[Batch]  # this rank's micro-batches
    weights: Sequence[Tensor]  # P_i of each micro-batch, [b]
    ridge: float  # λ
    side: int = 1  # 1 or -1, the sign of ε where ∇G is taken at θ + εz instead of θ (`NoCurvature`)

    def gradient(self) -> tuple[Vector, Tensor, Tensor]:
        """∇G at the parameters of this moment (reduced), L_i [local], and the mean KL (a scalar, global)."""
        space = self.level.space
        gradient, losses, kl = space.accumulator(), [], []
        for batch, weights in zip(self.batches, self.weights, strict=True):
            terms = self.level.add_gradient(batch, weights, gradient)
            losses.append(terms.losses)
            kl.append(terms.kl)
        gradient = self.add_ridge_(space.reduce_gradients(gradient), space.masters)
        return gradient, torch.cat(losses), self.total_kl(kl)

    def total_kl(self, parts: Sequence[Tensor]) -> Tensor:
        return group_sum_(torch.stack(list(parts)).sum(), self.level.space.dp_group)

    def add_ridge_(self, vector: Vector, point: Sequence[Tensor]) -> Vector:
        """Add 2λ times a point: ∇λ‖θ‖² at θ, and its Hessian's product with v at v."""
        if self.ridge:
            torch._foreach_add_(vector, list(point), alpha=2 * self.ridge)
        return vector


@dataclass
class Evaluation:
    """What a step needs of the pool batch."""

    gradient: Vector  # ∇G
    product: Vector | None  # Hz; None where no curvature is used
    derivatives: Tensor  # g_i along z, [local]
    losses: Tensor  # L_i, [local]
    kl: Tensor  # global mean, scalar


class Curvature(Protocol):
    def evaluate[Batch](self, pool: Pool[Batch], z: Vector) -> Evaluation: ...

    def product[Batch](self, pool: Pool[Batch], v: Vector) -> Vector | None: ...


def is_full_precision(space: ParameterSpace) -> bool:
    """Whether ε is so small that a gradient at θ ± εz may stand for that at θ."""
    return all(parameter.dtype in (torch.float32, torch.float64) for parameter in space.parameters)


class NoCurvature:
    """H = 0. In float32 a forward pass and one forward-backward pass are enough for ∇G and g_i: the gradient is taken
    at θ + εz, where the losses are needed anyway, and differs from that at θ by a few per cent (εHz). The loop changes
    `Pool.side` from step to step, so that most of the difference cancels."""

    def evaluate[Batch](self, pool: Pool[Batch], z: Vector) -> Evaluation:
        level, space = pool.level, pool.level.space
        if not is_full_precision(space):
            gradient, losses, kl = pool.gradient()
            return Evaluation(gradient, None, directional_derivatives(level, pool.batches, z), losses, kl)
        epsilon, gradient = pool.side * difference_step(space, z), space.accumulator()
        with space.displaced(z) as move_to:
            move_to(-epsilon)
            low = torch.cat([level.losses(batch) for batch in pool.batches])
            move_to(epsilon)
            terms = [
                level.add_gradient(batch, weights, gradient)
                for batch, weights in zip(pool.batches, pool.weights, strict=True)
            ]
        high = torch.cat([term.losses for term in terms])
        return Evaluation(
            gradient=pool.add_ridge_(space.reduce_gradients(gradient), space.masters),
            product=None,
            derivatives=central_differences(high, low, epsilon),
            losses=(high + low) / 2,
            kl=pool.total_kl([term.kl for term in terms]),
        )

    def product[Batch](self, pool: Pool[Batch], v: Vector) -> Vector | None:
        return None


class FiniteDifference:
    """Central differences of ordinary gradients: runs wherever training runs, at the memory of a training step."""

    def evaluate[Batch](self, pool: Pool[Batch], z: Vector) -> Evaluation:
        evaluation = self._between(pool, z)
        if is_full_precision(pool.level.space):
            return evaluation
        gradient, losses, kl = pool.gradient()
        return replace(evaluation, gradient=gradient, losses=losses, kl=kl)

    def product[Batch](self, pool: Pool[Batch], v: Vector) -> Vector | None:
        return self._between(pool, v).product

    def _between[Batch](self, pool: Pool[Batch], z: Vector) -> Evaluation:
        """Everything from θ + εz and θ − εz."""
        level, space = pool.level, pool.level.space
        epsilon = difference_step(space, z)
        plus, minus = space.accumulator(), space.accumulator()
        sides: dict[int, list[Tensor]] = {1: [], -1: []}
        kl: list[Tensor] = []
        with space.displaced(z) as move_to:
            # both sides of one micro-batch after each other, so that what it needs (the target's logits) is made once
            for batch, weights in zip(pool.batches, pool.weights, strict=True):
                for sign, gradient in ((1, plus), (-1, minus)):
                    move_to(sign * epsilon)
                    terms = level.add_gradient(batch, weights, gradient)
                    sides[sign].append(terms.losses)
                    kl.append(terms.kl / 2)
        difference, mean = plus, minus  # in place: two vectors do
        torch._foreach_sub_(difference, minus)
        torch._foreach_add_(mean, difference, alpha=0.5)
        for part in difference:
            part.div_((2 * epsilon).to(part.dtype))
        high, low = torch.cat(sides[1]), torch.cat(sides[-1])
        return Evaluation(
            gradient=pool.add_ridge_(space.reduce_gradients(mean), space.masters),
            product=pool.add_ridge_(space.reduce_gradients(difference), z),
            derivatives=central_differences(high, low, epsilon),
            losses=(high + low) / 2,
            kl=pool.total_kl(kl),
        )


class GaussNewton:
    """Two forward passes for Jv, one more and a backward pass for JᵀB (Jv); see `LowerLevel.add_gauss_newton`."""

    def evaluate[Batch](self, pool: Pool[Batch], z: Vector) -> Evaluation:
        space = pool.level.space
        gradient, product = space.accumulator(), space.accumulator()
        terms, derivatives = self._add(pool, z, gradient, product)
        return Evaluation(
            gradient=pool.add_ridge_(space.reduce_gradients(gradient), space.masters),
            product=pool.add_ridge_(space.reduce_gradients(product), z),
            derivatives=derivatives,
            losses=torch.cat([term.losses for term in terms]),
            kl=pool.total_kl([term.kl for term in terms]),
        )

    def product[Batch](self, pool: Pool[Batch], v: Vector) -> Vector | None:
        product = pool.level.space.accumulator()
        self._add(pool, v, None, product)
        return pool.add_ridge_(pool.level.space.reduce_gradients(product), v)

    def _add[Batch](
        self, pool: Pool[Batch], v: Vector, gradient: Vector | None, product: Vector
    ) -> tuple[list[LowerTerms], Tensor]:
        """:returns: terms of each micro-batch, and ⟨v, ∇L_i⟩, [local]."""
        level = pool.level
        epsilon = difference_step(level.space, v)
        terms, derivatives = [], []
        for batch, weights in zip(pool.batches, pool.weights, strict=True):
            with level.space.displaced(v) as move_to:  # what it needs is gone before there is a graph
                move_to(epsilon)
                ahead = level.values(batch)
                move_to(-epsilon)
                along = level.slope(ahead, batch, 2 * epsilon)
            del ahead
            outputs = level.outputs(batch)
            derivatives.append(level.add_gauss_newton(outputs, batch, weights, along, product, gradient is not None))
            del along
            if gradient is not None:
                terms.append(level.add_gradient(batch, weights, gradient, outputs))
            del outputs
        return terms, torch.cat(derivatives)


class Exact:
    """Double backward. The levels must be twice differentiable (`check_exact`).

    :raises UserError: with more than one tensor-parallel rank: the second derivative of Megatron's tensor-parallel
        collectives is missing.
    """

    def __init__(self, space: ParameterSpace) -> None:
        if group_size(space.tp_group) > 1:
            raise UserError(
                f"bilevel.curvature=exact needs proxy.tensor_parallel=1, not {group_size(space.tp_group)}: set it to "
                "1, or take bilevel.curvature=gauss-newton, which runs at any size"
            )

    def evaluate[Batch](self, pool: Pool[Batch], z: Vector) -> Evaluation:
        gradient, losses, kl = pool.gradient()
        derivatives = directional_derivatives(pool.level, pool.batches, z)
        return Evaluation(gradient, self.product(pool, z), derivatives, losses, kl)

    def product[Batch](self, pool: Pool[Batch], v: Vector) -> Vector | None:
        space = pool.level.space
        total = space.accumulator()
        for batch, weights in zip(pool.batches, pool.weights, strict=True):
            value = pool.level.objective(batch, weights)
            # a parameter that G is linear in, or does not use, has no second derivative: zeros
            slopes = torch.autograd.grad(value, space.parameters, create_graph=True, allow_unused=True)
            along = sum(
                (
                    (slope * part.to(slope.dtype)).sum()
                    for slope, part in zip(slopes, v, strict=True)
                    if slope is not None
                ),
                start=value.new_zeros(()),
            )
            along.backward()
            space.harvest_(total)
        return pool.add_ridge_(space.reduce_gradients(total), v)


def check_exact[Batch](pool: Pool[Batch], v: Vector, tolerance: float = 5e-2) -> None:
    """Compare the double backward with a central difference once, before it is trusted.

    Kernels whose second derivative is silently wrong are off by far more than differences in float32 are.

    :raises UserError: if the two disagree by more than `tolerance`, relative, or there is no second derivative.
    """
    space = pool.level.space
    try:
        exact = Exact(space).product(pool, v)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as failure:  # "derivative for … is not implemented"
        reason = " ".join(str(failure).split())[:200]
        raise UserError(
            f"bilevel.curvature=exact: the model has no second derivative ({reason}); take "
            "bilevel.curvature=finite-difference"
        ) from failure
    differences = FiniteDifference().product(pool, v)
    assert exact is not None
    assert differences is not None
    error = float(space.norm(torch._foreach_sub(exact, differences)) / space.norm(differences))
    if not error < tolerance:
        raise UserError(
            f"bilevel.curvature=exact: the model's second derivative is off by {error:.1%} from a finite difference "
            "(a fused kernel without one); take bilevel.curvature=finite-difference"
        )


def make_curvature(name: str, space: ParameterSpace) -> Curvature:
    """By the name in `bilevel.curvature`."""
    if name == "exact":
        return Exact(space)
    kinds: dict[str, type[Curvature]] = {
        "none": NoCurvature, "finite-difference": FiniteDifference, "gauss-newton": GaussNewton,
    }  # fmt: skip
    return kinds[name]()
