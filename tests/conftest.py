"""What several test modules share."""

from pathlib import Path

import pytest

from tests.tiny_run import megatron_bliss, tiny_config


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Settings and directory of an undisturbed two-round run with a random control, made by `run`."""
    folder = tmp_path_factory.mktemp("run")
    settings, run = tiny_config(folder), folder / "run"
    done = megatron_bliss("run", settings, "--run", run)
    assert done.returncode == 0, done.stdout + done.stderr
    return settings, run
