"""Whole runs by the command line: every stage, a second call, a changed config, and SIGKILL at arbitrary moments."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_bliss.artifacts import digest_file
from tests.tiny_run import command, megatron_bliss


def outcome(run: Path) -> dict[str, object]:
    """What must not depend on interruptions: selections and losses of every arm and round."""
    found: dict[str, object] = {}
    for path in sorted(run.rglob("selection/*.npy")) + sorted(run.rglob("scores/*.npy")):
        found[str(path.relative_to(run))] = digest_file(path)
    for path in sorted(run.rglob("results.json")):
        found[str(path.relative_to(run))] = json.loads(path.read_text())
    return found


def test_a_run_ends_with_everything_it_promises(finished: tuple[Path, Path]) -> None:
    _, run = finished
    state = json.loads((run / "state.json").read_text())["stages"]
    assert {stage["status"] for stage in state.values()} == {"done"}
    for arm in (run, run / "controls" / "random"):
        for number in (1, 2):
            results = json.loads((arm / f"round-{number:04d}/evaluation/results.json").read_text())
            assert np.isfinite(results["decay"]["test_loss"])
            assert set(results["decay"]["domain_loss"]) == {"walk", "noise"}
    assert (run / "report.html").stat().st_size > 10_000


def test_selections_take_a_fifth_of_the_slices_tokens(finished: tuple[Path, Path]) -> None:
    _, run = finished
    seen: dict[str, set[int]] = {}
    for number in (1, 2):
        folder = run / f"round-{number:04d}/selection"
        manifest = json.loads((folder / "manifest.json").read_text())
        kept = sum(shard["counts"]["kept_tokens"] for shard in manifest["shards"])
        offered = sum(shard["counts"]["slice_tokens"] for shard in manifest["shards"])
        assert abs(kept - 0.2 * offered) <= 32  # within one sequence
        for shard in manifest["shards"]:
            name = shard["record"]["name"]
            ids = set(np.load(folder / f"{name}.npy", allow_pickle=False).tolist())
            assert not ids & seen.setdefault(name, set()), "rounds use disjoint slices"
            seen[name] |= ids


def test_a_second_call_does_nothing(finished: tuple[Path, Path]) -> None:
    settings, run = finished
    before, began = outcome(run), (run / "state.json").read_bytes()
    again = megatron_bliss("run", settings, "--run", run)
    assert again.returncode == 0, again.stderr
    assert outcome(run) == before
    assert (run / "state.json").read_bytes() == began


def test_a_changed_config_is_refused_with_the_difference(finished: tuple[Path, Path]) -> None:
    settings, run = finished
    refused = megatron_bliss("run", settings, "--run", run, "bilevel.gamma=0.5")
    assert refused.returncode == 2
    assert "bilevel.gamma: 0.01 -> 0.5" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_status_and_dry_run_name_every_stage(finished: tuple[Path, Path]) -> None:
    settings, run = finished
    for shown in (megatron_bliss("status", run), megatron_bliss("run", settings, "--run", run, "--dry-run")):
        assert shown.returncode == 0, shown.stderr
        for stage in ("bilevel", "score", "select", "pretrain", "evaluate"):
            assert stage in shown.stdout


def test_status_ends_with_the_report_and_its_doubts(finished: tuple[Path, Path]) -> None:
    _, run = finished
    lines = megatron_bliss("status", run).stdout.splitlines()
    doubts = json.loads((run / "report.json").read_text())["warnings"]
    assert len(doubts) > 0  # so few sequences, so few steps
    assert lines[lines.index(f"report: {run / 'report.html'}") + 1 :][: len(doubts)] == [
        f"  {doubt['sentence']}" for doubt in doubts
    ]


def kill_whole_tree_later(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """SIGKILL the launcher alone, as a user or the kernel would; True if it was still running."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


def stop_later(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Ask the launcher to stop; True if it had to."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        assert process.wait(timeout=120) in (0, 3)
        return process.returncode == 3
    return False


@pytest.mark.slow
@pytest.mark.parametrize("interrupt", [kill_whole_tree_later, stop_later])
def test_interruptions_at_five_moments_change_nothing(
    finished: tuple[Path, Path], tmp_path: Path, interrupt: Callable[[subprocess.Popen[bytes], float], bool]
) -> None:
    settings, undisturbed = finished
    run, moments = tmp_path / "run", random.Random(20260622)
    began, kills = time.monotonic(), 0
    while kills < 5:
        process = subprocess.Popen(command("run", settings, "--run", run), stdout=subprocess.DEVNULL)
        kills += interrupt(process, moments.uniform(4, 25))
        assert time.monotonic() - began < 900
        if process.returncode == 0:
            break
    assert kills == 5, "the run ended before it was interrupted five times: make it longer"
    done = megatron_bliss("run", settings, "--run", run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert outcome(run) == outcome(undisturbed)
