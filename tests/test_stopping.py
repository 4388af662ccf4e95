"""Stages that are asked to stop: how they are asked, how ranks agree, and that a later call ends in the same bytes."""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_bliss import stopping
from megatron_bliss.artifacts import RunPaths
from megatron_bliss.stages import inventory, ngrams
from tests.distributed import run_ranks
from tests.side_models import selected_run
from tests.stopping_ranks import SMALL, STAGES, prepare, stop_stages, votes
from tests.toy_shards import write_run


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_received", [])
    for name in (stopping.STOP_FILE, stopping.STOP_AT, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("unasked")
def test_a_file_a_time_or_a_signal_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not stopping.requested()
    monkeypatch.setenv(stopping.STOP_FILE, str(tmp_path / "stop"))
    assert not stopping.requested()
    (tmp_path / "stop").touch()
    assert stopping.requested()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not stopping.requested(), "one rank a node looks for the file"
    monkeypatch.setenv(stopping.STOP_AT, str(time.time() + 100))
    assert not stopping.requested()
    monkeypatch.setenv(stopping.STOP_AT, str(time.time() - 1))
    assert stopping.requested()
    monkeypatch.delenv(stopping.STOP_AT)
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    try:
        stopping.listen()
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stopping.requested()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_ranks_of_different_pace_stop_at_the_same_step() -> None:
    """A step takes 2 ms on the slower rank, so a vote every 50 ms is one every 25 steps or fewer."""
    (step, reductions), other = run_ranks(votes, 2)
    assert [step, reductions] == other
    assert 50 <= step <= 120
    assert 5 <= reductions <= 16  # 1, 2, 4, 8, 16, then at most 25


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("stopped")
    whole = selected_run(folder, **SMALL)
    run_ranks(prepare, 1, whole)
    shutil.copytree(whole, folder / "stopped")
    return run_ranks(stop_stages, 2, whole, folder / "stopped", timeout=300)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stopped_stage_goes_on_to_the_same_bytes(stopped: list[dict[str, Any]], stage: str) -> None:
    assert stopped[0][stage] == stopped[1][stage]
    stops, undisturbed, found = stopped[0][stage]
    assert stops >= 1
    assert undisturbed
    assert found == undisturbed


def test_stopped_ngrams_go_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process without ranks, asked after every second of its twelve chunks."""
    whole, stopped = (RunPaths(tmp_path / name) for name in ("whole", "stopped"))
    settings = ["method=dsir", "dsir.features=tokens", "scoring.chunk_sequences=100"]
    for paths in (whole, stopped):
        write_run(paths.root, {"a": [400, 300], "bb": [500]}, settings)
        inventory.run(paths.root)
    ngrams.run(whole.root, 1)
    looks = []

    def requested() -> bool:
        looks.append(1)
        return len(looks) % 2 == 0

    monkeypatch.setattr(stopping, "requested", requested)
    for _ in range(6):
        with pytest.raises(SystemExit) as ended:
            ngrams.run(stopped.root, 1)
        assert ended.value.code == stopping.EXIT_CODE
    ngrams.run(stopped.root, 1)
    assert len(looks) == 12, "no chunk is counted twice"
    expected, found = (
        {path.name: path.read_bytes() for path in paths.ngrams(1).iterdir()} for paths in (whole, stopped)
    )
    assert set(expected) == {"log-ratio.npy", "manifest.json", "sources.json"}
    assert found == expected
