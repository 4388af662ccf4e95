"""Data selection for LLM pretraining on Megatron-Core: BLISS rounds over binary token shards."""

__version__ = "0.1.0"
