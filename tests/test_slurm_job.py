"""What a job notes before and after its stage, and whether it is to try again; Slurm itself is not needed."""

from pathlib import Path

import pytest

from megatron_bliss.config import save_config
from megatron_bliss.errors import StageError, UserError
from megatron_bliss.orchestration import slurm_job, slurm_queue, state
from megatron_bliss.orchestration.plan import Stage, plan
from megatron_bliss.orchestration.slurm_queue import Job
from tests.fake_run import fake_config

MOST = 3


class Run:
    """A run of which a stage's needs are done."""

    def __init__(self, root: Path, name: str) -> None:
        config = fake_config(rounds=1)
        self.root, self.log = root, root / "a.log"
        save_config(config, root / "run.yaml")
        self.stages = {stage.name: stage for stage in plan(config, root)}
        self.stage = self.stages[name]
        self.words = list(self.stage.command)
        for need in self.stage.needs:
            self.do(self.stages[need])

    def do(self, stage: Stage) -> None:
        for output in stage.outputs:
            path = output if output.suffix else output / "manifest.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("done")
        state.begin(self.root, stage, 1, self.log, 0, state.digests(self.root, stage.inputs))
        state.finish(self.root, stage)

    def begin(self, **environment: str) -> str:
        return slurm_job.begin(self.words, self.log, MOST, {"SLURM_JOB_ID": "7"} | environment)

    def end(self, code: int, **environment: str) -> str:
        return slurm_job.end(self.words, code, self.log, MOST, {"SLURM_JOB_ID": "7"} | environment)

    def say(self, line: str) -> None:
        with open(self.log, "a") as stream:
            stream.write(line + "\n")

    @property
    def record(self) -> state.Record:
        return state.read_state(self.root)[self.stage.name]


@pytest.fixture
def bilevel(tmp_path: Path) -> Run:
    return Run(tmp_path, "round-0001/bilevel")


def test_a_stage_is_begun_ended_and_not_done_twice(bilevel: Run) -> None:
    assert bilevel.begin() == "go"
    assert (bilevel.record.status, bilevel.record.job, bilevel.record.log) == ("running", "7", "a.log")
    assert bilevel.end(0) == "requeue", "it wrote nothing"
    assert "ended without" in bilevel.record.note
    assert bilevel.begin() == "go"
    bilevel.do(bilevel.stage)
    assert bilevel.end(0) == "done"
    assert bilevel.begin() == "done"


def test_attempts_that_come_further_may_go_on_for_ever(bilevel: Run) -> None:
    for steps in range(1, MOST + 2):
        assert bilevel.begin() == "go"
        bilevel.say(f"[bilevel] {steps}/3000 steps")
        assert bilevel.end(3) == "requeue"
    assert (bilevel.record.furthest, bilevel.record.fruitless) == (steps, 0)


def test_attempts_that_come_no_further_end_with_the_reason(bilevel: Run) -> None:
    verdicts = []
    for steps in (40, 40, 12, 40):
        bilevel.begin()
        bilevel.say(f"[bilevel] {steps}/3000 steps\nout of memory")
        verdicts.append(bilevel.end(1))
    assert verdicts == ["requeue", "requeue", "requeue", "fail"]
    assert bilevel.record.status == "failed"
    assert bilevel.record.error.splitlines()[-2:] == [
        "out of memory",
        "3 attempts in a row came no further than 40; of the last: it failed with exit code 1",
    ]


def test_attempts_that_were_killed_without_a_word_count_too(bilevel: Run) -> None:
    for _ in range(MOST):
        assert bilevel.begin() == "go"
    with pytest.raises(StageError, match="3 attempts in a row came to nothing; of the last: it was killed"):
        bilevel.begin()


def test_bad_input_is_not_tried_again(bilevel: Run) -> None:
    bilevel.begin()
    bilevel.say("error: data.pool is of cheese; make it of text")
    assert bilevel.end(2) == "fail"
    assert bilevel.record.error == "error: data.pool is of cheese; make it of text"


def test_a_stage_whose_need_is_not_done_does_not_start(tmp_path: Path) -> None:
    run = Run(tmp_path, "round-0001/bilevel")
    state.fail(tmp_path, run.stages["warmup-proxy"], "no memory")
    with pytest.raises(StageError, match=r"cannot start: warmup-proxy is not done \(failed\); its log is .*a.log"):
        run.begin()


def test_another_job_at_the_same_stage_is_not_joined(bilevel: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    bilevel.begin()
    alive = Job("7", "RUNNING", "None", "n1", bilevel.stage.name)
    monkeypatch.setattr(slurm_queue, "jobs", lambda run_dir: [alive])
    with pytest.raises(StageError, match="job 7 is at it"):
        bilevel.begin(SLURM_JOB_ID="8")


def test_a_dead_task_fails_the_stage_only_if_it_was_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, "round-0001/score")
    task = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "0"}
    others = [Job("5_0", "RUNNING", "", "n1", run.stage.name), Job("5_1", "PENDING", "", "", run.stage.name)]
    monkeypatch.setattr(slurm_queue, "jobs", lambda run_dir: others)
    assert run.begin(**task) == "go"
    assert run.end(1, **task) == "requeue"
    assert run.end(1, SLURM_RESTART_COUNT="2", **task) == "fail"
    assert run.record.status == "running"
    others.pop()
    assert run.end(1, SLURM_RESTART_COUNT="2", **task) == "fail"
    assert run.record.status == "failed"


def test_the_task_that_ends_an_array_needs_no_command_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container there may be none: tasks that still wait stay in the queue then, and find all done."""
    run = Run(tmp_path, "round-0001/score")
    task = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "0"}
    assert run.begin(**task) == "go"
    for output in run.stage.outputs:
        output.mkdir(parents=True)
        (output / "manifest.json").write_text("done")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run.end(0, **task) == "done"
    assert run.record.status == "done"


def test_scores_that_are_there_count_whatever_became_of_the_last_task(tmp_path: Path) -> None:
    run = Run(tmp_path, "round-0001/select")
    state.begin(tmp_path, run.stages["round-0001/score"], 1, run.log, 0, {})  # a task that came late, and was killed
    assert run.begin() == "go"
    assert state.read_state(tmp_path)["round-0001/score"].status == "done"


def test_words_that_are_no_stage_of_the_run(bilevel: Run) -> None:
    with pytest.raises(UserError, match=r"has no stage `bilevel --run .* --round 9`"):
        slurm_job.find(["bilevel", "--run", str(bilevel.root), "--round", "9"])
    arm = bilevel.root / "controls" / "random"
    root, stage = slurm_job.find(["select", "--run", str(arm), "--round", "1"])
    assert (root, stage.name) == (bilevel.root, "controls/random/round-0001/select")
