"""Every setting of a run: dataclasses, one file a subject; YAML and `key=value` in files.py.

The defaults are the recipe of the BLISS paper (arXiv 2510.06048) for a 410M model; what they leave open is the data.
Sizes are in sequences, steps or tokens as each line says.
"""

from megatron_bliss.config.comparison import Comparison, load_comparison
from megatron_bliss.config.controls import control_config
from megatron_bliss.config.data import DataConfig, DomainConfig, TokenizerConfig, ValidationSetConfig
from megatron_bliss.config.files import differences, load_config, load_online_config, read_saved_config, save_config
from megatron_bliss.config.guards import GuardsConfig
from megatron_bliss.config.launch import JobConfig, LaunchConfig, SlurmConfig
from megatron_bliss.config.methods import BILEVEL_PRESETS, BilevelConfig, DsirConfig, MatesConfig, PerplexityConfig
from megatron_bliss.config.models import (
    EvaluationConfig,
    FidelityConfig,
    ModelConfig,
    ProxyConfig,
    TargetConfig,
    WarmupConfig,
)
from megatron_bliss.config.online import OnlineConfig
from megatron_bliss.config.run import ControlConfig, RunConfig, proxy_run, warmup_run
from megatron_bliss.config.selection import QuotaConfig, ScoringConfig, SelectionConfig
from megatron_bliss.config.tracking import TrackingConfig

__all__ = [
    "BILEVEL_PRESETS",
    "BilevelConfig",
    "Comparison",
    "ControlConfig",
    "DataConfig",
    "DomainConfig",
    "DsirConfig",
    "EvaluationConfig",
    "FidelityConfig",
    "GuardsConfig",
    "JobConfig",
    "LaunchConfig",
    "MatesConfig",
    "ModelConfig",
    "OnlineConfig",
    "PerplexityConfig",
    "ProxyConfig",
    "QuotaConfig",
    "RunConfig",
    "ScoringConfig",
    "SelectionConfig",
    "SlurmConfig",
    "TargetConfig",
    "TokenizerConfig",
    "TrackingConfig",
    "ValidationSetConfig",
    "WarmupConfig",
    "control_config",
    "differences",
    "load_comparison",
    "load_config",
    "load_online_config",
    "proxy_run",
    "read_saved_config",
    "save_config",
    "warmup_run",
]
