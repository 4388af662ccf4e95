"""What each method does."""

from dataclasses import dataclass
from typing import Any


@dataclass
class BilevelConfig:
    """The BLISS loop (DESIGN §2.1). `preset: paper` follows the authors' published procedure."""

    preset: str = "default"  # default | paper
    outer_steps: int = 3000  # a round
    inner_steps: int = 1  # AdamW steps on the proxy in each outer step (T)
    batch_size: int = 32  # sequences of the pool in each step, over all data-parallel ranks
    validation_batch_size: int = 32  # sequences of each validation set in each step
    micro_batch_size: int = 4  # sequences a forward pass
    lr_proxy: float = 1e-5
    lr_score: float = 1e-5
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_grad: float = 1.0
    lr_warmup_fraction: float = 0.1  # then cosine, to zero
    gamma: float = 1e-2  # weight of the KL term; 0 turns it off
    kl_direction: str = "target_proxy"  # KL(target ‖ proxy), as the authors compute it | proxy_target
    kl_source: str = "live"  # live: the target runs in the loop | cached: a stage of its own writes what it says before
    kl_top_k: int = 64  # ids of each token that a cached target is known at; the rest is one outcome
    lambda_: float = 1e-6  # weight of ‖θ_p‖²
    weights: str = "softmax"  # softmax of the scores over the batch | naive: score / batch size
    restart_score: bool = False  # a fresh score model in each round
    curvature: str = "gauss-newton"  # none | finite-difference | gauss-newton | exact (TP 1, plain torch ops)
    solver: str = "averaged"  # averaged: warm-started, running average of ∇f | conjugate-gradient: the same, z_steps
    # iterations of it, for curvature gauss-newton | paper: restarted from a constant
    solve_interval: int = 8  # outer steps from one update of z to the next, once the average below is full (the first
    # 1 / (1 - gradient_average) steps all update it); the others need no validation batch and no product
    z_steps: int = 1  # steps on the linear system in each update
    z_lr: float = 0.05
    damping: float = 1.0  # δ
    gradient_average: float = 0.99  # β of the running average of ∇f; 0 uses the last batch alone
    checkpoint_interval: int = 100  # outer steps

    @property
    def solve_first(self) -> int:
        """Outer steps to begin with that all update z: as many as the running average is over."""
        return round(1 / (1 - self.gradient_average))

    @property
    def uses_cached_target(self) -> bool:
        return self.kl_source == "cached" and self.gamma != 0

    def reuses_target(self, num_micro_batches: int) -> bool:
        """Whether the loop takes several gradients with the KL term in them at one micro-batch after the other.

        :param num_micro_batches: in a step, on each rank.
        """
        is_alone = num_micro_batches == 1 and (self.inner_steps > 1 or self.curvature == "exact")
        return is_alone or self.curvature == "finite-difference"


@dataclass
class PerplexityConfig:
    """The `perplexity` method: the proxy's mean loss on a sequence."""

    keep: str = "low"  # low | middle | high


@dataclass
class DsirConfig:
    """The `dsir` method (arXiv 2302.03169): importance weights from hashed n-grams.

    A score is the log of p(sequence) / q(sequence) under bags of n-grams, p of the validation set and q of the slice;
    it grows with the length. `selection.temperature: 1` draws as the paper does, 0 keeps the best.
    """

    features: str = "words"  # words of the text, as the authors' package takes them | tokens: of ids, much faster
    ngrams: int = 2  # units of the longest n-gram
    num_buckets: int = 10_000  # that n-grams are hashed to
    fit_tokens: int = 1_000_000_000  # of the slice that q is fitted to, at most, about


@dataclass
class MatesConfig:
    """The `mates` method (arXiv 2406.06046); the numbers are those of the authors' code.

    The oracle: how much one optimizer step on a sequence, from a model's weights and Adam state, lowers its loss on a
    reference batch of the validation set. It is measured on a sample of the slice, and a score model is fitted to it.
    The authors probe the model in training; here it is the warmed-up proxy, as the side process holds nothing larger.
    """

    sample_size: int = 80_000  # sequences of the round's slice that are probed, at most
    reference_sequences: int = 64  # of each validation set, drawn for the round
    lr: float | None = None  # of the probing step; null: warmup.proxy_lr, which the schedule of the warm-up peaks at
    held_out: float = 0.1  # of the sample: not fitted to, for the rank correlation that the stage reports
    fit_epochs: int = 5
    fit_batch_size: int = 64  # sequences, over all data-parallel ranks
    fit_lr: float = 5e-5
    temperature: float = 1.0  # of the Gumbel noise, in standard deviations of the influence; instead of `selection`'s
    checkpoint_interval: int = 1000  # probed sequences, and steps of the fit


# What `preset: paper` sets; the 410M settings of the authors' code. Settings given by the user win over it.
BILEVEL_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "curvature": "exact", "solver": "paper", "solve_interval": 1, "z_steps": 3, "z_lr": 1e-2,
        "damping": 1e-2, "gradient_average": 0.0, "lr_proxy": 1e-5, "lr_score": 1e-5, "inner_steps": 1,
        "kl_direction": "target_proxy", "weights": "softmax",
    },
}  # fmt: skip
