"""Cross-entropy and KL divergence per token from vocabulary-parallel logits, with their gradients in closed form.

One pass over chunks of tokens makes both losses and the gradient with respect to the proxy's logits, p the proxy's and
q the target's distribution, w and v the weights of a token:

    cross-entropy      w (p − onehot(label))
    KL(q ‖ p)          v (p − q)
    KL(p ‖ q)          v p (log p − log q − KL)

Only a chunk is ever held in float32; the gradient takes the memory of the logits. The columns that pad the vocabulary
belong to neither distribution. Two small collectives a chunk are all that tensor-parallel ranks exchange.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from megatron_bliss.bilevel import objective
from megatron_bliss.bilevel.space import group_size
from megatron_bliss.mcore.parallel import ParallelContext

CHUNK = 1 << 18  # logits of one model in a chunk on a CPU: what its cache holds
GPU_CHUNK = 1 << 24  # enough to fill a GPU


def chunks(logits: Tensor) -> list[slice]:
    """Rows of logits, [t, v], to be held in float32 at a time."""
    size = max((GPU_CHUNK if logits.is_cuda else CHUNK) // logits.shape[1], 1)
    return [slice(start, start + size) for start in range(0, len(logits), size)]


@dataclass(frozen=True)
class VocabShard:
    """The columns of the vocabulary that this tensor-parallel rank holds, all ranks having equally many."""

    vocab_size: int  # of the tokenizer: ids from here on are padding
    rank: int
    group: Any  # tensor-parallel group; None for one rank

    @classmethod
    def of(cls, context: ParallelContext, vocab_size: int) -> "VocabShard":
        return cls(vocab_size, context.tp_rank, context.tp_group if context.tp_size > 1 else None)

    def real_columns(self, width: int) -> int:
        """How many of this rank's `width` columns are not padding; they come first."""
        return min(max(self.vocab_size - self.rank * width, 0), width)

    def reduce_(self, tensor: Tensor, operation: Any) -> Tensor:
        if group_size(self.group) > 1:
            torch.distributed.all_reduce(tensor, op=operation, group=self.group)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """All ranks' [t, n] side by side: [t, ranks · n]."""
        size = group_size(self.group)
        if size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(size)]
        torch.distributed.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)


class TokenChunk(Protocol):
    """The losses of c tokens: float32 [c] each, equal on all tensor-parallel ranks."""

    cross_entropy: Tensor
    kl: Tensor

    def gradient_(self, weights: Tensor, kl_weights: Tensor | None) -> Tensor:
        """Of Σ_t w_t CE_t + v_t KL_t with respect to this rank's logits, float32 [c, v]; once."""
        ...


class Divergence(Protocol):
    """A KL term: what is known of the target at n tokens, and the direction."""

    def block(self, rows: slice) -> "KnownDivergence":
        """Of some of the tokens."""
        ...


class KnownDivergence(Protocol):
    """A KL term at n tokens, everything at hand."""

    def chunk(self, logits: Tensor, labels: Tensor, shard: VocabShard, rows: slice, first: int) -> TokenChunk:
        """:param logits: the proxy's at `rows` of the tokens, [c, v]: this rank's columns without padding.
        :param labels: [c], counted from this rank's first column on.
        :param first: the id of that column.
        """
        ...

    def plain(self, logits: Tensor) -> Tensor:
        """KL of each token by torch operations that can be differentiated twice, [n] from the proxy's logits
        [n, vocabulary] on one tensor-parallel rank."""
        ...


@dataclass(frozen=True)
class LogitsDivergence:
    """From the target's logits [t, v], laid out as the proxy's."""

    target_logits: Tensor
    direction: str = "target_proxy"  # KL(target ‖ proxy) | proxy_target

    def chunk(self, logits: Tensor, labels: Tensor, shard: VocabShard, rows: slice, first: int) -> TokenChunk:
        return _Chunk(logits, labels, shard, self.target_logits[rows, : logits.shape[1]], self.direction)

    def plain(self, logits: Tensor) -> Tensor:
        return objective.kl_divergence(logits, self.target_logits[:, : logits.shape[1]].float(), self.direction)


@torch.no_grad()
def token_terms_(
    logits: Tensor,
    labels: Tensor,
    shard: VocabShard,
    divergence: KnownDivergence | None = None,
    weights: Tensor | None = None,
    kl_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and KL of every token; where weights are given, `logits` are *overwritten* by the gradient of
    Σ_t w_t CE_t + v_t KL_t with respect to them.

    :param logits: [t, v], this rank's columns, any floating dtype.
    :param labels: [t], ids over the whole vocabulary.
    :param weights: w_t, float32 [t]. :param kl_weights: v_t, float32 [t].
    :returns: CE and KL, float32 [t] each, equal on all tensor-parallel ranks; KL is 0 without a `divergence`.
    """
    width = logits.shape[1]
    real = shard.real_columns(width)
    cross_entropy = torch.zeros(len(logits), device=logits.device)
    kl = torch.zeros_like(cross_entropy)
    for rows in chunks(logits):
        first = shard.rank * width
        part, columns = logits[rows, :real], labels[rows] - first
        chunk: TokenChunk = (
            divergence.chunk(part, columns, shard, rows, first) if divergence else _Chunk(part, columns, shard)
        )
        cross_entropy[rows], kl[rows] = chunk.cross_entropy, chunk.kl
        if weights is not None:
            logits[rows, :real] = chunk.gradient_(weights[rows], None if kl_weights is None else kl_weights[rows])
            logits[rows, real:] = 0
        del chunk  # before there is the next
    return cross_entropy, kl


class _Chunk:
    """Some tokens: their exponentials, sums and losses. Shapes: [c, v] and [c]."""

    def __init__(
        self,
        logits: Tensor,
        labels: Tensor,
        shard: VocabShard,
        target_logits: Tensor | None = None,
        direction: str | None = None,
    ) -> None:
        self.direction, real = direction, logits.shape[1]
        models = [logits] if target_logits is None else [logits, target_logits]
        if real:
            largest = torch.stack([part.amax(-1).float() for part in models])
        else:  # a rank that holds nothing but padding
            largest = logits.new_full((len(models), len(labels)), -torch.inf, dtype=torch.float32)
        shard.reduce_(largest, torch.distributed.ReduceOp.MAX)
        shifted = [part.float() - top.unsqueeze(-1) for part, top in zip(models, largest, strict=True)]
        self.is_here = (labels >= 0) & (labels < real)
        self.columns = labels.clamp(0, max(real - 1, 0)).unsqueeze(-1)
        label_logit = shifted[0].gather(-1, self.columns).squeeze(-1) if real else torch.zeros_like(largest[0])
        sums = [label_logit * self.is_here]
        if self.direction is not None:
            self.log_ratio = shifted[1] - shifted[0] if self.direction == "target_proxy" else shifted[0] - shifted[1]
        self.exponentials = [part.exp_() for part in shifted]
        sums += [part.sum(-1) for part in self.exponentials]
        if self.direction is not None:
            first = self.exponentials[1 if self.direction == "target_proxy" else 0]
            sums.append((first * self.log_ratio).sum(-1))
        self.sums = shard.reduce_(torch.stack(sums), torch.distributed.ReduceOp.SUM)
        self.cross_entropy = self.sums[1].log() - self.sums[0]
        self.kl = torch.zeros_like(self.cross_entropy) if self.direction is None else self._kl()

    def _kl(self) -> Tensor:
        first, second = (2, 1) if self.direction == "target_proxy" else (1, 2)
        self.offset = self.sums[second].log() - self.sums[first].log()  # log of the ratio of the two normalisers
        return self.sums[3] / self.sums[first] + self.offset

    def gradient_(self, weights: Tensor, kl_weights: Tensor | None) -> Tensor:
        """float32 [c, v], in the memory of the exponentials."""
        proxy = self.exponentials[0]
        if self.direction is None or kl_weights is None:
            gradient = proxy.mul_((weights / self.sums[1]).unsqueeze(-1))
        elif self.direction == "target_proxy":
            gradient = proxy.mul_(((weights + kl_weights) / self.sums[1]).unsqueeze(-1))
            gradient.addcmul_(self.exponentials[1], (kl_weights / self.sums[2]).unsqueeze(-1), value=-1)
        else:
            factor = self.log_ratio.add_((self.offset - self.kl).unsqueeze(-1)).mul_(kl_weights.unsqueeze(-1))
            gradient = proxy.mul_((factor + weights.unsqueeze(-1)) / self.sums[1].unsqueeze(-1))
        if gradient.shape[1]:
            gradient.scatter_add_(-1, self.columns, -(weights * self.is_here).unsqueeze(-1))
        return gradient
