"""Synthetic text for proofs: walks over a small vocabulary that follow a rule of their domain now and then."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Walks:
    """Domain k follows its own random rule, token to token, with probability 0.3 + 0.1 k; else any token comes."""

    vocab_size: int
    length: int  # tokens of a sequence
    domains: int = 6

    def draw(self, random: np.random.Generator, domain: int) -> np.ndarray:
        """One sequence: int64 [length]."""
        rule = np.random.default_rng(domain).integers(0, self.vocab_size, self.vocab_size)
        tokens = [int(random.integers(self.vocab_size))]
        while len(tokens) < self.length:
            follows = random.random() < 0.3 + 0.1 * domain
            tokens.append(int(rule[tokens[-1]]) if follows else int(random.integers(self.vocab_size)))
        return np.array(tokens)

    def mixture(
        self, random: np.random.Generator, count: int, more_of: int = 0, share: float = 0.0
    ) -> list[np.ndarray]:
        """Sequences of all domains alike, or a share of them of one domain and the rest of all alike."""
        return [
            self.draw(random, more_of if random.random() < share else int(random.integers(self.domains)))
            for _ in range(count)
        ]
