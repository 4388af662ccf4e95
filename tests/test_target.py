"""The LLM's checkpoints in the side processes: trained by Megatron at TP 2, read at TP 1; the evaluate stage."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests import launch
from tests.distributed import run_ranks
from tests.side_models import selected_run
from tests.target_models import read_target


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose LLM was warmed up by Megatron at TP 2 and measured on two ranks, after a decay branch."""
    folder = tmp_path_factory.mktemp("target")
    run = selected_run(folder, target__tensor_parallel=2, evaluation__max_sequences=1000)
    launch.run("megatron_bliss.cli", ["warmup-target", "--run", run], folder / "warmup.log", num_ranks=2, timeout=300)
    launch.run("tests.target_models", [run], folder / "evaluate.log", num_ranks=2, timeout=300)
    return run


@pytest.fixture(scope="module")
def found(run: Path) -> dict[str, Any]:
    return run_ranks(read_target, 1, run, timeout=300)[0]


def test_the_target_is_the_model_megatron_trained(found: dict[str, Any]) -> None:
    assert found["spread"] > 0.05
    assert found["difference"] < 1e-6
    assert found["frozen"]


def test_another_architecture_or_vocabulary_is_refused(found: dict[str, Any]) -> None:
    expected = ["num_layers 2", "ffn_hidden_size 64", "normalization LayerNorm", "padded_vocab_size 256"]
    for message, part in zip(found["refusals"], expected, strict=True):
        assert f"has {part}" in message


def test_arguments_and_parameters_of_another_function_are_refused(found: dict[str, Any]) -> None:
    expected = ["layernorm_epsilon 0.1", "squared_relu True", "qk_layernorm True", "kv_channels nowhere"]
    for message, part in zip(found["changed"], [*expected, "parameters that"], strict=True):
        assert f"has {part}" in message


def test_evaluation_is_the_mean_over_all_tokens(run: Path, found: dict[str, Any]) -> None:
    results = json.loads((run / "round-0000/evaluation/results.json").read_text())
    assert results["schema"] == 1
    assert results["iteration"] == 6
    assert results["tokens_trained"] == 6 * 4 * 32
    for name, expected in found["losses"].items():
        assert results["decay"][name] == pytest.approx(expected, rel=2e-6)
    domains = results["decay"]["domain_loss"]
    assert set(domains) == {"walk", "noise"}
    assert all(4 < loss < 6 for loss in domains.values())
