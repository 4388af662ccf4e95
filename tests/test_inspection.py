"""What a run says of single sequences and of its selections, against what Megatron's training loop really read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bliss.artifacts import RunPaths
from megatron_bliss.config import RunConfig
from megatron_bliss.data.selection import Selection
from megatron_bliss.data.shards import Shard
from megatron_bliss.data.slices import Slicing
from megatron_bliss.errors import UserError
from megatron_bliss.inspection import explain as explaining
from megatron_bliss.inspection.rounds import Run
from tests import launch
from tests.numbered_run import BATCH, ROUNDS, STEPS, numbered_run

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
    assert "its score is below the threshold" in whys
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
    return {key: rounds[0][key] for key in ("score", "rank", "of", "percentile")}


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
