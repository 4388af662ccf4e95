"""The demo's corpus: what goes where, that held-out text is nowhere else, and that junk is the hardest domain."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from megatron_bliss.data import demo_corpus
from megatron_bliss.data.deduplicate import line_keys
from megatron_bliss.data.demo_corpus import CAPS, SourceFile, build, collect, kind_of, split_docstrings
from megatron_bliss.data.documents import read_documents
from megatron_bliss.data.experiment_corpus import Prepared, prepare
from megatron_bliss.data.shards import Shard

SOURCE = '''"""Module text, which is long enough to be counted as prose by the function under test."""
import os  # noqa\x0c

class A:
    r"""Class text over
    several lines, also long enough to be counted as prose by the function.
    """

    x = """no docstring"""

    def f(self): "one line, together with code, and long enough to be counted as prose ........."

    async def g(self):
        """Short."""
        return \'\'\'text\'\'\'
'''


def test_docstrings_are_parted_from_code() -> None:
    code, prose = split_docstrings(SOURCE)
    for gone in ("Module text", "Class text", "Short."):
        assert gone not in code
    for kept in ('x = """no docstring"""', "import os", "one line, together", "return '''text'''"):
        assert kept in code
    assert prose.split("\n\n")[:2] == [
        "Module text, which is long enough to be counted as prose by the function under test.",
        "Class text over\nseveral lines, also long enough to be counted as prose by the function.",
    ]
    with pytest.raises(SyntaxError):
        split_docstrings("print 'python 2'")


def test_docstrings_of_a_file_with_form_feeds() -> None:
    code, _ = split_docstrings('x = 1\n\x0c\ny = 2\n\x0cdef f():\n    """Gone."""\n    return x\n')
    assert code == "x = 1\n\x0c\ny = 2\n\x0cdef f():\n    return x\n"


@pytest.mark.parametrize(
    ("root", "relative", "kind"),
    [
        ("stdlib", "json/decoder.py", "stdlib"),
        ("stdlib", "test/test_json/test_decode.py", "tests"),
        ("stdlib", "encodings/cp037.py", "tables"),
        ("stdlib", "html/entities.py", "tables"),
        ("stdlib", "pydoc_data/topics.py", None),
        ("stdlib", "_sysconfigdata__linux_x86_64-linux-gnu.py", None),
        ("packages", "numpy/linalg/linalg.py", "package"),
        ("packages", "numpy/linalg/tests/test_linalg.py", "tests"),
        ("packages", "torch/include/ATen/Context.h", "headers"),
        ("packages", "a-1.dist-info/METADATA", "licences"),
        ("packages", "a-1.dist-info/licenses/LICENSE.txt", "licences"),
        ("packages", "a-1.dist-info/direct_url.json", None),
        ("packages", "a-1.dist-info/RECORD", None),
        ("packages", "torchgen/native_functions.yaml", "data"),
        ("packages", "torch/lib/libtorch.so", None),
    ],
)
def test_kinds_of_files(root: str, relative: str, kind: str | None) -> None:
    assert kind_of(SourceFile(root, relative, "/" + relative)) == kind


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[str]]:
    """The built-in corpus, small: every cap is a tenth, and a third of the files is looked at."""
    some = demo_corpus.find_files()[::3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_corpus, "find_files", lambda: some)
        patch.setattr(demo_corpus, "CAPS", {name: cap // 10 for name, cap in CAPS.items()})
        patch.setattr(demo_corpus, "HELD_OUT_CHARACTERS", 60_000)
        patch.setattr(demo_corpus, "_TOPICS_CHARACTERS", 30_000)
        return collect(seed=3)


def test_every_domain_is_there_within_its_cap(corpus: dict[str, list[str]]) -> None:
    sizes = {name: sum(map(len, texts)) for name, texts in corpus.items()}
    assert set(sizes) == {*CAPS, "validation", "test"}
    for name, cap in CAPS.items():
        assert 0.5 * cap / 10 < sizes[name] <= cap / 10 + 10_000, name
    assert sizes["validation"] == pytest.approx(60_000, rel=0.02)
    assert sizes["test"] == pytest.approx(60_000, rel=0.02)
    assert 0.14 < sizes["junk"] / sum(sizes[name] for name in CAPS) < 0.18


def test_held_out_text_is_nowhere_else(corpus: dict[str, list[str]]) -> None:
    keys = {name: [key for text in texts for key, _ in line_keys(text)] for name, texts in corpus.items()}
    pool = {key for name in CAPS for key in keys[name]}
    for name in ("validation", "test"):
        shared = sum(key in pool for key in keys[name]) / len(keys[name])
        assert shared < 0.03, f"{shared:.1%} of the lines of {name} stand in the pool, too"
    assert len(set(keys["validation"]) & set(keys["test"])) < 0.03 * len(keys["test"])


@pytest.fixture(scope="module")
def prepared(corpus: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_corpus, "collect", lambda seed: corpus)
        build(folder / "text", seed=3)
    text = folder / "text"
    return prepare(
        text / "pool",
        text / "validation.jsonl",
        text / "test.jsonl",
        folder / "shards",
        vocab_size=1024,
        cut=128,
        seed=3,
    )


def test_written_and_prepared_like_any_corpus(prepared: Prepared, corpus: dict[str, list[str]]) -> None:
    assert set(prepared.pool) == set(CAPS)
    for prefix in prepared.prefixes:
        assert Shard(prefix).sequence_lengths.max() <= 128
    folder = Path(prepared.tokenizer).parent.parent / "text"
    assert [document.text for document in read_documents(folder / "pool" / "docs.jsonl")] == corpus["docs"]


def test_text_that_was_written_is_kept_and_another_seed_or_a_damage_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []
    monkeypatch.setattr(demo_corpus, "collect", lambda seed: seeds.append(seed) or {"a": [str(seed)], "test": ["x"]})
    for seed in (1, 1, 2):
        build(tmp_path, seed)
    assert seeds == [1, 2]
    (tmp_path / "pool" / "a.jsonl").write_text("")
    build(tmp_path, 2)
    assert seeds == [1, 2, 2]
    assert (tmp_path / "pool" / "a.jsonl").read_text() == '{"text": "2"}\n'


def test_junk_is_harder_than_any_real_domain(prepared: Prepared) -> None:
    """Loss of each sequence per token under a bigram model that was fitted to the other half of each domain."""
    vocab = prepared.vocab_size
    shards = {name: Shard(prefix) for name, prefix in prepared.pool.items()}
    counts = np.zeros((vocab, vocab))
    for shard in shards.values():
        train = np.concatenate([shard[i] for i in range(0, len(shard), 2)])
        np.add.at(counts, (train[:-1], train[1:]), 1)
    single = (counts.sum(0) + 1) / (counts.sum() + vocab)
    losses = -np.log((counts + 100 * single) / (counts.sum(1, keepdims=True) + 100))
    held = {
        name: [losses[shard[i][:-1], shard[i][1:]].mean() for i in range(1, len(shard), 2) if len(shard[i]) >= 32]
        for name, shard in shards.items()
    }
    # how hard the hardest real text is depends on the packages of the environment
    junk = np.quantile(held.pop("junk"), 0.5)
    hardest = {name: np.quantile(values, 0.9) for name, values in held.items()}
    assert junk > max(hardest.values()), (junk, hardest)


def make_tree(root: Path) -> dict[str, str]:
    """A tiny machine: a standard library and packages; its sysconfig paths."""
    files = {
        "lib/good.py": "x = 1\n" * 30,
        "lib/other.py": '"""' + "Prose of a module that goes on for a while. " * 4 + '"""\nimport os\n',
        "lib/latin.py": b"# \xe9\xe8\n",
        "lib/zero.py": "x = '\x00'\n",
        "lib/python2.py": "print 'x'\n",
        "lib/test/test_a.py": "def test_a():\n    assert 1 + 1 == 2\n",
        "lib/site-packages/pkg/__init__.py": "y = 2\n",
        "lib/site-packages/pkg-1.dist-info/METADATA": "Name: pkg\n",
        "lib/site-packages/pkg/big.json": json.dumps(list(range(100_000)), indent=0),
    }
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return {"stdlib": str(root / "lib"), "purelib": str(root / "lib/site-packages"), "include": str(root / "none")}


def test_the_same_files_anywhere_give_the_same_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name in ("one", "two/deeper"):
        paths = make_tree(tmp_path / name)
        monkeypatch.setattr(sysconfig, "get_paths", lambda paths=paths: paths)
        found.append(collect(seed=5))
    assert found[0] == found[1]
    real = {name: texts for name, texts in found[0].items() if name not in ("docs", "junk", "test", "validation")}
    assert set(real) == {"stdlib", "tests", "licences", "data"}
    assert not any("\x00" in text or "print 'x'" in text for texts in real.values() for text in texts)
    assert 190_000 < len(real["data"][0]) <= 200_000
    assert real["data"][0].endswith("\n")
    assert collect(seed=6)["junk"] != found[0]["junk"]
