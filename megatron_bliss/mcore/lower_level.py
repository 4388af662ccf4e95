"""The two levels of the bilevel problem on Megatron models, tensor × data × sequence parallel.

Conventions, the same for any number of ranks: L_i is the mean cross-entropy over the predicted tokens of sequence i,
KL the mean over all predicted tokens of the global batch, f the mean over all predicted tokens of the global
validation batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_bliss.bilevel import objective
from megatron_bliss.bilevel.hypergradient import harvest_
from megatron_bliss.bilevel.levels import LowerTerms
from megatron_bliss.bilevel.space import Vector, group_sum_
from megatron_bliss.mcore import models
from megatron_bliss.mcore.batches import Batch, mean_losses
from megatron_bliss.mcore.losses import Divergence, VocabShard, token_terms_
from megatron_bliss.mcore.parallel import ParallelContext
from megatron_bliss.mcore.score_model import ScoreModel
from megatron_bliss.mcore.space import parameter_space


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Some sequences of a global batch."""

    batch: Batch
    num_tokens: Tensor  # predicted tokens of the global batch, float32 scalar


def micro_batches(batches: Sequence[Batch], context: ParallelContext) -> list[MicroBatch]:
    """This rank's part of a global batch, with what has to be known of all of it: one small collective."""
    count = torch.stack([batch.loss_mask.sum() for batch in batches]).sum()
    group_sum_(count, context.dp_group)
    return [MicroBatch(batch, count.clamp_min(1)) for batch in batches]


class MegatronLowerLevel:
    """Proxy and frozen target.

    :param target: None without a KL term; then nothing of the target is ever computed.
    :param gamma: weight of the KL term.
    :param kl_direction: `target_proxy` or `proxy_target`.
    """

    def __init__(
        self,
        proxy: Any,
        target: Any | None,
        context: ParallelContext,
        vocab_size: int,
        gamma: float,
        kl_direction: str = "target_proxy",
    ) -> None:
        self.proxy, self.target, self.gamma, self.kl_direction = proxy, target, gamma, kl_direction
        self.space = parameter_space(proxy, context)
        self.shard = VocabShard.of(context, vocab_size)
        self._target_logits: tuple[MicroBatch, Tensor] | None = None

    def add_gradient(self, batch: MicroBatch, weights: Tensor, gradient: Vector) -> LowerTerms:
        """See `LowerLevel`. Memory: one micro-batch's graph, its logits and the target's."""
        mask = batch.batch.loss_mask
        token_weights = mask * (weights / mask.sum(1).clamp_min(1)).unsqueeze(1)
        kl_weights = mask * (self.gamma / batch.num_tokens)
        logits = _by_token(models.logits(self.proxy, batch.batch.tokens))
        cross_entropy, kl = self._terms_(logits, batch, self._divergence(batch), token_weights, kl_weights, gradient)
        return LowerTerms(mean_losses(cross_entropy, batch.batch), (kl * mask).sum() / batch.num_tokens)

    @torch.no_grad()
    def losses(self, batch: MicroBatch) -> Tensor:
        logits = _by_token(models.logits(self.proxy, batch.batch.tokens))
        cross_entropy, _ = token_terms_(logits, _positions_first(batch.batch.labels), self.shard)
        return mean_losses(_rows_first(cross_entropy, batch.batch), batch.batch)

    def objective(self, batch: MicroBatch, weights: Tensor) -> Tensor:
        """See `LowerLevel`; plain torch operations on the whole vocabulary, so for one tensor-parallel rank."""
        mask, real = batch.batch.loss_mask, self.shard.vocab_size
        logits = models.logits(self.proxy, batch.batch.tokens)[..., :real].float()
        losses = mean_losses(objective.cross_entropy(logits, batch.batch.labels), batch.batch)
        value = (weights * losses).sum()
        if (divergence := self._divergence(batch)) is not None:
            target = divergence.target_logits.view(*logits.transpose(0, 1).shape[:2], -1).transpose(0, 1)
            kl = objective.kl_divergence(logits, target[..., :real].float(), self.kl_direction)
            value = value + self.gamma * (kl * mask).sum() / batch.num_tokens
        return value

    def add_validation_gradient(self, batch: MicroBatch, gradient: Vector) -> Tensor:
        mask = batch.batch.loss_mask
        logits = _by_token(models.logits(self.proxy, batch.batch.tokens))
        cross_entropy, _ = self._terms_(logits, batch, None, mask / batch.num_tokens, None, gradient)
        return (cross_entropy * mask).sum() / batch.num_tokens

    def _terms_(
        self,
        logits: Tensor,
        batch: MicroBatch,
        divergence: Divergence | None,
        weights: Tensor,
        kl_weights: Tensor | None,
        gradient: Vector,
    ) -> tuple[Tensor, Tensor]:
        """CE and KL, [b, s]; adds the gradient of their weighted sum to `gradient`. Weights are [b, s]."""
        # the same memory, as nothing reads the logits after this; `data`, since autograd would notice a change of
        # `detach()` and route the gradient through a copy
        logit_gradient = logits.data
        cross_entropy, kl = token_terms_(
            logit_gradient,
            _positions_first(batch.batch.labels),
            self.shard,
            divergence,
            _positions_first(weights),
            None if kl_weights is None else _positions_first(kl_weights),
        )
        torch.autograd.backward(logits, logit_gradient)
        harvest_(self.space.parameters, gradient)
        return _rows_first(cross_entropy, batch.batch), _rows_first(kl, batch.batch)

    def _divergence(self, batch: MicroBatch) -> Divergence | None:
        """The target's logits are kept for the latest micro-batch: one forward pass where the loop goes through all
        its passes over a micro-batch at once, and memory that does not grow with their number."""
        if self.target is None or self.gamma == 0:
            return None
        if self._target_logits is None or self._target_logits[0] is not batch:
            self._target_logits = None  # before the next are made
            with torch.no_grad():
                self._target_logits = (batch, _by_token(models.logits(self.target, batch.batch.tokens)))
        return Divergence(self._target_logits[1], self.kl_direction)


class MegatronUpperLevel:
    """The score model."""

    def __init__(self, score_model: ScoreModel, context: ParallelContext) -> None:
        self.score_model = score_model
        self.space = parameter_space(score_model, context)

    def logits(self, batch: MicroBatch) -> Tensor:
        scores: Tensor = self.score_model(batch.batch)
        return scores


def _by_token(logits: Tensor) -> Tensor:
    """[b, s, v], as a view of Megatron's [s, b, v], to [s·b, v] without a copy."""
    return logits.transpose(0, 1).flatten(0, 1)


def _positions_first(values: Tensor) -> Tensor:
    """[b, s] to [s·b]."""
    return values.t().reshape(-1)


def _rows_first(values: Tensor, batch: Batch) -> Tensor:
    """[s·b] to [b, s]."""
    return values.view(batch.tokens.shape[1], batch.tokens.shape[0]).t()
