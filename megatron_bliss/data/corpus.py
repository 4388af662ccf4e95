"""From documents to a shard: tokenized in parallel, in an order that does not depend on the number of workers.

Every document ends with the tokenizer's eod id and is cut into sequences of at most `cut` tokens. Beside PREFIX.bin and
PREFIX.idx, PREFIX.json says what they were made of; it comes last, so a shard with a fitting one is complete.
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bliss.artifacts import digest_file, digest_json, read_json, write_json
from megatron_bliss.data.documents import Corpus, Document
from megatron_bliss.data.shards import ShardWriter, token_dtype
from megatron_bliss.data.tokenizers import Tokenizer, load_tokenizer
from megatron_bliss.errors import UserError
from megatron_bliss.progress import Progress
from megatron_bliss.wording import counted

_BATCH_CHARACTERS = 1 << 18  # of text sent to a worker at once
_BATCHES_AHEAD = 4  # a worker, so that reading never runs far ahead of writing

_worker_tokenizer: Tokenizer


@dataclass(frozen=True)
class Cutting:
    """How a document becomes sequences."""

    cut: int | None = None  # tokens a sequence at most; None: whole documents
    min_tokens: int = 1  # shorter sequences at the end of a document are dropped, and counted

    def __post_init__(self) -> None:
        if self.cut is not None and self.cut < 1:
            raise UserError(f"sequences of at most {self.cut} tokens cannot be cut; give 1 or more, or none at all")
        if self.cut is not None and self.min_tokens > self.cut:
            raise UserError(f"no sequence of at most {self.cut} tokens has {self.min_tokens}; lower the minimum")


@dataclass(frozen=True)
class ShardSummary:
    """PREFIX.json."""

    name: str
    tokenizer_digest: str
    vocab_size: int
    eod: int
    dtype: str
    num_documents: int
    num_empty_documents: int  # without any text: left out
    num_sequences: int
    num_tokens: int
    num_dropped_sequences: int
    num_dropped_tokens: int
    source_digest: str
    cutting: Cutting
    idx_sha256: str
    bin_sha256: str


class Encoder:
    """A tokenizer in `num_workers` processes; with one worker, in this process. Close it, or use it in a `with`."""

    def __init__(self, tokenizer: Tokenizer, num_workers: int = 1) -> None:
        self.tokenizer = tokenizer
        self.num_workers = num_workers
        self._pool: ProcessPoolExecutor | None = None
        if num_workers > 1:
            arguments = (str(tokenizer.path), tokenizer.eod_token)
            # spawn: a fork of a process that has threads (torch, CUDA) may hang
            self._pool = ProcessPoolExecutor(num_workers, get_context("spawn"), _start_worker, arguments)

    def __enter__(self) -> "Encoder":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def encode(self, documents: Iterable[Document]) -> Iterator[tuple[float, list[np.ndarray]]]:
        """Batches in order: source bytes, and ids of each document (uint16 or int32 [length], eod included)."""
        batches = _batches(documents)
        if self._pool is None:
            for size, texts in batches:
                yield size, _encode(self.tokenizer, texts)
            return
        pending: deque[tuple[float, Future[list[np.ndarray]]]] = deque()
        for size, texts in batches:
            pending.append((size, self._pool.submit(_encode_in_worker, texts)))
            if len(pending) >= _BATCHES_AHEAD * self.num_workers:
                yield _result(pending.popleft())
        yield from map(_result, pending)


def _result(pending: tuple[float, "Future[list[np.ndarray]]"]) -> tuple[float, list[np.ndarray]]:
    size, future = pending
    return size, future.result()


def _start_worker(path: str, eod_token: str | None) -> None:
    global _worker_tokenizer
    _worker_tokenizer = load_tokenizer(path, eod_token)


def _encode_in_worker(texts: list[str]) -> list[np.ndarray]:
    return _encode(_worker_tokenizer, texts)


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    dtype = token_dtype(tokenizer.vocab_size)
    return [np.array([*ids, tokenizer.eod] if text else [], dtype)
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True)]  # fmt: skip


def _batches(documents: Iterable[Document]) -> Iterator[tuple[float, list[str]]]:
    size, characters = 0.0, 0
    texts: list[str] = []
    for document in documents:
        texts.append(document.text)
        size += document.source_bytes
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield size, texts
            size, characters, texts = 0.0, 0, []
    if texts:
        yield size, texts


def cut_document(tokens: np.ndarray, cutting: Cutting) -> list[np.ndarray]:
    """Sequences of a document, [<= cut] each, in order; a tail below `min_tokens` included."""
    length = cutting.cut or max(len(tokens), 1)
    return [tokens[start : start + length] for start in range(0, len(tokens), length)]


def build_shard(corpus: Corpus, prefix: str | Path, encoder: Encoder, cutting: Cutting) -> ShardSummary:
    """Tokenize a corpus into PREFIX.bin, PREFIX.idx and PREFIX.json; nothing appears before all of it is done.

    :raises UserError: if there are no documents, or nothing is left of them.
    """
    tokenizer = encoder.tokenizer
    dtype = np.dtype(token_dtype(tokenizer.vocab_size))
    progress = Progress(f"tokenize-{re.sub(r'[^\w-]', '-', corpus.name)}", max(corpus.num_bytes // 1000, 1), "kB")
    counts = dict.fromkeys(
        ("num_documents", "num_empty_documents", "num_sequences", "num_tokens", "num_dropped_sequences",
         "num_dropped_tokens"), 0)  # fmt: skip
    read = 0.0
    with ShardWriter(prefix, dtype) as writer:
        for size, documents in encoder.encode(corpus.documents):
            for tokens in documents:
                sequences = cut_document(tokens, cutting)
                kept = [sequence for sequence in sequences if len(sequence) >= cutting.min_tokens]
                if kept:
                    writer.add_document(kept)
                num_kept = sum(map(len, kept))
                counts["num_documents"] += bool(kept)
                counts["num_empty_documents"] += not len(tokens)
                counts["num_sequences"] += len(kept)
                counts["num_tokens"] += num_kept
                counts["num_dropped_sequences"] += len(sequences) - len(kept)
                counts["num_dropped_tokens"] += len(tokens) - num_kept
            read += size
            progress.report(min(int(read / 1000), progress.total - 1), counts["num_tokens"])
        if not counts["num_sequences"]:
            raise UserError(_nothing(corpus.name, counts, cutting))
        forget(prefix)
    progress.report(progress.total, counts["num_tokens"])
    if counts["num_dropped_sequences"]:
        print(
            f"{corpus.name}: dropped {counted(counts['num_dropped_sequences'], 'sequence')} shorter than "
            f"{cutting.min_tokens} tokens, {counted(counts['num_dropped_tokens'], 'token')} in all",
            flush=True,
        )
    digests = [digest_file(Path(f"{prefix}{suffix}")) for suffix in (".idx", ".bin")]
    summary = ShardSummary(
        corpus.name, tokenizer.digest, tokenizer.vocab_size, tokenizer.eod, dtype.name, **counts,
        source_digest=corpus.digest, cutting=cutting, idx_sha256=digests[0], bin_sha256=digests[1],
    )  # fmt: skip
    write_json(Path(f"{prefix}.json"), {"schema": 1, **asdict(summary)})
    return summary


def _nothing(name: str, counts: dict[str, int], cutting: Cutting) -> str:
    if counts["num_dropped_sequences"]:
        return f"{name}: every sequence is shorter than {cutting.min_tokens} tokens; lower --min-tokens"
    if counts["num_empty_documents"]:
        return f"{name}: no text in {counted(counts['num_empty_documents'], 'document')}; check the field or column"
    return f"{name}: the input has no documents; check the path"


def forget(prefix: str | Path) -> None:
    """Remove what says something about a shard that is about to be replaced."""
    for suffix in (".json", ".mask"):
        Path(f"{prefix}{suffix}").unlink(missing_ok=True)


def finished_shard(corpus: Corpus, prefix: str | Path, tokenizer: Tokenizer, cutting: Cutting) -> ShardSummary | None:
    """The summary of a shard that was built of just this, and is still what was built; else None."""
    path = Path(f"{prefix}.json")
    if not path.is_file():
        return None
    content = {key: value for key, value in read_json(path).items() if key != "schema"}
    summary = ShardSummary(**{**content, "cutting": Cutting(**content["cutting"])})
    files = [Path(f"{prefix}{suffix}") for suffix in (".idx", ".bin")]
    if not all(file.is_file() for file in files):
        return None
    wanted = [corpus.digest, tokenizer.digest, tokenizer.eod, asdict(cutting), *map(digest_file, files)]
    found = [summary.source_digest, summary.tokenizer_digest, summary.eod, asdict(summary.cutting),
             summary.idx_sha256, summary.bin_sha256]  # fmt: skip
    return summary if digest_json(wanted) == digest_json(found) else None


def ensure_shard(corpus: Corpus, prefix: str | Path, encoder: Encoder, cutting: Cutting) -> ShardSummary:
    """`build_shard`, unless the same was done before."""
    done = finished_shard(corpus, prefix, encoder.tokenizer, cutting)
    return done or build_shard(corpus, prefix, encoder, cutting)
