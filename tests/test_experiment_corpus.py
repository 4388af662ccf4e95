"""`prepare`: anybody's jsonl becomes shards, without near-duplicates across the splits, and only once."""

from pathlib import Path

import pytest

from megatron_bliss.data.experiment_corpus import Prepared, prepare
from megatron_bliss.data.shards import Shard
from megatron_bliss.data.tokenizers import load_tokenizer
from megatron_bliss.errors import UserError
from tests.small_text import documents, write_jsonl


def make_inputs(folder: Path) -> tuple[Path, Path, Path]:
    """A pool whose domains have awkward names, with parts of the held-out sets hidden in it."""
    held_out = documents(40, seed=7)
    pool = folder / "pool"
    write_jsonl(pool / "a b.c.jsonl", documents(40, seed=1) + held_out[:5])
    write_jsonl(pool / "validation.jsonl", documents(40, seed=2))
    write_jsonl(pool / "all-leaked.jsonl", held_out[20:25])
    return pool, write_jsonl(folder / "val.jsonl", held_out[:22]), write_jsonl(folder / "test.jsonl", held_out[20:])


def run(folder: Path, **changes: int) -> Prepared:
    settings = {"vocab_size": 340, "cut": 32, "seed": 1} | changes
    return prepare(folder / "pool", folder / "val.jsonl", folder / "test.jsonl", folder / "out", **settings)


def texts(prepared: Prepared, prefix: str) -> list[str]:
    shard, tokenizer = Shard(prefix), load_tokenizer(prepared.tokenizer)
    ids = [i for sequence in range(len(shard)) for i in shard[sequence].tolist()]
    ends = [position for position, i in enumerate(ids) if i == tokenizer.eod]
    return [tokenizer.decode(ids[first:last]) for first, last in zip([0, *(e + 1 for e in ends)], ends, strict=False)]


def test_leaks_are_dropped_and_names_are_free(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_inputs(tmp_path)
    prepared = run(tmp_path)
    held_out = documents(40, seed=7)
    assert set(prepared.pool) == {"a b.c", "validation"}
    assert sorted(texts(prepared, prepared.pool["a b.c"])) == sorted(documents(40, seed=1))
    assert sorted(texts(prepared, prepared.pool["validation"])) == sorted(documents(40, seed=2))
    assert texts(prepared, prepared.test) == held_out[20:]
    assert texts(prepared, prepared.validation) == held_out[:20]
    said = capsys.readouterr().out
    assert "domain all-leaked is left out" in said
    assert "a b.c.jsonl: 40 documents, 5 near-duplicates dropped" in said


def test_the_order_is_drawn_from_the_seed(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    orders = []
    for seed in (1, 2, 1):
        prepared = run(tmp_path, seed=seed)
        orders.append(texts(prepared, prepared.pool["a b.c"]))
    assert orders[0] != documents(40, seed=1)
    assert orders[0] != orders[1]
    assert orders[0] == orders[2]


def test_what_is_done_is_kept_and_what_is_damaged_is_made_again(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    prepared = run(tmp_path)
    files = sorted(path for path in (tmp_path / "out").rglob("*") if path.suffix in (".bin", ".idx", ".model"))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    assert run(tmp_path) == prepared
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files} == before
    damaged = Path(f"{prepared.pool['validation']}.bin")
    damaged.write_bytes(damaged.read_bytes()[:-2] + b"\x09\x00")
    run(tmp_path)
    written = [path for path in files if path.stat().st_mtime_ns != before[path][0] and path.suffix != ".model"]
    assert written == [damaged, damaged.with_suffix(".idx")]
    assert {path: path.read_bytes() for path in files} == {path: content for path, (_, content) in before.items()}
    write_jsonl(tmp_path / "pool" / "new.jsonl", documents(10, seed=8))
    assert "new" in run(tmp_path).pool


def test_bad_inputs_are_named(tmp_path: Path) -> None:
    pool, validation, test = make_inputs(tmp_path)
    settings = {"vocab_size": 340, "cut": 32, "seed": 1}
    with pytest.raises(UserError, match=r"none\.jsonl does not exist"):
        prepare(pool, tmp_path / "none.jsonl", test, tmp_path / "out", **settings)
    with pytest.raises(UserError, match="must be different"):
        prepare(pool, test, test, tmp_path / "out", **settings)
    with pytest.raises(UserError, match=r"no \.jsonl files"):
        prepare(tmp_path / "out", validation, test, tmp_path / "out", **settings)
    copy = write_jsonl(tmp_path / "copy.jsonl", documents(40, seed=7)[20:])
    with pytest.raises(UserError, match=r"copy\.jsonl has no text that is not in the test set"):
        prepare(pool, copy, test, tmp_path / "out", **settings)
    write_jsonl(tmp_path / "leak" / "a.jsonl", documents(40, seed=7)[20:])
    with pytest.raises(UserError, match="pool has no documents"):
        prepare(tmp_path / "leak", validation, test, tmp_path / "out", **settings)
