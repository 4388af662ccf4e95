"""The parameter space of a Megatron model."""

import torch

from megatron_bliss.bilevel.space import ParameterSpace
from megatron_bliss.mcore.parallel import ParallelContext


def parameter_space(model: torch.nn.Module, context: ParallelContext) -> ParameterSpace:
    """The trainable parameters of a model, in the order of `model.parameters()`.

    Megatron marks tensor-parallel shards with `tensor_model_parallel`; copies inside sequence-parallel regions (norms,
    biases of row-parallel layers), whose gradients see only this rank's part of a sequence, with `sequence_parallel`.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return ParameterSpace(
        parameters,
        is_sharded=[bool(getattr(parameter, "tensor_model_parallel", False)) for parameter in parameters],
        needs_tp_sum=[bool(getattr(parameter, "sequence_parallel", False)) for parameter in parameters],
        tp_group=context.tp_group if context.tp_size > 1 else None,
        dp_group=context.dp_group if context.dp_size > 1 else None,
    )
