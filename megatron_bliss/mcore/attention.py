"""Causal attention in one fused operation, for Megatron's local layers.

Megatron's own local attention writes out the scores of every pair of positions and their softmax. Torch's fused kernel
does not, which saves most of a small model's activation memory and a good part of its time, on CPUs and on GPUs
without Transformer Engine. It has no second derivative: `plain_kernels` does without it.
"""

from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor


class FusedCausalAttention(DotProductAttention):
    """A drop-in for Megatron's attention where masks are causal and nothing is dropped out; without parameters."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        assert config.attention_dropout == 0
        assert config.window_size is None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """:param query: [s, b, heads, size]; key and value may have fewer heads. :returns: [s, b, heads · size]."""
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        context = torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return context.permute(2, 0, 1, 3).flatten(2)
