"""The weights w_k of several validation sets in the upper level, f = Σ_k w_k L_k."""

from typing import NamedTuple

import torch
from torch import Tensor


def exponentiated_gradient(weights: Tensor, losses: Tensor, rate: float) -> Tensor:
    """w_k exp(η L_k), normalised (Group-DRO, arXiv 1911.08731): towards the weights with the highest Σ_k w_k L_k.

    :param weights: w_k, [k]; one that has all but gone counts as 1e-12, so that it can come back.
    :param losses: L_k, [k]. Where one is not finite, the weights stay what they are.
    :param rate: η.
    """
    moved = torch.softmax(weights.clamp_min(1e-12).log() + rate * losses, dim=0)
    return torch.where(torch.isfinite(losses).all(), moved, weights)


class Upper(NamedTuple):
    """f of a step and what it is made of."""

    value: Tensor  # f, float64 scalar
    losses: Tensor  # L_k, float64 [k]
    weights: Tensor  # w_k, float64 [k]


class SetWeights:
    """w_k from step to step, float64; they stay as given where the rate is 0.

    A step's f has the weights that the losses of the steps before it led to, so that a set's loss and gradient come
    from one pass.

    :param start: w_k by name of the set.
    :param rate: η of `exponentiated_gradient`.
    :param device: of the losses.
    """

    def __init__(self, start: dict[str, float], rate: float, device: torch.device | None = None) -> None:
        self.names, self.rate = list(start), rate
        self.values = torch.tensor(list(start.values()), dtype=torch.float64, device=device)

    def take_in(self, losses: Tensor) -> Upper:
        """:param losses: L_k over all ranks, [k]."""
        losses, weights = losses.double(), self.values
        if self.rate:
            self.values = exponentiated_gradient(weights, losses, self.rate)
        return Upper((weights * losses).sum(), losses, weights)

    def load(self, values: list[float]) -> None:
        self.values = torch.tensor(values, dtype=torch.float64, device=self.values.device)
