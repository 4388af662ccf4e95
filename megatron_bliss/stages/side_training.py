"""How a side model is trained on its own, whatever it learns: schedule, log, checkpoints, and going on after a stop."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_bliss import stopping
from megatron_bliss.bilevel.optimizer import AdamSettings, Optimizer, lr_factor
from megatron_bliss.bilevel.space import ParameterSpace, Vector, group_sum_
from megatron_bliss.config import BilevelConfig
from megatron_bliss.mcore import checkpoints
from megatron_bliss.mcore.parallel import ParallelContext
from megatron_bliss.mcore.space import MegatronSpace
from megatron_bliss.mcore.stopping import Vote
from megatron_bliss.progress import MetricsLog, Progress
from megatron_bliss.tracking import Job, track

_LR_WARMUP_FRACTION = 0.1  # of the steps; then cosine, to zero

# Of a 0-based step: this rank's summand of the global batch's loss, the gradient of all, tokens of the global batch.
Step = Callable[[ParameterSpace, int], tuple[Tensor, Vector, int]]


@dataclass(frozen=True)
class SideTraining:
    """What is asked for."""

    job: Job
    directory: Path  # of checkpoints and metrics.jsonl
    name: str  # of the model in a checkpoint
    num_steps: int
    save_interval: int  # steps
    adam: AdamSettings


def train(training: SideTraining, model: Any, context: ParallelContext, done: int, step: Step) -> None:
    """Take the steps that are missing. All ranks call it.

    :param model: with the weights to begin with; those of a checkpoint are loaded here.
    :param done: steps that the newest checkpoint has.
    :raises SystemExit: with code 3, if this was asked to stop.
    """
    config, stage, num_steps = training.job.config, training.job.command, training.num_steps
    space = MegatronSpace(model, context, training.adam, config.proxy.distributed_optimizer)
    optimizer = space.optimizer(training.adam)
    if done:
        vectors = whole_vectors(optimizer)
        checkpoints.load(training.directory, {training.name: model}, {training.name: vectors})
        optimizer.load({name: space.own(vector) for name, vector in vectors.items()}, done)
    progress = Progress(stage, num_steps, start=done) if context.is_first else None
    tracker = track(training.job, context.is_first, done)
    metrics = MetricsLog(training.directory / "metrics.jsonl", done, tracker.log) if context.is_first else None
    num_tokens, vote = 0, Vote(context.device)
    while done < num_steps:
        factor = lr_factor(done, num_steps, _LR_WARMUP_FRACTION)
        loss, gradient, step_tokens = step(space, done)
        norm = optimizer.step(gradient, factor)
        num_tokens += step_tokens
        done += 1
        is_last = done == num_steps
        if done % config.target.log_interval == 0 or is_last:
            figures = {"loss": float(group_sum_(loss, space.dp_group)), "lr": training.adam.lr * factor}
            if progress is not None and metrics is not None:
                progress.report(done, num_tokens, **figures)
                metrics.write(done, **figures, gradient_norm=float(norm))
        stops = vote() and not is_last
        if done % training.save_interval == 0 or is_last or stops:
            vectors = whole_vectors(optimizer)
            checkpoints.save(training.directory, done, {training.name: model}, {training.name: vectors}, {}, keep=1)
        if stops:
            stopping.leave(stage, done, num_steps)
    tracker.close()


def adam_settings(settings: BilevelConfig, lr: float) -> AdamSettings:
    """Those of the side models: what `bilevel` says, and a learning rate."""
    return AdamSettings(lr, settings.weight_decay, (settings.beta1, settings.beta2), settings.clip_grad)


def whole_vectors(optimizer: Optimizer) -> dict[str, Vector]:
    """Masters and moments as a checkpoint holds them. All ranks call it."""
    vectors = {"master": optimizer.space.masters, **optimizer.moments()}
    return {name: optimizer.space.whole(vector) for name, vector in vectors.items()}
