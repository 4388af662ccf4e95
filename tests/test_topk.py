"""The streaming top-k against full sorts in Python, on every kind of distribution."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bliss.data.topk import Limits, Passes
from tests.arrays import InMemory, kept_ids, top_k

Entry = tuple[int, float, str, int, int, int]  # uses, -score, digest, id, shard, tokens


def in_order(shards: Sequence[InMemory], num_uses: int) -> list[Entry]:
    return sorted(
        (0 if shard.uses is None else int(shard.uses[i]), -float(shard.scores[i]), shard.digest, i, index, int(length))
        for index, shard in enumerate(shards)
        for i, length in enumerate(shard.lengths)
        if shard.uses is None or shard.uses[i] < num_uses
    )


def beginning(entries: Sequence[Entry], budget: int) -> set[tuple[int, int]]:
    """(shard, id) of the longest beginning within the budget."""
    kept = set()
    for *_, position, index, length in entries:
        budget -= length
        if budget < 0:
            break
        kept.add((index, position))
    return kept


def naive(
    shards: Sequence[InMemory], groups: Sequence[int], num_uses: int, limits: Limits, budget: int
) -> set[tuple[int, int]]:
    """The rule at the top of topk.py, word by word."""
    entries = in_order(shards, num_uses)
    num_groups = max(groups) + 1
    of_group = [[entry for entry in entries if groups[entry[4]] == group] for group in range(num_groups)]
    available = [sum(entry[5] for entry in own) for own in of_group]
    minimum = [min(int(limits.minimum[g]), available[g]) for g in range(num_groups)]
    maximum = [min(int(limits.maximum[g]), available[g]) for g in range(num_groups)]
    before = [0] * num_groups
    for end in range(len(entries) + 1):
        after = list(before)
        if end < len(entries):
            after[groups[entries[end][4]]] += entries[end][5]
            if sum(min(max(after[g], minimum[g]), maximum[g]) for g in range(num_groups)) <= budget:
                before = after
                continue
        kept: set[tuple[int, int]] = set()
        for g, own in enumerate(of_group):
            if end == len(entries) or before[g] > maximum[g]:
                kept |= beginning(own, maximum[g])
            elif after[g] <= minimum[g]:
                kept |= beginning(own, minimum[g])
            else:
                kept |= {(entry[4], entry[3]) for entry in entries[:end] if groups[entry[4]] == g}
        return kept
    raise AssertionError


FLOATS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), 1e-45, -1e-45, 1e-40, 3.4028235e38, 1.0000001]),
    st.floats(width=32, allow_nan=False),
)
FEW = st.sampled_from([0.0, -0.0, 1.0, 2.0, float("-inf")])  # heavy ties


@st.composite
def pools(draw: st.DrawFn, with_uses: bool = False) -> list[InMemory]:
    scores_of = draw(st.sampled_from([FLOATS, FEW, st.just(0.25)]))
    shards = []
    for index in draw(st.permutations(range(draw(st.integers(1, 5))))):
        entries = draw(st.lists(st.tuples(scores_of, st.integers(0, 9), st.integers(0, 3)), max_size=12))
        scores, lengths, uses = ([entry[column] for entry in entries] for column in range(3))
        shards.append(
            InMemory(
                f"digest{index}",
                np.array(scores, dtype=np.float32),
                np.array(lengths, dtype=np.int32),
                np.array(uses, dtype=np.uint8) if with_uses and draw(st.booleans()) else None,
            )
        )
    return shards


def pairs(kept: Sequence[Sequence[int]]) -> set[tuple[int, int]]:
    found = [(index, one) for index, ids in enumerate(kept) for one in ids]
    assert len(set(found)) == len(found), "no sequence is selected twice"
    assert all(list(ids) == sorted(ids) for ids in kept)
    return set(found)


@settings(max_examples=60, deadline=None)
@given(
    shards=pools(),
    budget=st.integers(0, 200),
    order=st.randoms(use_true_random=False),
    chunk=st.integers(1, 20),
    threads=st.integers(1, 2),
)
def test_top_k_equals_a_full_sort_for_any_order_of_shards_and_any_chunks(
    shards: list[InMemory], budget: int, order: object, chunk: int, threads: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_bliss.data.topk.CHUNK", chunk)
        kept = top_k(shards, budget, threads)
        assert pairs(kept) == beginning(in_order(shards, 1), budget)
        shuffled = list(range(len(shards)))
        order.shuffle(shuffled)  # type: ignore[attr-defined]
        again = top_k([shards[index] for index in shuffled], budget)
    assert [again[shuffled.index(index)] for index in range(len(shards))] == kept
    num_tokens = sum(int(shard.lengths[ids].sum()) for shard, ids in zip(shards, kept, strict=True))
    left = max((int(shard.lengths.max(initial=0)) for shard in shards), default=0)
    everything = sum(int(shard.lengths.sum()) for shard in shards)
    assert num_tokens <= budget
    assert num_tokens == everything or budget - num_tokens < left  # within one sequence


@settings(max_examples=60, deadline=None)
@given(shards=pools(with_uses=True), budget=st.integers(0, 200), num_uses=st.integers(1, 3))
def test_least_used_come_first(shards: list[InMemory], budget: int, num_uses: int) -> None:
    assert pairs(top_k(shards, budget, num_uses=num_uses)) == beginning(in_order(shards, num_uses), budget)


@settings(max_examples=150, deadline=None)
@given(
    shards=pools(with_uses=True),
    data=st.data(),
    budget=st.integers(0, 200),
    num_uses=st.integers(1, 3),
    order=st.randoms(use_true_random=False),
)
def test_limits_of_groups(
    shards: list[InMemory], data: st.DataObject, budget: int, num_uses: int, order: object
) -> None:
    num_groups = data.draw(st.integers(1, len(shards)))
    groups = [index % num_groups for index in range(len(shards))]
    minimum = data.draw(st.lists(st.integers(0, budget // num_groups), min_size=num_groups, max_size=num_groups))
    maximum = [least + data.draw(st.integers(0, budget)) for least in minimum]
    limits = Limits(np.array(minimum), np.array(maximum))
    passes = Passes(shards, groups, num_uses)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_bliss.data.topk.CHUNK", 5)
        kept = pairs(kept_ids(passes, passes.cuts(passes.count(), limits, budget)))
    assert kept == naive(shards, groups, num_uses, limits, budget)
    shuffled = list(range(len(shards)))
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    passes = Passes([shards[index] for index in shuffled], [groups[index] for index in shuffled], num_uses, threads=2)
    again = pairs(kept_ids(passes, passes.cuts(passes.count(), limits, budget)))
    assert {(shuffled[place], one) for place, one in again} == kept


@pytest.mark.parametrize("last", [1.0, 0.99999994, 0.5])
def test_a_group_at_its_maximum_before_the_common_end_keeps_no_more(last: float) -> None:
    """The others end at the same score as its last sequence, at one with the same upper bits, or further down."""
    scores = np.array([2, 1, -5], dtype=np.float32)
    others = np.array([2, last, -5], dtype=np.float32)
    shards = [
        InMemory("a", scores, np.array([1, 4, 9], np.int32)),
        InMemory("b", others, np.array([2, 5, 9], np.int32)),
    ]
    passes = Passes(shards, [0, 1])
    limits = Limits(np.array([0, 0]), np.array([5, 20]))
    kept = kept_ids(passes, passes.cuts(passes.count(), limits, 8))
    assert [list(ids) for ids in kept] == [[0, 1], [0]]


def test_500_shards_of_uneven_size() -> None:
    rng = np.random.default_rng(0)
    shards = []
    for index, size in enumerate((rng.pareto(1.0, 500) * 30).astype(int).clip(0, 3000)):
        scores = rng.standard_normal(size, dtype=np.float32)
        if index % 3 == 0:
            scores = np.round(scores, 1)  # ties across shards
        shards.append(InMemory(f"{rng.integers(1 << 60):x}", scores, rng.integers(1, 2048, size, dtype=np.int32)))
    budget = sum(int(shard.lengths.sum()) for shard in shards) // 5
    assert pairs(top_k(shards, budget, threads=2)) == beginning(in_order(shards, 1), budget)


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        top_k([InMemory("a", np.array([1, np.nan], dtype=np.float32), np.array([1, 1], dtype=np.int32))], 1)
