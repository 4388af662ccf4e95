"""What a stage's calls took, as they note it."""

import json
from pathlib import Path

import pytest

from megatron_bliss.errors import UserError
from megatron_bliss.stages.usage import recorded
from tests.distributed import run_ranks


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_call_is_a_line_but_those_that_were_refused(tmp_path: Path) -> None:
    path = tmp_path / "usage" / "score.jsonl"
    with recorded(path):
        pass
    with pytest.raises(SystemExit), recorded(path):
        raise SystemExit(3)
    with pytest.raises(UserError), recorded(path):
        raise UserError("no such run")
    first, second = lines(path)
    assert (first["ranks"], first["devices"], first["peak_device_bytes"]) == (1, 0, None)
    assert 1e7 < first["peak_host_bytes"] < 1e11
    assert second["seconds"] >= 0


def test_a_directory_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with recorded(tmp_path / "run" / "usage" / "score.jsonl"):
        pass
    assert not (tmp_path / "run").exists()


HELD = 1 << 28  # bytes, by rank 1 alone


def hold(rank: int, path: Path) -> int:
    import torch.distributed

    torch.distributed.init_process_group("gloo")
    with recorded(path):
        held = b"\1" * (HELD * rank)
    return len(held)


def test_the_peak_is_that_of_the_rank_that_took_most(tmp_path: Path) -> None:
    run_ranks(hold, 2, tmp_path / "usage" / "stage.jsonl")
    [line] = lines(tmp_path / "usage" / "stage.jsonl")
    assert line["ranks"] == 2
    assert line["peak_host_bytes"] - HELD > 1e7, "rank 0, which writes, took less than that"
