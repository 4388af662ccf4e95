"""Score files: chunks, several writers, kills, and what is refused."""

import errno
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bliss.artifacts import read_json, write_json
from megatron_bliss.data import claims as claims_module
from megatron_bliss.data import scores as scores_module
from megatron_bliss.data.claims import Claims
from megatron_bliss.data.scores import SCHEMA, ScoreFiles, ScoreWriter
from megatron_bliss.data.shards import ShardRecord
from megatron_bliss.errors import UserError
from tests import score_worker
from tests.launch import ROOT
from tests.toy_shards import fake_record


def open_writer(
    directory: Path, records: list[ShardRecord], wanted: dict[str, np.ndarray], model: str = "m", **more: Any
) -> ScoreWriter:
    return ScoreWriter(
        directory, records, wanted, method="bliss", model_digest=model, seed=1, chunk_sequences=4, **more
    )


def small(directory: Path, **more: Any) -> ScoreWriter:
    """Two chunks of one shard."""
    return open_writer(directory, [fake_record(8, "a")], {"a": np.arange(8, dtype=np.int32)}, **more)


def content(directory: Path) -> dict[str, bytes]:
    """Every file below a directory; nothing but score files and the manifest is left when all is done."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_scores_are_resumed_by_chunk_and_read_back(tmp_path: Path) -> None:
    records = [fake_record(20, "a"), fake_record(10, "b"), fake_record(5, "c")]
    wanted = {"a": np.arange(1, 20, 2, dtype=np.int32), "b": np.arange(4, dtype=np.int32)}
    writer = open_writer(tmp_path, records, wanted)
    chunks = list(writer.pending())
    assert [(chunk.record.name, chunk.number, len(chunk.ids), chunk.span) for chunk in chunks] == [
        ("a", 0, 4, (0, 9)), ("a", 1, 4, (9, 17)), ("a", 2, 2, (17, 20)), ("b", 0, 4, (0, 10)),
    ]  # fmt: skip
    for chunk in (chunks[2], chunks[0]):  # in any order
        writer.write(chunk, chunk.ids.astype(np.float32))
    assert (writer.num_scored, writer.num_wanted, writer.is_complete) == (6, 14, False)
    with pytest.raises(UserError, match="not scored to its end; run the score stage again"):
        ScoreFiles(tmp_path)

    writer = open_writer(tmp_path, records, wanted)
    assert [chunk.name for chunk in writer.pending()] == ["a.1", "b.0"]
    for chunk in writer.pending():
        writer.write(chunk, chunk.ids.astype(np.float32))
    assert writer.num_scored == writer.num_wanted
    assert writer.is_complete
    assert not list(open_writer(tmp_path, records, wanted).pending())

    files = ScoreFiles(tmp_path)
    for record in records[:2]:
        np.testing.assert_array_equal(files.read(record, wanted[record.name]), wanted[record.name].astype(np.float32))
    assert files.read(records[2], np.empty(0, dtype=np.int32)).shape == (0,)
    raw = np.load(tmp_path / "a.npy", allow_pickle=False)
    assert raw.dtype == np.float32
    assert np.isnan(raw[::2]).all()
    assert set(content(tmp_path)) == {"a.npy", "b.npy", "manifest.json"}


def test_the_manifest_says_what_the_scores_are(tmp_path: Path) -> None:
    writer = small(tmp_path, facts={"tokenizer": {"type": "t"}})
    for chunk in writer.pending():
        writer.write(chunk, np.ones(4, dtype=np.float32))
    manifest = read_json(tmp_path / "manifest.json", SCHEMA)
    known = {"direction": "higher is better", "seed": 1, "method": "bliss", "model_digest": "m", "chunk_sequences": 4}
    assert manifest | known | {"tokenizer": {"type": "t"}} == manifest
    shard = manifest["shards"]["a"]
    assert shard | {"digest": fake_record(8, "a").digest, "num_sequences": 8, "num_wanted": 8} == shard
    # other scores of the same things have another digest
    other = small(tmp_path / "other", facts={"tokenizer": {"type": "t"}})
    for chunk in other.pending():
        other.write(chunk, np.full(4, 1 + chunk.number, dtype=np.float32))
    assert ScoreFiles(tmp_path).digest != ScoreFiles(tmp_path / "other").digest


def test_scores_of_another_model_start_afresh(tmp_path: Path) -> None:
    for model, facts in (("m", {}), ("another model", {}), ("another model", {"bf16": True})):
        writer = small(tmp_path, model=model, facts=facts)
        with pytest.raises(UserError, match=r"not scored to its end|manifest.json does not exist"):
            ScoreFiles(tmp_path)  # nobody takes the old ones for the new
        chunks = list(writer.pending())
        assert len(chunks) == 2
        for chunk in chunks:
            writer.write(chunk, np.full(4, len(model), dtype=np.float32))
        assert ScoreFiles(tmp_path).model_digest == model
        assert set(np.load(tmp_path / "a.npy")) == {len(model)}
    with pytest.raises(UserError, match=r"holds other scores \(model_digest\); give a directory of its own"):
        small(tmp_path, facts={"bf16": True}, replace=False)
    assert small(tmp_path, model=model, facts=facts, replace=False).is_complete


def test_bad_scores_are_refused(tmp_path: Path) -> None:
    records, wanted = [fake_record(8, "a")], {"a": np.arange(0, 8, 2, dtype=np.int32)}
    writer = open_writer(tmp_path, records, wanted)
    [chunk] = writer.pending()
    with pytest.raises(UserError, match="sequence 4 of shard /nowhere/a got NaN"):
        writer.write(chunk, np.array([1, 2, np.nan, 4], dtype=np.float32))
    assert not [name for name in content(tmp_path) if name.endswith((".npy", ".done"))]
    writer.write(chunk, np.ones(4, dtype=np.float32))
    files = ScoreFiles(tmp_path)
    with pytest.raises(UserError, match="no score for 4 of the 8 sequences"):
        files.read(records[0], np.arange(8, dtype=np.int32))
    with pytest.raises(UserError, match="no scores of shard"):
        files.read(replace(records[0], bin_sha256="changed"), wanted["a"])
    path = tmp_path / "a.npy"
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(UserError, match="cannot be read as a numpy file"):
        files.read(records[0], wanted["a"])
    os.truncate(path, 0)
    with pytest.raises(UserError, match="cannot be read as a numpy file"):
        files.read(records[0], wanted["a"])
    np.save(path, np.zeros(7, dtype=np.float32))
    with pytest.raises(UserError, match=r"its shard needs float32 \[8\]"):
        files.read(records[0], wanted["a"])
    np.save(path, np.array([None]), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        files.read(records[0], wanted["a"])
    path.unlink()
    with pytest.raises(UserError, match="does not exist"):
        open_writer(tmp_path, records, wanted)


def test_a_manifest_of_another_schema_is_scored_again(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {"schema": 1, "shards": {}})
    with pytest.raises(UserError, match="schema 1"):
        ScoreFiles(tmp_path)
    assert len(list(small(tmp_path).pending())) == 2


def test_scores_that_changed_at_the_same_length_are_found(tmp_path: Path) -> None:
    records = [fake_record(8, "a"), fake_record(5, "none wanted")]
    writer = open_writer(tmp_path, records, {"a": np.arange(1, 8, dtype=np.int32)})
    for chunk in writer.pending():
        writer.write(chunk, np.ones(len(chunk.ids), dtype=np.float32))
    files, path = ScoreFiles(tmp_path), tmp_path / "a.npy"
    for record in records:
        files.verify(record)
    for place in (path.stat().st_size - 1, path.stat().st_size - 4 * 8, 0):  # the last score, one not wanted, header
        written = path.read_bytes()
        path.write_bytes(written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :])
        with pytest.raises(UserError, match=r"a\.npy (has changed since it was scored; remove|cannot be read)"):
            files.verify(records[0])
        path.write_bytes(written)
        files.verify(records[0])
    path.unlink()
    with pytest.raises(UserError, match="does not exist"):
        files.verify(records[0])


@pytest.mark.parametrize("moment", ["record", "manifest"])
def test_a_kill_between_data_and_record_loses_one_chunk_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    writer = small(tmp_path)
    first, second = writer.pending()
    writer.write(first, np.ones(4, dtype=np.float32))

    def killed(path: Path, content: dict[str, Any]) -> None:
        if path.name != "manifest.json" and moment == "manifest":
            write_json(path, content)
        else:
            raise KeyboardInterrupt

    monkeypatch.setattr(scores_module, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        writer.write(second, np.ones(4, dtype=np.float32))
    monkeypatch.undo()
    writer = small(tmp_path)
    assert [chunk.number for chunk in writer.pending()] == ([1] if moment == "record" else [])
    while (chunk := writer.claim()) is not None:
        writer.write(chunk, np.ones(4, dtype=np.float32))
    assert writer.is_complete
    assert set(content(tmp_path)) == {"a.npy", "manifest.json"}


def test_chunks_that_were_lost_are_scored_again(tmp_path: Path) -> None:
    writer = small(tmp_path)
    first, second = writer.pending()
    writer.write(first, np.ones(4, dtype=np.float32))
    [path] = tmp_path.glob(".unfinished-*/a.npy")
    with open(path, "r+b") as stream:  # as a page that another host wrote back late
        stream.seek(128 + 4)
        stream.write(b"\0" * 4)
    writer.write(second, np.ones(4, dtype=np.float32))
    assert not writer.is_complete
    assert [chunk.number for chunk in writer.pending()] == [0]
    writer.write(first, np.ones(4, dtype=np.float32))
    assert writer.is_complete
    assert np.load(tmp_path / "a.npy").tolist() == [1] * 8


# --- what a file system refuses


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["pwrite", "fsync", "replace"])
def test_a_full_disk_is_one_error_and_nothing_counts_that_is_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    writer = small(tmp_path)
    for chunk in writer.pending():
        with monkeypatch.context() as patched:
            patched.setattr(os, step, full_disk)
            with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); make room"):
                writer.write(chunk, np.ones(4, dtype=np.float32))
        assert not list(tmp_path.rglob("*.tmp"))
        assert chunk.number in [left.number for left in writer.pending()]
        writer.write(chunk, np.ones(4, dtype=np.float32))
    assert set(content(tmp_path)) == {"a.npy", "manifest.json"}


def test_a_disk_that_fills_up_while_a_chunk_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, write = small(tmp_path), os.pwrite

    def short(handle: int, data: bytes, offset: int) -> int:
        return full_disk() or 0 if len(data) < 8 else write(handle, data[:-5], offset)

    monkeypatch.setattr(os, "pwrite", short)
    with pytest.raises(UserError, match="No space left"):
        writer.write(next(writer.pending()), np.ones(4, dtype=np.float32))
    monkeypatch.undo()
    assert len(list(small(tmp_path).pending())) == 2


def test_a_directory_that_is_read_only_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patched:
        patched.setattr(os, "mkdir", refuse)
        with pytest.raises(UserError, match=r"new cannot be written \(Permission denied\); make room or change its"):
            small(tmp_path / "new")
    writer = small(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        with pytest.raises(UserError, match="cannot be written"):
            writer.claim()
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        small(file / "scores")


# --- claims


def owner(**changes: Any) -> str:
    return json.dumps(json.loads(claims_module._owner(os.getpid())) | changes)


@pytest.fixture
def claims(tmp_path: Path) -> Claims:
    return Claims(tmp_path, timeout=50)


def test_what_is_claimed_is_not_taken_until_its_owner_is_gone(tmp_path: Path, claims: Claims) -> None:
    path = tmp_path / "work.claim"
    path.write_text(owner(host="elsewhere"))
    assert not claims.take("work")
    claims.release("work")  # somebody else's
    assert path.exists()
    clock = tmp_path.stat().st_mtime
    os.utime(path, (clock - 45, clock - 45))
    assert not claims.take("work")
    os.utime(path, (clock - 55, clock - 55))
    assert claims.take("work")
    assert path.read_text() == owner()
    assert claims.take("work")  # ours already
    claims.release("work")
    assert not path.exists()
    assert claims.take("work")


@pytest.mark.parametrize(
    ("changes", "is_gone"),
    [
        ({"pid": 2**22 + 1}, True),  # beyond any process
        ({"started": 1.0}, True),  # the number was given to another process
        ({"host": "elsewhere", "pid": 2**22 + 1}, False),
        ({"host": "elsewhere", "job": "7", "restart": 0}, True),  # before this job was requeued
        ({"host": "elsewhere", "job": "7", "restart": 1}, False),
        ({"host": "elsewhere", "job": "8", "restart": 0}, False),
    ],
)
def test_an_owner_known_to_be_gone_is_followed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], is_gone: bool
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    claims_module._owner.cache_clear()
    (tmp_path / "work.claim").write_text(owner(**changes))
    assert Claims(tmp_path, timeout=50).take("work") == is_gone
    claims_module._owner.cache_clear()


@pytest.mark.parametrize("text", ["", '{"host": "x', "[1]"])
def test_a_claim_that_is_just_being_written_holds(tmp_path: Path, claims: Claims, text: str) -> None:
    (tmp_path / "work.claim").write_text(text)
    assert not claims.take("work")


def test_a_renewed_claim_lives_on(tmp_path: Path) -> None:
    mine, path = Claims(tmp_path, timeout=2), tmp_path / "work.claim"
    assert mine.take("work")
    path.write_text(owner(host="elsewhere"))  # so that nothing but time tells
    for _ in range(25):
        time.sleep(0.1)
        mine.renew("work")
        assert not Claims(tmp_path, timeout=2).take("work")


def test_time_is_the_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, claims: Claims) -> None:
    path = tmp_path / "work.claim"
    path.write_text(owner(host="elsewhere"))
    monkeypatch.setattr(time, "time", lambda: 4e9)  # this host's clock is far ahead
    assert not claims.take("work")


def test_a_chunk_is_claimed_once_and_taken_over_when_it_is_left(tmp_path: Path) -> None:
    first, second = small(tmp_path), small(tmp_path)
    one = first.claim()
    assert one is not None
    path = next(tmp_path.glob(".unfinished-*")) / f"{one.name}.claim"
    path.write_text(owner(host="elsewhere"))
    two = second.claim()
    assert two is not None
    assert (one.number, two.number) == (0, 1)
    second.write(two, np.ones(4, dtype=np.float32))
    assert second.claim() is None
    assert not second.is_complete
    os.utime(path, (0, 0))
    again = second.claim()
    assert again is not None
    assert again.number == 0
    second.write(again, np.ones(4, dtype=np.float32))
    assert second.is_complete
    before = content(tmp_path)
    first.renew(one)  # it was only slow
    first.write(one, np.ones(4, dtype=np.float32))
    first.give_back(one)
    assert first.claim() is None
    assert content(tmp_path) == before


# --- several processes


def start_workers(directory: Path, count: int, seconds: float) -> list[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.score_worker", str(directory), str(seconds)]
    return [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(count)]


def outputs(workers: list[subprocess.Popen[str]]) -> Iterator[str]:
    for worker in workers:
        output, _ = worker.communicate(timeout=60)
        assert worker.returncode == 0
        yield from output.split()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes that nobody disturbs."""
    directory = tmp_path_factory.mktemp("alone")
    score_worker.work(directory, 0)
    return content(directory)


def test_workers_share_the_chunks(tmp_path: Path, expected: dict[str, bytes]) -> None:
    done = Counter(outputs(start_workers(tmp_path, 3, 0.01)))
    assert len(done) == 24 + 1 + 7
    assert set(done.values()) == {1}
    assert content(tmp_path) == expected


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_workers_leave_the_same_bytes_to_any_number_of_others(
    tmp_path: Path, expected: dict[str, bytes], seed: int
) -> None:
    draws = random.Random(seed)
    kills = 0
    for round_number in range(4):
        workers = start_workers(tmp_path, draws.randint(1, 3), 0.02)
        assert workers[0].stdout
        workers[0].stdout.readline()  # at work
        time.sleep(draws.random() * 0.2)
        for worker in workers:
            kills += worker.poll() is None
            worker.kill()
            worker.communicate()
        assert round_number or kills, "the first workers were to be killed at work"
    list(outputs(start_workers(tmp_path, draws.randint(1, 2), 0)))
    assert content(tmp_path) == expected
