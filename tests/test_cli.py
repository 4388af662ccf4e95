"""The command line: exit codes, one sentence an error, what is printed, and that help is quick."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bliss.artifacts import RunPaths
from megatron_bliss.config import load_config
from megatron_bliss.orchestration import local
from tests.fake_run import fake_command
from tests.tiny_run import megatron_bliss, tiny_config


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_config(tmp_path_factory.mktemp("data"))


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv = ['x', '--help']; from megatron_bliss import cli\n"
    code += "try: cli.main()\nfinally: print(*sys.modules, file=sys.stderr)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0
    for command in ("demo", "run", "status", "report", "warmup-target", "bilevel", "evaluate"):
        assert command in shown.stdout
    assert not {"torch", "numpy", "omegaconf", "matplotlib", "megatron.core"} & set(shown.stderr.split())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run", "nowhere.yaml"], "error: nowhere.yaml does not exist; give the path of YAML settings"),
        (["run", "SETTINGS", "bilevel.gama=1"], "bilevel"),
        (["run", "SETTINGS", "--turbo"], "No such option"),
        (["fly"], "No such command"),
        (["status", "/nowhere"], "error: /nowhere/run.yaml does not exist"),
        (["select", "--run", "/nowhere", "--round", "0"], "--round"),
        (["explain", "a:1", "--run", "/nowhere"], "error: /nowhere/run.yaml does not exist"),
        (["prepare", "--run", "/nowhere", "--round", "0"], "error: /nowhere/run.yaml does not exist"),
        (["import", "x.parquet", "--run", "/nowhere", "--out", "y"], "error: /nowhere/run.yaml does not exist"),
    ],
)
def test_bad_usage_exits_with_2_and_without_a_traceback(settings: Path, words: list[str], sentence: str) -> None:
    done = megatron_bliss(*(str(settings) if word == "SETTINGS" else word for word in words), timeout=60)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_a_stage_that_has_nothing_to_read_exits_with_2(tmp_path: Path) -> None:
    done = megatron_bliss("inventory", "--run", tmp_path, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == f"error: {tmp_path}/run.yaml does not exist; give a directory that `megatron-bliss run` has made\n"
    )


def test_dry_run_prints_sizes_and_writes_nothing(settings: Path, tmp_path: Path) -> None:
    shown = megatron_bliss("run", settings, "--run", tmp_path / "run", "--dry-run", "target.global_batch_size=8")
    assert shown.returncode == 0, shown.stderr
    [score] = [line.split() for line in shown.stdout.splitlines() if line.strip().startswith("round-0001/score")]
    assert score[:3] == ["round-0001/score", "1", "400"]  # 1200 sequences in three slices
    assert "controls/random/round-0002/pretrain" in shown.stdout
    assert "parameters" in shown.stdout
    assert not (tmp_path / "run").exists()


def test_dry_run_without_the_data_says_what_it_cannot_know(settings: Path, tmp_path: Path) -> None:
    text = settings.read_text().replace(str(settings.parent / "noise"), "/nowhere/noise")
    (tmp_path / "other.yaml").write_text(text)
    shown = megatron_bliss("run", tmp_path / "other.yaml", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "?" in shown.stdout
    assert "/nowhere/noise.idx does not exist" in shown.stdout


def test_status_of_a_run_that_failed(settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, behaviour = tmp_path / "run", {"journal": str(tmp_path / "journal"), "fail": {"round-0001/score": 7}}
    with pytest.raises(Exception, match="exit code 7"):
        local.run(load_config(settings, []), run, command=fake_command(behaviour))
    state = json.loads(RunPaths(run).state.read_text())
    # as a launcher that was killed leaves it
    state["stages"]["warmup-proxy"] |= {"status": "running", "finished": None}
    RunPaths(run).state.write_text(json.dumps(state))
    shown = megatron_bliss("status", run)
    assert shown.returncode == 0, shown.stderr
    table, _, after = shown.stdout.partition(f"{run}: ")
    lines = {line.split()[0]: line for line in table.splitlines() if line.strip()}
    assert "done" in lines["inventory"]
    assert "loss 2.5" in lines["inventory"]
    assert "failed" in lines["round-0001/score"]
    assert "it went wrong" in lines["round-0001/score"]
    assert "interrupted" in lines["warmup-proxy"]
    assert "pending" in lines["round-0002/evaluate"]
    assert f"its log is {run}/logs/round-0001/score.log" in after
    arm = megatron_bliss("status", run / "controls/random")
    assert arm.returncode == 2
    assert "is a control arm" in arm.stderr
