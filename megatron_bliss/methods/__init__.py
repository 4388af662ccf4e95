from pathlib import Path

from megatron_bliss.config import OnlineConfig, RunConfig
from megatron_bliss.methods.all import All
from megatron_bliss.methods.blade import Blade
from megatron_bliss.methods.bliss import Bliss
from megatron_bliss.methods.dsir import Dsir
from megatron_bliss.methods.mates import Mates
from megatron_bliss.methods.offline import OfflineMethod
from megatron_bliss.methods.perplexity import Perplexity
from megatron_bliss.methods.random import Random
from megatron_bliss.methods.rho1 import Rho1
from megatron_bliss.methods.self_reference import SelfReference


def offline_method(config: RunConfig) -> OfflineMethod:
    """The method a run selects by; `settings_check.METHODS` lists the names."""
    if config.method == "bliss":
        return Bliss()
    if config.method == "mates":
        return Mates(config.mates.temperature)
    if config.method == "perplexity":
        return Perplexity(config.perplexity.keep)
    if config.method == "dsir":
        return Dsir()
    if config.method == "all":
        return All()
    assert config.method == "random", config.method
    return Random()


def online_method(config: OnlineConfig) -> Blade | Rho1 | SelfReference | None:
    """The method that chooses tokens during training; None where all of them carry loss."""
    if config.method == "blade":
        return Blade(config.sync_interval)
    if config.method == "rho1":
        return Rho1(Path(config.reference) if config.reference else None)
    return SelfReference(config.sync_interval) if config.method == "self" else None
