"""Overlap mode: a round's selection beside the training of the round before, from a checkpoint that stays the same."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_bliss.artifacts import RunPaths, digest_file, digest_tree, read_json, write_json
from megatron_bliss.config import LaunchConfig, RunConfig, WarmupConfig
from megatron_bliss.errors import UserError
from megatron_bliss.mcore.checkpoint_files import iteration_path, note_passing, write_iteration
from megatron_bliss.orchestration import local
from megatron_bliss.orchestration.check import check
from megatron_bliss.orchestration.plan import plan
from megatron_bliss.stages.sources import pin_target, target_checkpoint, target_iteration
from tests.fake_run import fake_command, fake_config
from tests.tiny_run import megatron_bliss, tiny_config

OVERLAP = LaunchConfig(mode="overlap", concurrency=2)


def ancestors(config: RunConfig, run: Path, name: str) -> set[str]:
    stages, found, left = {stage.name: stage for stage in plan(config, run)}, set[str](), [name]
    while left:
        new = set(stages[left.pop()].needs) - found
        found |= new
        left += new
    return found


def test_a_loop_waits_for_the_training_of_two_rounds_before_and_for_what_it_runs_beside(tmp_path: Path) -> None:
    config = fake_config(rounds=3, launch=OVERLAP)
    before = ancestors(config, tmp_path, "round-0003/bilevel")
    assert {"round-0001/pretrain", "round-0002/prepare", "round-0002/bilevel"} <= before
    assert "round-0002/pretrain" not in before
    assert "warmup-target" in ancestors(config, tmp_path, "round-0002/bilevel")
    assert "round-0001/pretrain" not in ancestors(config, tmp_path, "round-0002/bilevel")
    assert "warmup-target" in ancestors(config, tmp_path, "round-0001/bilevel")  # it has no training to run beside
    assert "round-0002/pretrain" in ancestors(config, tmp_path, "round-0003/pretrain")


def save(directory: Path, *iterations: int) -> None:
    """Checkpoints in name only."""
    for iteration in iterations:
        path = iteration_path(directory, iteration)
        path.mkdir(parents=True)
        (path / "metadata.json").touch()
        write_iteration(directory, iteration)


def test_the_newest_checkpoint_that_stays_is_chosen_once(tmp_path: Path) -> None:
    """Rounds of 6 steps after a warm-up of 6."""
    config = fake_config(rounds=3, launch=OVERLAP, warmup=WarmupConfig(target_steps=6))
    paths = RunPaths(tmp_path)
    pin_target(paths, config, 2)
    assert read_json(paths.pinned_target(2)) == {"schema": 1, "iteration": 6, "staleness": 6}
    assert target_checkpoint(paths, config, 2) == iteration_path(paths.warmup_target, 6)

    save(paths.target, 9, 12, 14)
    note_passing(paths.target, 14)  # it will go
    (iteration_path(paths.target, 15)).mkdir()  # being written
    pin_target(paths, config, 3)
    assert read_json(paths.pinned_target(3)) == {"schema": 1, "iteration": 12, "staleness": 6}
    save(paths.target, 18)
    pin_target(paths, config, 3)
    assert target_iteration(paths, config, 3) == 12
    assert target_checkpoint(paths, config, 3) == iteration_path(paths.target, 12)
    pin_target(paths, config, 2)
    assert target_iteration(paths, config, 2) == 6, "a checkpoint of a later round is none of a call that comes late"

    (tmp_path / "other").mkdir()
    alternate = RunPaths(tmp_path / "other")
    pin_target(alternate, fake_config(), 2)
    assert not alternate.pinned_target(2).exists()


def test_what_overlap_cannot_work_with_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"launch\.concurrency to 2 or more"):
        local.run(fake_config(launch=LaunchConfig(mode="overlap")), tmp_path)
    config = fake_config(launch=OVERLAP)
    config.target.extra_args = ["--save-retain-interval=100"]
    with pytest.raises(UserError, match="--save-retain-interval=100, by which Megatron removes checkpoints"):
        check(config, tmp_path)


@pytest.mark.parametrize(
    "lengths",
    [
        {"pretrain": 4, "bilevel": 2, "score": 1, "select": 0.2},
        pytest.param({"pretrain": 6, "bilevel": 9, "score": 0.5, "select": 0.2}, marks=pytest.mark.slow),
    ],
)
def test_a_round_takes_as_long_as_the_longer_of_selection_and_training(
    tmp_path: Path, lengths: dict[str, float]
) -> None:
    """Within 10 %, from the start of a training to that of the next, beside the time that a machine takes to start one
    more process. One after the other it would be their sum."""
    behaviour = {"journal": str(tmp_path / "journal"), "lengths": lengths}
    local.run(fake_config(rounds=3, controls=[], launch=OVERLAP), tmp_path / "run", command=fake_command(behaviour))
    lines = [line.split() for line in (tmp_path / "journal").read_text().splitlines()]
    times = {(event, name): float(time) for event, name, _, time in lines}
    start = max(
        times["begin", f"round-0001/{later}"] - times["end", f"round-0001/{earlier}"]
        for earlier, later in pairwise(("bilevel", "score", "select", "prepare", "pretrain"))
    )
    for number in (1, 2):
        this, following = f"round-{number:04d}", f"round-{number + 1:04d}"
        training = times["end", f"{this}/pretrain"] - times["begin", f"{this}/pretrain"]
        selection = times["end", f"{following}/prepare"] - times["begin", f"{following}/bilevel"]
        assert training >= lengths["pretrain"]
        assert selection >= sum(lengths.values()) - lengths["pretrain"]
        took = times["begin", f"{following}/pretrain"] - times["begin", f"{this}/pretrain"]
        assert took <= 1.1 * max(selection, training) + 2 * start


@pytest.mark.slow
def test_a_round_that_is_done_again_takes_the_same_checkpoint(tmp_path: Path) -> None:
    settings, run = tiny_config(tmp_path, control=False), tmp_path / "run"
    words = ["run", settings, "--run", run, "launch.mode=overlap"]
    done = megatron_bliss(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    paths = RunPaths(run)
    pin, manifest = read_json(paths.pinned_target(2)), read_json(paths.selection(2) / "manifest.json")
    assert manifest["target"] == {"iteration": pin["iteration"], "staleness": 12 - pin["iteration"]}
    assert pin["iteration"] in (6, 9, 12), "by how far the training of the first round was"
    report = json.loads((run / "report.json").read_text())
    assert [entry["target"]["staleness"] for entry in report["rounds"]] == [0, pin["staleness"]]
    assert f"target of iteration {pin['iteration']}, {pin['staleness']} steps" in megatron_bliss("status", run).stdout
    before = {path.name: digest_file(path) for path in paths.selection(2).glob("*.npy")}

    # called again after the training of the first round, the loop takes what was pinned, whatever is newer
    shutil.rmtree(paths.bilevel(2))
    write_json(paths.pinned_target(2), {"schema": 1, "iteration": 9, "staleness": 3})
    assert megatron_bliss("bilevel", "--run", run, "--round", "2").returncode == 0
    sources = read_json(paths.bilevel(2) / "sources.json")["sources"]
    assert sources["target"] == digest_tree(iteration_path(paths.target, 9))

    write_json(paths.pinned_target(2), pin)
    for directory in (paths.bilevel(2), paths.scores(2), paths.selection(2), paths.evaluation(2)):
        shutil.rmtree(directory)
    again = megatron_bliss(*words)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {path.name: digest_file(path) for path in paths.selection(2).glob("*.npy")} == before
