"""MATES: single optimizer steps and the score model fitted to what they do, on Megatron models of one and two ranks.

Influences of float32 models are differences of two losses near 5, which rounding moves by some 1e-7: they agree to
1e-5, where their spread is above 1e-3. Data-parallel ranks probe sequences of their own and agree to the bit.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_bliss.bilevel.optimizer import AdamSettings, Optimizer
from megatron_bliss.bilevel.probe import Probe
from megatron_bliss.bilevel.space import ParameterSpace
from megatron_bliss.config import load_config
from megatron_bliss.errors import UserError
from megatron_bliss.methods.mates import Mates
from megatron_bliss.orchestration.plan import plan
from tests.distributed import run_ranks
from tests.influence_ranks import LAYOUTS, one_rank, two_ranks
from tests.side_models import selected_run
from tests.test_tracking import board
from tests.tiny_run import tiny_config

TOLERANCE = 1e-5  # nats, of float32 influences
SAMPLE = 120


def test_a_probe_takes_a_step_of_adam_and_takes_it_back() -> None:
    """In float64 against torch's AdamW, from the state that five steps of it have left; two probes in a row."""
    torch.manual_seed(0)
    x, y, z = (torch.randn(8, 3, dtype=torch.float64) for _ in range(3))
    models = [torch.nn.Linear(3, 3).double() for _ in range(2)]
    settings = AdamSettings(lr=0.1, weight_decay=0.1, betas=(0.9, 0.95), clip_grad=1e-2)

    def loss(model: torch.nn.Module, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        return (model(inputs) - outputs).square().mean()

    def adam(model: torch.nn.Module) -> torch.optim.AdamW:
        return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, betas=(0.9, 0.95))

    theirs, optimizer = models[0], adam(models[0])

    def train(inputs: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss(theirs, inputs, y).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1e-2)
        optimizer.step()

    for _ in range(5):
        train(x)
    states = [optimizer.state[parameter] for parameter in theirs.parameters()]
    state = {name: [s[name].clone() for s in states] for name in ("exp_avg", "exp_avg_sq")}
    state["master"] = [parameter.detach().clone() for parameter in theirs.parameters()]
    ours = models[1]
    space = ParameterSpace(list(ours.parameters()))
    inner = Optimizer(space, adam(ours), list(ours.parameters()), settings)
    probe = Probe(inner, state, 5, lambda: loss(ours, z, z).detach())
    found = []
    for _ in range(2):
        gradient = torch.autograd.grad(loss(ours, z, y), list(ours.parameters()))
        found.append(float(probe.influence(list(gradient))))
        for name, vector in {"master": space.masters, **inner.moments()}.items():
            assert all(torch.equal(a, b) for a, b in zip(vector, state[name], strict=True)), name
    before = loss(theirs, z, z).item()
    train(z)
    # torch adds 1e-6 to the norm that it clips by
    assert found[0] == found[1] == pytest.approx(before - loss(theirs, z, z).item(), rel=1e-5)
    assert abs(found[0]) > 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to its warm-up's selection; sequences are longer than a window."""
    folder = tmp_path_factory.mktemp("influence")
    selected_run(
        folder, method="mates", data__sequence_length=20, warmup__proxy_steps=60, target__log_interval=5,
        mates__sample_size=SAMPLE, mates__reference_sequences=16, mates__held_out=0.2, mates__fit_batch_size=8,
        mates__fit_lr=1e-3, mates__fit_epochs=3, mates__checkpoint_interval=16,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    return run_ranks(one_rank, 1, folder, timeout=600)[0]


def test_influences_are_those_of_torchs_adam(one: dict[str, Any]) -> None:
    assert one["influence"].std() > 100 * TOLERANCE
    np.testing.assert_allclose(one["influence"][:6], one["by hand"], rtol=0, atol=TOLERANCE)


def test_a_step_on_noise_helps_less(one: dict[str, Any]) -> None:
    domains, influences = np.array(one["domains"]), one["influence"]
    walk, noise = influences[domains == "walk"], influences[domains == "noise"]
    assert min(len(walk), len(noise)) > 40
    assert np.mean(walk[:, None] > noise[None, :]) > 0.65  # the area under the curve


def test_the_score_model_ranks_what_was_held_out(one: dict[str, Any]) -> None:
    planted, fit = one["planted"], one["fit"]
    assert (planted["fitted"], planted["held_out"]) == (96, 24)
    assert planted["held_out_spearman"] > 0.5
    assert fit["fitted_spearman"] > 0.5
    scores = np.concatenate([values[~np.isnan(values)] for values in one["scores"].values()])
    assert abs(scores.mean()) < 1  # in standard deviations of the influence
    assert scores.std() > 0.05


def test_nothing_is_left_of_a_probing_step(one: dict[str, Any]) -> None:
    for restored, dtype in zip(one["restored"], ("torch.float32", "torch.bfloat16"), strict=True):
        assert restored["dtypes"] == [dtype]
        assert restored["same"]
        first, second, again = restored["influences"]
        assert first == again != second


def test_a_kill_changes_no_byte(one: dict[str, Any]) -> None:
    killed = one["killed"]
    assert (killed["reached"], killed["fitted"]) == (16, 16)
    assert killed["calls"] == 30 + SAMPLE - 16
    for name in ("influence", "fit", "metrics", "scores"):
        np.testing.assert_equal(killed[name], one[name])


def test_two_ranks_measure_and_fit_the_same(folder: Path, one: dict[str, Any]) -> None:
    first, second = run_ranks(two_ranks, 2, folder, timeout=600)
    np.testing.assert_array_equal(first["dp"]["influence"], one["influence"])
    np.testing.assert_allclose(first["sp"]["influence"], one["influence"], rtol=0, atol=TOLERANCE)
    for layout in LAYOUTS:
        np.testing.assert_array_equal(first[layout]["influence"], second[layout]["influence"])
        found, expected = (
            [json.loads(line)["loss"] for line in text.splitlines()]
            for text in (first[layout]["metrics"], one["metrics"])
        )
        np.testing.assert_allclose(found, expected, rtol=1e-3)
        assert first[layout]["fit"]["fitted_spearman"] == pytest.approx(one["fit"]["fitted_spearman"], abs=0.01)
    lines = [json.loads(line) for line in first["dp"]["metrics"].splitlines()]
    tracked = board(folder / "run-dp", "round-0001/fit-influence", "loss")
    assert tracked == pytest.approx({line["step"]: line["loss"] for line in lines}, rel=1e-6)


def test_the_plan_probes_before_it_fits_and_scores(tmp_path: Path) -> None:
    config = load_config(tiny_config(tmp_path), ["method=mates"])
    needs = {stage.name: stage.needs for stage in plan(config, tmp_path / "run")}
    assert needs["round-0002/influence"] == ("inventory", "warmup-proxy")
    assert needs["round-0002/fit-influence"] == ("inventory", "warmup-proxy", "round-0002/influence")
    assert "round-0002/fit-influence" in needs["round-0002/score"]


def test_a_threshold_does_not_go_with_noise(tmp_path: Path) -> None:
    words = ["method=mates", "selection.threshold=0", "selection.fraction=null", "controls=[]"]
    with pytest.raises(UserError, match=r"mates\.temperature is 1\.0.*set it to 0"):
        load_config(tiny_config(tmp_path), words)
    settings = load_config(tiny_config(tmp_path), [*words, "mates.temperature=0"]).selection
    assert Mates(0.5).settings(settings).temperature == 0.5
