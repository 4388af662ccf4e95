"""Which tokens keep their loss: exactly the share with the largest excess loss. Torch only.

BLADE's linear minimisation oracle over {α ∈ [0,1]^N, mean α = keep} is the vertex that keeps the tokens with the
largest Δ_n = L_n(u) − L_n(w), u the model and w the reference (arXiv 2606.18650); RHO-1 (arXiv 2404.07965) has the same
mask.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def top_share(excess: Tensor, competes: Tensor, keep: float) -> Tensor:
    """Keep ⌈keep · n⌉ of the n tokens of a row that compete: those with the largest excess, the earlier of equal ones.

    Nothing of it waits for the device.

    :param excess: [rows, tokens].
    :param competes: bool [rows, tokens]; other tokens are never kept.
    :returns: bool [rows, tokens].
    """
    excess = excess.masked_fill(~competes, -torch.inf)
    order = excess.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(excess.shape[1], device=excess.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    # 1e-9: a product such as 0.6 · 5 may come out a little above the whole number that it is
    count = (competes.sum(1, keepdim=True).double() * keep - 1e-9).ceil()
    return (rank < count) & competes


def choose(excess: Tensor, competes: Tensor, keep: float, scope: str) -> Tensor:
    """:param excess: [b, s], of a micro-batch.
    :param competes: bool [b, s], tokens with loss.
    :param scope: micro-batch | sequence: which of them compete with each other.
    :returns: bool [b, s].
    """
    shape = excess.shape if scope == "sequence" else (1, -1)
    return top_share(excess.reshape(shape), competes.reshape(shape), keep).view_as(excess)


def choose_globally(excess: Sequence[Tensor], competes: Sequence[Tensor], keep: float, group: Any) -> list[Tensor]:
    """One competition over all micro-batches of a step and all data-parallel ranks; every rank of `group` calls it.

    Each rank sees all Δ, float32: one gather a step. Among equal tokens the earlier sample of the global batch wins, so
    the number of ranks does not matter.

    :param excess: of this rank's micro-batches, each [b, s].
    :returns: bool, like `excess`.
    """
    # tokens that do not compete travel as NaN
    mine = torch.stack([e.float().masked_fill(~c, torch.nan) for e, c in zip(excess, competes, strict=True)])
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    everywhere = torch.stack(parts, dim=1)  # [micro-batches, ranks, b, s]: in the order of the samples
    row = everywhere.reshape(1, -1)
    kept = top_share(row, ~row.isnan(), keep).view_as(everywhere)
    return list(kept[:, dist.get_rank(group)])
