"""Reads a report as a browser would: which numbers it shows, where they say they are from, and what else it says."""

import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

_VOID = {"meta", "link", "br", "img"}
_UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}


@dataclass
class Page(HTMLParser):
    """`numbers`: (keys, exact value, text) of every <data>; `words`: texts that are taken from the JSON; `rest`: all
    other text outside figures."""

    numbers: list[tuple[list[Any], Any, str]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    _open: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in _VOID:
            return
        self._open.append((tag, dict(attrs)))
        if self._is_words():
            self.words.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1][0] == tag, f"<{self._open[-1][0]}> is closed by </{tag}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        names = [tag for tag, _ in self._open]
        if "svg" in names or "style" in names:
            return
        tag, attributes = self._open[-1] if self._open else ("", {})
        if tag == "data":
            exact = json.loads(attributes["value"] or "")
            self.numbers.append((json.loads(attributes["data-of"] or ""), exact, data))
        elif self._is_words():
            self.words[-1] += data
        elif tag != "title":
            self.rest.append(data)

    def _is_words(self) -> bool:
        return bool(self._open) and "words" in (self._open[-1][1].get("class") or "").split()


def read(html: str) -> Page:
    page = Page()
    page.feed(html)
    assert not page._open
    return page


def number(text: str) -> float | None:
    """What a number on the page is worth, with its unit; None for a dash."""
    if text == "–":
        return None
    if re.fullmatch(r"\d+:\d\d:\d\d", text):
        hours, minutes, seconds = map(int, text.split(":"))
        return hours * 3600 + minutes * 60 + seconds
    if text.endswith("%"):
        return float(text[:-1]) / 100
    match = re.fullmatch(r"(-?[\d.,]+(?:e[+-]\d+)?)([kMGTP]?)B?", text)
    assert match, text
    return float(match[1].replace(",", "")) * _UNITS[match[2]]


def strings(content: Any) -> set[str]:
    """Every string in a JSON value, keys among them."""
    if isinstance(content, dict):
        return set(content) | {text for value in content.values() for text in strings(value)}
    if isinstance(content, list):
        return {text for value in content for text in strings(value)}
    return {content} if isinstance(content, str) else set()
