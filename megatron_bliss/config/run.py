"""One experiment and its control arms."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from megatron_bliss.artifacts import RunPaths
from megatron_bliss.config.data import DataConfig
from megatron_bliss.config.guards import GuardsConfig
from megatron_bliss.config.launch import LaunchConfig
from megatron_bliss.config.methods import BilevelConfig, DsirConfig, MatesConfig, PerplexityConfig
from megatron_bliss.config.models import EvaluationConfig, FidelityConfig, ProxyConfig, TargetConfig, WarmupConfig
from megatron_bliss.config.online import OnlineConfig
from megatron_bliss.config.selection import ScoringConfig, SelectionConfig
from megatron_bliss.config.tracking import TrackingConfig


@dataclass
class ControlConfig:
    """An arm beside the main one, from the same warm-up, with the same schedule and tokens."""

    name: str = MISSING
    method: str | None = None  # of the main arm, if it is not given
    steps_factor: float = 1.0  # longer than the main arm by this factor, on as much more data
    settings: dict[str, Any] = field(default_factory=dict)  # what differs from the main arm, as {bilevel.gamma: 0}


@dataclass
class RunConfig:
    """One experiment."""

    seed: int = 1234
    method: str = "bliss"  # bliss | mates | dsir | perplexity | random | all
    rounds: int = 4
    round_steps: int = 10_000  # optimizer steps of the LLM in a round
    data: DataConfig = field(default_factory=DataConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    bilevel: BilevelConfig = field(default_factory=BilevelConfig)
    mates: MatesConfig = field(default_factory=MatesConfig)
    perplexity: PerplexityConfig = field(default_factory=PerplexityConfig)
    dsir: DsirConfig = field(default_factory=DsirConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)
    fidelity: FidelityConfig = field(default_factory=FidelityConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
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


def warmup_run(config: RunConfig, paths: RunPaths) -> RunPaths:
    """The run whose warm-up a run starts from: its own, or that of `warmup.start_from`."""
    return RunPaths(Path(config.warmup.start_from)) if config.warmup.start_from else paths


def proxy_run(config: RunConfig, paths: RunPaths) -> RunPaths:
    """The run whose warmed-up proxy a run uses."""
    return paths if config.warmup.own_proxy else warmup_run(config, paths)
