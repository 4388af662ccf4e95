"""The curvature of the losses in the logits, applied to a tangent, from vocabulary-parallel logits.

With p the proxy's distribution at a token, t the change of its logits along a direction and w the token's weight:

    B t = w (p ∘ t − p ⟨p, t⟩)            the softmax Hessian, of cross-entropy and of KL(q ‖ p) alike
    ⟨z, ∇CE⟩ = ⟨p, t⟩ − t[label]          the derivative of the token's cross-entropy along the direction
"""

import torch
import torch.distributed
from torch import Tensor

from megatron_bliss.mcore.losses import VocabShard, chunks


@torch.no_grad()
def gauss_newton_(logits: Tensor, tangent: Tensor, labels: Tensor, shard: VocabShard, weights: Tensor) -> Tensor:
    """Overwrite `tangent` with B tangent, and return every token's ⟨p, t⟩ − t[label].

    :param logits: [n, v], this rank's columns, any floating dtype; left as they are.
    :param tangent: float32 [n, v].
    :param labels: [n], ids over the whole vocabulary.
    :param weights: w, float32 [n].
    :returns: float32 [n], equal on all tensor-parallel ranks.
    """
    width = logits.shape[1]
    real = shard.real_columns(width)
    tangent[:, real:] = 0
    along = torch.zeros(len(logits), device=logits.device)
    for rows in chunks(logits):
        part, columns = tangent[rows, :real], labels[rows] - shard.rank * width
        largest = logits[rows, :real].amax(-1).float() if real else along.new_full((len(columns),), -torch.inf)
        shard.reduce_(largest, torch.distributed.ReduceOp.MAX)
        p = (logits[rows, :real].float() - largest.unsqueeze(-1)).exp_()  # not normalised yet
        is_here = (columns >= 0) & (columns < real)
        at_label = part.gather(-1, columns.clamp(0, max(real - 1, 0)).unsqueeze(-1)).squeeze(-1) if real else largest
        sums = torch.stack([p.sum(-1), (p * part).sum(-1), torch.where(is_here, at_label, 0.0)])
        total, product, label = shard.reduce_(sums, torch.distributed.ReduceOp.SUM)
        mean = product / total
        along[rows] = mean - label
        part.sub_(mean.unsqueeze(-1)).mul_(p).mul_((weights[rows] / total).unsqueeze(-1))
    return along
