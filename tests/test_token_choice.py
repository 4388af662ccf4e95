"""The choice of tokens against a choice written out in numpy, and over two ranks."""

from typing import Any

import numpy as np
import pytest
import torch

from megatron_bliss.mcore.token_choice import choose
from tests.distributed import run_ranks


def chosen(excess: np.ndarray, competes: np.ndarray, keep: float) -> np.ndarray:
    """The ⌈keep · n⌉ largest of a flat array, the earlier of equal ones."""
    ids = np.flatnonzero(competes)
    best = sorted(ids.tolist(), key=lambda i: (-excess[i], i))[: int(np.ceil(keep * len(ids) - 1e-9))]
    kept = np.zeros(len(excess), dtype=bool)
    kept[best] = True
    return kept


@pytest.mark.parametrize("keep", [0.01, 0.4, 0.6, 1.0])
def test_the_share_is_exact_and_ties_go_to_the_earlier(keep: float) -> None:
    random = np.random.default_rng(1)
    excess = random.integers(-3, 4, (6, 25)).astype(np.float32)  # many ties
    competes = random.random((6, 25)) < 0.7
    competes[2] = False  # a sequence without loss
    got = [choose(torch.tensor(excess), torch.tensor(competes), keep, scope) for scope in ("micro-batch", "sequence")]
    assert np.array_equal(got[0].flatten().numpy(), chosen(excess.ravel(), competes.ravel(), keep))
    for row in range(6):
        assert np.array_equal(got[1][row].numpy(), chosen(excess[row], competes[row], keep))


def _globally(rank: int, excess: np.ndarray, competes: np.ndarray) -> Any:
    import torch.distributed as dist

    from megatron_bliss.mcore.token_choice import choose_globally

    dist.init_process_group("gloo")
    mine = [torch.tensor(part[:, rank]) for part in (excess, competes)]
    kept = choose_globally(list(mine[0]), list(mine[1]), 0.6, dist.group.WORLD)
    return torch.stack(kept).numpy()


def test_a_global_batch_is_one_competition() -> None:
    random = np.random.default_rng(2)
    excess = random.integers(-9, 9, (3, 2, 4, 10)).astype(np.float32)  # [micro-batches, ranks, b, s]
    competes = random.random(excess.shape) < 0.8
    parts = run_ranks(_globally, 2, excess, competes)
    assert np.array_equal(np.stack(parts, axis=1).ravel(), chosen(excess.ravel(), competes.ravel(), 0.6))
