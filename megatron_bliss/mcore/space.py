"""A Megatron model with its optimizer as a parameter space.

The model sits in Megatron's DistributedDataParallel, whose buffers collect gradients in float32, and the optimizer is
Megatron's: plain, with float32 masters of bfloat16 parameters, or the distributed optimizer, where every data-parallel
rank holds masters and moments of its own part of each parameter. Vectors are shaped like the masters in each case.
"""

import logging
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_bliss.bilevel.optimizer import AdamSettings, Optimizer
from megatron_bliss.bilevel.space import ParameterSpace, Vector, group_size, group_sum_, sum_buckets_
from megatron_bliss.mcore.parallel import ParallelContext

# they announce their whole configuration, buffer by buffer
for _name in ("megatron.core.distributed", "megatron.core.optimizer"):
    logging.getLogger(_name).setLevel(logging.ERROR)


class MegatronSpace(ParameterSpace):
    """The trainable parameters of a model, in the order of `model.parameters()`.

    Megatron marks tensor-parallel shards with `tensor_model_parallel`; copies inside sequence-parallel regions (norms,
    biases of row-parallel layers), whose gradients see only this rank's part of a sequence, with `sequence_parallel`.

    The gradient buffers must be empty when a backward pass of the engine begins, and are empty after it.

    :param model: already holding the weights to begin with, for masters are copies of them.
    """

    def __init__(self, model: torch.nn.Module, context: ParallelContext, adam: AdamSettings, distributed: bool) -> None:
        self.ddp = _wrapped(model, distributed)
        wrapper = get_megatron_optimizer(_optimizer_config(model, adam, distributed), [self.ddp])
        (self._wrapper,) = getattr(wrapper, "chained_optimizers", [wrapper])
        if isinstance(self._wrapper.optimizer, torch.optim.AdamW):  # Megatron's choice without TE and Apex
            for group in self._wrapper.optimizer.param_groups:
                group["fused"] = True  # one kernel a parameter, without temporaries
        self.is_shared_out = distributed and context.dp_size > 1
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._ranges = [self._range(parameter) for parameter in parameters]
        self.held = [self._held(parameter) for parameter in parameters]
        masters = [parameter.data for parameter in self.held]
        super().__init__(parameters, **_layout(parameters, context), masters=masters)

    def optimizer(self, adam: AdamSettings) -> Optimizer:
        return Optimizer(self, self._wrapper.optimizer, self.held, adam)

    def _range(self, parameter: Tensor) -> slice:
        """What this rank holds the masters of."""
        if not isinstance(self._wrapper, DistributedOptimizer):
            return slice(0, parameter.numel())
        if parameter not in self._wrapper.model_param_gbuf_map:
            return slice(0, 0)
        own = self._wrapper._get_model_param_range_map(parameter)["param"]
        return slice(own.start, own.end)

    def _held(self, parameter: Tensor) -> Tensor:
        """The tensor in the inner optimizer that stands for a parameter, or for this rank's part of it."""
        if not isinstance(self._wrapper, DistributedOptimizer):
            main: Tensor = getattr(parameter, "main_param", parameter)
            return main
        if parameter not in self._wrapper.model_param_group_index_map:
            return torch.empty(0, device=parameter.device)
        group, order = self._wrapper.model_param_group_index_map[parameter]
        shard: Tensor = self._wrapper.optimizer.param_groups[group]["params"][order]
        return shard

    @torch.no_grad()
    def push(self) -> None:
        if isinstance(self._wrapper, DistributedOptimizer):
            self._wrapper._copy_main_params_to_model_params()
            self.ddp.start_param_sync(force_sync=True)
        else:
            super().push()

    def accumulator(self) -> Vector:
        return _Accumulator()

    @torch.no_grad()
    def harvest_(self, accumulator: Vector) -> None:
        assert isinstance(accumulator, _Accumulator)
        if accumulator.buffers:
            for whole, buffer in zip(accumulator.buffers, self.ddp.buffers, strict=True):
                whole.add_(buffer.grad_data)
        else:
            accumulator.begin(self.ddp.buffers, self.parameters)
        self._empty_buffers()

    @torch.no_grad()
    def reduce_gradients(self, accumulator: Vector) -> Vector:
        assert isinstance(accumulator, _Accumulator)
        if not accumulator.buffers:  # nothing was harvested
            accumulator.begin(self.ddp.buffers, self.parameters)
        self.sum_partial_(accumulator)
        if group_size(self.dp_group) > 1:
            for whole, buffer in zip(accumulator.buffers, self.ddp.buffers, strict=True):
                buffer.grad_data.copy_(whole)
            self.ddp.finish_grad_sync()
            for whole, buffer in zip(accumulator.buffers, self.ddp.buffers, strict=True):
                whole.copy_(buffer.grad_data)
            self._empty_buffers()
        return self.own(accumulator)

    def _empty_buffers(self) -> None:
        """What DDP's own `zero_grad_buffer` does, without its loop over the parameters: no kernel here adds to the
        buffers behind the gradients' back."""
        for buffer in self.ddp.buffers:
            buffer.reset()
        for group in self.ddp.bucket_groups:
            group.reset()

    def own(self, whole: Vector) -> Vector:
        if not isinstance(self._wrapper, DistributedOptimizer):
            return whole
        return [part.reshape(-1)[own].clone() for part, own in zip(whole, self._ranges, strict=True)]

    @torch.no_grad()
    def whole(self, vector: Vector) -> Vector:
        if not isinstance(self._wrapper, DistributedOptimizer):
            return vector
        whole = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in self.parameters]
        for part, own, values in zip(whole, self._ranges, vector, strict=True):
            part.view(-1)[own] = values
        sum_buckets_(whole, self.dp_group)
        return whole

    def _count_once(self, parts: Tensor) -> Tensor:
        total = super()._count_once(parts)
        return group_sum_(total, self.dp_group) if self.is_shared_out else total


def plain_space(model: torch.nn.Module, context: ParallelContext) -> ParameterSpace:
    """The trainable parameters of a model that is not trained: without optimizer, gradient buffers and masters."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    masters = [parameter.data for parameter in parameters]
    return ParameterSpace(parameters, **_layout(parameters, context), masters=masters)


def _layout(parameters: list[torch.nn.Parameter], context: ParallelContext) -> dict[str, Any]:
    """How parameters lie on the ranks."""
    return {
        "is_sharded": [bool(getattr(parameter, "tensor_model_parallel", False)) for parameter in parameters],
        "needs_tp_sum": [bool(getattr(parameter, "sequence_parallel", False)) for parameter in parameters],
        "tp_group": context.tp_group if context.tp_size > 1 else None,
        "dp_group": context.dp_group if context.dp_size > 1 else None,
    }


class _Accumulator(list[Tensor]):
    """Gradients like the parameters, laid out as DDP's buffers: one addition a buffer. It takes no memory before the
    first of them are there."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[Tensor] = []

    def begin(self, buffers: list[Any], parameters: list[Tensor]) -> None:
        """With what is in DDP's buffers."""
        self.buffers = [buffer.grad_data.clone() for buffer in buffers]
        views = {
            parameter: whole[place[0] : place[1]].view(parameter.shape)
            for whole, buffer in zip(self.buffers, buffers, strict=True)
            for parameter, place in buffer.param_index_map.items()
        }
        self.extend(views[parameter] for parameter in parameters)


def _wrapped(model: torch.nn.Module, distributed: bool) -> Any:
    """Gradients are sums over ranks and micro-batches, reduced when asked for."""
    config: Any = model.config
    config.calculate_per_token_loss = True  # else gradients would be divided by the number of ranks
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed)
    ddp = DistributedDataParallel(config, ddp_config, model)
    ddp.zero_grad_buffer()
    return ddp


def _optimizer_config(model: torch.nn.Module, adam: AdamSettings, distributed: bool) -> OptimizerConfig:
    """Clipping is ours: it waits for no device."""
    is_bf16 = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    return OptimizerConfig(
        optimizer="adam",
        lr=adam.lr,
        weight_decay=adam.weight_decay,
        adam_beta1=adam.betas[0],
        adam_beta2=adam.betas[1],
        clip_grad=0.0,
        bf16=is_bf16,
        params_dtype=torch.bfloat16 if is_bf16 else torch.float32,
        use_distributed_optimizer=distributed,
    )
