"""The two levels of the bilevel problem on Megatron models, tensor × data × sequence parallel.

Conventions, the same for any number of ranks: L_i is the mean cross-entropy over the predicted tokens of sequence i,
KL the mean over all predicted tokens of the global batch, the loss on a validation set the mean over all predicted
tokens of its global batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_bliss.bilevel import objective
from megatron_bliss.bilevel.levels import LowerTerms
from megatron_bliss.bilevel.space import ParameterSpace, Vector, group_sum_
from megatron_bliss.mcore import models
from megatron_bliss.mcore.batches import Batch, mean_losses
from megatron_bliss.mcore.losses import Divergence, VocabShard
from megatron_bliss.mcore.output_layer import (
    Outputs,
    OutputsDivergence,
    backward,
    copied,
    gauss_newton_backward,
    slope,
    token_losses,
)
from megatron_bliss.mcore.parallel import ParallelContext
from megatron_bliss.mcore.top_k import TopK, TopKDivergence


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Some sequences of a global batch."""

    batch: Batch
    num_tokens: Tensor  # predicted tokens of the global batch, float32 scalar
    target: TopK | None = None  # of its labelled tokens, where the target itself is not here


def micro_batches(
    batches: Sequence[Batch], context: ParallelContext, target: Sequence[TopK] | None = None
) -> list[MicroBatch]:
    """This rank's part of a global batch, with what has to be known of all of it: one small collective.

    :param target: for each of `batches`, what is known of the target at its labelled tokens.
    """
    count = torch.stack([batch.loss_mask.sum() for batch in batches]).sum()
    group_sum_(count, context.dp_group)
    known: Sequence[TopK | None] = target or [None] * len(batches)
    return [MicroBatch(batch, count.clamp_min(1), part) for batch, part in zip(batches, known, strict=True)]


class MegatronLowerLevel:
    """Proxy and frozen target.

    :param space: of the proxy.
    :param target: None without a KL term, or where batches say what is known of the target; then nothing of it is
        computed here.
    :param shard: this rank's columns of the vocabulary.
    :param gamma: weight of the KL term.
    :param kl_direction: `target_proxy` or `proxy_target`.
    :param reuses_target: whether a micro-batch's KL term is needed again: the target's logits are kept then.
    """

    def __init__(
        self,
        proxy: Any,
        space: ParameterSpace,
        target: Any | None,
        shard: VocabShard,
        gamma: float,
        kl_direction: str = "target_proxy",
        reuses_target: bool = True,
    ) -> None:
        self.proxy, self.space, self.target, self.shard = proxy, space, target, shard
        self.gamma, self.kl_direction, self.reuses_target = gamma, kl_direction, reuses_target
        self._latest: tuple[MicroBatch, OutputsDivergence] | None = None

    def add_gradient(
        self, batch: MicroBatch, weights: Tensor, gradient: Vector, outputs: Outputs | None = None
    ) -> LowerTerms:
        """See `LowerLevel`. Memory: one micro-batch's graph, a block of its logits and of the target's; of the latter,
        all where they are kept."""
        divergence = self._divergence(batch)  # the target's pass before there is a graph
        found = models.outputs(self.proxy, batch.batch) if outputs is None else outputs
        token_weights, kl_weights = self._weights(batch, weights)
        labels = labelled(batch.batch.labels, batch.batch)
        cross_entropy, kl = backward(found, labels, self.shard, token_weights, divergence, kl_weights)
        self.space.harvest_(gradient)
        losses = mean_losses(everywhere(cross_entropy, batch.batch), batch.batch)
        return LowerTerms(losses, kl.sum() / batch.num_tokens)

    @torch.no_grad()
    def losses(self, batch: MicroBatch) -> Tensor:
        outputs = models.outputs(self.proxy, batch.batch)
        cross_entropy = token_losses(outputs, labelled(batch.batch.labels, batch.batch), self.shard)
        return mean_losses(everywhere(cross_entropy, batch.batch), batch.batch)

    def outputs(self, batch: MicroBatch) -> Outputs:
        return models.outputs(self.proxy, batch.batch)

    @torch.no_grad()
    def values(self, batch: MicroBatch) -> Outputs:
        return copied(models.outputs(self.proxy, batch.batch))

    @torch.no_grad()
    def slope(self, ahead: Outputs, batch: MicroBatch, distance: Tensor) -> Outputs:
        return slope(ahead, models.outputs(self.proxy, batch.batch), distance)

    def add_gauss_newton(
        self, outputs: Outputs, batch: MicroBatch, weights: Tensor, along: Outputs, product: Vector, keeps_graph: bool
    ) -> Tensor:
        """See `LowerLevel`."""
        token_weights, kl_weights = self._weights(batch, weights)
        if self.target is not None or batch.target is not None:
            token_weights = token_weights + kl_weights
        labels = labelled(batch.batch.labels, batch.batch)
        derivatives = gauss_newton_backward(outputs, along, labels, self.shard, token_weights, keeps_graph)
        self.space.harvest_(product)
        return mean_losses(everywhere(derivatives, batch.batch), batch.batch)

    def objective(self, batch: MicroBatch, weights: Tensor) -> Tensor:
        """See `LowerLevel`; plain torch operations on the whole vocabulary, so for one tensor-parallel rank."""
        token_labels, divergence = labelled(batch.batch.labels, batch.batch), self._divergence(batch)
        token_weights, kl_weights = self._weights(batch, weights)
        outputs = models.outputs(self.proxy, batch.batch)
        value = token_weights.new_zeros(())
        for rows in outputs.blocks():
            logits = outputs.logits(rows)[:, : self.shard.vocab_size].float()
            value = value + (token_weights[rows] * objective.cross_entropy(logits, token_labels[rows])).sum()
            if divergence is not None:
                value = value + (kl_weights[rows] * divergence.block(rows).plain(logits)).sum()
        return value

    def add_validation_gradient(self, batch: MicroBatch, gradient: Vector, weight: Tensor | None = None) -> Tensor:
        """See `LowerLevel`."""
        outputs, labels = models.outputs(self.proxy, batch.batch), labelled(batch.batch.labels, batch.batch)
        shares = labelled(batch.batch.loss_mask, batch.batch) / batch.num_tokens
        weights = shares if weight is None else shares * weight.to(shares.dtype)
        cross_entropy, _ = backward(outputs, labels, self.shard, weights)
        self.space.harvest_(gradient)
        return (cross_entropy * shares).sum()

    def _weights(self, batch: MicroBatch, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Of each labelled token in G, for its cross-entropy and its KL: [n] each."""
        mask = batch.batch.loss_mask
        token_weights = mask * (weights / mask.sum(1).clamp_min(1)).unsqueeze(1)
        kl_weights = mask * (self.gamma / batch.num_tokens)
        return labelled(token_weights, batch.batch), labelled(kl_weights, batch.batch)

    def _divergence(self, batch: MicroBatch) -> Divergence | None:
        """The target's part is kept for the latest micro-batch: one forward pass where the loop takes all its own over
        a micro-batch at once, and memory that does not grow with their number."""
        if self.gamma and batch.target is not None:
            return TopKDivergence(batch.target, self.kl_direction)
        if self.target is None or self.gamma == 0:
            return None
        if self._latest is None or self._latest[0] is not batch:
            self._latest = None  # before the next is made
            with torch.no_grad():
                outputs = models.outputs(self.target, batch.batch)
            kept: dict[tuple[int, int], Tensor] | None = {} if self.reuses_target else None
            self._latest = batch, OutputsDivergence(outputs, self.kl_direction, kept)
        return self._latest[1]


class MegatronUpperLevel:
    """The score model."""

    def __init__(self, score_model: Any, space: ParameterSpace) -> None:
        self.score_model, self.space = score_model, space

    def logits(self, batch: MicroBatch) -> Tensor:
        scores: Tensor = self.score_model(batch.batch)
        return scores


def labelled(values: Tensor, batch: Batch) -> Tensor:
    """[b, s] to [n]: what belongs to the rows of `models.outputs`."""
    values = values.t().reshape(-1)
    return values if batch.labelled is None else values[batch.labelled]


def everywhere(values: Tensor, batch: Batch) -> Tensor:
    """[n] to [b, s], zeros where nothing is labelled."""
    rows, columns = batch.tokens.shape
    if batch.labelled is not None:
        values = values.new_zeros(rows * columns).index_copy(0, batch.labelled, values)
    return values.view(columns, rows).t()
