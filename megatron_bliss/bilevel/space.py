"""Vectors in a model's parameter space, on one rank of a tensor- and data-parallel job.

A vector (a gradient, z, a running average) is a list of tensors shaped like the masters: float32, or float64 where the
parameters are (the toy models of the tests). A tensor-parallel rank holds its shards of the sharded parameters and a
copy of the others. Every data-parallel rank holds the same vector, or its own part of it where a distributed optimizer
shares out the masters (`mcore.space`). Gradients are collected in an `accumulator`, shaped like this rank's
parameters, which `reduce_gradients` makes a vector of.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import Tensor

Vector = list[Tensor]

_BUCKET = 1 << 25  # elements reduced in one collective: large enough for bandwidth, small beside the model


def group_size(group: Any) -> int:
    """Ranks in a process group; no group means one."""
    return 1 if group is None else torch.distributed.get_world_size(group)


def group_sum_(tensor: Tensor, group: Any) -> Tensor:
    """Sum a tensor over a group in place, and return it."""
    if group_size(group) > 1:
        torch.distributed.all_reduce(tensor, group=group)
    return tensor


def difference_fraction(parameters: Sequence[Tensor], masters: Sequence[Tensor]) -> float:
    """How far, as a part of ‖θ‖, central differences move the parameters.

    √(machine ε) of the masters, which balances truncation against rounding, but no less than the parameters' own
    machine ε: a smaller move would be lost in rounding them (measured in bfloat16: derivatives within 2 % at one ε,
    within 10 % at a fifth of it or at three times it).
    """
    precision = max(torch.finfo(master.dtype).eps for master in masters) ** 0.5
    return max(precision, *(torch.finfo(parameter.dtype).eps for parameter in parameters))


def _master(parameter: Tensor) -> Tensor:
    """The parameter itself where it has the precision already."""
    return parameter.data if parameter.dtype in (torch.float32, torch.float64) else parameter.detach().float()


class ParameterSpace:
    """The parameters of one model, with inner products and reductions that count every parameter once.

    :param parameters: this rank's parameters, each once (tied ones too).
    :param is_sharded: for each, whether tensor-parallel ranks hold different parts of it (else: copies).
    :param needs_tp_sum: for each, whether its gradient is partial on every tensor-parallel rank, as that of the
        copies inside sequence-parallel regions is.
    :param tp_group: tensor-parallel process group; None for one rank.
    :param dp_group: data-parallel process group; None for one rank.
    :param masters: the parameters in full precision, in another layout where a subclass's `push` knows it.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        is_sharded: Sequence[bool] | None = None,
        needs_tp_sum: Sequence[bool] | None = None,
        tp_group: Any = None,
        dp_group: Any = None,
        masters: Sequence[Tensor] | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self.is_sharded = list(is_sharded or [False] * len(self.parameters))
        self.needs_tp_sum = list(needs_tp_sum or [False] * len(self.parameters))
        assert len(self.parameters) == len(self.is_sharded) == len(self.needs_tp_sum) > 0
        self.tp_group, self.dp_group = tp_group, dp_group
        self.masters: Vector = list(masters) if masters is not None else [_master(p) for p in self.parameters]
        self.difference_fraction = difference_fraction(self.parameters, self.masters)

    @torch.no_grad()
    def push(self) -> None:
        """Masters -> parameters, rounded to the parameters' dtype."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter.data_ptr() != master.data_ptr():
                parameter.copy_(master)

    def zeros(self) -> Vector:
        return [torch.zeros_like(master) for master in self.masters]

    def accumulator(self) -> Vector:
        """What `harvest_` adds gradients to and `reduce_gradients` makes a vector of: like this rank's parameters, in
        the precision of the masters; not to be read before."""
        return self.zeros()

    def harvest_(self, accumulator: Vector) -> None:
        """Move what backward passes have left of gradients onto an accumulator, and leave the parameters without."""
        for parameter, total in zip(self.parameters, accumulator, strict=True):
            if parameter.grad is not None:
                total.add_(parameter.grad)
                parameter.grad = None

    def whole(self, vector: Vector) -> Vector:
        """A vector shaped like this rank's parameters, on every data-parallel rank: what checkpoints hold."""
        return vector

    def own(self, whole: Vector) -> Vector:
        """The inverse of `whole`."""
        return whole

    def numel(self) -> Tensor:
        """Parameters of the whole model, over all tensor-parallel ranks: a float64 scalar tensor."""
        return self._count_once(torch.stack([torch.ones_like(m).sum(dtype=torch.float64) for m in self.masters]))

    @torch.no_grad()
    def dot(self, u: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
        """⟨u, v⟩ over all tensor-parallel ranks: a float64 scalar on the parameters' device, equal on all ranks.

        Sums within a tensor are in its own precision: converting the products would take more time than all the rest.
        """
        return self._count_once(torch.stack([(a * b).sum().double() for a, b in zip(u, v, strict=True)]))

    def _count_once(self, parts: Tensor) -> Tensor:
        """Sum a number a parameter, [parameters], to that of the whole model.

        Copies enter divided by the number of ranks that hold them, so one sum over the group counts each once and
        gives all ranks the same bits.
        """
        ranks = group_size(self.tp_group)
        if ranks == 1:
            return parts.sum()
        sharded = torch.tensor(self.is_sharded, device=parts.device)
        return group_sum_(torch.where(sharded, parts, parts / ranks).sum(), self.tp_group)

    @torch.no_grad()
    def norm(self, u: Sequence[Tensor]) -> Tensor:
        """‖u‖, a float64 scalar tensor."""
        return self._count_once(torch.stack(torch._foreach_norm(list(u))).double().square()).sqrt()

    @torch.no_grad()
    def reduce_gradients(self, accumulator: Vector) -> Vector:
        """Sum over data-parallel ranks, and over tensor-parallel ranks where gradients are partial.

        :param accumulator: not to be used afterwards.
        """
        self.sum_partial_(accumulator)
        sum_buckets_(accumulator, self.dp_group)
        return accumulator

    def sum_partial_(self, accumulator: Vector) -> None:
        """Sum over tensor-parallel ranks where gradients are partial."""
        sum_buckets_([g for g, needed in zip(accumulator, self.needs_tp_sum, strict=True) if needed], self.tp_group)

    @torch.no_grad()
    def clip(self, gradients: Vector, max_norm: float) -> Tensor:
        """Scale in place to at most `max_norm`, and return the norm before; no limit where max_norm is 0.

        What is not finite as a whole becomes zero.
        """
        norm = self.norm(gradients)
        factor = (max_norm / norm.clamp_min(1e-12)).clamp_max(1.0) if max_norm > 0 else torch.ones_like(norm)
        factor = torch.where(torch.isfinite(norm), factor, 0.0)
        for gradient in gradients:
            gradient.mul_(factor).nan_to_num_(0.0, 0.0, 0.0)
        return norm

    @contextmanager
    def displaced(self, direction: Sequence[Tensor]) -> Iterator[Callable[[Tensor | float], None]]:
        """Yield `move_to(ε)`, which puts the parameters to θ + εz, as often as it is called.

        Afterwards every byte of them and of the masters is what it was.
        """
        saved = [master.clone() for master in self.masters]

        @torch.no_grad()
        def move_to(epsilon: Tensor | float) -> None:
            for master, original, part in zip(self.masters, saved, direction, strict=True):
                # epsilon stays a tensor: no wait for the device
                step = torch.as_tensor(epsilon, dtype=master.dtype, device=master.device)
                torch.addcmul(original, part, step, out=master)
            self.push()

        try:
            yield move_to
        finally:
            torch._foreach_copy_(self.masters, saved)
            saved.clear()  # `move_to` may be there for longer
            self.push()

    @contextmanager
    def perturbed(self, direction: Sequence[Tensor], epsilon: Tensor | float) -> Iterator[None]:
        """Inside, the parameters are θ + εz; afterwards every byte of them and of the masters is what it was."""
        with self.displaced(direction) as move_to:
            move_to(epsilon)
            yield


def sum_buckets_(tensors: Vector, group: Any) -> None:
    """Sum tensors over a group in place, many in one collective."""
    if group_size(group) == 1 or not tensors:
        return
    bucket: Vector = []
    for index, tensor in enumerate(tensors):
        bucket.append(tensor)
        if index == len(tensors) - 1 or sum(t.numel() for t in bucket) >= _BUCKET:
            flat = torch.cat([t.reshape(-1) for t in bucket])
            torch.distributed.all_reduce(flat, group=group)
            for part, piece in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                part.copy_(piece.view_as(part))
            bucket = []
