"""A real Slurm with virtual nodes on this machine, for tests (testbed.sh)."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
_SCRIPT = Path(__file__).with_name("testbed.sh")


class Cluster:
    """A Slurm that is up. Its commands are run in `environment`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = os.environ | {
            "SLURM_CONF": str(directory / "slurm.conf"),
            "PYTHONPATH": str(REPOSITORY),
        }

    def call(self, *words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """A command beside the cluster, as on a login node."""
        return subprocess.run(
            list(map(str, words)), env=self.environment | variables, cwd=REPOSITORY, capture_output=True, text=True
        )

    def testbed(self, command: str, *words: str) -> subprocess.CompletedProcess[str]:
        """A command of testbed.sh: exec, start, down."""
        return subprocess.run([_SCRIPT, command, self.directory, *words], capture_output=True, text=True)


@contextmanager
def slurm(**options: object) -> Iterator[Cluster]:
    """Start one; skip the test where that cannot be, unless MEGATRON_BLISS_NEEDS_SLURM is set, as CI does.

    :param options: of `testbed.sh up`.
    """
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: sockets lie in it
    folder.chmod(0o755)  # munge wants to be reachable
    bed = Cluster(folder / "bed")
    started = bed.testbed("up", *(f"{key}={value}" for key, value in options.items()))
    try:
        if started.returncode:
            reason = f"no Slurm can be started here: {started.stderr.strip()}"
            if os.environ.get("MEGATRON_BLISS_NEEDS_SLURM"):
                pytest.fail(reason)
            pytest.skip(reason)
        yield bed
    finally:
        bed.testbed("down")
        folder.rmdir()
