"""The batch scripts of launch/: that they are clean, that Slurm takes them, and what torchrun's exit code says."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.bed import REPOSITORY, Cluster, slurm

LAUNCH = REPOSITORY / "launch"
SCRIPTS = sorted(path.stem for path in LAUNCH.glob("*.sbatch"))


@pytest.fixture(scope="module")
def bed() -> Iterator[Cluster]:
    with slurm() as testbed:
        yield testbed


def test_shellcheck_finds_nothing() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), *Path(__file__).parent.glob("*.sh")]
    found = subprocess.run(["shellcheck", "-x", *scripts], cwd=REPOSITORY, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.slurm
def test_slurm_takes_every_script_by_hand_and_with_the_settings(bed: Cluster) -> None:
    assert {"inventory", "bilevel", "score", "select", "prepare", "pretrain", "evaluate", "report"} <= set(SCRIPTS)
    for script in SCRIPTS:
        for words in (
            ("sbatch", "--test-only", LAUNCH / f"{script}.sbatch", "runs/my", "1"),
            (LAUNCH / "submit.sh", script, "runs/my", "1", "--test-only"),
        ):
            taken = bed.call(*words, **{f"{group}_GPUS": "4" for group in ("SIDE", "SCORE", "PRETRAIN", "EVALUATE")})
            assert taken.returncode == 0, (script, taken.stderr)
            assert "to start at" in taken.stderr
    refused = bed.call(LAUNCH / "submit.sh", "pretrain", "runs/my", "1", "--test-only", PRETRAIN_GPUS="5")
    assert refused.returncode, "the test bed's nodes have four GPUs"


def test_settings_reach_sbatch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ACCOUNT": "llm", "SIDE_PARTITION": "small", "SIDE_SBATCH": "--exclusive --nice=5"}.items():
        monkeypatch.setenv(name, value)

    def words(script: str, *further: str) -> list[str]:
        command = [str(LAUNCH / "submit.sh"), "--print", script, "runs/my", "3", *further]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()

    side = words("bilevel", "--dependency=afterok:12")
    assert {"--account=llm", "--partition=small", "--exclusive", "--nice=5", "--gpus-per-node=8"} <= set(side)
    assert side[-4:] == ["--dependency=afterok:12", f"{LAUNCH}/bilevel.sbatch", "runs/my", "3"]
    select = words("select")
    assert not {word.split("=")[0] for word in select} & {"--partition", "--gpus-per-node", "--exclusive"}
    assert "--array=0-3" in words("score")


def test_torchrun_exits_as_its_ranks_did(tmp_path: Path) -> None:
    script = tmp_path / "stopping.py"
    script.write_text("raise SystemExit(3)")
    command = [sys.executable, "-m", "megatron_bliss.torchrun", "--standalone", "--nproc-per-node", "2", str(script)]
    assert subprocess.run(command, capture_output=True).returncode == 3
