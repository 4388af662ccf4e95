"""The ledger of earlier selections, and candidates read in spans."""

import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bliss.data.candidates import Filters, ShardCandidates
from megatron_bliss.data.ledger import Ledger
from megatron_bliss.data.shards import Shard, ShardRecord, take_inventory
from megatron_bliss.data.slices import Slicing
from megatron_bliss.data.topk import Chunk
from megatron_bliss.errors import UserError
from tests.selections import select
from tests.toy_shards import fake_record, records_of

SIZE = 200


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> ShardRecord:
    return records_of(tmp_path_factory.mktemp("ledger"), {"a": [SIZE]})[0]


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory, record: ShardRecord) -> Ledger:
    directory = tmp_path_factory.mktemp("selections")
    kept = [np.arange(0, SIZE, 2), np.arange(0, SIZE, 3), np.array([0, SIZE - 1])]
    return Ledger([select(directory / str(i), {record.prefix: ids}) for i, ids in enumerate(kept)])


def test_uses_are_counted_by_content(tmp_path: Path, record: ShardRecord, ledger: Ledger) -> None:
    ids = np.arange(SIZE)
    expected = (ids % 2 == 0) + (ids % 3 == 0) * 1 + (ids == 0) + (ids == SIZE - 1)
    for start, stop in ((0, SIZE), (0, 1), (50, 51), (77, 140), (SIZE - 1, SIZE), (9, 9)):
        uses = ledger.uses(record, start, stop)
        assert uses.dtype == np.uint8
        assert uses.tolist() == expected[start:stop].tolist()
    for suffix in (".bin", ".idx"):
        (tmp_path / f"moved{suffix}").write_bytes(Path(record.prefix + suffix).read_bytes())
    [moved] = take_inventory({"other": [str(tmp_path / "moved")]})
    assert ledger.uses(moved, 0, SIZE).tolist() == expected.tolist()
    assert not ledger.uses(fake_record(SIZE), 0, SIZE).any()
    assert ledger.num_rounds == 3
    assert Ledger().digest != ledger.digest
    with pytest.raises(UserError, match="256 earlier selections"):
        Ledger([None] * 256)  # type: ignore[list-item]


def test_a_span_of_a_large_selection_takes_no_memory_for_the_rest(tmp_path: Path, record: ShardRecord) -> None:
    ledger = Ledger([select(tmp_path / "one", {record.prefix: np.array([1])})])
    np.save(tmp_path / "one" / f"{record.name}.npy", np.arange(1 << 20, dtype=np.int32))
    tracemalloc.start()
    assert ledger.uses(record, 5, 9).tolist() == [1] * 4
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 17, "bytes; the ids are four million"


@settings(max_examples=40, deadline=None)
@given(cuts=st.sets(st.integers(1, SIZE - 1)), temperature=st.sampled_from([0.0, 0.7]))
def test_candidates_do_not_depend_on_the_spans_they_are_read_in(
    record: ShardRecord, ledger: Ledger, cuts: set[int], temperature: float
) -> None:
    slicing = Slicing(seed=1, num_slices=2, records=[record], held_out=10)
    values = np.random.default_rng(0).standard_normal(SIZE, dtype=np.float32)

    def wanted(span: tuple[int, int]) -> np.ndarray:
        return slicing.ids(record, 1, span)

    candidates = ShardCandidates(record, wanted, lambda ids: values[ids], Filters(3, 15), ledger, temperature, seed=5)
    whole = candidates.read(0, SIZE)
    lengths = Shard(record.prefix).sequence_lengths
    expected = [i for i in slicing.ids(record, 1) if 3 <= lengths[i] <= 15]
    assert whole.ids.tolist() == expected
    assert whole.lengths.tolist() == lengths[expected].tolist()
    assert (whole.scores == values[expected]).all() == (temperature == 0)
    borders = [0, *sorted(cuts), SIZE]
    parts = [candidates.read(start, stop) for start, stop in pairwise(borders)]
    for name in Chunk.__dataclass_fields__:
        np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))


def test_a_shared_slice_is_all_that_is_not_held_out(record: ShardRecord) -> None:
    shared = Slicing(seed=1, num_slices=3, records=[record], held_out=10, is_shared=True)
    apart = Slicing(seed=1, num_slices=3, records=[record], held_out=10)
    everything = np.sort(np.concatenate([apart.ids(record, number) for number in range(3)]))
    assert shared.ids(record, 1).tolist() == shared.ids(record, 2).tolist() == everything.tolist()
    for number in (-1, 0):
        assert shared.ids(record, number).tolist() == apart.ids(record, number).tolist()
