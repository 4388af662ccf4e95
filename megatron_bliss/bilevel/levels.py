"""What the loop asks of the two levels. Toy models and Megatron models fit alike.

`Batch` is one micro-batch of this rank: the levels make and read it, the loop only passes it on. A method is called
at the parameters of that moment, so that a perturbation around it is felt.
"""

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from megatron_bliss.bilevel.space import ParameterSpace, Vector


class LowerTerms(NamedTuple):
    """One micro-batch's part of the lower level, without a graph."""

    losses: Tensor  # L_i, [b]
    kl: Tensor  # this micro-batch's summand of the global mean KL, scalar


class LowerLevel[Batch](Protocol):
    """G and f as functions of the proxy's parameters."""

    space: ParameterSpace

    def add_gradient(self, batch: Batch, weights: Tensor, gradient: Vector, outputs: Any = None) -> LowerTerms:
        """Add this micro-batch's ∇(Σ P_i L_i + γ KL) to `gradient`, not reduced over ranks.

        :param weights: P_i, [b].
        :param outputs: of `outputs`, where they are there already; used up.
        """
        ...

    def losses(self, batch: Batch) -> Tensor:
        """L_i, [b], without a graph."""
        ...

    def outputs(self, batch: Batch) -> Any:
        """A forward pass with a graph, for `add_gauss_newton` and `add_gradient` to go back through."""
        ...

    def values(self, batch: Batch) -> Any:
        """The same without a graph, and not changed by what becomes of the parameters."""
        ...

    def slope(self, ahead: Any, batch: Batch, distance: Tensor) -> Any:
        """The derivative of `values` along v, the parameters being θ − εv.

        :param ahead: `values` at θ + εv; used up.
        :param distance: 2ε, a float64 scalar.
        """
        ...

    def add_gauss_newton(
        self, outputs: Any, batch: Batch, weights: Tensor, along: Any, product: Vector, keeps_graph: bool
    ) -> Tensor:
        """Add Jᵀ B J v to `product`, not reduced, and return ⟨v, ∇L_i⟩, [b].

        B = (weight of a token) · (diag(p) − ppᵀ), p the softmax of its logits: the Hessian of cross-entropy and of
        KL(target ‖ ·) in the logits, and the Fisher matrix for the other direction of KL.

        :param outputs: of `outputs`; left as they are.
        :param along: of `slope`, along v.
        """
        ...

    def objective(self, batch: Batch, weights: Tensor) -> Tensor:
        """This micro-batch's Σ P_i L_i + γ KL with a graph that can be differentiated twice."""
        ...

    def add_validation_gradient(self, batch: Batch, gradient: Vector, weight: Tensor | None = None) -> Tensor:
        """Add this micro-batch's part of w ∇L to `gradient`, not reduced; returns its summand of L, a scalar.

        L is the loss on the validation set that the micro-batch is of.

        :param weight: w, a scalar; None for 1.
        """
        ...


class UpperLevel[Batch](Protocol):
    """The score model."""

    space: ParameterSpace

    def logits(self, batch: Batch) -> Tensor:
        """Raw scores, [b], with a graph where gradients are enabled."""
        ...
