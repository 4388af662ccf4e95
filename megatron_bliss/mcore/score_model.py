"""The score model: the proxy's backbone, mean pooling, and a linear head that gives one number a sequence."""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor

from megatron_bliss.config import ModelConfig
from megatron_bliss.mcore.batches import Batch
from megatron_bliss.mcore.models import gpt_arguments, place, positions
from megatron_bliss.mcore.parallel import ParallelContext


class ScoreModel(GPTModel):
    """A GPTModel with a score head in place of its output layer.

    Parameters of the backbone keep the proxy's names, so that a proxy's checkpoint initialises it. The head is
    float32, starts at zero, and is the same on all tensor-parallel ranks, as are its gradients.
    """

    def __init__(self, context: ParallelContext, **arguments: Any) -> None:
        super().__init__(**arguments)
        # an output layer that nothing uses would sit in checkpoints, optimizers and vectors
        del self.output_layer
        self.post_process = False  # GPTModel then ends with the hidden states
        self.parallel_context = context
        self.score_head = torch.nn.Linear(self.config.hidden_size, 1)
        torch.nn.init.zeros_(self.score_head.weight)
        torch.nn.init.zeros_(self.score_head.bias)

    def forward(self, batch: Batch) -> Tensor:
        """Raw scores, float32 [b], the same on all tensor-parallel ranks. The sigmoid is the method's."""
        hidden = super().forward(batch.tokens, positions(batch.tokens), None)  # [s, b, h], or this rank's part of s
        return self.score_head(self._pooled(hidden, batch.lengths)).squeeze(1)

    def _pooled(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """Mean over the positions that are not padding: float32 [b, h]."""
        first = self.parallel_context.tp_rank * len(hidden) if self.parallel_context.sequence_parallel else 0
        place_in_sequence = torch.arange(first, first + len(hidden), device=hidden.device)
        weights = (place_in_sequence[:, None] < lengths).float() / lengths.clamp_min(1)  # [s, b]
        pooled = torch.einsum("sbh,sb->bh", hidden.float(), weights)
        if self.parallel_context.sequence_parallel:
            # forward: sum over ranks; backward: every rank gets the gradient of its own positions
            pooled = reduce_from_tensor_model_parallel_region(pooled)
        return pooled


def build_score_model(
    model: ModelConfig, vocab_size: int, context: ParallelContext, recompute: bool = False
) -> ScoreModel:
    """A score model on this rank's device, its backbone random until a checkpoint is loaded
    (`checkpoints.load_backbone`).

    :param vocab_size: of the tokenizer, before padding.
    """
    score_model = place(ScoreModel(context, **gpt_arguments(model, vocab_size, context, recompute)), model, context)
    score_model.score_head.float()
    return score_model
