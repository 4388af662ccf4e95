"""Shards in Megatron's format: read and written like Megatron does, and refused when they are damaged."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_bliss.data.shards import Shard, ShardWriter, take_inventory, token_dtype, verify_shard
from megatron_bliss.errors import UserError

Documents = list[list[list[int]]]  # ids of each sequence of each document

documents_strategy = st.lists(
    st.lists(st.lists(st.integers(0, 65499), min_size=1, max_size=9), min_size=1, max_size=3), min_size=1, max_size=6
)
dtypes = st.sampled_from([np.uint16, np.int32])


def write(prefix: Path, documents: Documents, dtype: type = np.uint16) -> None:
    with ShardWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


@settings(max_examples=60, deadline=None)
@given(documents=documents_strategy, dtype=dtypes)
def test_megatron_reads_what_we_write(folder: Path, documents: Documents, dtype: type) -> None:
    write(folder / "ours", documents, dtype)
    read = IndexedDataset(str(folder / "ours"))
    assert read.index.dtype == dtype
    assert [read[i].tolist() for i in range(len(read))] == [ids for document in documents for ids in document]
    assert read.document_indices.tolist() == np.cumsum([0, *map(len, documents)]).tolist()


@settings(max_examples=60, deadline=None)
@given(documents=documents_strategy, dtype=dtypes)
def test_we_read_what_megatron_writes(folder: Path, documents: Documents, dtype: type) -> None:
    builder = IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=dtype)
    for document in documents:
        ids = torch.tensor([i for sequence in document for i in sequence])
        builder.add_document(ids, [len(sequence) for sequence in document])
    builder.finalize(str(folder / "theirs.idx"))
    shard = Shard(folder / "theirs")
    assert shard.dtype == dtype
    assert [shard[i].tolist() for i in range(len(shard))] == [ids for document in documents for ids in document]
    assert shard.document_starts.tolist() == np.cumsum([0, *map(len, documents)]).tolist()
    write(folder / "ours", documents, dtype)
    for suffix in ("bin", "idx"):
        assert (folder / f"ours.{suffix}").read_bytes() == (folder / f"theirs.{suffix}").read_bytes()


@pytest.mark.parametrize("vocab_size", [2, 65499, 65500, 65536, 65537, 250_000])
def test_dtype_is_megatrons(vocab_size: int) -> None:
    assert token_dtype(vocab_size) == DType.optimal_dtype(vocab_size)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), suffix=st.sampled_from([".bin", ".idx"]))
def test_any_truncation_is_refused(folder: Path, data: st.DataObject, suffix: str) -> None:
    write(folder / "cut", [[[1, 2, 3], [4]], [[5, 6]]])
    path = folder / f"cut{suffix}"
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(UserError, match=f"cut{suffix}"):
        Shard(folder / "cut")


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [(0, b"X", "bad header"), (9, b"\x02", "version 2"), (17, b"\x06", "dtype code 6"), (18, b"\x07", "bytes")],
)
def test_bad_header_is_refused(tmp_path: Path, offset: int, value: bytes, message: str) -> None:
    write(tmp_path / "a", [[[1, 2, 3]]])
    content = bytearray((tmp_path / "a.idx").read_bytes())
    content[offset : offset + 1] = value
    (tmp_path / "a.idx").write_bytes(content)
    with pytest.raises(UserError, match=message):
        Shard(tmp_path / "a")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.idx does not exist"):
        Shard(tmp_path / "a")


def test_changed_bytes_are_noticed_and_a_new_time_alone_is_not(tmp_path: Path) -> None:
    write(tmp_path / "a", [[[1, 2, 3]]])
    (record,) = take_inventory({"web": [str(tmp_path / "a")]})
    assert (record.domain, record.num_sequences, record.num_tokens) == ("web", 1, 3)
    os.utime(tmp_path / "a.bin", ns=(1, 1))
    verify_shard(record)
    (tmp_path / "a.bin").write_bytes(np.array([1, 2, 4], np.uint16).tobytes())
    with pytest.raises(UserError, match="digest changed"):
        verify_shard(record)


def test_the_same_data_is_listed_once_and_equal_names_stay_apart(tmp_path: Path) -> None:
    for name, ids in (("x/a", [1]), ("y/a", [2]), ("z/b", [1])):
        write(tmp_path / name, [[ids]])
    records = take_inventory({"one": [str(tmp_path / "x/a")], "two": [str(tmp_path / "y/a")]})
    assert len({record.name for record in records}) == 2
    with pytest.raises(UserError, match="list it once"):
        take_inventory({"one": [str(tmp_path / "x/a"), str(tmp_path / "x/a")]})


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OverflowError):
        write(tmp_path / "a", [[[1, 2]], [[70_000]]])
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_no_shard(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, numpy as np\n"
        "from megatron_bliss.data.shards import ShardWriter\n"
        "with ShardWriter(sys.argv[1], np.uint16) as writer:\n"
        "    for _ in range(1000): writer.add_document([list(range(100))])\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a")], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "a.bin").exists()
    assert not (tmp_path / "a.idx").exists()
    write(tmp_path / "a", [[[1]]])
    assert len(Shard(tmp_path / "a")) == 1
