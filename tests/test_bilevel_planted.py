"""Planted quality: in a pool where a known third of the sequences is junk, the learned scores tell it apart.

Two kinds of junk: random tokens, which a filter by loss would find too, and one token over and over, which has the
lowest loss of all.
"""

import numpy as np
import pytest
import torch

from megatron_bliss.config import BilevelConfig, ModelConfig
from megatron_bliss.mcore import parallel
from megatron_bliss.mcore.batches import make_batch
from megatron_bliss.mcore.lower_level import MicroBatch, micro_batches
from megatron_bliss.mcore.models import build_language_model
from megatron_bliss.mcore.score_model import build_score_model
from megatron_bliss.stages.bilevel import assemble
from tests.distributed import run_ranks

VOCAB_SIZE, LENGTH, BATCH, STEPS = 64, 33, 24, 40
SMALL = ModelConfig(preset="tiny", hidden_size=32, ffn_hidden_size=64)
CASES = [
    *(("finite-difference", kind) for kind in ("random", "repeated")),
    *((curvature, "random") for curvature in ("none", "gauss-newton")),
]


def sound(random: np.random.Generator) -> np.ndarray:
    """A walk that follows a fixed rule four times out of five."""
    rule = np.random.default_rng(0).integers(0, VOCAB_SIZE // 2, VOCAB_SIZE)
    tokens = [int(random.integers(VOCAB_SIZE))]
    while len(tokens) < LENGTH:
        tokens.append(int(rule[tokens[-1]] if random.random() < 0.8 else random.integers(VOCAB_SIZE)))
    return np.array(tokens)


def junk(kind: str, random: np.random.Generator) -> np.ndarray:
    if kind == "random":
        return random.integers(0, VOCAB_SIZE, LENGTH)
    return np.full(LENGTH, random.integers(VOCAB_SIZE // 2, VOCAB_SIZE))  # tokens that sound sequences rarely have


def auc(scores: np.ndarray, is_good: np.ndarray) -> float:
    """Chance that a good sequence scores above a bad one."""
    good, bad = scores[is_good], scores[~is_good]
    return float((good[:, None] > bad).mean() + 0.5 * (good[:, None] == bad).mean())


def learn(rank: int) -> dict[tuple[str, str], tuple[float, float]]:
    """For each case the AUC before and after the loop."""
    context = parallel.initialize(1, False, seed=1)

    def batch(rows: list[np.ndarray]) -> list[MicroBatch]:
        return micro_batches([make_batch(rows, context.device)], context)

    found = {}
    for curvature, kind in CASES:
        torch.manual_seed(0)
        score_model = build_score_model(SMALL, VOCAB_SIZE, context)
        proxy = build_language_model(SMALL, VOCAB_SIZE, context)
        settings = BilevelConfig(outer_steps=STEPS, lr_proxy=3e-3, lr_score=1e-3, gamma=0.0, curvature=curvature)
        loop = assemble(settings, proxy, score_model, None, context, VOCAB_SIZE)
        random = np.random.default_rng(1)
        is_good = np.arange(200) % 3 != 0
        test = batch([sound(random) if good else junk(kind, random) for good in is_good])[0]
        with torch.no_grad():
            before = auc(loop.upper.logits(test).numpy(), is_good)
        for _ in range(STEPS):
            rows = [junk(kind, random) if index % 3 == 0 else sound(random) for index in range(BATCH)]
            loop.step(batch(rows), batch([sound(random) for _ in range(BATCH)]))
        with torch.no_grad():
            found[curvature, kind] = before, auc(loop.upper.logits(test).numpy(), is_good)
    return found


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], tuple[float, float]]:
    result: dict[tuple[str, str], tuple[float, float]] = run_ranks(learn, 1, timeout=120)[0]
    return result


@pytest.mark.parametrize(("curvature", "kind"), CASES)
def test_scores_tell_junk_apart(found: dict[tuple[str, str], tuple[float, float]], curvature: str, kind: str) -> None:
    before, after = found[curvature, kind]
    assert before == 0.5  # a head of zeros
    assert after > 0.95
