"""What a run says of single sequences and of its selections, against what Megatron's training loop really read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from rich.console import Console

from megatron_bliss.artifacts import RunPaths
from megatron_bliss.config import RunConfig
from megatron_bliss.data import parquet
from megatron_bliss.data.scores import ScoreWriter
from megatron_bliss.data.selection import Selection
from megatron_bliss.data.shards import Shard
from megatron_bliss.data.slices import HELD_OUT, Slicing, slice_numbers
from megatron_bliss.errors import UserError
from megatron_bliss.inspection import exchange, tables
from megatron_bliss.inspection import explain as explaining
from megatron_bliss.inspection.overview import overview
from megatron_bliss.inspection.rounds import Run
from megatron_bliss.stages import inventory, select
from tests import launch
from tests.numbered_run import BATCH, ROUNDS, STEPS, numbered_run
from tests.toy_shards import fake_record, write_run

RECORDING_SCRIPT = Path(__file__).parent / "scripts" / "recording_gpt.py"
Trained = tuple[RunPaths, RunConfig, dict[int, set[int]]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run whose first round was prepared; both rounds are trained. And all tokens that each step read."""
    folder = tmp_path_factory.mktemp("inspected")
    paths, config = numbered_run(folder, script=RECORDING_SCRIPT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECORD", str(folder / "record.jsonl"))
        for words in (["prepare", "1"], ["pretrain", "1"], ["pretrain", "2"]):
            command = [words[0], "--run", paths.root, "--round", words[1]]
            launch.run("megatron_bliss.cli", command, paths.root / f"{'-'.join(words)}.log")
            if words == ["prepare", "1"]:
                prepared = times(paths)
                assert prepared
                assert not (folder / "record.jsonl").exists()
        assert times(paths).items() >= prepared.items(), "the training has built anew what was prepared"
    read: dict[int, set[int]] = {}
    lines = (folder / "record.jsonl").read_text().splitlines()
    for record in map(json.loads, lines):
        read.setdefault(record["step"], set()).update(record["tokens"])
    assert len(lines) == ROUNDS * STEPS * BATCH
    return paths, config, read


def times(paths: RunPaths) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in paths.index_cache.iterdir()}


def test_a_prepared_round_builds_no_index_and_another_does(trained: Trained) -> None:
    paths, _, _ = trained
    built = "Build and save the"
    assert built in (paths.root / "prepare-1.log.0").read_text()
    assert built not in (paths.root / "pretrain-1.log.0").read_text()
    assert built in (paths.root / "pretrain-2.log.0").read_text()


def test_steps_are_those_that_read_the_sequence(trained: Trained) -> None:
    """Every sequence of the pool, all steps: by tokens that no other sequence has."""
    paths, _, read = trained
    run, spread = Run(paths.root), []
    for record in run.inventory.pool:
        shard = Shard(record.prefix)
        for sequence_id in range(len(shard)):
            tokens = set(shard[sequence_id].tolist())
            truth = sorted(step for step, found in read.items() if tokens & found)
            facts = explaining.explain(run, f"{record.name}:{sequence_id}")
            told = [step for one in facts["rounds"] for step in one.get("steps") or []]
            assert told == truth, (record.name, sequence_id)
            kept = {one["round"]: one["kept"] for one in facts["rounds"]}
            selected = {n: sequence_id in Selection.open(paths.selection(n)).ids(record.prefix) for n in (1, 2)}
            assert {n for n in (1, 2) if kept.get(n)} == {n for n in (1, 2) if selected[n]}
            assert all(one["steps_done"] == len(one["steps"]) for one in facts["rounds"] if one["kept"])
            spread += [len(told)]
    assert sum(spread) > 80
    assert max(spread) > 1, "some are read in more than one step"


def test_score_and_rank_are_those_of_a_full_sort(trained: Trained) -> None:
    paths, config, _ = trained
    run = Run(paths.root)
    slicing = Slicing.of(config, run.inventory)
    ranked = []
    for record in run.inventory.pool:
        scores = np.load(paths.scores(1) / f"{record.name}.npy")
        ranked += [(-scores[i], record.digest, i, record.name) for i in slicing.ids(record, 1).tolist()]
    ranked.sort()
    kept = []
    for place, (score, _, sequence_id, name) in enumerate(ranked):
        [facts] = explaining.explain(run, f"{name}:{sequence_id}")["rounds"]
        assert (facts["rank"], facts["of"], facts["score"]) == (place + 1, len(ranked), -score)
        kept.append(facts["kept"])
    assert sorted(kept, reverse=True) == kept, "the kept ones have the first ranks"
    assert any(kept)
    assert not all(kept)


def test_explain_says_why_not(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    paths, config, _ = trained
    run = Run(paths.root)
    record, slicing = run.inventory.pool[0], Slicing.of(config, run.inventory)
    held_out = int(slicing.held_out_ids("a")["a"][0])
    facts = explaining.explain(run, f"{record.prefix}:{held_out}")
    assert facts["held_out"]
    assert facts["rounds"] == []
    kept = Selection.open(paths.selection(2)).ids(record.prefix)
    unkept = [i for i in slicing.ids(record, 2).tolist() if i not in kept]
    whys = {explaining.explain(run, f"a:{i}")["rounds"][0]["why"] for i in unkept}
    assert any(why.startswith("its score is below the threshold, ") for why in whys)
    waiting = explaining.explain(run, f"a:{slicing.ids(record, 0)[0]}")["rounds"]
    assert waiting == [{"round": 0, "method": "random", "kept": None, **_drawn(waiting), "why": waiting[0]["why"]}]
    assert waiting[0]["why"] == "nothing is selected for this round yet"
    explaining.show(paths.root, f"a:{unkept[0]}", False)
    shown = capsys.readouterr().out
    assert f"a:{unkept[0]} | a |" in shown
    assert "no" in shown
    assert " ".join(map(str, Shard(record.prefix)[unkept[0]][:5])) in shown
    explaining.show(paths.root, f"a:{unkept[0]}", True)
    assert json.loads(capsys.readouterr().out)["id"] == unkept[0]


def _drawn(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: rounds[0][key] for key in ("score", "compared", "uses", "rank", "of", "percentile")}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("a", "'a' is not SHARD:ID"),
        ("a:-1", "'a:-1' is not SHARD:ID"),
        ("a:120", "a has sequences 0 to 119; there is no 120"),
        ("c:1", "c is not a shard of the pool of .*; it has a, b$"),
    ],
)
def test_a_name_of_no_sequence_is_refused(name: str, sentence: str, trained: Trained) -> None:
    with pytest.raises(UserError, match=sentence):
        explaining.explain(Run(trained[0].root), name)


def test_rounds_on_the_whole_pool_share_their_slice(tmp_path: Path) -> None:
    write_run(tmp_path / "run", {"a": [200]}, ["method=random", "selection.pool=all", "selection.fraction=0.5",
                                               "warmup.fraction=1.0", "warmup.target_steps=0", "rounds=1"])  # fmt: skip
    inventory.run(tmp_path / "run")
    for number in (None, 1):
        select.run(tmp_path / "run", number)
    run = Run(tmp_path / "run")
    [overlap] = overview(run.round(1), 0)["overlap"]
    warmup, kept = (run.round(number).selection.ids(run.inventory.pool[0].prefix) for number in (0, 1))
    assert overlap["shared_sequences"] == len(np.intersect1d(warmup, kept)) > 0
    assert not overlap["disjoint_slices"]
    for number, slice_number, rounds in ((HELD_OUT, None, []), (0, 0, [0, 1]), (1, None, [1])):
        share = run.slicing.held_out_share("a")
        numbers = slice_numbers(run.inventory.pool[0], run.slicing.seed, run.slicing.num_slices, share)
        facts = explaining.explain(run, f"a0:{np.flatnonzero(numbers == number)[0]}")
        assert facts["slice"] == slice_number
        assert facts["in_every_round"] == (1 in rounds)
        assert [each["round"] for each in facts["rounds"]] == rounds


def test_infinite_scores_are_explained_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_run(tmp_path / "run", {"a": [200]}, ["rounds=1"])
    inventory.run(tmp_path / "run")
    run = Run(tmp_path / "run")
    ids = Slicing.of(config, run.inventory).ids_by_name(1)
    writer = ScoreWriter(run.paths.scores(1), run.inventory.pool, ids, method="bliss", model_digest="m", seed=1,
                         chunk_sequences=1000)  # fmt: skip
    [chunk] = list(writer.pending())
    writer.write(chunk, np.full(len(chunk.ids), -np.inf, dtype=np.float32))
    select.run(tmp_path / "run", 1)
    explaining.show(tmp_path / "run", f"a0:{chunk.ids[-1]}", True)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    printed = capsys.readouterr().out
    facts = json.loads(printed[printed.index("{") :], parse_constant=refuse)
    assert "its score is the threshold's" in facts["rounds"][0]["why"]


# --- a whole round


def test_the_overview_is_that_of_a_plain_count(trained: Trained) -> None:
    paths, config, _ = trained
    run = Run(paths.root)
    facts = overview(run.round(1), 2)
    rows = []  # of the candidates: score, kept, domain, length, id
    for record in run.inventory.pool:
        scores, kept = (
            np.load(paths.scores(1) / f"{record.name}.npy"),
            Selection.open(paths.selection(1)).ids(record.prefix),
        )
        lengths = Shard(record.prefix).sequence_lengths
        for i in Slicing.of(config, run.inventory).ids(record, 1).tolist():
            rows.append((float(scores[i]), i in kept, record.domain, int(lengths[i]), i))
    kept_rows = [row for row in rows if row[1]]
    assert facts["sizes"]["pool"]["sequences"] == 240
    for part, of in (("candidates", rows), ("kept", kept_rows)):
        assert facts["sizes"][part] == {"sequences": len(of), "tokens": sum(row[3] for row in of)}
        scores = sorted(row[0] for row in of)
        assert facts["score_quantiles"][part]["0"] == scores[0]
        assert facts["score_quantiles"][part]["0.5"] == scores[round(0.5 * (len(scores) - 1))]
    for domain in facts["domains"]:
        tokens = sum(row[3] for row in kept_rows if row[2] == domain["domain"])
        assert domain["kept_share"] == pytest.approx(tokens / sum(row[3] for row in kept_rows))
    [bucket] = [each for each in facts["lengths"] if each["from"] == 16]
    assert bucket["to"] == 31
    assert bucket["kept_sequences"] == sum(16 <= row[3] <= 31 for row in kept_rows)
    for part in ("pool", "candidates", "kept"):
        assert sum(each[f"{part}_share"] for each in facts["lengths"]) == pytest.approx(1)
        assert sum(each[f"{part}_share"] for each in facts["domains"]) == pytest.approx(1)
    [overlap] = facts["overlap"]
    assert (overlap["round"], overlap["shared_sequences"], overlap["disjoint_slices"]) == (2, 0, True)
    assert 0 < overlap["domain_drift"] < 0.5
    ordered = sorted(rows, reverse=True)
    shown = facts["samples"]
    assert [each["score"] for each in shown["best"]] == [row[0] for row in ordered[:2]]
    assert [each["score"] for each in shown["worst"]] == [row[0] for row in ordered[-2:]]
    assert [each["kept"] for each in shown["middle"]] == [True, True, False, False]
    lowest, highest = min(row[0] for row in kept_rows), max(row[0] for row in rows if not row[1])
    assert (shown["middle"][1]["score"], shown["middle"][2]["score"]) == (lowest, highest)
    first = shown["best"][0]
    assert first["text"] == " ".join(map(str, Shard(run.inventory.pool[first["shard"] == "b"].prefix)[first["id"]]))


def test_inspect_prints_tables_or_json(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    root = trained[0].root
    tables.show(root, None, 1, False)
    shown = capsys.readouterr().out
    for words in (
        "selection of round 2",
        "shares of tokens by domain",
        "0 sequences in common with round 1",
        "not kept",
    ):
        assert words in shown
    tables.show(root, 1, 1, True)
    assert json.loads(capsys.readouterr().out)["round"] == 1
    with pytest.raises(UserError, match="there is no round 3"):
        tables.show(root, 3, 1, False)


# --- tables to and fro


@pytest.fixture
def table(trained: Trained, tmp_path: Path) -> Path:
    exchange.export(trained[0].root, 1, tmp_path / "round.parquet")
    return tmp_path / "round.parquet"


def test_an_exported_round_is_what_was_selected(trained: Trained, table: Path, tmp_path: Path) -> None:
    paths, config, _ = trained
    rows = pyarrow.parquet.read_table(table).to_pylist()
    run = Run(paths.root)
    assert len(rows) == sum(len(ids) for ids in Slicing.of(config, run.inventory).ids_by_name(1).values())
    shards = {record.name: (record, Shard(record.prefix)) for record in run.inventory.pool}
    for row in rows[::7]:
        record, shard = shards[row["shard"]]
        assert row["shard_digest"] == record.digest
        assert row["tokens"] == shard.sequence_lengths[row["id"]]
        assert row["score"] == np.load(paths.scores(1) / f"{record.name}.npy")[row["id"]]
    # and a selection made of it is the same data in another place
    exchange.import_selection(paths.root, table, tmp_path / "selection")
    assert Selection.open(tmp_path / "selection").digest == Selection.open(paths.selection(1)).digest


def test_a_table_of_ids_alone_is_a_selection(trained: Trained, tmp_path: Path) -> None:
    ids = {"a": [5, 3, 119], "b": [0]}
    write_table(tmp_path / "own.parquet", shard=["a", "a", "a", "b"], id=[5, 3, 119, 0])
    exchange.import_selection(trained[0].root, tmp_path / "own.parquet", tmp_path / "selection")
    selection = Selection.open(tmp_path / "selection")
    for shard in selection.shards:
        assert shard.ids.tolist() == sorted(ids[shard.record.name])
    assert sum(weight for weight, _ in selection.blend) == pytest.approx(1)


def write_table(path: Path, **columns: Any) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"shard": ["c"], "id": [1]}, "names shard 'c', which is not in the pool; its shards are a, b"),
        ({"shard": ["a"], "id": [1], "shard_digest": ["0"]}, "made from another shard 'a'"),
        ({"shard": ["a"], "id": [120]}, "has id 120 of shard 'a', which has sequences 0 to 119"),
        ({"shard": ["a"], "id": [-1]}, "has id -1 of shard 'a'"),
        ({"shard": ["a", "b", "a"], "id": [1, 1, 1]}, "has id 1 of shard 'a' twice"),
        ({"shard": ["a"], "id": [1], "kept": [False]}, "keeps no sequence at all"),
        ({"shard": ["a"]}, "has no column 'id'; it has shard"),
        ({"shard": ["a"], "id": [1.5]}, "column 'id' is double; it must hold integers"),
        ({"shard": ["a", None], "id": [1, 2]}, "column 'shard' has rows without a value"),
        ({"shard": ["a"], "id": [1], "kept": ["yes"]}, "column 'kept' is string; it must hold booleans"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(
    columns: dict[str, Any], sentence: str, trained: Trained, tmp_path: Path
) -> None:
    write_table(tmp_path / "own.parquet", **columns)
    with pytest.raises(UserError, match=sentence):
        exchange.import_selection(trained[0].root, tmp_path / "own.parquet", tmp_path / "selection")
    assert not (tmp_path / "selection").exists()


def test_a_column_of_a_table_is_there_once(trained: Trained, tmp_path: Path) -> None:
    names, values = ["shard", "shard", "id"], [["a"], ["a"], [1]]
    pyarrow.parquet.write_table(pyarrow.table(list(map(pyarrow.array, values)), names), tmp_path / "own.parquet")
    with pytest.raises(UserError, match="has more than one column 'shard'"):
        exchange.import_selection(trained[0].root, tmp_path / "own.parquet", tmp_path / "selection")


def test_a_file_that_is_no_table_is_refused(trained: Trained, table: Path, tmp_path: Path) -> None:
    root = trained[0].root
    table.write_bytes(table.read_bytes()[:-20])
    for path, sentence in ((table, "cannot be read as parquet"), (tmp_path / "none.parquet", "does not exist")):
        with pytest.raises(UserError, match=sentence):
            exchange.import_selection(root, path, tmp_path / "selection")
    with pytest.raises(UserError, match="is there already"):
        exchange.import_selection(root, table, tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        exchange.export(root, 1, Path("/proc/none/round.parquet"))
    with pytest.raises(UserError, match=r"warmup/selection/manifest\.json does not exist"):
        exchange.export(root, 0, tmp_path / "x.parquet")


def test_large_tables_are_written_and_read_in_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "ROW_GROUP", 1000)
    record = fake_record(10_000, "big")
    ids = np.arange(10_000, dtype=np.int32)
    parts = [
        parquet.Rows(record, ids[i : i + 1500], ids[:1500], np.float32(ids[i : i + 1500]), ids[i : i + 1500] % 3 == 0)
        for i in range(0, 9000, 1500)
    ]
    parts[0].scores[:] = np.nan
    assert parquet.write_rows(tmp_path / "big.parquet", parts, {}) == 9000
    metadata = pyarrow.parquet.ParquetFile(tmp_path / "big.parquet").metadata
    assert max(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)) <= 1000
    assert metadata.row_group(0).column(2).compression == "ZSTD"
    assert pyarrow.parquet.read_table(tmp_path / "big.parquet")["score"].null_count == 1500
    kept = parquet.read_kept(tmp_path / "big.parquet", [record])["big"]
    assert kept.dtype == np.int32
    assert np.array_equal(kept, np.arange(0, 9000, 3))


def test_sequences_without_a_score_have_none_in_the_quantiles(capsys: pytest.CaptureFixture[str]) -> None:
    lowest = float(np.finfo(np.float32).min)
    Console().print(tables._quantiles({"candidates": {"0": lowest, "0.5": 1.25}}))
    assert capsys.readouterr().out.split()[-3:] == ["candidates", "none", "1.25"]
