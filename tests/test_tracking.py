"""wandb (offline) and TensorBoard: what Megatron's writers and ours leave, under which names; and that nothing else is
contacted."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_bliss import tracking
from megatron_bliss.artifacts import RunPaths
from megatron_bliss.config import LaunchConfig, RunConfig, TrackingConfig, load_config, read_saved_config
from megatron_bliss.errors import UserError
from megatron_bliss.orchestration import state
from megatron_bliss.progress import MetricsLog
from megatron_bliss.tracking import Job, Tracker
from tests import wandb_files
from tests.tiny_run import tiny_config
from tests.wandb_files import OfflineRun

ROOT = Path(__file__).parents[1]
TRACKED = ["tracking.wandb=offline", "tracking.tensorboard=true", "tracking.project=tiny"]
# Python's sockets, in every process that finds it on its path: who is asked for, beyond this machine.
WATCH = """
import os, socket
def _is_here(address):
    return not isinstance(address, tuple) or str(address[0]) in ("127.0.0.1", "::1", "localhost", "")
def _note(address):
    if not _is_here(address):
        with open(os.environ["CONTACTS"], "a") as stream:
            stream.write(f"{address}\\n")
_connect, _lookup = socket.socket.connect, socket.getaddrinfo
def connect(self, address):
    _note(address)
    return _connect(self, address)
def getaddrinfo(host, *args, **kwargs):
    if host not in (None, socket.gethostname()):
        _note((host,))
    return _lookup(host, *args, **kwargs)
socket.socket.connect, socket.getaddrinfo = connect, getaddrinfo
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The warm-up, tracked: selection, proxy, and the LLM in two processes, the first of which stops half way."""
    folder = tmp_path_factory.mktemp("tracked")
    (folder / "watch").mkdir()
    (folder / "watch" / "sitecustomize.py").write_text(WATCH)
    settings = tiny_config(folder, control=False)
    run = folder / "run"
    given = [*TRACKED, "target.extra_args=[--exit-interval,'3']"]
    state.prepare(load_config(settings, given), run)
    stages = "from megatron_bliss.stages import inventory, select, warmup_proxy as proxy\n"
    stages += "inventory.run(run); select.run(run, None); proxy.run(run)"
    assert python(folder, f"run = {str(run)!r}\n{stages}") == 0
    train = f"from megatron_bliss.stages import pretrain\npretrain.run({str(run)!r}, 0)"
    assert python(folder, train) != 0  # it says that it is not done
    assert python(folder, train) == 0
    return run


def python(folder: Path, code: str) -> int:
    """Run it in a process that notes its contacts in folder/contacts; returns its exit code."""
    environment = os.environ | {"PYTHONPATH": f"{folder / 'watch'}:{ROOT}", "CONTACTS": str(folder / "contacts")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with open(folder / "log", "a") as log:
        done = subprocess.run([sys.executable, "-c", code], stdout=log, stderr=log, env=environment, timeout=300)
    return done.returncode


def offline_runs(run: Path, command: str) -> list[OfflineRun]:
    """In order of their start."""
    paths = sorted(RunPaths(run).tracking.glob("wandb/offline-run-*/run-*.wandb"))
    found = [wandb_files.read(path) for path in paths]
    return [each for each in found if each.run.job_type == command]


def board(run: Path, name: str, tag: str) -> dict[int, float]:
    events = EventAccumulator(str(RunPaths(run).tensorboard / name))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_side_process_sends_the_lines_of_its_metrics(run: Path) -> None:
    [sent] = offline_runs(run, "warmup-proxy")
    lines = metrics(run / "warmup/proxy/metrics.jsonl")
    assert len(lines) == 12
    assert [(line["step"], line["loss"]) for line in sent.history] == [(line["step"], line["loss"]) for line in lines]
    assert board(run, "warmup-proxy", "loss") == pytest.approx({line["step"]: line["loss"] for line in lines}, rel=1e-6)


def test_the_llm_is_tracked_by_megatron_and_goes_on_in_the_same_run(run: Path) -> None:
    first, second = offline_runs(run, "warmup-target")
    assert first.run.run_id == second.run.run_id == Job(config(run), RunPaths(run), "warmup-target").id
    assert [line["step"] for line in first.history if "lm loss" in line] == [1, 2, 3]
    assert [line["step"] for line in second.history if "lm loss" in line] == [4, 5, 6]
    lines = {line["step"]: line for line in metrics(run / "warmup/pretrain/metrics.jsonl")}
    for line in second.history:
        assert line["domain loss/walk"] == pytest.approx(lines[line["step"]]["loss/walk"])
    assert list(board(run, "warmup-target", "lm loss")) == [1, 2, 3, 4, 5, 6]


def test_one_project_and_one_group_with_stages_as_jobs(run: Path) -> None:
    sent = [each.run for each in map(wandb_files.read, RunPaths(run).tracking.glob("wandb/*/run-*.wandb"))]
    assert {each.job_type for each in sent} == {"warmup-select", "warmup-proxy", "warmup-target"}
    assert {each.display_name for each in sent} == {"warmup-select", "warmup-proxy", "warmup-target"}
    assert {each.project for each in sent} == {"tiny"}
    assert len({each.run_group for each in sent}) == 1
    assert len({each.run_id for each in sent}) == 3


def test_a_selection_is_an_artefact(run: Path) -> None:
    [sent] = offline_runs(run, "warmup-select")
    [artifact] = sent.artifacts
    assert artifact.type == "selection"
    assert {entry.path for entry in artifact.manifest.contents} == {"manifest.json", "domains.table.json"}


def test_nothing_beyond_this_machine_is_contacted(run: Path) -> None:
    contacts = run.parent / "contacts"
    assert not contacts.exists(), contacts.read_text()
    # the watch sees a contact where there is one
    python(run.parent, "import socket\nsocket.create_connection(('192.0.2.1', 9), timeout=0.1)")
    assert "192.0.2.1" in contacts.read_text()


def config(run: Path) -> RunConfig:
    return read_saved_config(RunPaths(run).config)


def test_names_ids_and_groups(tmp_path: Path) -> None:
    settings = RunConfig()
    main, arm = RunPaths(tmp_path / "run"), RunPaths(tmp_path / "run").control("random")
    job, other = Job(settings, main, "bilevel", 2), Job(settings, arm, "pretrain", 1)
    assert (job.name, other.name) == ("round-0002/bilevel", "controls/random/round-0001/pretrain")
    assert job.group == other.group
    assert other.board == tmp_path / "run/tensorboard/controls/random/round-0001/pretrain"
    moved = replace(settings, launch=LaunchConfig(nproc_per_node=8), tracking=TrackingConfig(wandb="online"))
    assert Job(moved, main, "bilevel", 2).id == job.id
    others = [
        Job(settings, main, "bilevel", 1),
        Job(settings, main, "score", 2),
        Job(replace(settings, seed=2), main, "bilevel", 2),
        Job(settings, RunPaths(tmp_path / "another"), "bilevel", 2),
    ]
    assert job.id not in {each.id for each in others}


def test_it_is_off_unless_asked_for(tmp_path: Path) -> None:
    job = Job(RunConfig(), RunPaths(tmp_path), "pretrain", 1)
    assert tracking.script_arguments(job) == []
    assert tracking.environment(job) == {}
    tracking.track(job).log(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())
    only_board = replace(job, config=RunConfig(tracking=TrackingConfig(tensorboard=True)))
    assert "--tensorboard-dir" in tracking.script_arguments(only_board)
    assert not [word for word in tracking.script_arguments(only_board) if "wandb" in word]
    assert tracking.environment(only_board) == {}


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None if name == "tensorboard" else object())
    tracking.check(TrackingConfig())
    for asked in (TrackingConfig(wandb="offline"), TrackingConfig(tensorboard=True)):
        with pytest.raises(UserError, match=r"needs the package tensorboard.*pip install"):
            tracking.check(asked)


def test_tracking_of_a_run_may_be_switched_later(tmp_path: Path) -> None:
    settings, run = tiny_config(tmp_path), tmp_path / "run"
    state.prepare(load_config(settings, []), run)
    state.prepare(load_config(settings, ["tracking.wandb=offline"]), run)
    arm = RunPaths(run).control("random").config
    assert [read_saved_config(path).tracking.wandb for path in (RunPaths(run).config, arm)] == ["offline"] * 2


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    class Board:
        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, value, step))

    seen: list[tuple[str, float, int]] = []
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, Tracker(board=Board()).log)
    log.write(4, loss=2.5, kl=float("nan"))
    assert seen == [("loss", 2.5, 4)]
