"""Numbers in sentences."""

from megatron_bliss.wording import counted


def test_one_of_a_thing_is_not_several() -> None:
    assert [counted(n, "round") for n in (0, 1, 2)] == ["0 rounds", "1 round", "2 rounds"]
    assert [counted(n, "process") for n in (1, 12_000)] == ["1 process", "12,000 processes"]
