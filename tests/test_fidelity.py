"""Fidelity: usefulness of sequences to target and proxy, their rank correlations, and where the stage stands in a plan.

Usefulness by central differences is within 1 % of its spread of what whole gradients give, and of itself in every
layout of two ranks, where rank correlations agree to 0.01. In bfloat16 it ranks alike, with a correlation above 0.99.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bliss.config import load_config
from megatron_bliss.data.correlation import spearman, spearman_interval
from megatron_bliss.errors import UserError
from megatron_bliss.orchestration import check, state
from megatron_bliss.orchestration.cost import PoolSize, arm_costs
from megatron_bliss.orchestration.flops import TRAINING, Passes, proxy_flops, target_flops
from megatron_bliss.orchestration.plan import arms, plan
from megatron_bliss.stages import fidelity
from megatron_bliss.stages.fidelity import PROXY, TARGET
from tests.distributed import run_ranks
from tests.fake_run import fake_config
from tests.fidelity_ranks import LAYOUTS, one_rank, two_ranks
from tests.side_models import new_run
from tests.tiny_run import tiny_config

SAMPLE = 70


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fidelity")
    new_run(folder, data__sequence_length=20, fidelity__sequences=SAMPLE, target__micro_batch_size=8)
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    return run_ranks(one_rank, 1, folder, timeout=300)[0]


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.01 * expected.std())


def test_usefulness_is_the_product_of_the_gradients(one: dict[str, Any]) -> None:
    for name in (TARGET, PROXY):
        assert len(one[name]) == SAMPLE
        expected = np.array(one["by hand"][name])
        assert expected.std() > 0.2 * one[name].std()
        np.testing.assert_allclose(one[name][:8], expected, rtol=0, atol=0.01 * one[name].std())


def test_recomputed_activations_and_bfloat16_change_little(one: dict[str, Any]) -> None:
    for name in (TARGET, PROXY):
        close(one["recomputed"][name], one[name])
    np.testing.assert_array_equal(one["bf16"][TARGET], one[TARGET])
    assert (spearman(one["bf16"][PROXY], one[PROXY]) or 0) > 0.99
    assert (one["bf16"][PROXY] != one[PROXY]).any()


def test_the_results_are_of_what_was_measured(one: dict[str, Any]) -> None:
    found = one["results"]
    assert (found["sequences"], found["iteration"]) == (SAMPLE, 6)
    measured = {name: one[name] for name in (TARGET, PROXY, "scores")}
    for key, correlation in found["correlations"].items():
        first, second = key.split("_")
        assert correlation["spearman"] == spearman(measured[first], measured[second])
        assert correlation["low"] < correlation["spearman"] < correlation["high"]
    assert found["correlations"]["proxy_target"]["low"] > 0.3  # a proxy that is the target, and some noise
    assert set(found["correlations"]) == {"scores_target", "proxy_target", "scores_proxy"}


@pytest.mark.slow
def test_two_ranks_measure_the_same(folder: Path, one: dict[str, Any]) -> None:
    first, second = run_ranks(two_ranks, 2, folder, timeout=300)
    for layout in LAYOUTS:
        for name in (TARGET, PROXY):
            np.testing.assert_array_equal(first[layout][name], second[layout][name])
            close(first[layout][name], one[name])
        for key, expected in one["results"]["correlations"].items():
            assert first[layout]["results"]["correlations"][key] == pytest.approx(expected, abs=0.01)


# --- correlations


def test_an_interval_holds_the_true_correlation_as_often_as_it_says() -> None:
    """Of pairs with a rank correlation of 6/π asin(ρ/2): in 90 to 99 of 100 samples, a binomial's range (p = 0.001)."""
    random, rho = np.random.default_rng(0), 0.6
    truth, held = 6 / np.pi * np.arcsin(rho / 2), 0
    for seed in range(100):
        first = random.normal(size=60)
        second = rho * first + np.sqrt(1 - rho**2) * random.normal(size=60)
        low, high = spearman_interval(first, second, seed, num_resamples=200) or (1, 1)
        held += low <= truth <= high
    assert 87 <= held <= 100


def test_an_interval_is_drawn_by_its_seed_and_none_of_what_is_constant() -> None:
    values = np.arange(30.0)
    noisy = values + 9 * np.sin(values**2)
    assert spearman_interval(values, noisy, 1) == spearman_interval(values, noisy, 1)
    assert spearman_interval(values, noisy, 1) != spearman_interval(values, noisy, 2)
    assert spearman_interval(values, np.zeros(30), 1) is None
    measured = {TARGET: values, PROXY: values, "scores": np.zeros(30)}
    found = fidelity.judge(measured, 1)["correlations"]
    assert found["proxy_target"] == {"spearman": pytest.approx(1), "low": pytest.approx(1), "high": pytest.approx(1)}
    assert found["scores_target"] == {"spearman": None, "low": None, "high": None}


# --- plan and checks


def test_the_plan_measures_beside_the_training_and_only_the_report_waits(tmp_path: Path) -> None:
    stages = {stage.name: stage for stage in plan(fake_config(), tmp_path)}
    assert {name for name in stages if name.endswith("fidelity")} == {"round-0001/fidelity", "round-0002/fidelity"}
    assert {"round-0002/score", "round-0001/pretrain"} <= set(stages["round-0002/fidelity"].needs)
    assert [stage.name for stage in stages.values() if "round-0002/fidelity" in stage.needs] == ["report"]


@pytest.mark.parametrize("method", ["random", "all", "perplexity", "dsir"])
def test_methods_without_a_score_model_have_no_such_stage(tmp_path: Path, method: str) -> None:
    assert not [one for one in plan(fake_config(method=method), tmp_path) if one.command[0] == "fidelity"]


def test_it_can_be_turned_off_and_needs_an_llm(tmp_path: Path) -> None:
    def names(*words: str) -> list[str]:
        config = load_config(tiny_config(tmp_path), list(words))
        return [stage.name for stage in plan(config, tmp_path / "run") if stage.command[0] == "fidelity"]

    assert names("fidelity.sequences=0") == []
    assert names("method=mates") == ["round-0001/fidelity", "round-0002/fidelity"]
    assert names("warmup.target_steps=0", "bilevel.gamma=0") == ["round-0002/fidelity"]


@pytest.mark.parametrize("layout", ["pipeline_parallel", "context_parallel"])
def test_other_layouts_are_refused_at_the_start(tmp_path: Path, layout: str) -> None:
    words = [f"target.{layout}=2", "launch.nproc_per_node=2"]
    config = load_config(tiny_config(tmp_path), words)
    with pytest.raises(UserError, match=rf"target\.{layout} is 2: the stage fidelity .* set fidelity\.sequences to 0"):
        check.check(config, tmp_path / "run")
    check.check(load_config(tiny_config(tmp_path), [*words, "fidelity.sequences=0"]), tmp_path / "run")
    with pytest.raises(UserError, match=r"fidelity\.sequences is -1; it must not be below 0"):
        load_config(tiny_config(tmp_path), ["fidelity.sequences=-1"])


def test_it_may_be_changed_in_a_run_that_was_started(tmp_path: Path) -> None:
    path = tiny_config(tmp_path)
    state.prepare(load_config(path, []), tmp_path / "run")
    state.prepare(load_config(path, ["fidelity.sequences=0"]), tmp_path / "run")
    assert "sequences: 0" in (tmp_path / "run/run.yaml").read_text()


def test_its_cost_is_two_passes_and_a_gradient_of_each_model(tmp_path: Path) -> None:
    config = load_config(tiny_config(tmp_path), ["fidelity.sequences=10"])
    [main, *_] = arms(config, tmp_path / "run")
    cost = arm_costs(main, PoolSize(1200, 30_000))["round-0001/fidelity"]
    passes = TRAINING * 10 + Passes(20, 0)
    assert cost.flops == pytest.approx(32 * (proxy_flops(config, passes) + target_flops(config, passes)))
    assert (cost.sequences, cost.disk) == (60, 160)
