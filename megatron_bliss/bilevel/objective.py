"""The terms of the bilevel problem (arXiv 2510.06048, eqs. 3-5), as plain formulas over one global batch.

    P_i = softmax_i(s_1..n)                       importance weights, s the scores of the global batch
    G = Σ_i P_i L_i + γ KL + λ‖θ_p‖²              lower level;  L_i: mean cross-entropy of sequence i
    ∇_s Φ = −Σ_i g_i ∇_s P_i                      hypergradient;  g_i = ⟨z, ∇_p L_i⟩

The global batch is spread over data-parallel ranks: a rank holds `[local]` of the `[n]` entries, and every sum runs
over all of them.
"""

from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor

from megatron_bliss.bilevel.space import group_size, group_sum_

Weights = Literal["softmax", "naive"]


def scores_from_logits(logits: Tensor) -> Tensor:
    """s_i in (0, 1) from the score model's raw outputs [local]: the sigmoid of the paper.

    It bounds the ratio of two weights by e, which keeps the lower level from collapsing onto a few sequences; ranking
    is done on the raw logits, which do not saturate.
    """
    return logits.sigmoid()


def importance_weights(scores: Tensor, kind: Weights, dp_group: Any = None) -> Tensor:
    """P_i of the global batch: softmax of the scores, or `naive` s_i / n.

    :param scores: s_i of this rank's sequences, [local].
    :returns: P_i of the same sequences, [local]; softmax weights sum to 1 over all ranks.
    """
    if kind == "naive":
        size = group_sum_(torch.full((), float(scores.numel()), device=scores.device, dtype=scores.dtype), dp_group)
        return scores / size
    largest = scores.max()
    if group_size(dp_group) > 1:
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=dp_group)
    exponentials = (scores - largest).exp()
    return exponentials / group_sum_(exponentials.sum(), dp_group)


def score_coefficients(weights: Tensor, derivatives: Tensor, kind: Weights, dp_group: Any = None) -> Tensor:
    """c_i = ∂Φ/∂s_i, so that ∇Φ = Σ_i c_i ∇_s s_i.

    softmax: ∂P_j/∂s_i = P_i(δ_ij − P_j), hence c_i = −P_i (g_i − Σ_j P_j g_j): only centred g_i matter.
    naive: ∂P_j/∂s_i = δ_ij / n, hence c_i = −g_i / n.

    :param weights: P_i, [local]. :param derivatives: g_i, [local].
    """
    if kind == "naive":
        size = group_sum_(torch.full((), float(weights.numel()), device=weights.device, dtype=weights.dtype), dp_group)
        return -derivatives / size
    mean = group_sum_((weights * derivatives).sum(), dp_group)
    return -weights * (derivatives - mean)


def entropy(weights: Tensor, dp_group: Any = None) -> Tensor:
    """−Σ P_i log P_i of weights normalised over the global batch, in nats."""
    total = group_sum_(weights.sum(), dp_group)
    share = weights / total
    return group_sum_(-torch.special.xlogy(share, share).sum(), dp_group)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """−log p(label) per token, [...] from logits [..., vocab]. Twice differentiable plain torch operations."""
    return -logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def kl_divergence(proxy_logits: Tensor, target_logits: Tensor, direction: str = "target_proxy") -> Tensor:
    """KL per token, [...] from logits [..., vocab].

    :param direction: `target_proxy` is KL(target ‖ proxy), as the authors compute it; `proxy_target` the reverse.
    """
    proxy, target = proxy_logits.log_softmax(-1), target_logits.log_softmax(-1)
    first, second = (target, proxy) if direction == "target_proxy" else (proxy, target)
    return (first.exp() * (first - second)).sum(-1)


def top_k_divergence(proxy_logits: Tensor, ids: Tensor, log_probs: Tensor, direction: str = "target_proxy") -> Tensor:
    """KL per token over k + 1 outcomes: k ids, and all others together. [n] from the proxy's logits [n, vocab].

    :param ids: int64 [n, k].
    :param log_probs: the target's, float32 [n, k + 1], of the ids and, last, of all others.
    """
    proxy = proxy_logits.log_softmax(-1)
    others = proxy.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    if ids.shape[-1] == proxy.shape[-1]:  # there are none
        others = log_probs[:, -1:]
    proxy = torch.cat([proxy.gather(-1, ids), others], dim=-1)
    first, second = (log_probs, proxy) if direction == "target_proxy" else (proxy, log_probs)
    return (first.exp() * (first - second)).sum(-1)
