"""The LLM, the proxy, their warm-up and how the LLM is measured."""

from dataclasses import dataclass, field
from itertools import pairwise

from omegaconf import MISSING


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

    @property
    def recomputes(self) -> bool:
        """Whether its flags ask for all activations to be made again in the backward pass."""
        return ("--recompute-granularity", "full") in pairwise(self.extra_args)


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
    own_proxy: bool = False  # with start_from: the LLM's warm-up is that run's, the proxy is warmed up here


@dataclass
class FidelityConfig:
    """Whether what helps the proxy helps the LLM, and whether the scores know it: measured in each round, as rank
    correlations over a sample (`stages/fidelity.py`). Nothing else depends on it, so it may be changed in a run that
    was started, and turned off where the LLM's gradient takes too much memory."""

    sequences: int = 500  # of the round's slice, and of each validation set, at most; 0: no such stage


@dataclass
class EvaluationConfig:
    decay_steps: int = 200  # optimizer steps of the decay branch
    max_sequences: int = 2000  # of each measured set
    curve: bool = False  # also measure every checkpoint that was saved in the round
