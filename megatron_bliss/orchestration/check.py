"""What must hold before a run is started, beyond the single settings: models that exist, ranks that can share the work,
a warm-up that is there and is the right one. Reads, writes nothing.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_bliss import tracking
from megatron_bliss.artifacts import RunPaths
from megatron_bliss.config import RunConfig, WarmupConfig, differences, read_saved_config
from megatron_bliss.errors import UserError
from megatron_bliss.mcore.architectures import resolve
from megatron_bliss.orchestration.plan import Arm, arms


@dataclass(frozen=True)
class Ranks:
    """Processes of a stage with the LLM, and of one with proxy and score model; and what they are called."""

    target: int
    proxy: int
    target_name: str = "launch.nproc_per_node"
    proxy_name: str = "launch.nproc_per_node"


def check(config: RunConfig, run_dir: Path, ranks: Ranks | None = None) -> None:
    """:param ranks: those of all machines, for all stages, if they are not given.
    :raises UserError: naming the first setting that cannot work.
    """
    if ranks is None:
        launch = config.launch
        name = "launch.nproc_per_node" if launch.nnodes == 1 else "launch.nproc_per_node × launch.nnodes"
        ranks = Ranks(launch.num_ranks, launch.num_ranks, name, name)
    main, *controls = arms(config, run_dir)
    tracking.check(config.tracking)
    trains_proxy = config.warmup.start_from is None
    _check_target(config, ranks)
    _check_selection(main, trains_proxy, ranks)
    for arm in controls:
        try:
            _check_selection(arm, trains_proxy, ranks)
        except UserError as error:
            raise UserError(f"controls: {arm.name!r}: {error}") from None
        if _validation(arm.config) != _validation(config) and config.data.test is None:
            raise UserError(
                f"controls: {arm.name!r} has a data.validation of its own, and no set that both arms are measured on; "
                "give data.test"
            )
    if config.warmup.start_from is not None:
        _check_start(main, Path(config.warmup.start_from))


def _validation(config: RunConfig) -> list[Any]:
    """What an arm's validation loss is the loss of."""
    return [config.data.validation_prefixes, config.data.validation_weights, config.data.validation_weighting]


def _check_target(config: RunConfig, ranks: Ranks) -> None:
    target = config.target
    pruned = [word for word in target.extra_args if word.startswith("--save-retain-interval")]
    if pruned and config.launch.mode == "overlap":
        raise UserError(
            f"target.extra_args has {pruned[0]}, by which Megatron removes checkpoints that a round's selection may be "
            "made with; leave it out, or set launch.mode=alternate"
        )
    _check_model(config, "target")
    layout = target.tensor_parallel * target.pipeline_parallel * target.context_parallel
    _check_multiple(ranks.target_name, ranks.target, layout, "target's tensor × pipeline × context ranks")
    _check_multiple(
        "target.global_batch_size",
        target.global_batch_size,
        target.micro_batch_size * (ranks.target // layout),
        "target.micro_batch_size × data-parallel ranks",
    )


def _check_selection(arm: Arm, trains_proxy: bool, ranks: Ranks) -> None:
    """:param trains_proxy: whether the run warms up a proxy for the arms that have none of their own."""
    if arm.method.needs_proxy:
        _check_proxy(arm.config, trains_proxy or arm.config.warmup.own_proxy, ranks)
    if arm.method.learns == "bilevel":
        _check_bilevel(arm.config, ranks)
    if arm.measures_fidelity:
        _check_fidelity(arm.config, ranks)
    if arm.method.learns == "influence":
        _check_shared(arm.config, "mates.fit_batch_size", arm.config.mates.fit_batch_size, ranks)
    if arm.method.learns == "ngrams":
        _check_words(arm.config)


def _check_proxy(config: RunConfig, trains_proxy: bool, ranks: Ranks) -> None:
    tensor_parallel = config.proxy.tensor_parallel
    _check_model(config, "proxy")
    _check_multiple(ranks.proxy_name, ranks.proxy, tensor_parallel, "proxy.tensor_parallel")
    if trains_proxy:
        if config.warmup.proxy_steps == 0:
            raise UserError("warmup.proxy_steps is 0, but a method scores by the proxy: set it above 0")
        _check_shared(config, "warmup.proxy_batch_size", config.warmup.proxy_batch_size, ranks)


def _check_fidelity(config: RunConfig, ranks: Ranks) -> None:
    for name in ("pipeline_parallel", "context_parallel"):
        if (value := getattr(config.target, name)) > 1:
            raise UserError(
                f"target.{name} is {value}: the stage fidelity takes gradients of the LLM under tensor and data "
                "parallelism only; set fidelity.sequences to 0 to do without it"
            )
    _check_multiple(ranks.target_name, ranks.target, config.proxy.tensor_parallel, "proxy.tensor_parallel (fidelity)")


def _check_words(config: RunConfig) -> None:
    if config.dsir.features == "words" and config.data.tokenizer.model is None:
        raise UserError(
            "dsir.features is 'words', and data.tokenizer.model names no file to tell words by; name the tokenizer's, "
            "or set dsir.features=tokens"
        )


def _check_bilevel(config: RunConfig, ranks: Ranks) -> None:
    bilevel = config.bilevel
    if bilevel.curvature == "exact" and config.proxy.tensor_parallel > 1:
        raise UserError(
            f"bilevel.curvature is 'exact' (as in preset paper) with proxy.tensor_parallel = "
            f"{config.proxy.tensor_parallel}; set proxy.tensor_parallel to 1 or curvature to gauss-newton"
        )
    if bilevel.gamma and not config.warmup.target_steps:
        raise UserError(
            f"warmup.target_steps is 0, but the KL term (bilevel.gamma = {bilevel.gamma}) needs a target checkpoint; "
            "set bilevel.gamma to 0 or warmup.target_steps above 0"
        )
    _check_shared(config, "bilevel.batch_size", bilevel.batch_size, ranks)
    _check_shared(config, "bilevel.validation_batch_size", bilevel.validation_batch_size, ranks)


def _check_model(config: RunConfig, name: str) -> None:
    settings = config.target if name == "target" else config.proxy
    try:
        architecture = resolve(settings.model)
    except UserError as error:
        raise UserError(f"{name}.model: {error}") from None
    for size in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        value, divisor = getattr(architecture, size), f"{name}.tensor_parallel"
        _check_multiple(f"{name}.model: {size}", value, settings.tensor_parallel, divisor)


def _check_shared(config: RunConfig, key: str, batch_size: int, ranks: Ranks) -> None:
    shared_by = ranks.proxy // config.proxy.tensor_parallel
    _check_multiple(
        key, batch_size, shared_by, f"the proxy's data-parallel ranks ({ranks.proxy_name} / tensor_parallel)"
    )


def _check_multiple(key: str, value: int, divisor: int, of: str) -> None:
    if value % divisor:
        raise UserError(f"{key} is {value}; it must be a multiple of {divisor}, {of}")


def _check_start(arm: Arm, start: Path) -> None:
    """The run that the warm-up is taken from has seen the same data and has the same models."""
    path = RunPaths(start).config
    if not path.exists():
        raise UserError(f"warmup.start_from is {start}, which has no run.yaml; give the directory of a run")
    other = read_saved_config(path)
    if other.warmup.start_from is not None:
        raise UserError(
            f"warmup.start_from is {start}, which has no warm-up of its own; give the run it starts from, "
            f"{other.warmup.start_from}"
        )
    own_proxy = arm.config.warmup.own_proxy
    changed = differences(*(_what_warmup_depends_on(config, own_proxy) for config in (other, arm.config)))
    if changed:
        raise UserError(
            f"warmup.start_from is {start}, whose settings differ ({'; '.join(changed)}); make them equal, or let the "
            "run do a warm-up of its own"
        )


def _what_warmup_depends_on(config: RunConfig, own_proxy: bool) -> RunConfig:
    """A configuration that has these settings only: seed, rounds (the slices), data, models, warm-up.

    :param own_proxy: leave out what only the proxy depends on.
    """
    found = RunConfig(seed=config.seed, rounds=config.rounds, data=config.data)
    found.target.model = config.target.model
    found.warmup = replace(config.warmup, start_from=None, own_proxy=False)
    if own_proxy:
        found.warmup = WarmupConfig(fraction=config.warmup.fraction, target_steps=config.warmup.target_steps)
    else:
        found.proxy.model = config.proxy.model
    return found
