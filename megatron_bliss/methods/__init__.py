from megatron_bliss.config import RunConfig
from megatron_bliss.methods.bliss import Bliss
from megatron_bliss.methods.offline import OfflineMethod
from megatron_bliss.methods.perplexity import Perplexity
from megatron_bliss.methods.random import Random


def offline_method(config: RunConfig) -> OfflineMethod:
    """The method a run selects by; `settings_check.METHODS` lists the names."""
    if config.method == "bliss":
        return Bliss()
    if config.method == "perplexity":
        return Perplexity(config.perplexity.keep)
    assert config.method == "random", config.method
    return Random()
