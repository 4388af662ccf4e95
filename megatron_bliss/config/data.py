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
class ValidationSetConfig:
    """One of several validation sets."""

    prefix: str = MISSING  # of its shard
    weight: float = 1.0  # beside the others'; they need not sum to 1


@dataclass
class DataConfig:
    """The pool and the sets the model is measured on.

    The upper level of the bilevel problem is the loss on the validation set or, of several, Σ_k w_k L_k.
    """

    pool: list[DomainConfig] = field(default_factory=list)
    validation: str | None = None  # shard prefix
    validation_sets: dict[str, ValidationSetConfig] = field(default_factory=dict)  # or several, by name
    validation_weighting: str = "given"  # w_k: given | uniform | worst-case: begins as given, then each step of the
    # bilevel loop takes w_k to w_k exp(η L_k), normalised (Group-DRO, arXiv 1911.08731)
    validation_rate: float = 0.01  # η
    test: str | None = None  # shard prefix; looked at by `evaluate` only
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    sequence_length: int = 1024  # tokens a training sample
    held_out: int = 200  # sequences a domain kept out of every slice, for the loss per domain
    contamination_tokens: int = 50_000_000  # of the pool that validation sets are looked for in; 0: they are not

    @property
    def validation_prefixes(self) -> dict[str, str]:
        """By name; one set alone is called `validation`."""
        if self.validation is not None:
            return {"validation": self.validation}
        return {name: one.prefix for name, one in self.validation_sets.items()}

    @property
    def validation_weights(self) -> dict[str, float]:
        """w_k by name, with a sum of 1; `worst-case` begins with them."""
        names = list(self.validation_prefixes)
        if self.validation is not None or self.validation_weighting == "uniform":
            return dict.fromkeys(names, 1 / len(names))
        total = sum(one.weight for one in self.validation_sets.values())
        return {name: one.weight / total for name, one in self.validation_sets.items()}
