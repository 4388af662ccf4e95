"""KL divergence from the k largest probabilities of the target and the mass of the rest, where nothing else is known.

Every token has k + 1 outcomes: the target's k most likely ids S, and "any other id". With q the target's and p the
proxy's probabilities of these outcomes, q_T and p_T those of the rest, both directions are KL divergences of the k + 1:

    KL(q ‖ p)    gradient in the logits: p_j − q_j in S, p_j (1 − q_T / p_T) elsewhere
    KL(p ‖ q)    p_j (log p_j − log q_j − KL) in S, p_j (log p_T − log q_T − KL) elsewhere

They are lower bounds of the true divergences (data processing), by exactly q_T KL(q | not in S ‖ p | not in S) and
p_T KL(p | not in S ‖ q | not in S) (chain rule): nothing where S is the vocabulary, and less for every larger k.

Megatron's cached-logits distillation (`megatron.training.distillation`) also keeps the top k log-probabilities of the
whole vocabulary and lumps the rest together. There the rest's mass is 1 minus the others, cut off at 1e-8, and
gradients are autograd's; here it is summed over the other ids and stored, and gradients are in closed form, chunk by
chunk. The files differ, too: see `data/target_cache.py`.
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed
from torch import Tensor

from megatron_bliss.bilevel import objective
from megatron_bliss.mcore.losses import VocabShard, chunks

_TINY = torch.finfo(torch.float32).tiny  # stands for a mass of nothing


@dataclass(frozen=True)
class TopK:
    """What is known of the target at n tokens."""

    ids: Tensor  # int64 [n, k], over the whole vocabulary
    log_probs: Tensor  # float32 [n, k + 1], of these ids and, last, of all others together


@torch.no_grad()
def top_k_of(logits: Tensor, shard: VocabShard, k: int) -> TopK:
    """The k most likely ids of each token, most likely first, equal on all tensor-parallel ranks.

    :param logits: [n, v], this rank's columns, any floating dtype.
    :param k: at most the size of the vocabulary.
    """
    width = logits.shape[1]
    real, first = shard.real_columns(width), shard.rank * width
    ids = torch.empty(len(logits), k, dtype=torch.int64, device=logits.device)
    log_probs = torch.empty(len(logits), k + 1, device=logits.device)
    for rows in chunks(logits):
        part = logits[rows, :real].float()
        values, columns = part.topk(min(k, real), dim=-1)
        values, candidates = shard.gather(_padded(values, k, -torch.inf)), shard.gather(_padded(columns + first, k, 0))
        top, places = values.topk(k, dim=-1)
        ids[rows] = candidates.gather(-1, places)
        largest = top[:, :1]
        exponentials = (part - largest).exp_()
        local, is_here = _columns(ids[rows], first, real)
        _remove_(exponentials, local, is_here)
        rest = shard.reduce_(exponentials.sum(-1, keepdim=True), torch.distributed.ReduceOp.SUM)
        log_masses = torch.cat([top - largest, rest.clamp_min(_TINY).log()], dim=-1)
        log_probs[rows] = log_masses.log_softmax(-1)
    return TopK(ids, log_probs)


def _padded(values: Tensor, width: int, filling: float) -> Tensor:
    """[c, less] to [c, width]: a rank may hold fewer than k columns."""
    return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=filling)


def _columns(ids: Tensor, first: int, real: int) -> tuple[Tensor, Tensor]:
    """Where ids lie among this rank's columns, and whether they do."""
    local = ids - first
    return local.clamp(0, max(real - 1, 0)), (local >= 0) & (local < real)


def _remove_(exponentials: Tensor, columns: Tensor, is_here: Tensor) -> Tensor:
    """Set the entries of S to exactly zero; returns them, zero where they are another rank's."""
    if not exponentials.shape[1]:
        return torch.zeros(is_here.shape, device=exponentials.device)
    taken = exponentials.gather(-1, columns) * is_here
    exponentials.scatter_add_(-1, columns, -taken)
    return taken


@dataclass(frozen=True)
class TopKDivergence:
    """The KL term from a target of which the top k are known."""

    target: TopK
    direction: str = "target_proxy"  # KL(target ‖ proxy) | proxy_target

    def block(self, rows: slice) -> "TopKDivergence":
        return replace(self, target=TopK(self.target.ids[rows], self.target.log_probs[rows]))

    def plain(self, logits: Tensor) -> Tensor:
        """The same by torch operations that can be differentiated twice: [n] from [n, vocabulary]."""
        return objective.top_k_divergence(logits, self.target.ids, self.target.log_probs, self.direction)

    def chunk(self, logits: Tensor, labels: Tensor, shard: VocabShard, rows: slice, first: int) -> "_TopKChunk":
        return _TopKChunk(logits, labels, shard, self, rows, first)


class _TopKChunk:
    """Some tokens: see `losses.TokenChunk`. Shapes: [c, v], [c, k] and [c]."""

    def __init__(
        self, logits: Tensor, labels: Tensor, shard: VocabShard, divergence: TopKDivergence, rows: slice, first: int
    ) -> None:
        self.direction, real = divergence.direction, logits.shape[1]
        self.log_target = divergence.target.log_probs[rows]  # [c, k + 1]
        self.columns, self.is_in_top = _columns(divergence.target.ids[rows], first, real)
        # a rank may hold nothing but padding
        largest = logits.amax(-1).float() if real else torch.full_like(labels, -torch.inf, dtype=torch.float32)
        shard.reduce_(largest, torch.distributed.ReduceOp.MAX)
        shifted = logits.float() - largest.unsqueeze(-1)
        self.is_here = (labels >= 0) & (labels < real)
        self.label_columns = labels.clamp(0, max(real - 1, 0)).unsqueeze(-1)
        label = shifted.gather(-1, self.label_columns).squeeze(-1) if real else torch.zeros_like(largest)
        top = shifted.gather(-1, self.columns) if real else torch.zeros_like(self.log_target[:, :-1])
        self.rest = shifted.exp_()  # of the ids outside S
        self.top = _remove_(self.rest, self.columns, self.is_in_top)
        # Σ in S of the first distribution times the log ratio of both, the normaliser of the proxy left out
        log_ratio = self.log_target[:, :-1] - top
        if self.direction == "target_proxy":
            terms = self.log_target[:, :-1].exp() * log_ratio * self.is_in_top
        else:
            terms = -self.top * log_ratio
        sums = torch.stack([label * self.is_here, self.rest.sum(-1), self.top.sum(-1), terms.sum(-1)])
        label, self.rest_sum, top_sum, terms_sum = shard.reduce_(sums, torch.distributed.ReduceOp.SUM)
        self.normaliser = self.rest_sum + top_sum
        log_normaliser = self.normaliser.log()
        self.cross_entropy = log_normaliser - label
        self.log_ratio = -(log_ratio + log_normaliser.unsqueeze(-1))  # log p − log q in S
        self.rest_log_ratio = self.rest_sum.clamp_min(_TINY).log() - log_normaliser - self.log_target[:, -1]
        if self.direction == "target_proxy":
            target = self.log_target.exp()
            self.kl = terms_sum + target[:, :-1].sum(-1) * log_normaliser - target[:, -1] * self.rest_log_ratio
        else:
            in_top = (terms_sum - top_sum * log_normaliser) / self.normaliser
            self.kl = in_top + self.rest_sum / self.normaliser * self.rest_log_ratio

    def gradient_(self, weights: Tensor, kl_weights: Tensor | None) -> Tensor:
        """float32 [c, v], in the memory of the exponentials. For p and q of S its entries are added one by one."""
        if kl_weights is None:
            kl_weights = torch.zeros_like(weights)
        scale, kl_scale = weights / self.normaliser, kl_weights / self.normaliser
        if self.direction == "target_proxy":
            rest = scale + kl_scale - kl_weights * self.log_target[:, -1].exp() / self.rest_sum.clamp_min(_TINY)
            top = self.top * (scale + kl_scale).unsqueeze(-1)
            top -= kl_weights.unsqueeze(-1) * self.log_target[:, :-1].exp() * self.is_in_top
        else:
            rest = scale + kl_scale * (self.rest_log_ratio - self.kl)
            top = self.top * (scale.unsqueeze(-1) + kl_scale.unsqueeze(-1) * (self.log_ratio - self.kl.unsqueeze(-1)))
        gradient = self.rest.mul_(rest.unsqueeze(-1))
        if gradient.shape[1]:
            gradient.scatter_add_(-1, self.columns, top)
            gradient.scatter_add_(-1, self.label_columns, -(weights * self.is_here).unsqueeze(-1))
        return gradient
