"""Derivatives along z by central differences, and the score model's gradient from them.

ε = √(machine ε) (1 + ‖θ‖) / ‖z‖          the displacement is that fraction of the parameters, whatever z's scale
g_i = (L_i(θ + εz) − L_i(θ − εz)) / 2ε     for the whole batch from two forward passes
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_bliss.bilevel.levels import LowerLevel, UpperLevel
from megatron_bliss.bilevel.objective import scores_from_logits
from megatron_bliss.bilevel.space import ParameterSpace, Vector


def difference_step(space: ParameterSpace, direction: Sequence[Tensor]) -> Tensor:
    """ε for central differences along a direction, a float64 scalar tensor; finite for a zero direction too."""
    size = 1 + space.norm(space.masters)
    return space.difference_fraction * size / space.norm(direction).clamp_min(1e-30)


def directional_derivatives[Batch](lower: LowerLevel[Batch], batches: Sequence[Batch], z: Vector) -> Tensor:
    """g_i = ⟨z, ∇L_i⟩ of this rank's sequences, [local]: two forward passes."""
    epsilon = difference_step(lower.space, z)
    with torch.no_grad():
        with lower.space.perturbed(z, epsilon):
            plus = torch.cat([lower.losses(batch) for batch in batches])
        with lower.space.perturbed(z, -epsilon):
            minus = torch.cat([lower.losses(batch) for batch in batches])
    return central_differences(plus, minus, epsilon)


def central_differences(plus: Tensor, minus: Tensor, epsilon: Tensor) -> Tensor:
    """g_i, [local], from the L_i at θ + εz and at θ − εz, [local] each; ε is a float64 scalar tensor."""
    return (plus - minus) / (2 * epsilon).to(plus.dtype)


def score_logits[Batch](upper: UpperLevel[Batch], batches: Sequence[Batch]) -> list[Tensor]:
    """Raw scores of each micro-batch, [b], without a graph: one kept until `score_gradient` would be there at the peak
    of memory, and saves little."""
    with torch.no_grad():
        return [upper.logits(batch) for batch in batches]


def score_gradient[Batch](upper: UpperLevel[Batch], batches: Sequence[Batch], coefficients: Sequence[Tensor]) -> Vector:
    """∇Φ = Σ_i c_i ∇s_i, reduced over all ranks: one backward pass a micro-batch, whose graph is gone after it.

    :param coefficients: c_i of each micro-batch's sequences, [b].
    """
    gradient = upper.space.accumulator()
    for batch, part in zip(batches, coefficients, strict=True):
        scores = scores_from_logits(upper.logits(batch))
        (scores * part.to(scores.dtype)).sum().backward()
        upper.space.harvest_(gradient)
    return upper.space.reduce_gradients(gradient)
