"""Seeds, slices, top-k, score files, blends, selections and sampling: data/ and methods/."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bliss.artifacts import read_json, write_json
from megatron_bliss.config import RunConfig
from megatron_bliss.data.blend import BlendPart, blend_weights, score_weights
from megatron_bliss.data.sampling import SequenceSampler, permute, share_of_rank
from megatron_bliss.data.seeds import derive, hash_positions, uniform
from megatron_bliss.data.selection import Counts, KeptShard, Selection, write_selection
from megatron_bliss.data.shards import ShardRecord
from megatron_bliss.data.slices import HELD_OUT, Slicing, slice_numbers
from megatron_bliss.errors import UserError
from megatron_bliss.methods import offline_method
from megatron_bliss.methods.perplexity import Perplexity
from megatron_bliss.methods.random import Random
from megatron_bliss.settings_check import METHODS
from tests.toy_shards import fake_record, records_of, write_shard

# --- seeds


def test_derived_seeds_differ_and_stay() -> None:
    seeds = {derive(1), derive(2), derive(1, "a"), derive(1, 1), derive(1, "1"), derive(1, "a", "b"), derive(1, "ab")}
    assert len(seeds) == 7
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_hash_is_splitmix64() -> None:
    # the first outputs of SplitMix64 from state 1234567, as published with the algorithm
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert hash_positions(1234567, np.arange(5)).tolist() == expected


def test_hash_leaves_its_input_alone() -> None:
    positions = np.arange(4, dtype=np.uint64)
    hash_positions(7, positions)
    assert positions.tolist() == [0, 1, 2, 3]


# --- slices


def test_slices_are_disjoint_and_cover_all_and_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    record = fake_record(5000)
    whole = slice_numbers(record, 1, 4, 0.02)
    monkeypatch.setattr("megatron_bliss.data.slices._CHUNK", 7)
    np.testing.assert_array_equal(slice_numbers(record, 1, 4, 0.02), whole)
    slicing = Slicing(seed=1, num_slices=4, records=[record], held_out=100)
    parts = [slicing.ids(record, number) for number in range(-1, 4)]
    assert all(part.dtype == np.int32 and (np.diff(part) > 0).all() for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(5000))


def test_slices_are_even() -> None:
    num_sequences, num_slices = 200_000, 5
    numbers = slice_numbers(fake_record(num_sequences), 1, num_slices, 0.02)
    counts = np.bincount(numbers + 1, minlength=num_slices + 1)
    expected = num_sequences * np.array([0.02, *[0.98 / num_slices] * num_slices])
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()  # five standard deviations


def test_slices_depend_on_seed_and_shard_but_not_on_the_held_out_share() -> None:
    numbers = slice_numbers(fake_record(1000), 1, 4, 0.02)
    assert (slice_numbers(fake_record(1000), 2, 4, 0.02) != numbers).mean() > 0.5
    assert (slice_numbers(fake_record(1000, name="other"), 1, 4, 0.02) != numbers).mean() > 0.5
    more_held_out = slice_numbers(fake_record(1000), 1, 4, 0.2)
    changed = more_held_out != numbers
    assert (more_held_out[changed] == HELD_OUT).all()
    assert 100 < changed.sum() < 300


def test_held_out_sequences_are_spread_over_a_domain() -> None:
    records = [fake_record(30_000, "a0", "a"), fake_record(10_000, "a1", "a"), fake_record(100, "b0", "b")]
    slicing = Slicing(seed=3, num_slices=2, records=records, held_out=400)
    assert slicing.held_out_share("b") == 0.05
    held_out = slicing.held_out_ids("a")
    assert list(held_out) == ["a0", "a1"]
    assert 220 < len(held_out["a0"]) < 380  # 300 expected
    assert 50 < len(held_out["a1"]) < 150
    for number in range(2):
        assert not np.isin(slicing.ids_by_name(number)["a0"], held_out["a0"]).any()


# --- blends

PARTS = [BlendPart("a", 100, 30), BlendPart("a", 100, 10), BlendPart("b", 200, 60), BlendPart("b", 50, 0)]


def test_blend_policies() -> None:
    assert blend_weights("pool", PARTS, {"a": 9, "b": 1}) == pytest.approx([0.3, 0.1, 0.6, 0])
    assert blend_weights("keep", PARTS, {"a": 3, "b": 1}) == pytest.approx([0.75 * 3 / 4, 0.75 / 4, 0.25, 0])
    assert blend_weights("keep", PARTS, None) == pytest.approx([200 / 450 * 3 / 4, 200 / 450 / 4, 250 / 450, 0])
    # a domain without kept tokens leaves its share to the others
    assert blend_weights("keep", [*PARTS, BlendPart("c", 10, 0)], {"a": 3, "b": 1, "c": 4})[2] == pytest.approx(0.25)


def test_score_weights_are_pool_tokens_times_mean_rank() -> None:
    weights = score_weights(["a", "b", "b", "c"], [100, 60, 40, 9], {"a": 0.75, "b": 0.25, "c": float("nan")})
    assert weights == {"a": 100 * 0.75, "b": 100 * 0.25, "c": 0}


# --- selections


def make_selection(directory: Path, records: list[ShardRecord], ids: list[list[int]]) -> Selection:
    total = sum(map(len, ids))
    shards = [
        KeptShard(
            record,
            np.array(kept, dtype=np.int32),
            Counts(len(kept), 10 * len(kept), record.num_sequences, record.num_tokens),
            len(kept) / max(total, 1),
        )
        for record, kept in zip(records, ids, strict=True)
    ]
    write_selection(
        directory,
        shards,
        method="bliss",
        seed=1,
        fraction=0.2,
        thresholds={"a": 0.5, "b": -float("inf")},
        blend_policy="pool",
        sources={"scores": "abc"},
    )
    return Selection.open(directory)


@pytest.fixture(scope="module")
def toy_records(tmp_path_factory: pytest.TempPathFactory) -> list[ShardRecord]:
    return records_of(tmp_path_factory.mktemp("pool"), {"a": [30, 20], "bb": [10]})


def test_a_selection_is_read_back(tmp_path: Path, toy_records: list[ShardRecord]) -> None:
    selection = make_selection(tmp_path / "s", toy_records, [[1, 5, 29], [], [0]])
    prefixes = [record.prefix for record in toy_records]
    assert selection.ids(prefixes[0]).tolist() == [1, 5, 29]
    assert selection.ids(prefixes[0]).dtype == np.int32
    assert selection.blend == [(0.75, prefixes[0]), (0.25, prefixes[2])]
    assert selection.dropped == [prefixes[1]]
    assert selection.domains["a"].kept_sequences == 3
    assert selection.domains["a"].slice_sequences == 50
    assert selection.counts.kept_tokens == 40
    link = tmp_path / "link"
    link.symlink_to(Path(prefixes[0]).parent)
    assert selection.shard(link / Path(prefixes[0]).name).record == toy_records[0]
    with pytest.raises(UserError, match="nowhere/x is not in selection"):
        selection.ids("/nowhere/x")


def test_the_digest_is_of_the_data_alone(tmp_path: Path, toy_records: list[ShardRecord]) -> None:
    selection = make_selection(tmp_path / "s", toy_records, [[1, 5], [], [0, 2]])
    again = make_selection(tmp_path / "elsewhere", list(reversed(toy_records)), [[0, 2], [], [1, 5]])
    assert again.digest == selection.digest
    assert make_selection(tmp_path / "t", toy_records, [[1, 6], [], [0, 2]]).digest != selection.digest
    assert make_selection(tmp_path / "u", toy_records, [[1, 5], [], [0]]).digest != selection.digest
    other_weights = [replace(shard, weight=weight) for shard, weight in zip(selection.shards, (1, 0, 3), strict=True)]
    settings = {"method": "bliss", "seed": 1, "fraction": 0.2, "blend_policy": "pool"}
    write_selection(tmp_path / "v", other_weights, thresholds={}, sources={}, **settings)  # type: ignore[arg-type]
    assert Selection.open(tmp_path / "v").digest != selection.digest


def test_damage_is_noticed(tmp_path: Path) -> None:
    records = records_of(tmp_path / "pool", {"a": [10], "b": [10]})
    directory = tmp_path / "s"
    with pytest.raises(UserError, match="would be empty"):
        make_selection(directory, records, [[], []])
    with pytest.raises(UserError, match="run the stage that writes it first"):
        Selection.open(directory)
    make_selection(directory, records, [[1, 2], [3]])
    np.save(directory / "a0.npy", np.array([1, 3], dtype=np.int32))
    with pytest.raises(UserError, match=r"a0.npy is missing or changed"):
        Selection.open(directory)
    for bad in ([2, 1], [1, 1], [1, 10], [-1, 1]):
        with pytest.raises(UserError, match="does not hold 2 ascending int32 ids below 10"):
            make_selection(directory, records, [bad, [3]])
    make_selection(directory, records, [[1, 2], [3]])
    write_shard(Path(records[0].prefix), 10, seed=99)
    with pytest.raises(UserError, match="its digest changed"):
        Selection.open(directory)


def test_a_manifest_of_another_schema_is_refused(tmp_path: Path, toy_records: list[ShardRecord]) -> None:
    make_selection(tmp_path, toy_records, [[1], [], []])
    write_json(tmp_path / "manifest.json", read_json(tmp_path / "manifest.json") | {"schema": 2})
    with pytest.raises(UserError, match="schema 2"):
        Selection.open(tmp_path)


# --- sampling


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1))
def test_permute_is_a_permutation(size: int, seed: int) -> None:
    assert sorted(permute(np.arange(size), size, seed).tolist()) == list(range(size))


def test_permute_mixes_well_and_reaches_far() -> None:
    for size in (3, 4):  # every one of size! orders comes up about as often; five standard deviations
        orders = Counter(tuple(permute(np.arange(size), size, seed).tolist()) for seed in range(1200))
        num_orders = 6 if size == 3 else 24
        assert len(orders) == num_orders
        expected = 1200 / num_orders
        assert max(abs(count - expected) for count in orders.values()) < 5 * expected**0.5
    values = permute(np.arange(10_000), 10_000, 5)
    assert abs(np.corrcoef(np.arange(10_000), values)[0, 1]) < 0.05
    huge = permute(np.arange(1000) + 10**12, 2 * 10**12, 5)
    assert len(np.unique(huge)) == 1000
    assert 0.8 * 10**12 < huge.mean() < 1.2 * 10**12


IDS = {"a": np.array([3, 7, 11], dtype=np.int32), "c": np.array([0, 2, 4, 6, 8], dtype=np.int32)}
RECORDS = [fake_record(20, name) for name in "abc"]
ALL = sorted([(0, i) for i in (3, 7, 11)] + [(2, i) for i in (0, 2, 4, 6, 8)])


def test_every_sequence_comes_once_an_epoch() -> None:
    sampler = SequenceSampler(RECORDS, IDS, seed=5)
    assert len(sampler) == 8
    drawn = [sample for step in range(8) for sample in sampler.batch(step, 3)]  # three epochs
    epochs = [drawn[start : start + 8] for start in (0, 8, 16)]
    assert all(sorted(epoch) == ALL for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert SequenceSampler(RECORDS, IDS, seed=5).batch(4, 3) == drawn[12:15]
    assert SequenceSampler(RECORDS, IDS, seed=6).batch(0, 8) != drawn[:8]


def test_weights_decide_how_often_a_record_comes() -> None:
    sampler = SequenceSampler(RECORDS, IDS, seed=5, weights=[3.0, 100.0, 1.0])  # the second has nothing to draw
    drawn = Counter(sampler.batch(1, 8000))
    assert sorted(drawn) == ALL
    for (index, _), count in drawn.items():
        expected = 2000 if index == 0 else 400
        assert abs(count - expected) < 5 * expected**0.5


def test_ranks_share_a_batch() -> None:
    batch = SequenceSampler(RECORDS, IDS, seed=5).batch(0, 8)
    parts = [share_of_rank(batch, rank, 4) for rank in range(4)]
    assert sorted(sample for part in parts for sample in part) == ALL
    assert {len(part) for part in parts} == {2}
    with pytest.raises(UserError, match="8 sequences cannot be shared by 3"):
        share_of_rank(batch, 0, 3)


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(UserError, match="no sequence to draw from"):
        SequenceSampler(RECORDS, {}, seed=5)
    with pytest.raises(UserError, match="no sequence to draw from"):
        SequenceSampler(RECORDS, IDS, seed=5, weights=[0, 1, 0])


# --- methods


def test_methods_by_name() -> None:
    found = {name: offline_method(RunConfig(method=name)) for name in METHODS}
    assert [(m.name, m.scored_by, m.learns) for m in found.values()] == [
        ("bliss", "score_model", "bilevel"), ("mates", "score_model", "influence"), ("dsir", "ngrams", "ngrams"),
        ("perplexity-low", "proxy_loss", None),
        ("random", "none", None), ("all", "none", None),
    ]  # fmt: skip


@pytest.mark.parametrize(("keep", "best"), [("low", 1.0), ("middle", 2.0), ("high", 9.0)])
def test_perplexity_prefers(keep: str, best: float) -> None:
    method = Perplexity(keep)
    losses = [np.array([9, 1], dtype=np.float32), np.array([], dtype=np.float32), np.array([2], dtype=np.float32)]
    everything = np.concatenate(losses)
    scores = method.compared(method.from_output(everything), np.median(method.from_output(everything)))
    assert scores.dtype == np.float32
    assert everything[scores.argmax()] == best


def test_random_scores_are_uniform_and_keyed() -> None:
    ids = np.arange(10_000, dtype=np.int32)
    scores = Random().score_without_model(fake_record(10_000), ids, seed=1)
    assert scores.dtype == np.float32
    counts, _ = np.histogram(scores, bins=10, range=(0, 1))
    assert np.abs(counts - 1000).max() < 5 * 1000**0.5
    np.testing.assert_array_equal(Random().score_without_model(fake_record(10_000), ids[5:9], seed=1), scores[5:9])
    for other in (
        Random().score_without_model(fake_record(10_000), ids, seed=2),
        Random().score_without_model(fake_record(10_000, "another"), ids, seed=1),
    ):
        assert abs(np.corrcoef(scores, other)[0, 1]) < 0.05
    assert uniform(np.array([0, 2**64 - 1], dtype=np.uint64)).tolist() == [0, 1 - 2**-53]
