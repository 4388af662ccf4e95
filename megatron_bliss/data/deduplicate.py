"""Near-duplicate removal by lines, in one pass and with the same result on every machine.

A document is dropped when more than half of it, counted in characters of lines of at least 20 characters, stands in
documents that were kept before it. Lines are compared with white space and case evened out. A document without a
line that long counts as one line.
"""

import hashlib
from collections.abc import Iterable, Sequence

MIN_LINE_CHARACTERS = 20


def line_keys(text: str) -> list[tuple[bytes, int]]:
    """A 64-bit key and the length in characters of every line that counts."""
    normalised = [" ".join(line.split()) for line in text.lower().splitlines()]
    lines = [line for line in normalised if len(line) >= MIN_LINE_CHARACTERS] or [" ".join(normalised)]
    blake2b = hashlib.blake2b
    return [(blake2b(line.encode("utf-8", "replace"), digest_size=8).digest(), len(line)) for line in lines]


class KeptLines:
    """The lines of all documents kept so far; 8 bytes of content each."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def share_seen(self, keys: list[tuple[bytes, int]]) -> float:
        """The part of a document's characters, 0 to 1, that stands in kept documents."""
        total = sum(length for _, length in keys)
        return sum(length for key, length in keys if key in self._seen) / total if total else 0.0

    def admit(self, text: str) -> bool:
        """Keep a document, unless more than half of it was seen before."""
        keys = line_keys(text)
        if self.share_seen(keys) > 0.5:
            return False
        self._seen.update(key for key, _ in keys)
        return True


def deduplicate(groups: Iterable[Sequence[str]]) -> list[list[int]]:
    """Indices of the documents kept in each group. Earlier groups win: put held-out sets before the pool."""
    kept = KeptLines()
    return [[index for index, text in enumerate(group) if kept.admit(text)] for group in groups]
