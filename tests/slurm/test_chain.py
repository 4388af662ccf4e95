"""A run as a chain of jobs on a real Slurm, with stages that only count: what is submitted, kept, replaced, tried
again, given up, and what `status` says of it."""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.bed import Cluster, slurm
from tests.slurm.chain import Chain

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def bed() -> Iterator[Cluster]:
    with slurm() as cluster:
        yield cluster


@pytest.fixture
def nodes_closed(bed: Cluster) -> Iterator[None]:
    """No job starts."""
    bed.call("scontrol", "update", "nodename=n1,n2", "state=drain", "reason=test")
    yield
    bed.call("scontrol", "update", "nodename=n1,n2", "state=resume")


@pytest.mark.usefixtures("nodes_closed")
def test_resubmitting_keeps_what_waits_and_replaces_what_is_gone(bed: Cluster, tmp_path: Path) -> None:
    chain = Chain.fake(bed, tmp_path)
    assert "12 jobs submitted, 0 left as they are, 0 stages done" in chain.submit()
    first = chain.jobs()
    assert len(first) == 12
    assert len(first["round-0001/score"]) == 2
    assert "0 jobs submitted, 12 left as they are" in chain.submit()
    bed.call("scancel", *first["round-0001/select"])  # Slurm ends what can then never start
    chain.wait_for(lambda: len(chain.jobs()) == 7)
    assert "5 jobs submitted, 7 left as they are" in chain.submit()
    again = chain.jobs()
    assert {name for name in first if again[name] != first[name]} == {
        "round-0001/select", "round-0001/prepare", "round-0001/pretrain", "round-0001/evaluate", "report",
    }  # fmt: skip
    # a larger array is topped up, and what depends on it waits for both parts
    assert "6 jobs submitted, 6 left as they are" in chain.submit("launch.slurm.score.tasks=5")
    assert len(chain.jobs()["round-0001/score"]) == 5
    select = bed.call("scontrol", "show", "job", *chain.jobs()["round-0001/select"]).stdout
    assert len(re.findall(r"afterany:\d+", select)) == 2
    assert "left as they are" in chain.submit("launch.slurm.score.tasks=1")
    assert len(chain.jobs()["round-0001/score"]) == 1
    assert "12 queued" in chain.cli("status", chain.run_dir)
    assert "has jobs in Slurm's queue" in chain.cli("run", chain.config, "--run", chain.run_dir, code=2)
    squeue = tmp_path / "squeue"
    squeue.write_text(
        f"#!/bin/sh\n{shutil.which('squeue')} \"$@\" | sed 's/|PENDING|[^|]*|/|PENDING|launch failed requeued held|/'\n"
    )
    squeue.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert re.search(r"inventory +stuck +job \d+ is held", chain.cli("status", chain.run_dir, PATH=path))
    assert f"released {chain.jobs()['inventory'][0]} (inventory)" in chain.submit(PATH=path)
    chain.cli("cancel", chain.run_dir)
    assert not chain.jobs()
    assert "none of the run's jobs is left" in chain.cli("status", chain.run_dir)
    squeue.write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
    silent = bed.call(sys.executable, "-m", "megatron_bliss.cli", "status", chain.run_dir, PATH=path)
    assert silent.returncode == 0, "the files say enough"
    assert "is missing above: squeue failed: Unable to contact slurm controller" in silent.stdout


def test_a_chain_comes_to_its_end_over_stops_failures_and_requeues(bed: Cluster, tmp_path: Path) -> None:
    chain = Chain.fake(
        bed, tmp_path, codes={"warmup-proxy": [1], "round-0001/bilevel": [3]}, steps={"pretrain": 30},
        seconds={"pretrain": 0.1},
    )  # fmt: skip
    chain.submit()
    chain.wait_for(lambda: chain.attempts("round-0001/pretrain"))
    (number,) = chain.jobs()["round-0001/pretrain"]
    bed.call("scancel", "--batch", "--signal=USR2", number)  # as at the time limit, or when the job is pre-empted
    chain.wait_for(lambda: chain.attempts("round-0001/pretrain") == 2)
    assert chain.jobs()["round-0001/pretrain"] == [number], "the same job goes on"
    chain.wait()
    records = chain.records()
    assert chain.is_done(), records
    assert records["warmup-proxy"]["attempts"] == records["round-0001/bilevel"]["attempts"] == 2
    log = (chain.run_dir / str(records["round-0001/pretrain"]["log"])).read_text()
    steps = [int(found) for found in re.findall(r"\[pretrain\] (\d+)/10030", log)]  # after the warm-up's 10,000
    assert steps == list(range(10_001, 10_031)), "it goes on where it stopped, in one log"
    assert "0 jobs submitted, 0 left as they are, 12 stages done" in chain.submit()
    again = bed.call(
        "launch/submit.sh",
        "prepare",
        chain.run_dir,
        "1",
        "--wait",
        f"--output={tmp_path}/by-hand.log",
        **chain.variables,
    )  # by hand
    assert again.returncode == 0, again.stderr
    assert chain.attempts("round-0001/prepare") == 1, "there was nothing to do"


@pytest.mark.slow
def test_a_chain_without_progress_ends_with_the_reason(bed: Cluster, tmp_path: Path) -> None:
    chain = Chain.fake(bed, tmp_path, codes={"round-0001/bilevel": [1] * 9})
    chain.submit()
    chain.wait()
    assert chain.attempts("round-0001/bilevel") == 3
    shown = chain.cli("status", chain.run_dir)
    assert "3 attempts in a row came to nothing; of the last: it failed with exit code 1" in shown
    assert re.search(r"round-0001/bilevel failed; its log is \S+/logs/slurm/round-0001.bilevel-\d+.log", shown)
    assert "none of the run's jobs is left in Slurm's queue" in shown
    (chain.run_dir / "behaviour.json").write_text("{}")
    chain.submit()
    chain.wait()
    assert chain.is_done()


def test_bad_input_is_not_tried_again(bed: Cluster, tmp_path: Path) -> None:
    chain = Chain.fake(bed, tmp_path, codes={"inventory": [2] * 9})
    chain.submit()
    chain.wait()
    assert chain.attempts("inventory") == 1
    assert "data.pool is of cheese; make it of text" in chain.cli("status", chain.run_dir)


@pytest.mark.slow
def test_a_stage_that_hangs_is_ended_and_tried_again(bed: Cluster, tmp_path: Path) -> None:
    chain = Chain.fake(bed, tmp_path, hangs=["round-0001/select"])
    chain.submit("launch.hang_minutes=1")
    chain.wait()
    assert chain.is_done()
    assert chain.records()["round-0001/select"]["attempts"] == 2
    log = (chain.run_dir / chain.records()["round-0001/select"]["log"]).read_text()
    assert "gave no sign of life for 1 minutes" in log


@pytest.mark.slow
def test_a_stage_that_does_not_stop_when_asked_is_put_back_all_the_same(bed: Cluster, tmp_path: Path) -> None:
    chain = Chain.fake(bed, tmp_path, deaf=["round-0001/pretrain"], steps={"pretrain": 60}, seconds={"pretrain": 1})
    chain.submit("launch.slurm.stop_margin=8")
    chain.wait_for(lambda: chain.progress("round-0001/pretrain") > 2)
    chain.bed.call("scancel", "--batch", "--signal=USR2", *chain.jobs()["round-0001/pretrain"])
    chain.wait()
    assert chain.is_done()
    assert chain.records()["round-0001/pretrain"]["attempts"] == 2


@pytest.mark.slow
def test_with_overlap_a_round_takes_as_long_as_the_longer_of_selection_and_training(
    bed: Cluster, tmp_path: Path
) -> None:
    training, selection = 300, (100, 60)  # seconds; of bilevel and score
    lengths = {"pretrain": training, "bilevel": selection[0], "score": selection[1]}
    chain = Chain.fake(bed, tmp_path, rounds=2, steps=lengths, seconds=dict.fromkeys(lengths, 1))
    chain.submit("launch.mode=overlap")
    chain.wait(1800)
    assert chain.is_done()
    first, second = (chain.records()[f"round-{number:04d}/pretrain"]["finished"] for number in (1, 2))
    assert second - first == pytest.approx(max(training, sum(selection)), rel=0.1)
    print(f"{second - first:.0f} s a round; {training} s of training, {sum(selection)} s of selection")
