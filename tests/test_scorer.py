"""The score stage and tools/score_shards.py with real models: layouts, precision, several jobs, what is refused."""

import random
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bliss.artifacts import RunPaths, read_json
from megatron_bliss.data.scores import SCHEMA
from megatron_bliss.stages import inventory
from tests import launch
from tests.distributed import run_ranks
from tests.scoring_ranks import files_of, one_rank, save_checkpoint, two_ranks
from tests.side_models import new_run
from tests.tiny_run import tiny_config

CLI = "megatron_bliss.cli"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with an inventory and a score model; some sequences are longer than a window."""
    folder = tmp_path_factory.mktemp("scorer")
    run = new_run(folder, data__sequence_length=10, scoring__batch_tokens=256, scoring__chunk_sequences=40)
    run_ranks(save_checkpoint, 1, run)
    shutil.copytree(run, folder / "two")
    shutil.copytree(run, folder / "jobs")
    refused = shutil.copytree(run, folder / "refused")
    # with shards of its own, which are to be damaged
    config = tiny_config(folder / "damaged", control=False)
    shutil.copy(config, refused / "run.yaml")
    (refused / "inventory.json").unlink()
    inventory.run(refused)
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    return run_ranks(one_rank, 1, folder, timeout=200)[0]


def test_the_last_line_can_be_searched_for(one: dict[str, Any]) -> None:
    [line] = [line for line in one["printed"].splitlines() if line.startswith("[score] done:")]
    found = re.fullmatch(
        r"\[score\] done: (\d+) sequences, (\d+) of them by this job: (\d+) tokens, \d+ tokens/s, padding (\d+\.\d) %",
        line,
    )
    assert found
    num_scored = sum(int(np.isfinite(scores).sum()) for scores in one["scores"].values())
    assert int(found[1]) == int(found[2]) == num_scored
    assert 16 * num_scored < int(found[3]) < 32 * num_scored
    assert 0 < float(found[4]) < 20
    assert one["again"].splitlines() == [f"[score] done: {num_scored} sequences, all scored before"]
    assert not one["threads"]


def test_data_parallel_ranks_change_no_byte(folder: Path, one: dict[str, Any]) -> None:
    for files in run_ranks(two_ranks, 2, folder, timeout=200):
        assert files == one["files"]


def test_bf16_scores_are_close(one: dict[str, Any]) -> None:
    for shard, scores in one["scores"].items():
        scored = np.isfinite(scores)
        np.testing.assert_array_equal(np.isfinite(one["bf16"][shard]), scored)
        error, spread = np.abs(one["bf16"][shard] - scores)[scored], np.std(scores[scored])
        assert 0 < error.max() < 0.1 * spread
        assert error.mean() < 0.02 * spread


def test_the_manifest_is_whole(folder: Path, one: dict[str, Any]) -> None:
    manifest = read_json(RunPaths(folder / "run").scores(1) / "manifest.json", SCHEMA)
    assert manifest["tokenizer"] == {"type": "NullTokenizer", "model_sha256": None, "vocab_size": 256}
    assert manifest["bf16"] is True
    assert manifest["sequence_length"] == 10
    assert set(one["files"]) == {"manifest.json", "walk.npy", "noise.npy"}


def test_the_tool_gives_the_same_scores_of_all_sequences(one: dict[str, Any]) -> None:
    for shard, scores in one["scores"].items():
        by_tool, scored = one["tool: scores"][shard], np.isfinite(scores)
        assert np.isfinite(by_tool).all()
        # other sequences share their batches
        np.testing.assert_allclose(by_tool[scored], scores[scored], rtol=0, atol=1e-5)
    assert one["tool: same"]
    assert "1,200 sequences" in one["tool: dry run"]
    assert "30 chunks of at most 40" in one["tool: dry run"]


def test_the_tool_refuses_what_does_not_fit(one: dict[str, Any]) -> None:
    assert re.search(r"given lies in no run; name the run.yaml .* by --settings", one["tool: lost"])
    assert re.search(r"scores holds other scores \(bf16\); give a directory of its own", one["tool: other model"])
    assert "is for other shards than --shards now names; give another --out" in one["tool: other shards"]
    assert re.search(r"has token id \d+, but data.tokenizer.vocab_size is 100", one["tool: vocabulary"])
    assert "'random' scores nothing with a model" in one["tool: random"]
    assert one["tool: kept"]


def test_bad_input_is_refused(one: dict[str, Any]) -> None:
    assert re.search(r"sequence \d+ of shard \S+walk got NaN as its score", one["refused"]["nan"])
    assert one["refused"]["left"] == ""
    assert "walk is not the one this run was started with (its digest changed)" in one["refused"]["changed shard"]
    assert "one of the two was truncated or replaced" in one["refused"]["truncated shard"]
    assert re.search(r"scores holds scores of another model than \S+iter_0000002", one["refused"]["model"])


def test_the_tool_under_torchrun_and_its_exit_codes(folder: Path, one: dict[str, Any], tmp_path: Path) -> None:
    words = ["--shards", folder / "walk.bin", folder / "walk.idx", "--out", tmp_path / "out", "--run", folder / "two"]
    words += ["--round", "1"]
    log = launch.run("tools.score_shards", words, tmp_path / "log", num_ranks=2)
    assert "[score] done: 600 sequences" in log
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "walk.npy"), one["tool: scores"]["walk"])
    (tmp_path / "file").write_text("")
    words[4] = tmp_path / "file" / "out"
    codes = launch.finish(launch.start("tools.score_shards", words, tmp_path / "bad"), 180)
    assert codes == [2]
    assert re.search(r"error: .*file/out cannot be written", (tmp_path / "bad.0").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_jobs_leave_the_same_bytes_to_any_number_of_others(
    folder: Path, one: dict[str, Any], tmp_path: Path, seed: int
) -> None:
    """Jobs of the real stage, one of them of two ranks, killed at random moments."""
    run, draws = shutil.copytree(folder / "jobs", tmp_path / "run"), random.Random(seed)
    words, scores = ["score", "--run", run, "--round", "1"], RunPaths(run).scores(1)

    def start(num_jobs: int, attempt: int) -> list[Any]:
        return [launch.start(CLI, words, tmp_path / f"log{attempt}-{job}", 1 + job % 2) for job in range(num_jobs)]

    killed_at_work = 0
    for attempt in range(3):
        jobs = start(draws.randint(1, 2), attempt)
        deadline, begun = time.monotonic() + 60, len(list(scores.rglob("*.done")))
        while len(list(scores.rglob("*.done"))) == begun and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(draws.random() * 0.05)
        for process in [process for job in jobs for process in job]:
            process.kill()
            process.join()
        killed_at_work += not (scores / "manifest.json").exists()
    assert killed_at_work
    for job in start(2, 3):
        assert set(launch.finish(job, 120)) == {0}
    assert files_of(scores) == one["files"]
