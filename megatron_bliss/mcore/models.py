"""The one place where Megatron-Core language models are built and run forward.

Transformer Engine's layers and the fused kernels are used where a GPU is there and they can be imported, Megatron's
local layers elsewhere; parameters have the same names in checkpoints either way. Fusing gradient accumulation into
the backward pass (Apex) is left to `pretrain()`: it writes into `main_grad` buffers, while gradients here are values.
"""

import logging
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.distributed
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from megatron_bliss.config import ModelConfig
from megatron_bliss.errors import UserError
from megatron_bliss.mcore.architectures import Architecture, resolve
from megatron_bliss.mcore.attention import FusedCausalAttention
from megatron_bliss.mcore.batches import Batch
from megatron_bliss.mcore.kernels import PLAIN, Kernels, available_kernels
from megatron_bliss.mcore.output_layer import Outputs
from megatron_bliss.mcore.parallel import ParallelContext

# GPTModel announces its successor at every construction; pretrain_gpt.py builds it nevertheless
logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)


@cache
def kernels_in_use() -> Kernels:
    """The choice for this process, printed once by the first rank."""
    kernels = available_kernels()
    if torch.distributed.get_rank() == 0:
        print(f"[models] {kernels}", flush=True)
    return kernels


def build_language_model(
    model: ModelConfig,
    vocab_size: int,
    context: ParallelContext,
    recompute: bool = False,
    plain_kernels: bool = False,
) -> GPTModel:
    """A randomly initialised GPTModel, or this rank's pipeline stage of one, on this rank's device; the same weights
    at every tensor-parallel size.

    Parameters are float32, or bfloat16 where `model.bf16` says so (masters: `space.MegatronSpace`).

    :param vocab_size: of the tokenizer, before padding.
    :param recompute: recompute activations layer by layer in the backward pass instead of keeping them.
    :param plain_kernels: torch's own operations on a GPU too: fused kernels have no second derivative.
    :raises UserError: if the architecture does not fit the tensor-parallel size.
    """
    return place(GPTModel(**gpt_arguments(model, vocab_size, context, recompute, plain_kernels)), model, context)


def place(model: GPTModel, config: ModelConfig, context: ParallelContext) -> GPTModel:
    """Give a model its dtype and device."""
    return model.to(device=context.device, dtype=torch.bfloat16 if config.bf16 else torch.float32)


def gpt_arguments(
    model: ModelConfig,
    vocab_size: int,
    context: ParallelContext,
    recompute: bool = False,
    plain_kernels: bool = False,
) -> dict[str, Any]:
    """What GPTModel's constructor takes."""
    architecture = resolve(model)
    _check_divisible(architecture, model, context.tp_size)
    kernels = PLAIN if plain_kernels else kernels_in_use()
    config = transformer_config(architecture, kernels, model.bf16, context, recompute)
    return {
        "config": config,
        "transformer_layer_spec": layer_spec(config, kernels, context.pp_rank),
        "parallel_output": True,
        "pre_process": context.pp_rank == 0,
        "post_process": context.is_last_stage,
        **architecture.gpt_model_kwargs(vocab_size),
    }


def transformer_config(
    architecture: Architecture, kernels: Kernels, bf16: bool, context: ParallelContext, recompute: bool
) -> TransformerConfig:
    # weights are drawn on the CPU: there Megatron draws whole matrices and cuts them, so that they do not depend on TP
    kwargs: dict[str, Any] = {
        "tensor_model_parallel_size": context.tp_size,
        "sequence_parallel": context.sequence_parallel,
        "use_cpu_initialization": True,
        "bf16": bf16,
        "params_dtype": torch.bfloat16 if bf16 else torch.float32,
        "transformer_impl": "transformer_engine" if kernels.transformer_engine else "local",
        "masked_softmax_fusion": kernels.fused_softmax,
        # fused GeLU is GeLU with a bias added; SwiGLU does without
        "bias_activation_fusion": kernels.fused_activation and (architecture.bias or architecture.activation != "gelu"),
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": kernels.apex_norm,
        "pipeline_model_parallel_size": context.pp_size,
        "pipeline_dtype": torch.bfloat16 if bf16 else torch.float32,
    }
    if recompute:
        kwargs |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(**architecture.transformer_config_kwargs(), **kwargs)


def layer_spec(config: TransformerConfig, kernels: Kernels, pp_rank: int = 0) -> Any:
    """Modules of the transformer's layers, of one pipeline stage, and of its last norm."""
    if kernels.transformer_engine:
        return get_gpt_layer_with_transformer_engine_spec()
    layer = get_gpt_layer_local_spec(normalization=config.normalization)
    if kernels.apex_norm and config.normalization == "LayerNorm":
        from megatron.core.fusions.fused_layer_norm import FusedLayerNorm

        norm: Any = FusedLayerNorm
    else:
        norm = torch_norm
    layer.submodules = replace(layer.submodules, input_layernorm=norm, pre_mlp_layernorm=norm)
    if kernels.fused_attention:
        attention = layer.submodules.self_attention
        attention.submodules = replace(attention.submodules, core_attention=FusedCausalAttention)
    num_layers = get_num_layers_to_build(config, pp_rank=pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def torch_norm(config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> torch.nn.Module:
    """Torch's LayerNorm or RMSNorm, marked for sequence parallelism, which Megatron's own wrapper refuses."""
    kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
    norm = kind(hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


def _check_divisible(architecture: Architecture, model: ModelConfig, tp_size: int) -> None:
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        if (value := getattr(architecture, name)) % tp_size:
            raise UserError(
                f"model {model.preset!r} has {name} {value}, which tensor_parallel = {tp_size} does not divide; "
                "choose another tensor-parallel size"
            )


def token_losses(model: GPTModel, batch: Batch) -> Tensor:
    """Next-token cross-entropy of every position, padding included: float32 [b, s], the same on all TP ranks."""
    losses: Tensor = model(batch.tokens, positions(batch.tokens), None, labels=batch.labels)
    return losses.float()


def outputs(model: GPTModel, batch: Batch) -> Outputs:
    """What this rank's logits are made of where the batch has labels, rows in the order of `batch.labelled`.

    The output layer, the largest of a small model, runs for nothing else. `logits` is for pipeline stages, of which all
    but the last return the hidden states they pass on.
    """

    def processor(hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **_: Any) -> Outputs:
        # what the output layer does around its product, for some rows: backward, the gradients of all ranks are summed
        if model.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states)
        rows = hidden_states.flatten(0, 1)
        if batch.labelled is not None:
            rows = rows.index_select(0, batch.labelled)
        if not model.config.sequence_parallel:
            rows = copy_to_tensor_model_parallel_region(rows)
        return Outputs(rows, output_layer.weight if output_weight is None else output_weight)

    found: Outputs = model(batch.tokens, positions(batch.tokens), None, output_processor=processor)
    return found


def logits(model: GPTModel, batch: Batch) -> Tensor:
    """This rank's part of the vocabulary where the batch has labels: [n, padded vocabulary / tp], in the model's dtype.

    Of a pipeline stage that is not the last: the hidden states it passes on.
    """
    found: Outputs | Tensor = outputs(model, batch)
    return found.logits() if isinstance(found, Outputs) else found


def positions(tokens: Tensor) -> Tensor:
    """Position ids of tokens [b, s]: [b, s], each row 0 … s-1."""
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
