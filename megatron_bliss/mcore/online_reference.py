"""The reference model of online token selection: a second model of the training's own kind, for forward passes.

It has parameters only, no gradients and no optimizer; `online_training` trains a model of its own for it.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_bliss.errors import UserError


@dataclass(frozen=True)
class Call:
    """What a script's forward step called its model with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Reference:
    """:param module: like the model in training, on this rank's device, without DDP.
    :param offload: outside `use()` its parameters are on the host, pinned, and nothing of it is on the device.
    """

    def __init__(self, module: Any, offload: bool) -> None:
        self.module = module.requires_grad_(False).eval()
        self._parameters: list[torch.nn.Parameter] = list(module.parameters())
        self._device = self._parameters[0].device
        self._offload = offload
        self._host: list[Tensor] = []
        self.is_on_device = True

    @property
    def bare(self) -> Any:
        """The module without Megatron's wrappers, its parameters wherever they are."""
        return unwrap_model(self.module)

    @property
    def device_bytes(self) -> int:
        """Of its parameters on the compute device; on a machine where that is the CPU, those that are not put aside."""
        if not self.is_on_device:
            return 0
        return sum(parameter.numel() * parameter.element_size() for parameter in self._parameters)

    def set(self, values: Sequence[Tensor]) -> None:
        """Take the values of these parameters."""
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.data = value.detach().clone()
        self.put_aside()

    def average(self, values: Sequence[Tensor], rest: float) -> None:
        """w ← rest · w + (1 − rest) · values, computed in float32 and rounded to the model's dtype."""
        with self.use():
            mixed = [
                torch.lerp(value.detach().float(), parameter.data.float(), rest).to(parameter.dtype)
                for parameter, value in zip(self._parameters, values, strict=True)
            ]
        self.set(mixed)

    def put_aside(self) -> None:
        """After a change of the parameters: keep them where they are to be between uses."""
        if not self._offload:
            return
        pin = self._device.type == "cuda"
        self._host = [
            parameter.data.to("cpu").pin_memory() if pin else parameter.data for parameter in self._parameters
        ]
        self._release()

    def _release(self) -> None:
        for parameter, host in zip(self._parameters, self._host, strict=True):
            parameter.data = host
        self.is_on_device = False

    @contextmanager
    def use(self) -> Iterator[None]:
        """Inside, the parameters are on the device."""
        if self.is_on_device:
            yield
            return
        for parameter, host in zip(self._parameters, self._host, strict=True):
            parameter.data = host.to(self._device, non_blocking=True)
        self.is_on_device = True
        try:
            yield
        finally:
            self._release()

    @torch.no_grad()
    def losses(self, call: Call) -> Tensor:
        """Of every token of a micro-batch, [b, s], without dropout."""
        losses: Tensor = self.module(*call.args, **call.kwargs)
        return losses


@contextmanager
def recorded(model: Any) -> Iterator[list[Call]]:
    """Inside, every call of the model is noted."""
    calls: list[Call] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(args, kwargs))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def as_evaluated(model: Any) -> Iterator[None]:
    """Inside, the model has no dropout and keeps no graph."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Inside, generators start from `seed`; outside, none has moved."""
    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()
    before = random.getstate(), np.random.get_state(), torch.get_rng_state(), torch.cuda.get_rng_state()
    try:
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed)
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
        torch.cuda.set_rng_state(before[3])
        tracker.set_states(states)


def loss_mask_of(loss_func: Any, losses: Any, calls: Sequence[Call]) -> Tensor:
    """The mask that a script's loss function was bound with.

    :param losses: what the script's forward step returned, and loss_func beside it, a `functools.partial`.
    :param calls: of the model in that step.
    :raises UserError: if it is not clear which tensor is the mask, or the losses are not those of single tokens.
    """
    labels = calls[0].kwargs.get("labels") if len(calls) == 1 else None
    if not isinstance(labels, Tensor) or not isinstance(losses, Tensor) or losses.shape != labels.shape:
        raise UserError(
            "the script's forward_step does not call its model once with labels=… and return its loss at each token, "
            "so tokens cannot be selected online; do both, as pretrain_gpt.py does"
        )
    bound = [*getattr(loss_func, "args", ()), *getattr(loss_func, "keywords", {}).values()]
    masks = [value for value in bound if isinstance(value, Tensor) and value.numel() == losses.numel()]
    found = [mask for mask in masks if mask is calls[0].kwargs.get("loss_mask")] or masks
    if len(found) != 1:
        raise UserError(
            "the script's forward_step does not return a functools.partial with one loss mask bound, so tokens cannot "
            "be selected online; return (losses, partial(loss_func, loss_mask)), as pretrain_gpt.py does"
        )
    return found[0]
