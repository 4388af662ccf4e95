"""Near-duplicates: what is dropped, what is not, and how long it takes."""

import random
import time

from hypothesis import given
from hypothesis import strategies as st

from megatron_bliss.data.deduplicate import deduplicate
from tests.small_text import documents, sentences

LINES = [f"line number {number} is long enough" for number in range(8)]


def text(*numbers: int) -> str:
    return "\n".join(LINES[number] for number in numbers)


def test_more_than_half_is_dropped_and_half_is_kept() -> None:
    assert deduplicate([[text(0, 1), text(0, 2), text(0, 1, 3)]]) == [[0, 1]]


def test_held_out_groups_win_and_dropped_documents_do_not_count() -> None:
    pool = [text(0, 1, 2), text(2, 3), text(4, 5)]
    assert deduplicate([[text(0, 1)], pool]) == [[0], [1, 2]]
    assert deduplicate([pool, [text(0, 1)]]) == [[0, 1, 2], []]


def test_case_and_spacing_do_not_hide_a_duplicate() -> None:
    changed = "   " + text(0, 1).upper().replace(" ", "\t ") + "\r\n\n"
    assert deduplicate([[text(0, 1), changed]]) == [[0]]


def test_short_lines_do_not_count_unless_there_is_nothing_else() -> None:
    header = "import os\nimport sys\n"
    assert deduplicate([[header + LINES[0], header + LINES[1]]]) == [[0, 1]]
    assert deduplicate([["yes\nno", "no\nyes", "yes\nno"]]) == [[0, 1]]


@given(st.lists(st.text(max_size=50), max_size=8), st.randoms())
def test_twice_the_same_leaves_nothing_of_the_second(texts: list[str], shuffler: random.Random) -> None:
    texts = [text for text in texts if text.strip()]
    again = texts[:]
    shuffler.shuffle(again)
    first, second = deduplicate([texts, again])
    kept = {texts[index] for index in first}
    assert not any(again[index] in kept for index in second)


def test_speed() -> None:
    """40 MB in less than 10 s is asked for; a tenth of that here, in processor time."""
    group = [sentences(80, index) for index in range(900)]
    assert sum(map(len, group)) > 3_500_000
    began = time.process_time()
    deduplicate([group])
    assert time.process_time() - began < 1.0


def test_different_text_stays() -> None:
    assert deduplicate([documents(50), documents(50, seed=1)]) == [list(range(50)), list(range(50))]
