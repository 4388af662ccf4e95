"""Documents out of files: jsonl, parquet, and plain text files or directories of them."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_bliss.artifacts import digest_bytes, digest_json
from megatron_bliss.errors import UserError


@dataclass(frozen=True)
class Document:
    text: str
    source_bytes: float  # of the input that this document stands for; they add up to Corpus.num_bytes


@dataclass(frozen=True)
class Corpus:
    """Documents that can be read once or more often, in the same order each time."""

    name: str
    documents: Iterable[Document]
    num_bytes: int
    digest: str  # of the list of sources

    def sample(self, max_characters: int) -> Iterator[str]:
        """The first texts, `max_characters` in all at most."""
        left = max_characters
        for document in self.documents:
            if left <= 0:
                return
            yield document.text[:left]
            left -= len(document.text)


@dataclass(frozen=True)
class _Files:
    paths: list[Path]
    field: str

    def __iter__(self) -> Iterator[Document]:
        for path in self.paths:
            yield from read_documents(path, self.field)


def corpus_from_files(name: str, paths: Iterable[str | Path], field: str = "text") -> Corpus:
    """All documents of some files and directories (searched for files, in sorted order).

    The digest is of the files' names, bytes and times, so that a large corpus need not be read twice.

    :param field: of a jsonl line, or the column of a parquet file, that holds the text.
    :raises UserError: if a path does not exist or holds no file.
    """
    files = [file for path in paths for file in _find_files(Path(path))]
    stats = [file.stat() for file in files]
    listing = [[file.name, stat.st_size, stat.st_mtime_ns] for file, stat in zip(files, stats, strict=True)]
    return Corpus(name, _Files(files, field), sum(stat.st_size for stat in stats), digest_json([field, listing]))


def corpus_from_texts(name: str, texts: list[str]) -> Corpus:
    """Documents in memory; the digest is of their text."""
    encoded = [text.encode() for text in texts]
    documents = [Document(text, len(data)) for text, data in zip(texts, encoded, strict=True)]
    return Corpus(name, documents, sum(map(len, encoded)), digest_bytes(*encoded))


def read_documents(path: Path, field: str = "text") -> Iterator[Document]:
    """Read one file by its suffix: .jsonl, .parquet, or anything else as one document.

    :raises UserError: naming file and line for what is not a document.
    """
    if path.suffix == ".jsonl":
        for number, record, size in read_jsonl(path):
            yield Document(text_field(path, number, record, field), size)
    elif path.suffix == ".parquet":
        yield from _read_parquet(path, field)
    else:
        try:
            yield Document(path.read_text(encoding="utf-8"), path.stat().st_size)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, byte {error.start}, is not UTF-8; convert the file or leave it out") from None


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, object], int]]:
    """Line number (from 1), object and bytes of each line; blank lines are passed over.

    :raises UserError: naming file and line, for a line that is not a JSON object in UTF-8.
    """
    try:
        stream = open(path, "rb")  # noqa: SIM115 (closed by the with below)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give the path of a jsonl file") from None
    with stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:  # of decoding, too
                raise UserError(f"{path}:{number} is not JSON ({error}); mend or remove the line") from None
            if not isinstance(record, dict):
                raise UserError(f"{path}:{number} is not a JSON object; write one object with named fields a line")
            yield number, record, len(line)


def text_field(path: Path, number: int, record: dict[str, object], field: str) -> str:
    """:raises UserError: naming file and line, if the field is missing, no string, or not valid Unicode."""
    value = record.get(field)
    if not isinstance(value, str):
        found = f"has {type(value).__name__} in field" if field in record else "has no field"
        raise UserError(f"{path}:{number} {found} {field!r}; a string is needed there")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{path}:{number}: character {error.start} of {field!r} is half a surrogate pair; mend the line"
            ) from None
    return value


def _find_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"input {path} does not exist; give a file or a directory")
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise UserError(f"input directory {path} holds no files; give one with text, jsonl or parquet files")
    return files


def _read_parquet(path: Path, column: str) -> Iterator[Document]:
    import pyarrow  # here, because it takes long to import and most corpora are not parquet
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a parquet file ({error}); copy it again or leave it out") from None
    with file:
        if column not in file.schema_arrow.names:
            raise UserError(f"{path} has no column {column!r}; it has {', '.join(file.schema_arrow.names)}")
        size = path.stat().st_size / max(file.metadata.num_rows, 1)
        row = 0
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            for value in batch.column(0).to_pylist():
                row += 1
                if not isinstance(value, str):
                    raise UserError(f"{path}, row {row}: column {column!r} holds {value!r}; a string is needed there")
                yield Document(value, size)
