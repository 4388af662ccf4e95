"""`fit-influence`: a score model learns to predict what the `influence` stage has measured.

It begins with the proxy's backbone in every round, and is fitted by squared error to influences in standard deviations
of those fitted to. `fit.json` says how well it ranks the sequences that were held out.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_bliss.artifacts import RunPaths, digest_bytes, digest_tree, write_json
from megatron_bliss.bilevel.space import ParameterSpace, Vector
from megatron_bliss.config import RunConfig, read_saved_config
from megatron_bliss.data.correlation import spearman
from megatron_bliss.data.sampling import share_of_rank, shuffled
from megatron_bliss.data.seeds import derive
from megatron_bliss.errors import UserError
from megatron_bliss.mcore import checkpoint_files, checkpoints, parallel
from megatron_bliss.mcore.batches import Batch, bucket, make_batch
from megatron_bliss.mcore.parallel import ParallelContext, agreed, same
from megatron_bliss.mcore.score_model import ScoreModel, build_score_model
from megatron_bliss.mcore.scorer import Pass, means, score_measure
from megatron_bliss.stages import influence
from megatron_bliss.stages.influence_data import InfluenceSample
from megatron_bliss.stages.inventory import run_inventory
from megatron_bliss.stages.side_training import SideTraining, adam_settings, train
from megatron_bliss.stages.sources import resume
from megatron_bliss.stages.warmup_proxy import proxy_directory
from megatron_bliss.tracking import Job


def run(run_dir: Path, round_number: int) -> None:
    """Write `round-N/influence-model` (score model, metrics.jsonl, fit.json), or finish it. All ranks call it.

    :raises UserError: without all influences of the sample, or where a batch cannot be shared by the ranks.
    """
    paths = RunPaths(Path(run_dir))
    config, directory = read_saved_config(paths.config), paths.influence_model(round_number)
    context = parallel.initialize(config.proxy.tensor_parallel, config.proxy.sequence_parallel, config.seed)
    with agreed(context):
        inventory = run_inventory(paths.root, config)
        data = FitData(config, InfluenceSample(config, inventory, round_number), paths.influence(round_number), context)
        proxy = checkpoint_files.find(proxy_directory(paths, config))
        sources = {"inventory": inventory.digest, "proxy": digest_tree(proxy), "influence": data.digest}
        done = resume("fit-influence", directory, sources, context.is_first) or 0
    done = same(context, done, f"the number of steps in {directory}")
    if same(context, int(fit_path(directory).exists()), f"the presence (1) of {fit_path(directory)}"):
        return
    model = build_score_model(config.proxy.model, config.data.tokenizer.vocab_size, context, config.proxy.recompute)
    if not done:
        checkpoints.load_backbone(proxy, model)
    settings = config.mates
    training = SideTraining(
        Job(config, paths, "fit-influence", round_number), directory, checkpoints.SCORE, data.num_steps,
        settings.checkpoint_interval, adam_settings(config.bilevel, settings.fit_lr),
    )  # fmt: skip

    def step(space: ParameterSpace, number: int) -> tuple[Tensor, Vector, int]:
        batches, num_tokens = data.micro_batches(number)
        return *_loss_and_gradient(model, space, batches, settings.fit_batch_size), num_tokens

    train(training, model, context, done, step)
    forward = Pass(context, config.data.sequence_length, config.scoring.batch_tokens)
    predicted = means(forward.totals(score_measure(model.eval()), data.sample))
    with agreed(context):
        if context.is_first:
            judged = data.judge(predicted)
            write_json(fit_path(directory), {"schema": 1, **judged})
            print(
                f"[fit-influence] done: rank correlation {judged['held_out_spearman']} over {judged['held_out']} "
                f"sequences that were held out, {judged['fitted_spearman']} over those fitted to",
                flush=True,
            )


def fit_path(directory: Path) -> Path:
    return directory / "fit.json"


class FitData:
    """The sample with what was measured of it, and the batches of every step, the same for any number of ranks.

    :param directory: of the influences.
    :raises UserError: if some are missing, they are all the same, or a batch cannot be shared by the ranks.
    """

    def __init__(self, config: RunConfig, sample: InfluenceSample, directory: Path, context: ParallelContext) -> None:
        self.sample, self._context, self._size = sample, context, config.mates.fit_batch_size
        self._micro_batch_tokens = config.bilevel.micro_batch_size * config.data.sequence_length
        share_of_rank([(0, 0)] * self._size, context.dp_rank, context.dp_size)  # refuse a size that cannot be shared
        self._influences = influence.read(directory)
        if len(self._influences) != len(sample):
            raise UserError(
                f"{directory} holds {len(self._influences)} of {len(sample)} influences; run the influence stage first"
            )
        self.digest = digest_bytes(self._influences.tobytes())
        fitted = self._influences[: sample.num_fitted]
        if fitted.std() == 0:
            raise UserError(f"{directory} holds the same influence for all sequences; raise mates.lr")
        self._targets = (self._influences - fitted.mean()) / fitted.std()
        self._seed = derive(config.seed, "fit-influence")
        self.num_steps = max(config.mates.fit_epochs * sample.num_fitted // self._size, 1)

    def micro_batches(self, step: int) -> tuple[list[tuple[Batch, Tensor]], int]:
        """This rank's micro-batches of a 0-based step, each with its targets, float32 [b]; and the number
        of predicted tokens of the global batch."""
        draws = np.arange(step * self._size, (step + 1) * self._size)
        context = self._context
        drawn = shuffled(draws, self.sample.num_fitted, self._seed)
        mine = drawn[context.dp_rank :: context.dp_size]
        lengths = np.maximum(self.sample.lengths[mine] - 1, 0)
        found = []
        for members in bucket(lengths, self._micro_batch_tokens, context.length_multiple):
            chosen = mine[members]
            batch = make_batch([self.sample.get(i)[0] for i in chosen], context.device, context.length_multiple)
            targets = torch.from_numpy(self._targets[chosen]).to(context.device, torch.float32, non_blocking=True)
            found.append((batch, targets))
        return found, int(np.maximum(self.sample.lengths[drawn] - 1, 0).sum())

    def judge(self, predicted: np.ndarray) -> dict[str, Any]:
        """What `fit.json` holds: the sample, and Spearman's correlation of predictions with what was measured."""
        fitted, measured = self.sample.num_fitted, self._influences
        return {
            "fitted": fitted,
            "held_out": self.sample.num_held_out,
            "influence_mean": float(measured.mean()),
            "influence_std": float(measured.std()),
            "helpful_share": float((measured > 0).mean()),
            "fitted_spearman": spearman(predicted[:fitted], measured[:fitted]),
            "held_out_spearman": spearman(predicted[fitted:], measured[fitted:]),
        }


def _loss_and_gradient(
    model: ScoreModel, space: ParameterSpace, batches: Sequence[tuple[Batch, Tensor]], size: int
) -> tuple[Tensor, Vector]:
    """This rank's summand of the mean squared error over the global batch, and the gradient of all.

    :param size: sequences of the global batch.
    """
    gradient = space.accumulator()
    total = torch.zeros((), device=space.parameters[0].device)
    for batch, targets in batches:
        loss = (model(batch) - targets).square().sum() / size
        loss.backward()
        space.harvest_(gradient)
        total += loss.detach()
    return total, space.reduce_gradients(gradient)
