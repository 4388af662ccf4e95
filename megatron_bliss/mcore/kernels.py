"""Which fused kernels this machine has. Imports no Megatron: `platform` asks before a training script does."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch


@dataclass(frozen=True)
class Kernels:
    """Which implementations are used."""

    transformer_engine: bool  # layers, norms and attention
    apex_norm: bool  # Apex's fused LayerNorm in local layers
    fused_softmax: bool  # Megatron's CUDA softmax in local layers, bf16 only
    fused_activation: bool  # bias and activation in one kernel, as pretrain() has it on GPUs
    fused_weight_gradient: bool  # Apex's gradient accumulation in the backward pass, for pretrain() only
    fused_attention: bool  # torch's, in the local layers of side models

    def __str__(self) -> str:
        layers = "Transformer Engine" if self.transformer_engine else "Megatron's local ones"
        norms = "Transformer Engine" if self.transformer_engine else "Apex" if self.apex_norm else "torch"
        fused = {
            "attention": self.transformer_engine or self.fused_attention,
            "softmax": self.fused_softmax,
            "bias and activation": self.fused_activation,
        }
        return f"layers: {layers}, norms: {norms}, fused: {', '.join(name for name, is_on in fused.items() if is_on)}"


PLAIN = Kernels(False, False, False, False, False, False)  # torch's own operations, which can be differentiated twice


def is_importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def choose_kernels(on_gpu: bool, is_importable: Callable[[str], bool]) -> Kernels:
    """The best of what is there. Nothing but torch is used without a GPU."""
    if not on_gpu:
        return replace(PLAIN, fused_attention=True)
    transformer_engine = is_importable("transformer_engine.pytorch")
    local = not transformer_engine
    return Kernels(
        transformer_engine=transformer_engine,
        apex_norm=local and is_importable("apex.normalization.fused_layer_norm"),
        fused_softmax=local and is_importable("scaled_upper_triang_masked_softmax_cuda"),
        fused_activation=True,
        fused_weight_gradient=is_importable("fused_weight_gradient_mlp_cuda"),
        fused_attention=local,
    )


@cache
def available_kernels() -> Kernels:
    """The choice for this process."""
    return choose_kernels(torch.cuda.is_available(), is_importable)
