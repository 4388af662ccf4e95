"""Which values a setting may have, and which go together: what can be said without models, ranks or files.

`orchestration/check.py` says the rest, before a run is started.
"""

import math
import re
from collections.abc import Callable
from typing import Any

from omegaconf import OmegaConf

from megatron_bliss.errors import UserError
from megatron_bliss.wording import counted

METHODS = ("bliss", "mates", "dsir", "perplexity", "random", "all")
WITHOUT_SCORES = ("random", "all")  # of the methods

_CHOICES = {
    "method": METHODS,
    "bilevel.preset": ("default", "paper"),
    "bilevel.kl_direction": ("target_proxy", "proxy_target"),
    "bilevel.kl_source": ("live", "cached"),
    "bilevel.weights": ("softmax", "naive"),
    "bilevel.curvature": ("none", "finite-difference", "gauss-newton", "exact"),
    "bilevel.solver": ("averaged", "conjugate-gradient", "paper"),
    "perplexity.keep": ("low", "middle", "high"),
    "dsir.features": ("words", "tokens"),
    "guards.action": ("none", "stop", "random", "rollback"),
    "data.validation_weighting": ("given", "uniform", "worst-case"),
    "tracking.wandb": ("off", "offline", "online"),
    "launch.mode": ("alternate", "overlap"),
}
_ONLINE_CHOICES = {
    "method": ("none", "blade", "rho1", "self"),
    "scope": ("micro-batch", "sequence", "global-batch"),
}
_SELECTION_CHOICES = {"blend": ("pool", "keep", "score"), "pool": ("slice", "all")}
_ROUNDING = 1e-12  # of sums of shares: less than a token of any pool
_MAX_FLOAT32 = 3.4028234663852886e38
_POSITIVE = (
    "rounds",
    "round_steps",
    "data.sequence_length",
    "data.tokenizer.vocab_size",
    "target.global_batch_size",
    "target.micro_batch_size",
    "target.lr",
    "target.save_interval",
    "target.log_interval",
    "target.tensor_parallel",
    "target.pipeline_parallel",
    "target.context_parallel",
    "proxy.tensor_parallel",
    "warmup.proxy_batch_size",
    "bilevel.outer_steps",
    "bilevel.inner_steps",
    "bilevel.batch_size",
    "bilevel.validation_batch_size",
    "bilevel.micro_batch_size",
    "bilevel.solve_interval",
    "bilevel.z_steps",
    "bilevel.kl_top_k",
    "bilevel.checkpoint_interval",
    "mates.reference_sequences",
    "mates.fit_epochs",
    "mates.fit_batch_size",
    "mates.fit_lr",
    "mates.checkpoint_interval",
    "dsir.ngrams",
    "dsir.num_buckets",
    "dsir.fit_tokens",
    "scoring.batch_tokens",
    "scoring.chunk_sequences",
    "scoring.claim_timeout",
    "evaluation.max_sequences",
    "launch.nproc_per_node",
    "launch.nnodes",
    "launch.max_attempts",
    "launch.concurrency",
)
_POSITIVE_IF_GIVEN = (
    *(
        f"{model}.model.{size}"
        for model in ("target", "proxy")
        for size in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    ),
    *(
        f"launch.slurm.{kind}.{size}"
        for kind in ("cpu", "side", "score", "pretrain", "evaluate")
        for size in ("gpus", "cpus", "tasks")
    ),
    "launch.slurm.stop_margin",
)
_NOT_NEGATIVE = (
    *("warmup.target_steps", "warmup.proxy_steps", "evaluation.decay_steps"),
    *("fidelity.sequences", "data.held_out", "data.contamination_tokens", "launch.hang_minutes", "launch.stop_minutes"),
)
_Rule = tuple[tuple[str, ...], Callable[[Any], bool], str]
_RULES: tuple[_Rule, ...] = (
    (_POSITIVE, lambda value: value > 0, "must be above 0"),
    (_POSITIVE_IF_GIVEN, lambda value: value is None or value > 0, "must be above 0"),
    (_NOT_NEGATIVE, lambda value: value >= 0, "must not be below 0"),
    (("warmup.fraction",), lambda value: 0 < value <= 1, "must be above 0 and at most 1"),
    (("mates.sample_size",), lambda value: value >= 4, "must be at least 4"),
    (("mates.lr",), lambda value: value is None or value > 0, "must be above 0"),
    (("mates.held_out",), lambda value: 0 < value < 1, "must be above 0 and below 1"),
    (("mates.temperature",), lambda value: 0 <= value < math.inf, "must be a number that is not below 0"),
    (("bilevel.gradient_average",), lambda value: 0 <= value < 1, "must be at least 0 and below 1"),
    (("data.validation_rate",), lambda value: 0 < value < math.inf, "must be above 0"),
)


def check_given(given: Any) -> None:
    """:param given: what a user wrote, before anything is known to be a setting.
    :raises UserError: for a layout that proxy and score model cannot have.
    """
    for key in ("proxy.pipeline_parallel", "proxy.context_parallel"):
        if OmegaConf.select(given, key) not in (None, 1):
            raise UserError(
                f"{key} is {OmegaConf.select(given, key)}: proxy and score model run in one tensor-parallel group "
                "(proxy.tensor_parallel); for a pipelined target set target.pipeline_parallel and "
                "bilevel.kl_source=cached"
            )


def check(settings: Any) -> None:
    """:param settings: a `RunConfig` as OmegaConf holds it.
    :raises UserError: naming the first setting that cannot work.
    """
    missing = sorted(OmegaConf.missing_keys(settings))
    if missing:
        raise UserError(f"settings without a value: {', '.join(missing)}; give them in the YAML file or as key=value")
    for key, choices in _CHOICES.items():
        _check_choice(key, OmegaConf.select(settings, key), choices)
    for keys, holds, rule in _RULES:
        for key in keys:
            if not holds(value := OmegaConf.select(settings, key)):
                raise UserError(f"{key} is {value}; it {rule}")
    if settings.bilevel.solver == "conjugate-gradient" and settings.bilevel.curvature != "gauss-newton":
        raise UserError(
            "bilevel.solver=conjugate-gradient needs a positive semi-definite curvature; set "
            f"bilevel.curvature=gauss-newton instead of {settings.bilevel.curvature}, or bilevel.solver=averaged"
        )
    vocab_size = settings.data.tokenizer.vocab_size
    if settings.bilevel.kl_source == "cached" and settings.bilevel.kl_top_k > vocab_size:
        raise UserError(
            f"bilevel.kl_top_k is {settings.bilevel.kl_top_k}; it must be at most data.tokenizer.vocab_size, "
            f"{vocab_size}"
        )
    _check_pool(settings.data.pool)
    _check_validation(settings.data)
    _check_controls(settings)
    check_selection(settings.selection, [domain.name for domain in settings.data.pool])
    check_online(settings.online)
    _check_online_layout(settings)
    _check_pool_lasts(settings)
    if settings.selection.threshold is not None and settings.method == "mates" and settings.mates.temperature:
        raise UserError(
            f"mates.temperature is {settings.mates.temperature}; it moves scores at random, which no "
            "selection.threshold fits; set it to 0, or give selection.fraction or selection.tokens"
        )
    if settings.selection.threshold is not None and (settings.method in WITHOUT_SCORES or settings.controls):
        raise UserError(
            f"selection.threshold is for one method's scores; with method={' or '.join(WITHOUT_SCORES)} or controls, "
            "whose scores are others, "
            "give selection.fraction or selection.tokens"
        )


def _check_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{key} is {value!r}; it must be one of {', '.join(choices)}")


def _check_pool_lasts(settings: Any) -> None:
    """With one pool for all rounds, each takes a fraction of all of it; the warm-up has taken a part of its slice."""
    selection, warmup = settings.selection, settings.warmup
    if selection.pool != "all" or selection.fraction is None or settings.method == "all":
        return
    taken = settings.rounds * selection.fraction
    if warmup.target_steps:
        taken += warmup.fraction / (settings.rounds + 1)
    if taken > selection.max_repeats + 1e-9:
        raise UserError(
            f"{counted(settings.rounds, 'round')} of selection.fraction={selection.fraction} and the warm-up take "
            f"{taken:.3g} times the pool, and selection.max_repeats is {selection.max_repeats}; raise it, or lower the "
            "fraction"
        )


def check_selection(selection: Any, domains: list[str]) -> None:
    """:param selection: a `SelectionConfig`.
    :raises UserError: naming the first setting that cannot work.
    """
    for name, choices in _SELECTION_CHOICES.items():
        _check_choice(f"selection.{name}", getattr(selection, name), choices)
    sizes = [name for name in ("fraction", "tokens", "threshold") if getattr(selection, name) is not None]
    if len(sizes) != 1:
        given = " and ".join(f"selection.{name}" for name in sizes) or "nothing"
        raise UserError(
            f"{given} says how much is kept; give one of selection.fraction, tokens and threshold, null for the others"
        )
    rules: list[tuple[str, bool, str]] = [
        ("fraction", selection.fraction is None or 0 < selection.fraction <= 1, "must be above 0 and at most 1"),
        ("tokens", selection.tokens is None or selection.tokens > 0, "must be above 0"),
        (
            "threshold",
            selection.threshold is None or abs(selection.threshold) <= _MAX_FLOAT32,
            "must be a number that a float32 can hold",
        ),
        ("min_length", selection.min_length >= 0, "must not be below 0"),
        (
            "max_length",
            selection.max_length is None or selection.max_length >= max(selection.min_length, 1),
            "must be above 0 and not below selection.min_length",
        ),
        ("temperature", 0 <= selection.temperature < math.inf, "must be a number that is not below 0"),
        ("max_repeats", 1 <= selection.max_repeats <= 255, "must be between 1 and 255"),
        ("max_repeats", selection.max_repeats == 1 or selection.pool == "all", "needs selection.pool=all"),
        (
            "temperature",
            not selection.temperature or selection.threshold is None,
            "moves scores at random, which no threshold fits; give selection.fraction or selection.tokens instead",
        ),
    ]
    for name, holds, rule in rules:
        if not holds:
            raise UserError(f"selection.{name} is {getattr(selection, name)}; it {rule}")
    _check_quotas(selection, domains)


def check_online(online: Any) -> None:
    """:param online: an `OnlineConfig`.
    :raises UserError: naming the first setting that cannot work.
    """
    for name, choices in _ONLINE_CHOICES.items():
        _check_choice(f"online.{name}", getattr(online, name), choices)
    size = online.reference_batch_size
    rules: list[tuple[str, bool, str]] = [
        ("keep", 0 < online.keep <= 1, "must be above 0 and at most 1"),
        ("sync_interval", online.sync_interval > 0, "must be above 0"),
        ("reference_steps", online.reference_steps > 0, "must be above 0"),
        ("reference_batch_size", size is None or size > 0, "must be above 0"),
        ("lambda_", 0 <= online.lambda_ < math.inf, "must be a number that is not below 0"),
        ("average", 0 <= online.average < 1, "must be at least 0 and below 1"),
    ]
    for name, holds, rule in rules:
        if not holds:
            raise UserError(f"online.{name} is {getattr(online, name)}; it {rule}")
    if online.reference is not None and online.method != "rho1":
        raise UserError(
            f"online.reference is {online.reference} and online.method is {online.method}: a given reference goes with "
            "rho1 alone; change one of them"
        )


def _check_online_layout(settings: Any) -> None:
    if settings.online.method == "none":
        return
    for name in ("pipeline_parallel", "context_parallel"):
        if (value := settings.target[name]) > 1:
            raise UserError(
                f"target.{name} is {value}: online.method={settings.online.method} compares whole sequences' losses "
                "on one rank, so it runs under tensor and data parallelism only; set it to 1"
            )


def _check_quotas(selection: Any, domains: list[str]) -> None:
    quotas = selection.quotas
    if quotas and (selection.blend != "pool" or selection.threshold is not None):
        raise UserError(
            "selection.quotas share out one budget over all domains; they need selection.blend=pool and "
            "selection.fraction or selection.tokens"
        )
    for name, quota in quotas.items():
        if name not in domains:
            raise UserError(f"selection.quotas names domain {name!r}; the pool has {', '.join(domains)}")
        if not 0 <= quota.minimum <= quota.maximum <= 1 or quota.maximum == 0:
            raise UserError(
                f"selection.quotas: domain {name!r} has minimum {quota.minimum} and maximum {quota.maximum}; they are "
                "shares, 0 <= minimum <= maximum <= 1, with a maximum above 0"
            )
    least = sum(quota.minimum for quota in quotas.values())
    most = sum(quotas[name].maximum if name in quotas else 1.0 for name in domains)
    if least > 1 + _ROUNDING or most < 1 - _ROUNDING:
        what = (
            f"minimums sum to {least:.4g}, which is above 1"
            if least > 1 + _ROUNDING
            else f"maximums sum to {most:.4g}, below 1"
        )
        raise UserError(f"selection.quotas: {what}; no selection can have these shares")


def _check_pool(pool: Any) -> None:
    names = [domain.name for domain in pool]
    if not names:
        raise UserError("data.pool is empty; list at least one domain with its shard prefixes")
    for domain in pool:
        if not domain.name or "/" in domain.name:
            raise UserError(f"data.pool names a domain {domain.name!r}; a name is not empty and has no / in it")
        if names.count(domain.name) > 1:
            raise UserError(f"data.pool names domain {domain.name!r} twice; domains need names of their own")
        if not domain.prefixes:
            raise UserError(f"data.pool: domain {domain.name!r} has no prefixes; list its shards")
        if domain.weight is not None and not domain.weight > 0:
            raise UserError(f"data.pool: domain {domain.name!r} has weight {domain.weight}; it must be above 0")
    if len({domain.weight is None for domain in pool}) > 1:
        raise UserError("data.pool gives a weight to some domains only; weigh all of them or none")


def _check_validation(data: Any) -> None:
    if (data.validation is None) == (not data.validation_sets):
        given = "nothing" if data.validation is None else "data.validation and data.validation_sets"
        raise UserError(
            f"{given} says what the selection is to help; give data.validation=PREFIX, or data.validation_sets with a "
            "name, prefix and weight for each of several"
        )
    for name, one in data.validation_sets.items():
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
            raise UserError(
                f"data.validation_sets names a set {name!r}; a name is of letters, digits, _ . - and begins with one "
                "of the first two"
            )
        if not 0 < one.weight < math.inf:
            raise UserError(f"data.validation_sets: set {name!r} has weight {one.weight}; it must be above 0")
    weights = {one.weight for one in data.validation_sets.values()}
    if data.validation_weighting == "uniform" and len(weights) > 1:
        raise UserError(
            "data.validation_weighting is 'uniform' and data.validation_sets has weights; leave them out, or set "
            "data.validation_weighting=given"
        )


def _check_controls(settings: Any) -> None:
    names = [settings.method, *(control.name for control in settings.controls)]
    for control in settings.controls:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", control.name) or names.count(control.name) > 1:
            raise UserError(
                f"controls: {control.name!r} names a directory and a line of the report, so it must be of letters, "
                "digits, _ . - and used once, and not be the method of the main arm"
            )
        if not control.steps_factor > 0:
            raise UserError(f"controls: {control.name!r} has steps_factor {control.steps_factor}; it must be above 0")
