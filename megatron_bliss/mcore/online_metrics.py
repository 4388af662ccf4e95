"""What online selection did, for people and the report: metrics.jsonl (docs/architecture.md has its keys)."""

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_bliss.progress import MetricsLog


class OnlineMetrics:
    """Sums stay on the device; it is waited for once in `interval` steps. All ranks hold one, the first writes.

    :param path: None: nothing is written.
    :param done: iterations before this process.
    """

    def __init__(self, path: Path | None, done: int, interval: int) -> None:
        self._interval = interval
        self._log = MetricsLog(path, done) if path is not None and dist.get_rank() == 0 else None
        self._sums: Tensor | None = None

    def add(self, losses: Tensor, reference: Tensor, competes: Tensor, kept: Tensor) -> None:
        """A micro-batch; all [b, s]."""
        losses, excess = losses.float(), (losses - reference).float()
        values = torch.stack(
            [
                competes.sum().float(),
                kept.sum().float(),
                (losses * competes).sum(),
                (losses * kept).sum(),
                (excess * competes).sum(),
                (excess * kept).sum(),
            ]
        )
        self._sums = values if self._sums is None else self._sums + values

    def step_done(self, iteration: int) -> None:
        if iteration % self._interval or self._sums is None:
            return
        dist.all_reduce(self._sums, group=parallel_state.get_data_parallel_group())
        tokens, kept, loss, kept_loss, excess, kept_excess = self._sums.tolist()
        self._sums = None
        if self._log is not None and tokens and kept:
            self._log.write(
                iteration,
                kept_share=kept / tokens,
                loss=loss / tokens,
                kept_loss=kept_loss / kept,
                reference_loss=(loss - excess) / tokens,
                excess=excess / tokens,
                kept_excess=kept_excess / kept,
            )

    def synchronised(self, iteration: int, num_syncs: int, losses: Tensor, seconds: float) -> None:
        """:param losses: the reference's, of validation and training (or not), at its first and last step, [2, 2] or
        [2, 1]; or empty."""
        figures = {"sync": float(num_syncs), "seconds": seconds}
        if losses.numel():
            names = ("validation_loss", "train_loss")[: losses.shape[1]]
            keys = [f"reference_{when}{name}" for when in ("first_", "") for name in names]
            figures |= dict(zip(keys, losses.flatten().tolist(), strict=True))
        if dist.get_rank() == 0:
            shown = " | ".join(f"{name} {value:.4g}" for name, value in figures.items())
            print(f"[online] after {iteration} steps the reference is synchronised | {shown}", flush=True)
        if self._log is not None:
            self._log.write(iteration + 1, **figures)  # it is done again when a process goes on after `iteration`
