"""Medians and percentile ranks by counting, against sorts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bliss.data.ranks import mean_ranks, median
from megatron_bliss.data.topk import Passes
from tests.arrays import InMemory

SCORES = st.lists(
    st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, float("inf"), -float("inf")]),
        st.floats(width=32, allow_nan=False),
    ),
    max_size=15,
)


def passes_of(scores: list[np.ndarray], threads: int = 1) -> Passes:
    shards = [InMemory(str(i), own, np.ones(len(own), dtype=np.int32)) for i, own in enumerate(scores)]
    return Passes(shards, range(len(shards)), threads=threads)


def ranks_by_sorting(scores: list[np.ndarray]) -> list[float]:
    everything = np.sort(np.concatenate(scores))
    found = []
    for own in scores:
        below, upto = (np.searchsorted(everything, own, side=side) for side in ("left", "right"))
        found.append((below + upto).mean() / 2 / len(everything) if len(own) else np.nan)
    return found


@settings(max_examples=60, deadline=None)
@given(lists=st.lists(SCORES, min_size=1, max_size=4))
def test_few_scores_are_exact(lists: list[list[float]]) -> None:
    scores = [np.array(own, dtype=np.float32) for own in lists]
    everything = np.concatenate(scores)
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr("megatron_bliss.data.topk.CHUNK", 4)
        found, expected = median(passes_of(scores)), np.median(everything) if len(everything) else np.float32(np.nan)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
        if len(everything):
            np.testing.assert_allclose(mean_ranks(passes_of(scores)), ranks_by_sorting(scores), rtol=1e-12)


@pytest.mark.parametrize("kind", ["normal", "narrow", "ties", "sigmoid and the lowest float"])
def test_many_scores(kind: str) -> None:
    rng = np.random.default_rng(0)
    scores = [rng.standard_normal(size, dtype=np.float32) + np.float32(size / 1e5) for size in (50_000, 30_001, 7)]
    if kind == "narrow":
        scores = [np.float32(0.5) + own * np.float32(1e-6) for own in scores]
    elif kind == "ties":
        scores = [np.round(own) for own in scores]
    elif kind == "sigmoid and the lowest float":
        scores = [1 / (1 + np.exp(-own * np.float32(1e-3))) for own in scores]
        for own in scores:
            own[:2] = np.finfo(np.float32).min
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_bliss.data.topk.CHUNK", 10_000)
        found = mean_ranks(passes_of(scores, threads=2))
        np.testing.assert_allclose(found, ranks_by_sorting(scores), atol=1e-6)
        np.testing.assert_array_equal(mean_ranks(passes_of(scores)), found)
        assert median(passes_of(scores, threads=2)) == np.median(np.concatenate(scores))
