"""Files of a run: atomic writes, JSON with a schema, digests and the lock."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_bliss import artifacts
from megatron_bliss.errors import UserError


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    artifacts.write_json(path, {"schema": 1, "value": 1})
    with pytest.raises(TypeError), artifacts.atomic_write(path) as stream:
        stream.writelines([b"half", None])
    assert artifacts.read_json(path)["value"] == 1
    assert os.listdir(tmp_path) == ["state.json"]


@pytest.mark.parametrize(
    ("content", "words"), [("{", "not valid JSON"), ('{"schema": 2}', "schema 2"), ("[]", "schema None")]
)
def test_json_of_another_kind_is_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=words):
        artifacts.read_json(tmp_path / "a.json")


def test_missing_json_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run the stage that writes it"):
        artifacts.read_json(tmp_path / "a.json")


def test_digests_tell_lists_of_parts_apart(tmp_path: Path) -> None:
    assert artifacts.digest_bytes(b"ab", b"c") != artifacts.digest_bytes(b"a", b"bc")
    (tmp_path / "x").write_bytes(b"1" * 10)
    before = artifacts.digest_tree(tmp_path)
    (tmp_path / "x").write_bytes(b"1" * 11)
    assert artifacts.digest_tree(tmp_path) != before


def test_the_digest_of_a_checkpoint_sees_other_weights_of_the_same_size(tmp_path: Path) -> None:
    weights = np.random.default_rng(1).standard_normal(1 << 20).astype(np.float32)
    (tmp_path / "weights").write_bytes(weights.tobytes())
    before = artifacts.digest_tree(tmp_path)
    (tmp_path / "weights").write_bytes(np.nextafter(weights, np.float32(9)).tobytes())
    assert artifacts.digest_tree(tmp_path) != before
    (tmp_path / "weights").write_bytes(weights.tobytes())
    assert artifacts.digest_tree(tmp_path) == before


def test_the_lock_names_its_holder(tmp_path: Path) -> None:
    lock = tmp_path / "run.lock"
    code = "import sys, pathlib, megatron_bliss.artifacts as a\nwith a.run_lock(pathlib.Path(sys.argv[1])): pass"
    command = [sys.executable, "-c", code, str(lock)]
    with artifacts.run_lock(lock):
        other = subprocess.run(command, capture_output=True, text=True)
    assert other.returncode != 0
    assert f"process {os.getpid()} on" in other.stderr
    assert subprocess.run(command).returncode == 0
