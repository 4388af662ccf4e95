"""A run as a chain of jobs on a real Slurm, with stages that only count: what is submitted, kept, replaced, tried
again, given up, and what `status` says of it."""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_bliss.config import JobConfig, LaunchConfig, SlurmConfig, save_config
from tests.fake_run import fake_config
from tests.slurm.bed import Cluster, slurm

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def bed() -> Iterator[Cluster]:
    with slurm(REQUEUE=1) as cluster:
        cluster.environment |= {
            "PYTHON": str(Path(__file__).with_name("fake_python")),
            "REAL_PYTHON": sys.executable,
        }
        yield cluster


class Chain:
    """A run that is submitted to a cluster."""

    def __init__(self, bed: Cluster, folder: Path, rounds: int = 1, **behaviour: object) -> None:
        self.bed, self.run_dir, self.config = bed, folder / "run", folder / "config.yaml"
        jobs = {kind: JobConfig(nodes=[1], gpus=1, time="10") for kind in ("side", "score", "pretrain", "evaluate")}
        jobs["score"].tasks = 2
        config = fake_config(
            rounds=rounds, controls=[], launch=LaunchConfig(slurm=SlurmConfig(is_shared=True, max_attempts=3, **jobs))
        )
        save_config(config, self.config)
        self.run_dir.mkdir()
        (self.run_dir / "behaviour.json").write_text(json.dumps(behaviour))

    def cli(self, *words: object, code: int = 0) -> str:
        done = self.bed.call(sys.executable, "-m", "megatron_bliss.cli", *map(str, words))
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, *words: str, code: int = 0) -> str:
        return self.cli("submit", self.config, "--run", self.run_dir, *words, code=code)

    def records(self) -> dict[str, dict[str, object]]:
        path = self.run_dir / "state.json"
        return json.loads(path.read_text())["stages"] if path.exists() else {}

    def jobs(self) -> dict[str, list[str]]:
        """Numbers of the jobs that are alive, by stage."""
        found: dict[str, list[str]] = {}
        for line in self.bed.call("squeue", "--noheader", "--array", "--format=%i|%k").stdout.splitlines():
            number, comment = line.split("|")
            if f":{self.run_dir}:" in comment:
                found.setdefault(comment.rpartition(":")[2], []).append(number)
        return found

    def wait(self, seconds: float = 400) -> None:
        """Until none of its jobs is left."""
        self.wait_for(lambda: not self.jobs(), seconds)

    def wait_for(self, holds: Callable[[], object], seconds: float = 400) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, self.bed.call("squeue").stdout + str(self.records())
            time.sleep(0.2)

    def attempts(self, stage: str) -> int:
        return len(list((self.run_dir / "fake" / stage).glob("attempt-*")))


@pytest.fixture
def nodes_closed(bed: Cluster) -> Iterator[None]:
    """No job starts."""
    bed.call("scontrol", "update", "nodename=n1,n2", "state=drain", "reason=test")
    yield
    bed.call("scontrol", "update", "nodename=n1,n2", "state=resume")


@pytest.mark.usefixtures("nodes_closed")
def test_resubmitting_keeps_what_waits_and_replaces_what_is_gone(bed: Cluster, tmp_path: Path) -> None:
    chain = Chain(bed, tmp_path)
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
    shown = chain.cli("status", chain.run_dir)
    assert "12 queued" in shown
    chain.cli("cancel", chain.run_dir)
    assert not chain.jobs()
    assert "none of the run's jobs is left" in chain.cli("status", chain.run_dir)


def test_a_chain_comes_to_its_end_over_stops_failures_and_requeues(bed: Cluster, tmp_path: Path) -> None:
    chain = Chain(
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
    assert {record["status"] for record in records.values()} == {"done"}, records
    assert records["warmup-proxy"]["attempts"] == records["round-0001/bilevel"]["attempts"] == 2
    log = (chain.run_dir / str(records["round-0001/pretrain"]["log"])).read_text()
    steps = [int(found) for found in re.findall(r"\[pretrain\] (\d+)/30", log)]
    assert steps == list(range(1, 31)), "it goes on where it stopped, in one log"
    assert "0 jobs submitted, 0 left as they are, 12 stages done" in chain.submit()


def test_a_chain_without_progress_ends_with_the_reason(bed: Cluster, tmp_path: Path) -> None:
    chain = Chain(bed, tmp_path, codes={"round-0001/bilevel": [1] * 9})
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
    assert {record["status"] for record in chain.records().values()} == {"done"}


def test_bad_input_is_not_tried_again(bed: Cluster, tmp_path: Path) -> None:
    chain = Chain(bed, tmp_path, codes={"inventory": [2] * 9})
    chain.submit()
    chain.wait()
    assert chain.attempts("inventory") == 1
    assert "data.pool is of cheese; make it of text" in chain.cli("status", chain.run_dir)
