"""One plan on several machines: who starts what, what happens when one fails or is gone, and the same files."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_bliss.artifacts import read_json
from megatron_bliss.config import LaunchConfig, RunConfig, save_config
from megatron_bliss.errors import UserError
from megatron_bliss.orchestration import state
from megatron_bliss.orchestration.nodes import Nodes, endpoint_of_torchrun
from megatron_bliss.orchestration.plan import plan
from megatron_bliss.orchestration.processes import RUN_VARIABLE
from tests.fake_run import fake_config, journal
from tests.test_run import outcome
from tests.tiny_run import command, megatron_bliss, tiny_config

TWO = fake_config(rounds=1, controls=[], launch=LaunchConfig(nnodes=2, concurrency=2))


def node(rank: int, run: Path, behaviour: dict[str, Any], config: RunConfig = TWO) -> subprocess.Popen[str]:
    settings = run.parent / f"settings-{rank}.yaml"
    save_config(config, settings)
    behaviour = {"journal": str(run.parent / "journal"), "seconds": 0.02} | behaviour
    words = [sys.executable, "-m", "tests.fake_node", str(settings), str(run), json.dumps(behaviour), str(rank)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ends(*processes: subprocess.Popen[str], seconds: float = 120) -> list[tuple[int, str]]:
    texts = [process.communicate(timeout=seconds)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, texts, strict=True)]


def test_both_nodes_have_their_part_of_distributed_stages(tmp_path: Path) -> None:
    run = tmp_path / "run"
    other, first = node(1, run, {}), node(0, run, {})
    for code, text in ends(first, other):
        assert code == 0, text
    begun = [name for event, name, _ in journal(tmp_path / "journal") if event == "begin"]
    stages = plan(TWO, run)
    distributed = {stage.name for stage in stages if stage.num_ranks == 2}
    assert {"warmup-target", "round-0001/score", "round-0001/pretrain"} <= distributed
    assert "round-0001/select" not in distributed
    assert sorted(begun) == sorted([stage.name for stage in stages] + [f"{name}@1" for name in distributed])
    assert {record.status for record in state.read_state(run).values()} == {"done"}
    assert read_json(run / "nodes.json")["code"] == 0


def test_a_failure_ends_all_nodes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (code, text), (other_code, other_text) = ends(*(node(rank, run, {"fail": {"warmup-proxy": 7}}) for rank in (0, 1)))
    assert (code, other_code) == (1, 1)
    assert "warmup-proxy failed with exit code 7" in text
    assert "the first node ended with exit code 1; it says why" in other_text


def test_a_node_ends_when_the_first_is_gone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first, other = (node(rank, run, {"lengths": {"warmup-proxy": 60}}) for rank in (0, 1))
    deadline = time.monotonic() + 60
    while not {"warmup-proxy@1"} & {name for _, name, _ in journal(tmp_path / "journal")}:
        assert time.monotonic() < deadline, "it was not joined"
        time.sleep(0.05)
    first.kill()
    first.communicate()
    [(code, text)] = ends(other)
    assert code == 1
    assert "nothing was heard of the first node for 4 seconds" in text
    left = [process for process in psutil.process_iter() if _belongs(process, run)]
    assert not left


def _belongs(process: psutil.Process, run: Path) -> bool:
    try:
        return str(process.environ().get(RUN_VARIABLE, "")).startswith(str(run))
    except psutil.Error:
        return False


def test_what_is_missing_or_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="needs --node-rank and --rdzv-endpoint"):
        Nodes.of(2, None, None)
    with pytest.raises(UserError, match="--rdzv-endpoint is 'host'; give HOST:PORT"):
        Nodes.of(2, 0, "host")
    with pytest.raises(UserError, match="--node-rank is 2, with --nnodes 2; it goes from 0 to 1"):
        Nodes.of(2, 2, "host:1")
    monkeypatch.setenv("MASTER_ADDR", "host")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert endpoint_of_torchrun() == "host:29500"


@pytest.mark.slow
def test_two_nodes_write_what_one_with_two_ranks_does(tmp_path: Path) -> None:
    settings, one, two = tiny_config(tmp_path, rounds=1), tmp_path / "one", tmp_path / "two"
    done = megatron_bliss("run", settings, "--run", one, "launch.nproc_per_node=2", "launch.concurrency=1")
    assert done.returncode == 0, done.stdout + done.stderr
    port = 10_000 + os.getpid() % 20_000  # it and those after it are none that the system hands out
    together = ["--launcher", "torchrun", "--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    words = command("run", settings, "--run", two, "launch.concurrency=1", *together, "--node-rank")
    processes = [
        subprocess.Popen([*words, rank], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in "01"
    ]
    for code, text in ends(*processes, seconds=900):
        assert code == 0, text
    assert outcome(two) == outcome(one)
