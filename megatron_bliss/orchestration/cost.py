"""What a run costs before it is started: sequences, tokens, floating-point operations and disk, stage by stage.

The numbers are estimates from the sizes alone: sequences are taken as long as the model's. `flops.py` has the passes
through the models, `memory.py` what a rank holds; `make bench NAME=cost` compares both with what is measured.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megatron_bliss.config import RunConfig
from megatron_bliss.data.shards import Shard
from megatron_bliss.data.target_cache import bytes_per_token
from megatron_bliss.errors import UserError
from megatron_bliss.mcore.architectures import resolve
from megatron_bliss.orchestration.check import check
from megatron_bliss.orchestration.flops import (
    FORWARD,
    TRAINING,
    Passes,
    bilevel_flops_per_step,
    proxy_flops,
    solving_steps,
    target_flops,
    target_training_flops,
    validation_batch,
)
from megatron_bliss.orchestration.memory import stage_memory
from megatron_bliss.orchestration.plan import Arm, arms, plan
from megatron_bliss.wording import counted

_FORWARD = 1 / 3  # of a forward and backward pass
_BYTES_PER_PARAMETER = {False: 16, True: 18}  # float32 weights and Adam's moments as saved; True: bf16 weights on top
_WIDTH = 120  # of the table where there is no terminal
_SCORE_BYTES = _ID_BYTES = 4  # float32, int32
_SAMPLE_BYTES = 12  # of Megatron's sample index (2 × int32) and shuffle index (uint32)
_BLEND_BYTES = 10  # of its index of a blend (int16, int64)


@dataclass(frozen=True)
class PoolSize:
    """The candidate pool."""

    num_sequences: int
    num_tokens: int

    def part(self, fraction: float) -> "PoolSize":
        return PoolSize(round(self.num_sequences * fraction), round(self.num_tokens * fraction))


@dataclass(frozen=True)
class Cost:
    """What a stage handles; None where it depends on a pool of unknown size."""

    sequences: int | None = 0
    tokens: int | None = 0
    flops: float | None = 0.0
    disk: int | None = 0  # bytes that stay


def target_flops_per_step(config: RunConfig) -> float:
    """Of one optimizer step of the LLM."""
    tokens = config.target.global_batch_size * config.data.sequence_length
    return tokens * target_training_flops(config)


def selection_flops(arm: Arm, pool: PoolSize | None) -> float | None:
    """What an arm spends to know what to train on: its proxy's warm-up, how its score model learns, and the scoring."""
    costs = arm_costs(arm, pool)
    names = [
        arm.stage_name(command, r)
        for r in range(1, arm.config.rounds + 1)
        for command in ("cache-target", "bilevel", "influence", "fit-influence", "score")
    ]
    parts = [costs[name].flops for name in names if name in costs]
    if arm.method.needs_proxy:
        parts.append(_warmup_proxy(arm.config).flops)
    return None if None in parts else sum(part for part in parts if part is not None)


def train_flops(config: RunConfig, iteration: int) -> float:
    """Of training the LLM up to an iteration, warm-up included."""
    return iteration * target_flops_per_step(config)


def online_flops(config: RunConfig, steps: int) -> float:
    """Of online selection beside `steps` steps of the LLM: the reference's forward passes, and its own training.

    Taken as if tokens were selected from the first step on, so it is an upper bound. A reference step of BLADE goes
    through as many tokens of the pool and of the validation set, and through the former with the model and the old
    reference too; one of RHO-1 through those of the validation set.
    """
    online = config.online
    if online.method == "none":
        return 0.0
    passes = 2 * _FORWARD if online.scope == "global-batch" else 0.0  # model and reference look ahead
    flops = steps * (_FORWARD + passes) * target_flops_per_step(config)
    size = (online.reference_batch_size or config.target.global_batch_size) / config.target.global_batch_size
    if online.method == "rho1" and online.reference is None:
        flops += online.reference_steps * size * target_flops_per_step(config)
    if online.method == "blade":
        reference_step = (2 + 2 * _FORWARD) * size * target_flops_per_step(config)
        flops += steps / online.sync_interval * online.reference_steps * reference_step
    return flops


def arm_costs(arm: Arm, pool: PoolSize | None) -> dict[str, Cost]:
    """Cost of an arm's stages by name; stages that cost next to nothing are not in it."""
    config = arm.config
    one_slice = pool.part(1 / config.num_slices) if pool else None
    offered = _offered(config, pool)
    share = arm.method.settings(config.selection).share(offered.num_tokens) if offered else 1.0
    costs = {
        arm.stage_name("inventory"): Cost(*_size(pool)),
        arm.stage_name("warmup-select"): _select(pool, one_slice, config.warmup.fraction),
        arm.stage_name("warmup-prepare"): _prepare(
            config, one_slice, config.warmup.fraction, config.warmup.target_steps
        ),
        arm.stage_name("warmup-target"): _pretrain(config, config.warmup.target_steps),
        arm.stage_name("warmup-proxy"): _warmup_proxy(config),
    }
    for number in range(1, config.rounds + 1):
        if arm.method.learns == "ngrams":
            costs[arm.stage_name("ngrams", number)] = _ngrams(config, offered)
        if arm.method.learns == "influence":
            costs[arm.stage_name("influence", number)] = _influence(config, offered)
            costs[arm.stage_name("fit-influence", number)] = _fit_influence(config, offered)
        if arm.method.learns == "bilevel":
            costs[arm.stage_name("bilevel", number)] = _bilevel(config)
            costs[arm.stage_name("cache-target", number)] = _cache_target(config)
        if arm.method.scored_by != "none":
            costs[arm.stage_name("score", number)] = _score(arm, pool, offered)
        if arm.measures_fidelity:
            costs[arm.stage_name("fidelity", number)] = _fidelity(config, offered)
        costs[arm.stage_name("select", number)] = _select(pool, offered, share)
        costs[arm.stage_name("prepare", number)] = _prepare(config, offered, share, config.round_steps)
        training = _pretrain(config, config.round_steps)
        reference = online_flops(config, config.round_steps)
        costs[arm.stage_name("pretrain", number)] = replace(training, flops=(training.flops or 0) + reference)
        costs[arm.stage_name("evaluate", number)] = _evaluate(config)
    return costs


def _offered(config: RunConfig, pool: PoolSize | None) -> PoolSize | None:
    """What a round chooses from."""
    return pool and pool.part(1.0 if config.selection.pool == "all" else 1 / config.num_slices)


def _checkpoint_bytes(config: RunConfig, proxy: bool) -> int:
    model = config.proxy.model if proxy else config.target.model
    return resolve(model).num_parameters(config.data.tokenizer.vocab_size) * _BYTES_PER_PARAMETER[model.bf16]


def _size(pool: PoolSize | None) -> tuple[int | None, int | None]:
    return (pool.num_sequences, pool.num_tokens) if pool else (None, None)


def _warmup_proxy(config: RunConfig) -> Cost:
    sequences = config.warmup.proxy_steps * config.warmup.proxy_batch_size
    tokens = sequences * config.data.sequence_length
    flops = tokens * proxy_flops(config, TRAINING)
    return Cost(sequences, tokens, flops, _checkpoint_bytes(config, proxy=True))


def _bilevel(config: RunConfig) -> Cost:
    bilevel = config.bilevel
    sequences = bilevel.outer_steps * bilevel.batch_size + solving_steps(bilevel) * validation_batch(config)
    flops = config.bilevel.outer_steps * bilevel_flops_per_step(config)
    vectors = 2 * 4 * resolve(config.proxy.model).num_parameters(config.data.tokenizer.vocab_size)  # z, averaged ∇f
    disk = 2 * _checkpoint_bytes(config, proxy=True) + vectors  # proxy and score model
    return Cost(sequences, sequences * config.data.sequence_length, flops, disk)


def _cache_target(config: RunConfig) -> Cost:
    """A forward pass over what the round's bilevel loop will draw."""
    bilevel = config.bilevel
    if not bilevel.uses_cached_target:
        return Cost()
    sequences = bilevel.outer_steps * bilevel.batch_size
    tokens = sequences * config.data.sequence_length
    disk = tokens * bytes_per_token(bilevel.kl_top_k, config.data.tokenizer.vocab_size)
    return Cost(sequences, tokens, tokens * target_flops(config, FORWARD), disk)


def _influence(config: RunConfig, offered: PoolSize | None) -> Cost:
    """A step on every sequence of the sample, and the reference batch after it."""
    size = _sample_size(config, offered)
    reference = config.mates.reference_sequences * len(config.data.validation_prefixes)
    length = config.data.sequence_length
    flops = size * length * proxy_flops(config, TRAINING + Passes(reference, 0))
    return Cost(size * (1 + reference), size * (1 + reference) * length, flops, 8 * size)


def _fit_influence(config: RunConfig, offered: PoolSize | None) -> Cost:
    """Its epochs, and a forward pass over the whole sample."""
    size, settings, length = _sample_size(config, offered), config.mates, config.data.sequence_length
    fitted = round(size * (1 - settings.held_out)) * settings.fit_epochs
    flops = length * proxy_flops(config, TRAINING * fitted + Passes(size, 0), has_output=False)
    return Cost(fitted + size, (fitted + size) * length, flops, _checkpoint_bytes(config, proxy=True))


def _sample_size(config: RunConfig, offered: PoolSize | None) -> int:
    """Sequences that are probed in a round: no more than it is offered."""
    return min(config.mates.sample_size, offered.num_sequences) if offered else config.mates.sample_size


def _fidelity(config: RunConfig, offered: PoolSize | None) -> Cost:
    """The gradient on a sample of the validation sets, and two passes over one of the slice, for each of two models."""
    most, length = config.fidelity.sequences, config.data.sequence_length
    sample = min(most, offered.num_sequences) if offered else most
    validation = most * len(config.data.validation_prefixes)
    passes = Passes(2 * sample, 0) + TRAINING * validation
    flops = length * (proxy_flops(config, passes) + target_flops(config, passes))
    sequences = 2 * (2 * sample + validation)
    return Cost(sequences, sequences * length, flops, 2 * 8 * sample)


def _ngrams(config: RunConfig, offered: PoolSize | None) -> Cost:
    """Counting; no floating-point operations worth naming."""
    if offered is None:
        return Cost(None, None, 0.0, None)
    read = offered.part(min(config.dsir.fit_tokens / max(offered.num_tokens, 1), 1.0))
    return Cost(read.num_sequences, read.num_tokens, 0.0, 8 * config.dsir.num_buckets)


def _score(arm: Arm, pool: PoolSize | None, offered: PoolSize | None) -> Cost:
    if pool is None or offered is None:
        return Cost(None, None, None, None)
    has_output = arm.method.scored_by != "score_model"
    flops = offered.num_tokens * proxy_flops(arm.config, Passes(1, 0), has_output) if arm.method.needs_proxy else 0.0
    return Cost(offered.num_sequences, offered.num_tokens, flops, pool.num_sequences * _SCORE_BYTES)


def _select(pool: PoolSize | None, offered: PoolSize | None, fraction: float) -> Cost:
    if pool is None or offered is None:
        return Cost(None, None, 0.0, None)
    kept = offered.part(fraction)
    return Cost(kept.num_sequences, kept.num_tokens, 0.0, kept.num_sequences * _ID_BYTES)


def _prepare(config: RunConfig, offered: PoolSize | None, fraction: float, steps: int) -> Cost:
    """An entry for each kept sequence in each epoch, and for each sample of the epochs that the steps need."""
    if offered is None:
        return Cost(None, None, 0.0, None)
    kept, drawn = offered.part(fraction), steps * config.target.global_batch_size
    tokens = max(kept.num_tokens, 1)
    epochs = max(-(-drawn * config.data.sequence_length // tokens), 1)
    disk = epochs * kept.num_sequences * _ID_BYTES + drawn * _BLEND_BYTES
    disk += epochs * tokens // config.data.sequence_length * _SAMPLE_BYTES
    return Cost(kept.num_sequences, kept.num_tokens, 0.0, disk)


def _pretrain(config: RunConfig, steps: int) -> Cost:
    sequences = steps * config.target.global_batch_size
    num_checkpoints = -(-steps // config.target.save_interval)  # the last one is always saved
    return Cost(
        sequences,
        sequences * config.data.sequence_length,
        steps * target_flops_per_step(config),
        num_checkpoints * _checkpoint_bytes(config, proxy=False),
    )


def _evaluate(config: RunConfig) -> Cost:
    """The decay branch, and forward passes over the measured sets (as large as they may be)."""
    evaluation = config.evaluation
    sets = [evaluation.max_sequences] * (len(config.data.validation_prefixes) + (1 if config.data.test else 0))
    sets += [min(evaluation.max_sequences, config.data.held_out)] * len(config.data.pool)
    measured = 1 + (-(-config.round_steps // config.target.save_interval) if evaluation.curve else 0)
    sequences = evaluation.decay_steps * config.target.global_batch_size + measured * sum(sets)
    length = config.data.sequence_length
    flops = evaluation.decay_steps * target_flops_per_step(config)
    flops += measured * sum(sets) * length * target_flops(config, FORWARD)
    num_checkpoints = -(-evaluation.decay_steps // config.target.save_interval)
    return Cost(sequences, sequences * length, flops, num_checkpoints * _checkpoint_bytes(config, proxy=False))


def show(config: RunConfig, run_dir: Path) -> None:
    """Print the table of `--dry-run`.

    :raises UserError: for settings that cannot work.
    """
    check(config, run_dir)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    pool, reason = measure(config)
    costs: dict[str, Cost] = {}
    for arm in arms(config, run_dir):
        costs |= arm_costs(arm, pool)
    title = f"{run_dir}: {config.method}, {counted(config.rounds, 'round')}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("stage", "ranks", "sequences", "tokens", "FLOPs", "memory", "disk"):
        table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)
    stages = plan(config, run_dir)
    configs = {arm.paths.root: arm.config for arm in arms(config, run_dir)}
    for stage in stages:
        *amounts, disk = _cells(costs.get(stage.name, Cost()))
        peak = stage_memory(configs[stage.run_dir], stage.command[0])
        memory = f"{quantity(peak.total)}B" if peak else ""
        table.add_row(stage.name, str(stage.num_ranks), *amounts, memory, disk)
    known = [costs.get(stage.name, Cost()) for stage in stages]
    total, flops = sum(cost.disk or 0 for cost in known), sum(cost.flops or 0 for cost in known)
    table.add_section()
    table.add_row("in all", "", "", "", f"{flops:.2e}", "", f"{quantity(total)}B")
    console.print(table)
    for line in _notes(config, run_dir, pool):
        console.print(line, soft_wrap=True, highlight=False)
    if reason:
        console.print(f"the pool's size is not known, so numbers are missing above: {reason}", soft_wrap=True)


def measure(config: RunConfig) -> tuple[PoolSize | None, str]:
    """Size of the pool from its indices, or why it is not known."""
    try:
        shards = [Shard(prefix) for domain in config.data.pool for prefix in domain.prefixes]
    except UserError as error:
        return None, str(error)
    return PoolSize(sum(len(shard) for shard in shards), sum(shard.num_tokens for shard in shards)), ""


def _cells(cost: Cost) -> tuple[str, str, str, str]:
    def cell(value: float | None, text: str) -> str:
        return "?" if value is None else text if value else ""

    return (
        cell(cost.sequences, quantity(cost.sequences or 0)),
        cell(cost.tokens, quantity(cost.tokens or 0)),
        cell(cost.flops, f"{cost.flops or 0:.2e}"),
        cell(cost.disk, f"{quantity(cost.disk or 0)}B"),
    )


def _notes(config: RunConfig, run_dir: Path, pool: PoolSize | None) -> list[str]:
    vocab = config.data.tokenizer.vocab_size
    target, proxy = (resolve(model).num_parameters(vocab) for model in (config.target.model, config.proxy.model))
    lines = [
        f"target {quantity(target)} parameters, proxy {quantity(proxy)} parameters",
        "memory: of a rank's GPU at its peak, without the CUDA context, NCCL's buffers and fragmentation",
    ]
    for arm in arms(config, run_dir):
        trained = arm.config.round_steps * config.target.global_batch_size * config.data.sequence_length
        if offered := _offered(arm.config, pool):
            kept = offered.part(arm.method.settings(arm.config.selection).share(offered.num_tokens)).num_tokens
            lines.append(
                f"{arm.name}: a round trains on {quantity(trained)} tokens, {trained / max(kept, 1):.2f} times the "
                f"{quantity(kept)} that are selected for it"
            )
        share = selection_flops(arm, pool)
        if share is not None:
            training = train_flops(arm.config, arm.config.round_end(config.rounds))
            lines.append(f"{arm.name}: selection takes {share / training:.1%} of the training's FLOPs")
        if reference := online_flops(arm.config, arm.config.rounds * arm.config.round_steps):
            training = train_flops(arm.config, arm.config.round_end(arm.config.rounds))
            lines.append(
                f"{arm.name}: online selection takes at most {reference / training:.1%} of the training's FLOPs"
            )
    return lines


def quantity(number: float) -> str:
    """1234567 as 1.23M."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
