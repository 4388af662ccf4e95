"""How sequences are scored, and what a round keeps."""

from dataclasses import dataclass, field


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
