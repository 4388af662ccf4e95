"""Numbers in sentences."""


def counted(number: int, noun: str) -> str:
    """1 round, 2 rounds, 3 processes, 12,000 tokens."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"
