"""What training on a sequence is worth to a model, to first order.

    g_i = ⟨∇L, ∇L_i⟩      one step of gradient descent of size η on sequence i lowers L by about η g_i

L is the loss on the validation sets, L_i the mean loss of sequence i over its predicted tokens, no curvature or
optimizer between them. ∇L is computed once; the g_i of many sequences then take two forward passes (central
differences along ∇L, as in `bilevel.hypergradient`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_bliss.bilevel.space import ParameterSpace, Vector, difference_fraction
from megatron_bliss.mcore.batches import Batch
from megatron_bliss.mcore.models import token_losses
from megatron_bliss.mcore.scorer import Pass, Sequences, loss_measure
from megatron_bliss.mcore.space import plain_space

Sets = Mapping[str, tuple[float, Sequences]]  # by name, the weight of a set in L, and its sequences


class Usefulness:
    """Of sequences to one model. All ranks make and call it.

    Memory beside a batch's graph: the parameters twice, and a float32 vector like them. The LLM may be large.

    :param model: whose parameters require gradients.
    :param forward: how sequences are put through it.
    :param validation: what L is the loss on.
    """

    def __init__(self, model: GPTModel, forward: Pass, validation: Sets) -> None:
        self._forward, self._measure = forward, loss_measure(model)
        space = plain_space(model, forward.context)
        self._parameters, self._gradient = space.parameters, _gradient(model, space, forward, validation)
        self._epsilon = _difference_step(space, self._gradient)

    def __call__(self, sequences: Sequences) -> np.ndarray:
        """g_i of each: float64 [n], equal on all ranks."""
        with self._displaced(self._epsilon):
            plus = self._losses(sequences)
        with self._displaced(-self._epsilon):
            minus = self._losses(sequences)
        return (plus - minus) / (2 * float(self._epsilon))

    def _losses(self, sequences: Sequences) -> np.ndarray:
        totals = self._forward.totals(self._measure, sequences)
        losses: np.ndarray = totals[:, 0] / np.maximum(totals[:, 1], 1)
        return losses

    @contextmanager
    def _displaced(self, epsilon: Tensor) -> Iterator[None]:
        """Inside, the parameters are θ + ε∇L; afterwards every byte of them is what it was."""
        originals = [parameter.detach().clone() for parameter in self._parameters]
        try:
            with torch.no_grad():
                for parameter, part in zip(self._parameters, self._gradient, strict=True):
                    parameter.copy_(parameter + epsilon.to(part.dtype) * part)
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._parameters, originals)


def _gradient(model: GPTModel, space: ParameterSpace, forward: Pass, validation: Sets) -> Vector:
    """∇L, float32, reduced over all ranks."""
    gradient = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in space.parameters]
    for weight, sequences in validation.values():
        scale = weight / max(_num_predicted(sequences), 1)

        def add(batch: Batch, scale: float = scale) -> None:
            (scale * (token_losses(model, batch) * batch.loss_mask).sum()).backward()
            space.harvest_(gradient)

        forward.each(sequences, add)
    return space.reduce_gradients(gradient)


def _difference_step(space: ParameterSpace, gradient: Vector) -> Tensor:
    """As `hypergradient.difference_step`, for parameters without masters."""
    fraction = difference_fraction(space.parameters, gradient)
    return fraction * (1 + space.norm(space.parameters)) / space.norm(gradient).clamp_min(1e-30)


def _num_predicted(sequences: Sequences) -> int:
    """Tokens of all sequences that carry loss as labels."""
    masks = (sequences.get(index)[1] for index in range(len(sequences.lengths)))
    counts = zip(sequences.lengths.tolist(), masks, strict=True)
    return sum(max(length - 1, 0) if mask is None else int(mask[1:].sum()) for length, mask in counts)
