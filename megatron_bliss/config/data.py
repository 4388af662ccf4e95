"""What a run reads: the candidate pool, the measured sets, the tokenizer."""

from dataclasses import dataclass, field

from omegaconf import MISSING


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
