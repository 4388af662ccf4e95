"""The interpreter that `make env` builds on: new enough, and able to make a virtual environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def find(*words: str, path: str = os.environ["PATH"]) -> str:
    environment = os.environ | {"PATH": path, "PYENV_ROOT": "/nowhere"}
    done = subprocess.run(
        ["/bin/sh", str(ROOT / "tools/find_python.sh"), *words], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_given_python_is_checked() -> None:
    assert find(sys.executable) == sys.executable
    assert find("/nowhere/python") == ""


@pytest.mark.parametrize("lacking", ["ensurepip", "venv"])
def test_a_python_that_cannot_make_environments_is_passed_over(tmp_path: Path, lacking: str) -> None:
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\ncase "$2" in *{lacking}*) exit 1;; esac\n')
    python.chmod(0o755)
    assert find(str(python)) == ""
    assert find(path=str(tmp_path)) == ""


def test_make_says_what_to_do_about_a_python_that_does_not_fit(tmp_path: Path) -> None:
    words = ["make", "env", f"VENV={tmp_path / 'venv'}", "PYTHON=/bin/false"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("PYTHON=/bin/false is not a Python >= 3.12 with venv and ensurepip: install one")
    assert not (tmp_path / "venv").exists()
