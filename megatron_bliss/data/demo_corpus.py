"""A corpus out of text that every machine with this package has: Python's standard library and the installed packages.

Documentation prose (docstrings and pydoc's topics) is the target domain; its held-out sets are whole source files
whose docstrings stand nowhere else, because code goes into the pool without its docstrings. Junk, drawn from a seed, is
harder to predict than any real domain. What is written is what `megatron-bliss demo --pool --validation --test` reads.
"""

import ast
import hashlib
import inspect
import json
import os
import random
import re
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath

from megatron_bliss.artifacts import atomic_write, digest_file, read_json, write_json
from megatron_bliss.data.deduplicate import KeptLines

# Characters of each domain in the pool, at most.
CAPS = {
    "stdlib": 5_000_000,
    "tests": 5_200_000,
    "tables": 2_000_000,
    "licences": 1_100_000,
    "headers": 2_400_000,
    "data": 900_000,
    "docs": 1_400_000,
    "junk": 3_500_000,
}
TARGET_DOMAIN = "docs"  # what the held-out sets are of
HELD_OUT = ("test", "validation")
HELD_OUT_CHARACTERS = 225_000  # of docs, in validation and test each
_FILE_CHARACTERS = 200_000  # of a single file, at most
_TABLE_BYTES = 20_000  # of a package's file, at least, that may be a table
_DOCS_CHARACTERS = 20_000  # of a single file's docstrings, at most
_TOPICS_CHARACTERS = 300_000

_TEST_FOLDERS = {"test", "tests", "idle_test", "testing", "_tests"}
_HEADER_SUFFIXES = {".h", ".hpp", ".hh", ".cuh"}
_DATA_SUFFIXES = {".json", ".yaml", ".yml", ".toml"}
_PROSE_SUFFIXES = {".md", ".rst"}
_PROSE_NAMES = re.compile(r"LICEN[SC]E|COPYING|NOTICE|README|METADATA|AUTHORS|CHANGE|HISTORY", re.IGNORECASE)
_FRAGMENT = re.compile(r" ?[A-Za-z]{1,5}|[^\w\s]{1,2}|\d|\s+")
_MACHINE_FILES = {"direct_url.json", "build-details.json"}  # they hold paths of this machine
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_SKIPPED = {"__pycache__", "site-packages", "dist-packages", "megatron_bliss", "node_modules"}


@dataclass(frozen=True, order=True)
class SourceFile:
    """A file by the root it was found in and its path below that, the same on every machine."""

    root: str  # stdlib | packages | include
    relative: str  # with slashes
    path: str

    @property
    def parts(self) -> tuple[str, ...]:
        return PurePosixPath(self.relative).parts


def find_files() -> list[SourceFile]:
    """Every file of the standard library, the installed packages and Python's headers, sorted."""
    paths = sysconfig.get_paths()
    roots = {"stdlib": paths["stdlib"], "packages": paths["purelib"], "include": paths["include"]}
    found = []
    for root, top in roots.items():
        for folder, names, files in os.walk(top):
            names[:] = [name for name in names if name not in _SKIPPED and not name.startswith(".")]
            for name in files:
                path = os.path.join(folder, name)
                found.append(SourceFile(root, os.path.relpath(path, top).replace(os.sep, "/"), path))
    return sorted(found)


def kind_of(file: SourceFile) -> str | None:
    """The domain a file may belong to by its name: one of CAPS, `package` for code of packages, or None."""
    *folders, name = file.parts
    if name in _MACHINE_FILES or name.startswith("_sysconfig"):
        return None
    suffix = PurePosixPath(name).suffix.lower()
    if suffix == ".py":
        if _TEST_FOLDERS & set(folders) or name.startswith("test_") or name == "conftest.py":
            return "tests"
        if file.root == "packages":
            return "package"
        if folders == ["encodings"] or file.relative == "html/entities.py":
            return "tables"
        return None if "pydoc_data" in folders else "stdlib"
    if suffix in _HEADER_SUFFIXES:
        return "headers"
    if suffix in _DATA_SUFFIXES:
        return "data"
    if suffix in _PROSE_SUFFIXES or (_PROSE_NAMES.match(name) and suffix in ("", ".txt", ".apache", ".bsd", ".mit")):
        return "licences"
    return None


def is_table(text: str) -> bool:
    """Whether a source file is mostly literals: generated tables, colour maps, code pages."""
    return sum(map(text.count, "0123456789")) > 0.12 * len(text)


def read_text(path: str, limit: int = _FILE_CHARACTERS) -> str | None:
    """The text of a file, up to a line's end before `limit` characters; None if it is not text in UTF-8."""
    try:
        with open(path, encoding="utf-8") as stream:
            text = stream.read(limit + 1)
    except (OSError, UnicodeDecodeError):
        return None
    if "\x00" in text:
        return None
    return cut_at_line(text, limit)


def cut_at_line(text: str, limit: int) -> str:
    """At most `limit` characters, whole lines if there are any."""
    if len(text) <= limit:
        return text
    return text[: text.rfind("\n", 0, limit) + 1 or limit]


def split_docstrings(source: str) -> tuple[str, str]:
    """Code without the docstrings that have lines of their own, and the docstrings as prose, a paragraph between two.

    :raises SyntaxError: if it is no Python of this version.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of other people's code
        statements = list(_docstrings(ast.parse(source)))
    prose = [inspect.cleandoc(text) for text, _, _ in statements if len(text) >= 80]
    lines = source.split("\n")  # as Python counts them; splitlines() also splits at form feeds
    for _, first, last in reversed(statements):
        block = "\n".join(lines[first - 1 : last]).strip()
        if block.endswith(('"', "'")) and re.match(r"[rRuU]?['\"]", block):
            del lines[first - 1 : last]
    return "\n".join(lines), "\n\n".join(prose)


def _docstrings(node: _Documented) -> Iterator[tuple[str, int, int]]:
    """Text, first and last line of the docstrings of a module and all in it, in order."""
    for position, child in enumerate(node.body):
        if isinstance(child, _Documented):
            yield from _docstrings(child)
        elif position == 0 and isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            text = child.value.value
            if isinstance(text, str):
                yield text, child.lineno, child.end_lineno or child.lineno


def collect(seed: int) -> dict[str, list[str]]:
    """Documents of each domain of the pool, of `validation` and of `test`; the same for the same files and seed."""
    files: dict[str, list[SourceFile]] = defaultdict(list)
    for file in sorted(find_files(), key=lambda file: _draw(seed, f"{file.root}/{file.relative}")):
        files[kind_of(file) or ""].append(file)
    stdlib = [split for file in files["stdlib"] if (split := _split(file))]
    prose = [text for _, text in stdlib if text] + list(_package_prose(files["package"]))
    random.Random(f"{seed} prose").shuffle(prose)  # noqa: S311 (not cryptography)
    kept = KeptLines()
    source_files = iter(prose)  # used up in turn, so no source file is in two of the sets
    corpus = {name: _take(source_files, HELD_OUT_CHARACTERS, kept) for name in HELD_OUT}
    candidates: dict[str, Iterable[str]] = {
        "docs": chain(_topics(seed), source_files),
        "stdlib": (code for code, _ in stdlib),
        "tables": chain(_texts(files["tables"]), filter(is_table, _texts(files["package"], _TABLE_BYTES))),
        "tests": _texts(files["tests"]),
        "licences": _texts(files["licences"]),
        "headers": _texts(files["headers"]),
        "data": _texts(files["data"]),
    }
    corpus |= {name: _take(texts, CAPS[name], kept) for name, texts in candidates.items()}
    corpus["junk"] = list(make_junk(chain.from_iterable(corpus[name] for name in candidates), CAPS["junk"], seed))
    return {name: texts for name, texts in corpus.items() if texts}


def _draw(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()


def _take(texts: Iterable[str], cap: int, kept: KeptLines) -> list[str]:
    """Texts up to `cap` characters in all, without near-duplicates of anything taken before."""
    taken: list[str] = []
    left = cap
    for text in texts:
        part = cut_at_line(text, left)
        if part.strip() and kept.admit(part):
            taken.append(part)
            left -= len(part)
        if left <= 0:
            break
    return taken


def _texts(files: Iterable[SourceFile], min_bytes: int = 1) -> Iterator[str]:
    for file in files:
        if os.path.getsize(file.path) >= min_bytes and (text := read_text(file.path)):
            yield text


def _split(file: SourceFile) -> tuple[str, str] | None:
    text = read_text(file.path, limit=10 * _FILE_CHARACTERS)  # a cut file is no Python
    if text is None:
        return None
    try:
        code, prose = split_docstrings(text)
    except SyntaxError:
        return None
    return cut_at_line(code, _FILE_CHARACTERS), cut_at_line(prose, _DOCS_CHARACTERS)


def _package_prose(files: Iterable[SourceFile]) -> Iterator[str]:
    """Docstrings of packages, until there are enough beside those of the standard library."""
    left = CAPS["docs"] - _TOPICS_CHARACTERS
    for file in files:
        if left <= 0:
            return
        text = read_text(file.path) if 4_000 <= os.path.getsize(file.path) <= 100_000 else None
        if text and text.count('"""') >= 10 and (split := _split(file)) and len(split[1]) >= 1000:
            left -= len(split[1])
            yield split[1]


def _topics(seed: int) -> Iterator[str]:
    """The texts of Python's help(), which come from one source file: for the pool only."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return
    left = _TOPICS_CHARACTERS
    for name in sorted(topics, key=lambda name: _draw(seed, name)):
        if left > 0:
            yield topics[name]
        left -= len(topics[name])


def make_junk(texts: Iterable[str], num_characters: int, seed: int) -> Iterator[str]:
    """Text that cannot be predicted: the 2000 commonest fragments of other text, each as likely as any other.

    That costs a model more a token than shuffled words or characters, or bytes in base64, whose tokens are short.
    """
    generator = random.Random(f"{seed} junk")  # noqa: S311 (not cryptography)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_FRAGMENT.findall(text[:2000]))
    fragments = [fragment for fragment, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:2000]]
    made = 0
    while made < num_characters:
        text = "".join(generator.choices(fragments, k=1200))
        made += len(text)
        yield text


def build(out: Path, seed: int) -> None:
    """Write `pool/NAME.jsonl` a domain, `validation.jsonl` and `test.jsonl` below `out`, and print a table of them.

    What an earlier call with the same seed wrote is kept, even if packages were installed since.
    """
    record = out / "corpus.json"
    if _finished(record, seed):
        return
    for stale in (out / "pool").glob("*.jsonl"):
        stale.unlink()
    files = {}
    print(f"{'domain':<12}{'documents':>10}{'MB':>8}")
    for name, texts in collect(seed).items():
        path = out / f"{name}.jsonl" if name in HELD_OUT else out / "pool" / f"{name}.jsonl"
        with atomic_write(path, "w") as stream:
            stream.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        files[str(path.relative_to(out))] = digest_file(path)
        print(f"{name:<12}{len(texts):>10}{sum(len(text.encode()) for text in texts) / 1e6:>8.2f}", flush=True)
    write_json(record, {"schema": 1, "seed": seed, "files": files})


def _finished(record: Path, seed: int) -> bool:
    if not record.is_file():
        return False
    content = read_json(record)
    return content["seed"] == seed and all(
        (record.parent / name).is_file() and digest_file(record.parent / name) == digest
        for name, digest in content["files"].items()
    )
