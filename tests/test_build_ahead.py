"""Index files built before a training: by a user's own script, after a kill, and what cannot be built ahead."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_bliss.artifacts import read_json
from megatron_bliss.errors import UserError
from megatron_bliss.mcore import build_ahead as building
from megatron_bliss.stages import prepare
from tests import launch
from tests.numbered_run import numbered_run
from tests.selections import select
from tests.test_pretrain import USER_SCRIPT, user_arguments
from tests.tiny_run import write_chain_shard


def test_a_users_script_finds_what_its_own_arguments_built(tmp_path: Path) -> None:
    """Two tensor-parallel ranks train on what one process prepared with the same words."""
    for seed, name in enumerate(("walk", "noise")):
        write_chain_shard(tmp_path / name, 120, seed, 0.5)
    select(tmp_path / "selection", {str(tmp_path / name): np.arange(0, 120, 3) for name in ("walk", "noise")})
    more = ["--tensor-model-parallel-size", "2", "--exit-interval", "1"]
    words = ["--selection", tmp_path / "selection", USER_SCRIPT, *user_arguments(tmp_path, *more)]
    prepared = launch.run("megatron_bliss.hooks", [*words[:2], "--prepare-only", *words[2:]], tmp_path / "prepare.log")
    cache = tmp_path / "cache"
    times = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert f"{len(times)} index files are in {cache}" in prepared
    trained = launch.run("megatron_bliss.hooks", words, tmp_path / "train.log", num_ranks=2)
    assert "iteration        1/" in trained
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == times
    assert "Build and save the" in prepared
    assert "Build and save the" not in trained


def test_files_appear_whole_and_the_description_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while they get their names, the cache holds no file that Megatron would look at."""
    partial = building._partial(tmp_path / "cache")
    names = [f"{digest}-GPTDataset-train-{part}" for digest in "ab" for part in ("description.txt", "sample_index.npy")]
    for name in names:
        (partial / name).write_text(name)
    moved: list[str] = []
    replace = building.os.replace

    def fail_later(source: Path, target: Path) -> None:
        if len(moved) == 2:
            raise KeyboardInterrupt
        moved.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(building.os, "replace", fail_later)
    with pytest.raises(KeyboardInterrupt):
        building._publish(partial, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*description.txt"))
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2


def test_what_a_killed_preparation_left_is_removed(tmp_path: Path) -> None:
    mine = building._partial(tmp_path)
    (mine / "file").touch()
    host = mine.name.partition("@")[2]
    dead, other, like_mine = (
        mine.with_name(f".prepare-{name}") for name in (f"999999999@{host}", "999999999@elsewhere", f"9@{host}-9")
    )
    for directory in (dead, other, like_mine):
        directory.mkdir()
    assert building._partial(tmp_path) == mine
    assert not list(mine.iterdir())
    assert not dead.exists()
    assert other.exists(), "another machine's may be at work"
    assert like_mine.exists()


def test_a_round_is_prepared_once_for_its_selection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, config = numbered_run(tmp_path)
    calls: list[int | None] = []

    def build(script: Path, arguments: list[str], selection: Path, iteration: int | None) -> list[Path]:
        calls.append(iteration)
        paths.index_cache.mkdir(exist_ok=True)
        (paths.index_cache / "x-train-document_index.npy").write_bytes(b"123")
        return [paths.index_cache / "x-train-document_index.npy"]

    monkeypatch.setattr(prepare, "build_ahead", build)
    prepare.run(paths.root, 1)
    prepare.run(paths.root, 1)
    assert calls == [0]
    assert "are there" in capsys.readouterr().out
    prepare.run(paths.root, 2)
    assert calls == [0, config.round_end(1)]
    assert read_json(paths.indices(2))["files"] == {"x-train-document_index.npy": 3}
    (paths.index_cache / "x-train-document_index.npy").write_bytes(b"12")  # cut short
    prepare.run(paths.root, 2)
    shutil.rmtree(paths.selection(2))
    shutil.copytree(paths.selection(1), paths.selection(2))  # another selection
    prepare.run(paths.root, 2)
    assert len(calls) == 4
    with pytest.raises(UserError, match=r"warmup/selection/manifest\.json does not exist"):
        prepare.run(paths.root, 0)


def test_the_last_value_of_a_flag_counts() -> None:
    words = ["--a", "1", "--b=2", "--a=3", "--c"]
    assert [building._value(words, flag) for flag in ("--a", "--b", "--c", "--d")] == ["3", "2", None, None]


@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        ("", 1),
        ("--tensor-model-parallel-size 4 --pipeline-model-parallel-size=2 --context-parallel-size 3", 24),
        ("--pipeline-model-parallel-size 2 --expert-model-parallel-size 8", 16),
        ("--tensor-model-parallel-size 4 --expert-model-parallel-size 6 --expert-tensor-parallel-size 1", 12),
    ],
)
def test_ranks_of_one_copy_of_the_model(words: str, ranks: int) -> None:
    assert building._ranks_of_a_copy(words.split()) == ranks


def test_arguments_that_leave_the_samples_open_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="--global-batch-size is missing"):
        building.build_ahead(USER_SCRIPT, ["--micro-batch-size", "2"], None)


def test_a_script_without_pretrain_is_refused(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import megatron.training")
    words = ["--prepare-only", tmp_path / "script.py", "--global-batch-size", "8"]
    [process] = launch.start("megatron_bliss.hooks", words, tmp_path / "log")
    assert launch.finish([process], 120) == [2]
    text = Path(f"{tmp_path / 'log'}.0").read_text()
    assert f"error: {tmp_path / 'script.py'} did not call megatron.training.pretrain" in text
    assert "Traceback" not in text
