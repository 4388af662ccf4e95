"""tools/text_to_shards.py and tools/inspect_shards.py as a user starts them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bliss.data.shards import Shard
from megatron_bliss.data.validation import ValidationSet
from tests.small_text import documents, write_jsonl

TOOLS = Path(__file__).parent.parent / "tools"


def run(tool: str, *arguments: object, fails: bool = False) -> str:
    """Standard output; or the message, if it is to fail because of what the user gave."""
    command = [sys.executable, str(TOOLS / tool), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == (2 if fails else 0), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if fails else done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where shards of two domains lie, and what was said while they were made."""
    folder = tmp_path_factory.mktemp("tools")
    write_jsonl(folder / "web.jsonl", documents(60))
    (folder / "code").mkdir()
    for index, text in enumerate(documents(5, seed=1)):
        (folder / "code" / f"{index}.txt").write_text(text)
    inputs = [folder / "web.jsonl", f"code={folder / 'code'}"]
    options = ["--out", folder / "out", "--train-tokenizer", 340, "--cut", 32, "--workers", 2]
    return folder, run("text_to_shards.py", *inputs, *options)


def test_text_becomes_shards(built: tuple[Path, str]) -> None:
    folder, said = built
    for name in ("web", "code"):
        shard = Shard(folder / "out" / name)
        assert shard.sequence_lengths.max() == 32
        assert f"{name}: {len(shard)} sequences, {shard.num_tokens:,} tokens" in said
        assert f"[tokenize-{name}] " in said
    assert len(Shard(folder / "out" / "code").document_starts) == 5 + 1


def test_pairs_and_inspection(built: tuple[Path, str]) -> None:
    folder, _ = built
    (folder / "pairs.jsonl").write_text(json.dumps({"prompt": "strand plort", "answer": " quell"}) + "\n")
    given = ["--tokenizer", folder / "out" / "tokenizer.model"]
    run("text_to_shards.py", f"pairs={folder / 'pairs.jsonl'}", "--pairs", "--out", folder / "out", "--cut", 32, *given)
    assert 0 < ValidationSet.open(folder / "out" / "pairs").loss_share < 1
    table = run("inspect_shards.py", folder / "out").splitlines()
    assert [line.split()[0].rsplit("/", 1)[-1] for line in table] == ["shard", "code", "pairs", "web"]
    assert table[1].split()[1:5] == [str(len(Shard(folder / "out" / "code"))),
                                     str(Shard(folder / "out" / "code").num_tokens), "uint16", "100.0%"]  # fmt: skip
    assert "strand plort quell" in run("inspect_shards.py", folder / "out" / "pairs", "--show", 0, *given)


def test_mistakes_are_one_sentence(built: tuple[Path, str]) -> None:
    folder, _ = built
    model = folder / "out" / "tokenizer.model"
    out = ["--out", folder / "out", "--tokenizer", model]
    assert "none.jsonl does not exist" in run("text_to_shards.py", folder / "none.jsonl", *out, fails=True)
    assert "needs --tokenizer" in run("text_to_shards.py", folder / "web.jsonl", "--pairs", *out, fails=True)
    assert "there is no 10000" in run("inspect_shards.py", folder / "out" / "web", "--show", 10000, fails=True)


def test_help_names_every_kind_of_input() -> None:
    said = run("text_to_shards.py", "--help")
    for word in (".jsonl", ".parquet", "tokenizer.json", "--min-tokens", "examples:"):
        assert word in said
