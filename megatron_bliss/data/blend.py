"""How much of each shard goes into the training blend, given what was kept of it.

- `pool`: a shard's weight is its kept tokens, so every kept token is as likely as any other.
- `keep`: the domains' configured weights (none configured: their tokens in the pool), each spread over the domain's
  shards by kept tokens.
- `score`: a domain's weight is its tokens in the pool times the mean percentile rank of its candidates' scores among
  all candidates; spread as in `keep`. A rank is the share of candidates below it, plus half of its ties, so it lies
  in (0, 1), whatever the scale of the scores, and 0.5 for every domain when all are equally good.

With `pool` one threshold holds for all shards; with the other two the fraction is kept within each domain, since its
share of the blend is decided by its weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

POLICIES = ("pool", "keep", "score")


@dataclass(frozen=True)
class BlendPart:
    """A shard, as far as the blend is concerned."""

    domain: str
    pool_tokens: int
    kept_tokens: int


def blend_weights(policy: str, parts: Sequence[BlendPart], domain_weights: dict[str, float] | None) -> list[float]:
    """Weight of each shard; they sum to 1, and are 0 for shards nothing was kept of.

    The share of a domain nothing was kept of goes to the others in proportion.

    :param domain_weights: by domain; None: the domains' tokens in the pool. `pool` does not look at them.
    """
    assert policy in POLICIES
    kept: dict[str, int] = {}
    pool: dict[str, int] = {}
    for part in parts:
        kept[part.domain] = kept.get(part.domain, 0) + part.kept_tokens
        pool[part.domain] = pool.get(part.domain, 0) + part.pool_tokens
    by_domain: Mapping[str, float] = kept if policy == "pool" else pool if domain_weights is None else domain_weights
    weights = [
        by_domain[part.domain] * part.kept_tokens / kept[part.domain] if part.kept_tokens else 0.0 for part in parts
    ]
    total = sum(weights)
    assert total > 0, "something was kept"
    return [weight / total for weight in weights]


def score_weights(
    domains: Sequence[str], pool_tokens: Sequence[int], mean_ranks: Mapping[str, float]
) -> dict[str, float]:
    """Domain weights of the `score` policy.

    :param domains: of each shard, with its tokens in the pool.
    :param mean_ranks: of the domains' candidates (`ranks.mean_ranks`); NaN for a domain without any, which gets 0.
    """
    tokens: dict[str, int] = {}
    for domain, num_tokens in zip(domains, pool_tokens, strict=True):
        tokens[domain] = tokens.get(domain, 0) + num_tokens
    return {domain: tokens[domain] * rank if (rank := mean_ranks[domain]) > 0 else 0.0 for domain in tokens}
