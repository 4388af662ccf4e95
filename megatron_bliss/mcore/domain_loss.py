"""The LLM's training loss by domain, from the `dataset_id` that Megatron's blended datasets put into every sample.

Megatron's own loss functions drop it. `install()` stands between a script and `pretrain()`: the iterator that a forward
step reads from remembers the ids, and what the step returns is looked at and passed on as it is, so neither losses nor
gradients change, and other wrappers of the same step find what they would find without this one.

Losses are there where the pipeline ends; ids only on the first rank of each tensor-parallel group, which reads the
data. Those ranks add up on their device. Where Megatron logs, and nowhere else, sums over data and context parallel
ranks are taken and waited for, and the last rank, which holds Megatron's TensorBoard writer, writes them.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_bliss.bilevel.space import group_sum_
from megatron_bliss.progress import MetricsLog

NameOf = Callable[[str], str]  # the domain of a dataset, by its prefix


def install(path: Path, name_of: NameOf) -> None:
    """Record into `path`, a metrics.jsonl, from the next call of `pretrain()` on. A line an interval of Megatron's log:

    loss            mean over all tokens since the line before
    loss/NAME       of a domain, where any of it was read
    tokens/NAME     tokens that it is the mean of
    """
    import megatron.training
    import megatron.training.training as training
    from megatron.training.global_vars import get_wandb_writer

    record = DomainLosses(path, name_of)
    pretrain, training_log = megatron.training.pretrain, training.training_log
    taken, logged = inspect.signature(pretrain), inspect.signature(training_log)

    @functools.wraps(pretrain)
    def recording_pretrain(*args: Any, **kwargs: Any) -> Any:
        call = taken.bind(*args, **kwargs)
        given = call.arguments
        given["train_valid_test_dataset_provider"] = record.naming(given["train_valid_test_dataset_provider"])
        given["forward_step_func"] = record.watching(given["forward_step_func"])
        return pretrain(*call.args, **call.kwargs)

    @functools.wraps(training_log)
    def recording_log(*args: Any, **kwargs: Any) -> Any:
        iteration = logged.bind(*args, **kwargs).arguments["iteration"]
        if iteration % megatron.training.get_args().log_interval == 0:
            record.write(iteration, megatron.training.get_tensorboard_writer(), get_wandb_writer())
        return training_log(*args, **kwargs)

    megatron.training.pretrain = training.pretrain = recording_pretrain
    training.training_log = recording_log


class DomainLosses:
    """Sums of losses and numbers of tokens by dataset, since they were last written."""

    def __init__(self, path: Path, name_of: NameOf) -> None:
        self._path, self._name_of = path, name_of
        self._prefixes: list[str] | None = None  # of the training datasets in order, once they are known here
        self._is_shared = False  # whether all tensor-parallel ranks know them
        self._totals: Tensor | None = None  # float64 [datasets, 2]: summed loss, tokens with loss
        self._log: MetricsLog | None = None

    def naming(self, provider: Callable[..., Any]) -> Callable[..., Any]:
        """A provider of datasets that does the same, and notes which the training ones are."""

        @functools.wraps(provider)
        def provide(*args: Any, **kwargs: Any) -> Any:
            built = provider(*args, **kwargs)
            if built[0] is not None:
                self._prefixes = [part.dataset_path for part in getattr(built[0], "datasets", [built[0]])]
            return built

        return provide

    def watching(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """A forward step that does the same, and has its losses added up."""

        @functools.wraps(forward_step)
        def step(data_iterator: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            if data_iterator is None or not model.training:  # a pipeline stage that reads nothing; an evaluation
                return forward_step(data_iterator, model, *args, **kwargs)
            reader = _Reader(data_iterator)
            result = forward_step(reader, model, *args, **kwargs)
            if reader.sample is not None and isinstance(result, tuple):
                self._add(reader.sample, *result)
            return result

        return step

    def _add(self, sample: dict[str, Any], output: Any, loss_function: Any) -> None:
        """:param output: of the model: losses [micro batch, tokens] where the pipeline ends.
        :param loss_function: a partial whose first argument is the loss mask, as Megatron-LM's scripts have it.
        """
        mask = next(iter(getattr(loss_function, "args", ())), None)
        if self._prefixes is None or not isinstance(mask, Tensor) or not isinstance(output, Tensor):
            return
        if output.shape != mask.shape:
            return  # hidden states, which the next pipeline stage takes
        if self._totals is None:
            self._totals = torch.zeros(len(self._prefixes), 2, dtype=torch.float64, device=output.device)
        weights = mask.detach().double()
        losses = torch.where(mask != 0, output.detach().double() * weights, 0.0)
        parts = torch.stack([losses.sum(1), weights.sum(1)], dim=1)
        ids = sample.get("dataset_id", torch.zeros(len(parts), dtype=torch.int64))  # a single dataset is not blended
        self._totals.index_add_(0, ids.to(output.device, torch.int64, non_blocking=True), parts)

    def write(self, iteration: int, board: Any, wandb_writer: Any) -> None:
        """A line of what was added up since the last. All ranks call it.

        :param board: Megatron's TensorBoard writer, on the rank that has one.
        :param wandb_writer: the same of wandb.
        """
        if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            return
        self._share_names()
        if self._prefixes is None:
            return
        names = [self._name_of(prefix) for prefix in self._prefixes]
        sums = self._summed(len(names))
        if torch.distributed.get_rank() != torch.distributed.get_world_size() - 1:
            return
        figures = _figures(names, sums)
        if not figures:
            return
        if self._log is None:
            self._log = MetricsLog(self._path, iteration - 1)  # lines of steps that are taken once more are dropped
        self._log.write(iteration, **figures)
        shown = {f"domain {name}": value for name, value in figures.items() if name.startswith("loss/")}
        for name, value in shown.items() if board else ():
            board.add_scalar(name, value, iteration)
        if wandb_writer:
            wandb_writer.log(shown, iteration)

    def _share_names(self) -> None:
        """Once, from the tensor-parallel rank that built the datasets to the others."""
        group = parallel_state.get_tensor_model_parallel_group()
        if not self._is_shared and torch.distributed.get_world_size(group) > 1:
            known = [self._prefixes]
            torch.distributed.broadcast_object_list(known, group=group, group_src=0)
            self._prefixes = known[0]
        self._is_shared = True

    def _summed(self, num_datasets: int) -> list[list[float]]:
        """Over the ranks that read data; waits for the device. Starts anew."""
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        totals = self._totals
        if totals is None:
            totals = torch.zeros(num_datasets, 2, dtype=torch.float64, device=device)
        sums = group_sum_(totals.clone(), parallel_state.get_data_parallel_group(with_context_parallel=True))
        sums = group_sum_(sums, parallel_state.get_tensor_model_parallel_group())  # all but one add zeros
        self._totals = totals.zero_()
        found: list[list[float]] = sums.tolist()
        return found


class _Reader:
    """An iterator over batches that remembers the last one."""

    def __init__(self, batches: Iterator[dict[str, Any]]) -> None:
        self._batches = batches
        self.sample: dict[str, Any] | None = None

    def __iter__(self) -> "_Reader":
        return self

    def __next__(self) -> dict[str, Any]:
        self.sample = next(self._batches)
        return self.sample

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)


def _figures(names: list[str], sums: list[list[float]]) -> dict[str, float]:
    """Of each domain that was read; several datasets may belong to one."""
    by_domain: dict[str, tuple[float, float]] = {}
    for name, (loss, tokens) in zip(names, sums, strict=True):
        before = by_domain.get(name, (0.0, 0.0))
        by_domain[name] = before[0] + loss, before[1] + tokens
    read = {name: (loss, tokens) for name, (loss, tokens) in by_domain.items() if tokens}
    if not read:
        return {}
    figures = {"loss": sum(loss for loss, _ in read.values()) / sum(tokens for _, tokens in read.values())}
    figures |= {f"loss/{name}": loss / tokens for name, (loss, tokens) in read.items()}
    return figures | {f"tokens/{name}": tokens for name, (_, tokens) in read.items()}
