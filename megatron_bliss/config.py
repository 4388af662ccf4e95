"""Every setting of a run: dataclasses, read from YAML with `key=value` overrides, checked before anything starts.

The defaults are the recipe of the BLISS paper (arXiv 2510.06048) for a 410M model; what they leave open is the data.
Sizes are in sequences, steps or tokens as each line says.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # omegaconf reads with it
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_bliss.artifacts import RunPaths, atomic_write
from megatron_bliss.errors import UserError
from megatron_bliss.settings_check import check, check_given


@dataclass
class DomainConfig:
    """One domain of the candidate pool."""

    name: str = MISSING
    prefixes: list[str] = field(default_factory=list)  # shards, without .bin/.idx
    weight: float | None = None  # share in the blend, for all domains or none; None: as many as there are tokens


@dataclass
class TokenizerConfig:
    """The tokenizer the shards were made with, as Megatron names it."""

    type: str = "SentencePieceTokenizer"  # Megatron's --tokenizer-type
    model: str | None = None  # Megatron's --tokenizer-model
    vocab_size: int = MISSING  # ids in the shards are below it


@dataclass
class DataConfig:
    """The pool and the sets the model is measured on."""

    pool: list[DomainConfig] = field(default_factory=list)
    validation: str = MISSING  # shard prefix; the upper level of the bilevel problem
    test: str | None = None  # shard prefix; looked at by `evaluate` only
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    sequence_length: int = 1024  # tokens a training sample
    held_out: int = 200  # sequences a domain kept out of every slice, for the loss per domain


@dataclass
class ModelConfig:
    """An architecture by name; single numbers may be overridden."""

    preset: str = MISSING  # see mcore/architectures.py
    num_layers: int | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    bf16: bool = False  # parameters in bfloat16 with float32 master weights


@dataclass
class TargetConfig:
    """The LLM: trained by Megatron's own pretrain()."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(preset="pythia-410m"))
    global_batch_size: int = 512  # sequences a step
    micro_batch_size: int = 8
    lr: float = 1e-3
    min_lr: float = 1e-5  # reached at the end of a decay branch
    lr_warmup_steps: int = 2000
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    context_parallel: int = 1
    sequence_parallel: bool = False
    save_interval: int = 1000  # steps between checkpoints; the last of a round is always saved
    log_interval: int = 10
    script: str | None = None  # path of your pretrain_gpt.py; None: the one in this package, which does the same
    extra_args: list[str] = field(default_factory=list)  # further Megatron flags, word by word


@dataclass
class ProxyConfig:
    """The proxy LM; the score model has the same backbone."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(preset="pythia-31m"))
    tensor_parallel: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False  # masters and moments shared out over data-parallel ranks, as Megatron does it
    recompute: bool = False  # activations are computed again in the backward pass: less memory, a third more time


@dataclass
class WarmupConfig:
    """Round 0: target and proxy are trained on a random part of slice 0."""

    fraction: float = 0.2  # of the tokens of slice 0
    target_steps: int = 10_000
    proxy_steps: int = 10_000
    proxy_batch_size: int = 512  # sequences a step
    proxy_lr: float = 1e-3
    start_from: str | None = None  # another run's directory whose warm-up is used instead


@dataclass
class BilevelConfig:
    """The BLISS loop (DESIGN §2.1). `preset: paper` follows the authors' published procedure."""

    preset: str = "default"  # default | paper
    outer_steps: int = 3000  # a round
    inner_steps: int = 1  # AdamW steps on the proxy in each outer step (T)
    batch_size: int = 32  # sequences of the pool in each step, over all data-parallel ranks
    validation_batch_size: int = 32  # sequences of the validation set in each step
    micro_batch_size: int = 4  # sequences a forward pass
    lr_proxy: float = 1e-5
    lr_score: float = 1e-5
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_grad: float = 1.0
    lr_warmup_fraction: float = 0.1  # then cosine, to zero
    gamma: float = 1e-2  # weight of the KL term; 0 turns it off
    kl_direction: str = "target_proxy"  # KL(target ‖ proxy), as the authors compute it | proxy_target
    kl_source: str = "live"  # live: the target runs in the loop | cached: a stage of its own writes what it says before
    kl_top_k: int = 64  # ids of each token that a cached target is known at; the rest is one outcome
    lambda_: float = 1e-6  # weight of ‖θ_p‖²
    weights: str = "softmax"  # softmax of the scores over the batch | naive: score / batch size
    restart_score: bool = False  # a fresh score model in each round
    curvature: str = "gauss-newton"  # none | finite-difference | gauss-newton | exact (TP 1, plain torch ops)
    solver: str = "averaged"  # averaged: warm-started, running average of ∇f | conjugate-gradient: the same, z_steps
    # iterations of it, for curvature gauss-newton | paper: restarted from a constant
    z_steps: int = 1  # steps on the linear system in each outer step
    z_lr: float = 0.05
    damping: float = 1.0  # δ
    gradient_average: float = 0.99  # β of the running average of ∇f; 0 uses the last batch alone
    checkpoint_interval: int = 100  # outer steps

    @property
    def uses_cached_target(self) -> bool:
        return self.kl_source == "cached" and self.gamma != 0


# What `preset: paper` sets; the 410M settings of the authors' code. Settings given by the user win over it.
BILEVEL_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "curvature": "exact", "solver": "paper", "z_steps": 3, "z_lr": 1e-2, "damping": 1e-2, "gradient_average": 0.0,
        "lr_proxy": 1e-5, "lr_score": 1e-5, "inner_steps": 1, "kl_direction": "target_proxy", "weights": "softmax",
    },
}  # fmt: skip


@dataclass
class PerplexityConfig:
    """The `perplexity` method: the proxy's mean loss on a sequence."""

    keep: str = "low"  # low | middle | high


@dataclass
class ScoringConfig:
    batch_tokens: int = 16_384  # tokens in one forward pass, padding included
    chunk_sequences: int = 65_536  # what a job claims, scores and puts on disk at a time; a kill loses as much
    bf16: bool = False  # the model that scores is cast to bfloat16; sums stay float32
    claim_timeout: float = 300  # seconds without a sign of life until another job does a job's chunk


@dataclass
class QuotaConfig:
    """Bounds of a domain's share of the tokens that a round keeps."""

    minimum: float = 0.0  # or all of the domain, if it has less
    maximum: float = 1.0


@dataclass
class SelectionConfig:
    """What a round keeps. `fraction`, `tokens` or `threshold`: one of them, and 0.2 of the tokens if none is given."""

    fraction: float | None = 0.2  # of the tokens of the round's candidates
    tokens: int | None = None  # so many
    threshold: float | None = None  # every candidate with at least this score
    blend: str = "pool"  # pool: one threshold for all | keep: the fraction within each domain, your weights | score
    quotas: dict[str, QuotaConfig] = field(default_factory=dict)  # by domain, for blend `pool`; data/topk.py: the rule
    min_length: int = 0  # tokens; shorter sequences are no candidates
    max_length: int | None = None  # tokens; longer sequences are no candidates
    # Gumbel-top-k: score / temperature + Gumbel noise is compared; 0: the score itself. Scores are raw outputs of the
    # score model (logits), in `perplexity` nats a token: a temperature of their spread leaves little of their order.
    temperature: float = 0.0
    pool: str = "slice"  # slice: the round's own part of the pool | all: whatever earlier rounds left of all of it
    max_repeats: int = 1  # `all`: rounds that may take a sequence; when new ones run out, the least used come first

    def share(self, num_tokens: int) -> float:
        """About how much of so many tokens is kept; all for a threshold, which does not tell."""
        if self.fraction is not None:
            return self.fraction
        return min(self.tokens / max(num_tokens, 1), 1.0) if self.tokens is not None else 1.0


@dataclass
class EvaluationConfig:
    decay_steps: int = 200  # optimizer steps of the decay branch
    max_sequences: int = 2000  # of each measured set
    curve: bool = False  # also measure every checkpoint that was saved in the round


@dataclass
class LaunchConfig:
    """How stages are started on this machine."""

    nproc_per_node: int = 1  # ranks of each stage (GPUs)
    concurrency: int = 1  # stages that may run side by side
    threads: int | None = None  # CPU threads a rank; None: all cores shared out evenly


@dataclass
class ControlConfig:
    """An arm beside the main one, from the same warm-up, with the same schedule and tokens."""

    name: str = MISSING
    method: str = "random"
    steps_factor: float = 1.0  # longer than the main arm by this factor, on as much more data
    perplexity: PerplexityConfig = field(default_factory=PerplexityConfig)


@dataclass
class RunConfig:
    """One experiment."""

    seed: int = 1234
    method: str = "bliss"  # bliss | perplexity | random
    rounds: int = 4
    round_steps: int = 10_000  # optimizer steps of the LLM in a round
    data: DataConfig = field(default_factory=DataConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    bilevel: BilevelConfig = field(default_factory=BilevelConfig)
    perplexity: PerplexityConfig = field(default_factory=PerplexityConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    controls: list[ControlConfig] = field(default_factory=list)

    @property
    def num_slices(self) -> int:
        """Disjoint parts of the pool: one for the warm-up, one a round."""
        return self.rounds + 1

    @property
    def is_model_parallel(self) -> bool:
        """Whether any model is split inside its layers."""
        return max(self.target.tensor_parallel, self.target.context_parallel, self.proxy.tensor_parallel) > 1

    def round_end(self, round_number: int) -> int:
        """The LLM's iteration at the end of a round; round 0 is the warm-up."""
        return self.warmup.target_steps + round_number * self.round_steps


def load_config(path: Path | None, overrides: list[str]) -> RunConfig:
    """Read YAML (or start from the defaults), apply the preset, then `key=value` overrides, and check everything.

    :raises UserError: for a file that is not YAML settings, an unknown key, a value of the wrong type, or one that
        cannot work.
    """
    given = _read(path) if path else OmegaConf.create()
    for word in overrides:
        if not word.partition("=")[0] or "=" not in word:
            raise UserError(f"{word!r} is not a setting: write key=value, for example bilevel.gamma=0")
    try:
        given = OmegaConf.merge(given, OmegaConf.from_dotlist(overrides))
        check_given(given)
        preset = str(OmegaConf.select(given, "bilevel.preset") or "default")
        settings = OmegaConf.create({"bilevel": BILEVEL_PRESETS.get(preset, {})})
        if any(OmegaConf.select(given, f"selection.{size}") is not None for size in ("tokens", "threshold")):
            settings.selection = {"fraction": None}  # the default stands back
        return _checked(OmegaConf.merge(OmegaConf.structured(RunConfig), settings, given))
    except OmegaConfBaseException as error:
        where = ": ".join(str(part) for part in (path, error.full_key) if part)
        raise UserError(f"{where}: {str(error).splitlines()[0]}" if where else str(error).splitlines()[0]) from None
    except yaml.YAMLError as error:
        raise UserError(f"{' '.join(overrides)}: {_line(error)}; write each setting as key=value") from None


def _read(path: Path) -> Any:
    """What a YAML file says, nothing of it checked.

    :raises UserError: if it cannot be read, or is not a mapping.
    """
    try:
        given = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the path of a run's YAML settings") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML settings: {_line(error)}") from None
    if not isinstance(given, DictConfig):
        raise UserError(f"{path} holds a list; settings are written as key: value")
    return given


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _checked(merged: Any) -> RunConfig:
    check(merged)
    config: RunConfig = OmegaConf.to_object(merged)  # type: ignore[assignment]
    for control in config.controls:
        try:
            check(OmegaConf.structured(control_config(config, control, Path())))
        except UserError as error:
            raise UserError(f"controls: {control.name!r}: {error}") from None
    return config


def control_config(config: RunConfig, control: ControlConfig, main_run: Path) -> RunConfig:
    """The settings of a control arm as a run of its own, with as much more data as it takes more steps."""
    from dataclasses import replace

    return replace(
        config,
        method=control.method,
        round_steps=round(config.round_steps * control.steps_factor),
        selection=replace(
            config.selection,
            fraction=config.selection.fraction and config.selection.fraction * control.steps_factor,
            tokens=config.selection.tokens and round(config.selection.tokens * control.steps_factor),
        ),
        warmup=replace(config.warmup, start_from=config.warmup.start_from or str(main_run)),
        perplexity=control.perplexity,
        controls=[],
    )


def warmup_run(config: RunConfig, paths: RunPaths) -> RunPaths:
    """The run whose warm-up a run starts from: its own, or that of `warmup.start_from`."""
    return RunPaths(Path(config.warmup.start_from)) if config.warmup.start_from else paths


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved settings; done once a run."""
    with atomic_write(path, "w") as stream:
        stream.write(OmegaConf.to_yaml(OmegaConf.structured(config)))


def read_saved_config(path: Path) -> RunConfig:
    """The settings a run was started with.

    :raises UserError: if the file is missing or damaged.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; give a directory that `megatron-bliss run` has made")
    try:
        return _checked(OmegaConf.merge(OmegaConf.structured(RunConfig), _read(path)))
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}; restore the file, or start a new run") from None


def differences(saved: RunConfig, now: RunConfig) -> list[str]:
    """Lines `key: saved value -> value now` for every setting that changed."""
    old, new = _flat(OmegaConf.structured(saved)), _flat(OmegaConf.structured(now))
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in sorted(old | new) if old.get(key) != new.get(key)]


def _flat(config: DictConfig) -> dict[str, Any]:
    def walk(value: Any, key: str) -> dict[str, Any]:
        items: Any
        if isinstance(value, dict):
            items = value.items()
        elif isinstance(value, list):
            items = enumerate(value)
        else:
            return {key: value}
        found: dict[str, Any] = {}
        for name, part in items:
            found |= walk(part, f"{key}.{name}" if key else str(name))
        return found

    return walk(OmegaConf.to_container(config), "")
