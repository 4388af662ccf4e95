"""Losses through a language model's output layer, whose logits are made in blocks of tokens, not all at once.

With h the hidden states of a block, W the layer's weight and D the gradient in the block's logits, in closed form:

    logits = h Wᵀ        ∂/∂h = D W        ∂/∂W = Σ over blocks of Dᵀ h

and with ḣ and Ẇ their derivatives along a direction, the logits' derivative is ḣ Wᵀ + h Ẇᵀ.

The gradients in h then go back through the model as one. Tensor-parallel ranks hold rows of W each; what sums ∂/∂h over
them is the model's own operation in front of the layer.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_bliss.mcore.gauss_newton import gauss_newton_
from megatron_bliss.mcore.losses import Divergence, LogitsDivergence, VocabShard, token_terms_

BLOCK_TOKENS = 256  # on a CPU: matrix products are not much slower for it
GPU_BLOCK = 1 << 27  # logits of one model in a block


@dataclass(frozen=True, eq=False)
class Outputs:
    """What the logits of n tokens are made of: hidden states, [n, h], and the output layer's weight, [v, h]; this
    tensor-parallel rank's v columns of the vocabulary."""

    hidden: Tensor
    weight: Tensor

    def logits(self, rows: slice = slice(None)) -> Tensor:
        """[rows, v], in the model's dtype."""
        return torch.nn.functional.linear(self.hidden[rows], self.weight)

    def blocks(self) -> list[slice]:
        """Tokens whose logits are there at a time."""
        size = max(GPU_BLOCK // len(self.weight), 1) if self.hidden.is_cuda else BLOCK_TOKENS
        return [slice(start, start + size) for start in range(0, max(len(self.hidden), 1), size)]


def copied(outputs: Outputs) -> Outputs:
    """As values of this moment: without a graph, and what they are when parameters change."""
    return Outputs(outputs.hidden.detach(), outputs.weight.detach().clone())


@torch.no_grad()
def slope(ahead: Outputs, behind: Outputs, distance: Tensor) -> Outputs:
    """ḣ and Ẇ by a difference, in the model's dtype.

    :param ahead: of `copied`, at θ + εv; used up. :param behind: at θ − εv.
    :param distance: 2ε, a scalar.
    """
    hidden = (ahead.hidden.float() - behind.hidden.float()).div_(distance.float())
    weight = ahead.weight.float().sub_(behind.weight).div_(distance.float())
    return Outputs(hidden.to(ahead.hidden.dtype), weight.to(ahead.weight.dtype))


@dataclass(frozen=True)
class OutputsDivergence:
    """The KL term of a target whose logits are made with the proxy's, block by block."""

    target: Outputs
    direction: str = "target_proxy"  # KL(target ‖ proxy) | proxy_target
    kept: dict[tuple[int, int], Tensor] | None = None  # logits by block, where they are needed again

    def block(self, rows: slice) -> LogitsDivergence:
        if self.kept is None:
            return LogitsDivergence(self.target.logits(rows), self.direction)
        if (key := (rows.start, rows.stop)) not in self.kept:
            self.kept[key] = self.target.logits(rows)
        return LogitsDivergence(self.kept[key], self.direction)


class _Gradient:
    """∂/∂h, [n, h] in the model's dtype, and ∂/∂W, [v, h]; the products of several blocks are summed in float32."""

    def __init__(self, outputs: Outputs) -> None:
        self.outputs = outputs
        self.hidden = torch.empty_like(outputs.hidden)
        self.weight: Tensor | None = None

    def add(self, rows: slice, logits: Tensor) -> None:
        """:param logits: the gradient in the logits of a block, [rows, v]."""
        hidden, weight = self.outputs.hidden[rows], self.outputs.weight
        torch.mm(logits, weight, out=self.hidden[rows])
        if self.weight is None:
            self.weight = logits.t() @ hidden
        elif self.weight.dtype == logits.dtype == torch.float32:
            self.weight.addmm_(logits.t(), hidden)
        else:
            self.weight = self.weight.float().add_(logits.t() @ hidden)

    def backward(self, keeps_graph: bool = False) -> None:
        """Through the model, to where gradients of its parameters go; the weight's is gone before."""
        outputs: Any = self.outputs
        assert self.weight is not None
        torch.autograd.backward([outputs.weight], [self.weight.to(outputs.weight.dtype)])
        self.weight = None
        torch.autograd.backward([outputs.hidden], [self.hidden], retain_graph=keeps_graph)


def token_losses(outputs: Outputs, labels: Tensor, shard: VocabShard) -> Tensor:
    """Cross-entropy, float32 [n], without a graph. Labels are ids over the whole vocabulary, [n]."""
    with torch.no_grad():
        return torch.cat([token_terms_(outputs.logits(rows), labels[rows], shard)[0] for rows in outputs.blocks()])


def backward(
    outputs: Outputs,
    labels: Tensor,
    shard: VocabShard,
    weights: Tensor,
    divergence: Divergence | None = None,
    kl_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Take the gradient of Σ_t w_t CE_t + v_t KL_t back through the model.

    :param outputs: with a graph.
    :param labels: [n], ids over the whole vocabulary.
    :param weights: w_t, float32 [n]. :param kl_weights: v_t, float32 [n].
    :returns: CE and KL, float32 [n] each, equal on all tensor-parallel ranks; KL is 0 without a `divergence`.
    """
    cross_entropy = torch.zeros_like(weights)
    kl = torch.zeros_like(weights)
    with torch.no_grad():
        gradient = _Gradient(outputs)
        for rows in outputs.blocks():
            logits, of_block = outputs.logits(rows), None if divergence is None else divergence.block(rows)
            terms = token_terms_(
                logits, labels[rows], shard, of_block, weights[rows], None if kl_weights is None else kl_weights[rows]
            )
            cross_entropy[rows], kl[rows] = terms
            gradient.add(rows, logits)
            del logits, of_block
    gradient.backward()
    return cross_entropy, kl


def gauss_newton_backward(
    outputs: Outputs, along: Outputs, labels: Tensor, shard: VocabShard, weights: Tensor, keeps_graph: bool
) -> Tensor:
    """Take B Jv back through the model, and return every token's ⟨p, t⟩ − t[label] with t = Jv; see `gauss_newton_`.

    :param outputs: with a graph. :param along: their `slope` along v.
    :param labels: [n], ids over the whole vocabulary. :param weights: w, float32 [n].
    :returns: float32 [n], equal on all tensor-parallel ranks.
    """
    derivatives = torch.zeros_like(weights)
    with torch.no_grad():
        gradient = _Gradient(outputs)
        for rows in outputs.blocks():
            logits = outputs.logits(rows)
            tangent = torch.nn.functional.linear(along.hidden[rows], outputs.weight).float()
            tangent += torch.nn.functional.linear(outputs.hidden[rows], along.weight)
            derivatives[rows] = gauss_newton_(logits, tangent, labels[rows], shard, weights[rows])
            gradient.add(rows, tangent.to(logits.dtype))
            del logits, tangent
    gradient.backward(keeps_graph)
    return derivatives
