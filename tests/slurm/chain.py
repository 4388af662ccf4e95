"""A run that is submitted to a test bed, with real stages or with such that only count (fake_stage.py)."""

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from megatron_bliss.config import FidelityConfig, JobConfig, LaunchConfig, RunConfig, SlurmConfig, save_config
from megatron_bliss.orchestration.logs import last_reading, tail
from megatron_bliss.orchestration.plan import plan
from tests.fake_run import fake_config
from tests.slurm.bed import Cluster

FAKE_PYTHON = {"PYTHON": str(Path(__file__).with_name("fake_python")), "REAL_PYTHON": sys.executable}


def small_jobs(**changes: Any) -> LaunchConfig:
    """Two scoring jobs, pretraining on two nodes, all else on one; a process a node."""
    jobs = {kind: JobConfig(nodes=[1], gpus=1, time="30") for kind in ("side", "score", "pretrain", "evaluate")}
    jobs["pretrain"].nodes = [2]
    jobs["score"].tasks = 2
    jobs["cpu"] = JobConfig(cpus=1, time="30")
    return LaunchConfig(threads=1, slurm=SlurmConfig(is_shared=True, **jobs | changes))


def ranks_of_task(bed: Cluster, task: int) -> list[psutil.Process]:
    """Of an array that runs."""
    found = []
    wanted = {"SLURM_CONF": bed.environment["SLURM_CONF"], "SLURM_ARRAY_TASK_ID": str(task)}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            variables = process.environ()
            if "LOCAL_RANK" in variables and wanted.items() <= variables.items():
                found.append(process)
    return found


class Chain:
    """:param folder: for the settings and the run's directory.
    :param variables: of the environment that it is submitted in, and so of its jobs.
    """

    def __init__(self, bed: Cluster, folder: Path, config: RunConfig, **variables: str) -> None:
        self.bed, self.run_dir, self.config, self.variables = bed, folder / "run", folder / "config.yaml", variables
        self.run_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, self.config)
        self.plan = {stage.name: stage for stage in plan(config, self.run_dir)}

    @classmethod
    def fake(cls, bed: Cluster, folder: Path, rounds: int = 1, **behaviour: object) -> "Chain":
        """With stages that only count, one process each, as `behaviour` says."""
        launch = small_jobs(pretrain=JobConfig(nodes=[1], gpus=1, time="30"))
        without = FidelityConfig(sequences=0)  # a chain without branches
        config = fake_config(rounds=rounds, controls=[], launch=launch, fidelity=without)
        chain = cls(bed, folder, config, **FAKE_PYTHON)
        (chain.run_dir / "behaviour.json").write_text(json.dumps(behaviour))
        return chain

    def cli(self, *words: object, code: int = 0, **variables: str) -> str:
        done = self.bed.call(sys.executable, "-m", "megatron_bliss.cli", *map(str, words), **self.variables | variables)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, *words: str, code: int = 0, **variables: str) -> str:
        return self.cli("submit", self.config, "--run", self.run_dir, *words, code=code, **variables)

    def records(self) -> dict[str, dict[str, Any]]:
        path = self.run_dir / "state.json"
        return json.loads(path.read_text())["stages"] if path.exists() else {}

    def is_done(self) -> bool:
        records = self.records()
        return all(records.get(name, {}).get("status") == "done" for name in self.plan)

    def jobs(self, *states: str) -> dict[str, list[str]]:
        """Numbers of its jobs, by stage: of those that wait or run, or in some states."""
        asked = [f"--states={','.join(states)}"] if states else []
        found: dict[str, list[str]] = {}
        for line in self.bed.call("squeue", "--noheader", "--array", "--format=%i|%k", *asked).stdout.splitlines():
            number, _, comment = line.partition("|")
            if f":{self.run_dir}:" in comment:
                found.setdefault(comment.rpartition(":")[2], []).append(number)
        return found

    def progress(self, stage: str) -> int:
        """How far a stage's log says that it is."""
        record = self.records().get(stage, {})
        if not record.get("log"):
            return 0
        reading = last_reading(tail(self.run_dir / record["log"]), self.plan[stage].iterations)
        return reading.done if reading else 0

    def wait(self, seconds: float = 3600) -> None:
        """Until none of its jobs waits or runs."""
        self.wait_for(lambda: not self.jobs(), seconds)

    def wait_for(self, holds: Callable[[], object], seconds: float = 3600, poll: float = 0.2) -> None:
        end = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > end:
                raise AssertionError(self.bed.call("squeue").stdout + json.dumps(self.records(), indent=1))
            time.sleep(poll)

    def attempts(self, stage: str) -> int:
        """Of a counting stage."""
        return len(list((self.run_dir / "fake" / stage).glob("attempt-*")))
