"""A real two-round run as jobs on two nodes, disturbed twice, beside the same run by `megatron-bliss run`."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_bliss.config import read_saved_config
from tests.slurm.bed import slurm
from tests.slurm.chain import Chain, ranks_of_task, small_jobs

PRETRAIN, SCORE = "round-0001/pretrain", "round-0002/score"


@pytest.mark.slow
@pytest.mark.slurm
def test_a_disturbed_run_over_two_nodes_ends_as_run_does(finished: tuple[Path, Path], tmp_path: Path) -> None:
    settings, reference = finished
    config = replace(read_saved_config(settings), controls=[], launch=small_jobs())
    with slurm() as bed:
        chain = Chain(bed, tmp_path, config)
        chain.submit()
        chain.wait_for(lambda: chain.records().get(PRETRAIN, {}).get("status") == "running")
        (number,) = chain.jobs()[PRETRAIN]
        requeued = bed.call("scontrol", "requeue", number)
        assert requeued.returncode == 0, requeued.stderr
        chain.wait_for(lambda: chain.records().get(SCORE, {}).get("status") == "running")
        chain.wait_for(lambda: ranks_of_task(bed, 0))
        for rank in ranks_of_task(bed, 0):
            rank.kill()
        chain.wait()
        assert chain.is_done(), chain.cli("status", chain.run_dir)
        restarts = bed.call("scontrol", "show", "job", number).stdout
        assert "Restarts=1" in restarts
    assert (chain.run_dir / "report.html").stat().st_size > 10_000
    for number in (1, 2):
        here, there = chain.run_dir / f"round-{number:04d}", reference / f"round-{number:04d}"
        for path in sorted(there.glob("selection/*.npy")):
            assert np.array_equal(np.load(here / "selection" / path.name), np.load(path)), path
        ours, theirs = (json.loads((folder / "evaluation/results.json").read_text()) for folder in (here, there))
        # pretraining has one rank there and two here, whose gradients are summed in another order
        for name in ("validation_loss", "test_loss", "domain_loss"):
            assert ours["decay"][name] == pytest.approx(theirs["decay"][name], rel=1e-6), name
