"""Several validation sets: their weights by hand, settings, files, and the bilevel stage on one and two ranks."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_bliss.artifacts import RunPaths, read_json
from megatron_bliss.bilevel.set_weights import SetWeights, exponentiated_gradient
from megatron_bliss.config import ControlConfig, DataConfig, ValidationSetConfig, control_config, load_config
from megatron_bliss.data.inventory import Inventory
from megatron_bliss.data.validation import ValidationSet
from megatron_bliss.errors import UserError
from megatron_bliss.mcore.online_data import ValidationSamples
from megatron_bliss.stages import bilevel, inventory, ngrams, select, warmup_proxy
from megatron_bliss.stages.evaluate import over_sets, refuse_divergence
from tests.bilevel_ranks import kill_bilevel
from tests.distributed import run_ranks
from tests.side_models import edit_config
from tests.tiny_run import tiny_config, write_chain_shard

NEEDED = ["data.tokenizer.vocab_size=100", "data.pool=[{name: web, prefixes: [w]}]"]
TWO = ["data.validation_sets.easy={prefix: e, weight: 3}", "data.validation_sets.hard={prefix: h}"]
STEPS = 6


# --- weights


def test_exponentiated_gradient_by_hand() -> None:
    weights, losses = torch.tensor([0.75, 0.25], dtype=torch.float64), torch.tensor([1.0, 3.0], dtype=torch.float64)
    a, b = 0.75 * math.exp(0.5 * 1), 0.25 * math.exp(0.5 * 3)
    found = exponentiated_gradient(weights, losses, 0.5)
    assert found.tolist() == pytest.approx([a / (a + b), b / (a + b)], rel=1e-12)
    assert torch.equal(exponentiated_gradient(weights, torch.tensor([1.0, math.inf]), 0.5), weights)
    gone = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for _ in range(10):
        gone = exponentiated_gradient(gone, torch.tensor([0.0, 3.0], dtype=torch.float64), 1.0)
    assert gone[1] > 0.8


def test_weights_follow_the_losses_of_earlier_steps() -> None:
    moving, fixed = (SetWeights({"a": 0.5, "b": 0.5}, rate) for rate in (1.0, 0.0))
    losses = torch.tensor([1.0, 2.0])
    first = moving.take_in(losses)
    assert float(first.value) == 1.5
    assert first.weights.tolist() == [0.5, 0.5]
    share = math.e / (1 + math.e)
    assert float(moving.take_in(losses).value) == pytest.approx((1 - share) + 2 * share)
    assert float(fixed.take_in(losses).value) == float(fixed.take_in(losses).value) == 1.5


def test_loss_over_sets() -> None:
    data = DataConfig(validation_sets={"a": ValidationSetConfig("a", 3.0), "b": ValidationSetConfig("b")})
    losses = {"a": 2.0, "b": 4.0}
    found = over_sets(losses, data)
    assert found["validation_loss"] == 2.5
    assert found["validation_sets"] == {"a": {"loss": 2.0, "weight": 0.75}, "b": {"loss": 4.0, "weight": 0.25}}
    worst = over_sets(losses, replace(data, validation_weighting="worst-case"))
    assert worst["validation_loss"] == 4.0
    assert [one["weight"] for one in worst["validation_sets"].values()] == [0.0, 1.0]
    assert over_sets({"validation": 2.0}, DataConfig(validation="a")) == {"validation_loss": 2.0}


# --- settings


def test_a_loss_that_is_no_number_ends_the_evaluation() -> None:
    losses: dict[str, dict[str, float | None]] = {"validation": {"validation": 2.0}, "test": {"": None}}
    refuse_divergence(losses, Path("iter_0000007"))
    for value in (math.nan, math.inf):
        with pytest.raises(UserError, match=r"loss of iter_0000007 on the domain set web is (nan|inf): .*target\.lr"):
            refuse_divergence(losses | {"domain": {"web": value}}, Path("iter_0000007"))


def test_one_set_or_several() -> None:
    data = load_config(None, [*NEEDED, *TWO]).data
    assert data.validation_prefixes == {"easy": "e", "hard": "h"}
    assert data.validation_weights == {"easy": 0.75, "hard": 0.25}
    one = load_config(None, [*NEEDED, "data.validation=v"]).data
    assert (one.validation_prefixes, one.validation_weights) == ({"validation": "v"}, {"validation": 1.0})
    for settings, error in (
        (NEEDED, "nothing says what the selection is to help; give data.validation=PREFIX"),
        ([*NEEDED, *TWO, "data.validation=v"], "data.validation and data.validation_sets says"),
        ([*NEEDED, *TWO, "data.validation_weighting=uniform"], "'uniform' and data.validation_sets has weights"),
        ([*NEEDED, *TWO, "data.validation_weighting=worst"], "must be one of given, uniform, worst-case"),
        ([*NEEDED, *TWO, "data.validation_rate=0"], "data.validation_rate is 0.0; it must be above 0"),
        ([*NEEDED, "data.validation_sets.a={prefix: a, weight: 0}"], "set 'a' has weight 0.0; it must be above 0"),
        ([*NEEDED, "data.validation_sets.a={weight: 1}"], "without a value: data.validation_sets.a.prefix"),
        ([*NEEDED, "data.validation_sets={'a/b': {prefix: a}}"], "names a set 'a/b'"),
    ):
        with pytest.raises(UserError) as raised:
            load_config(None, list(settings))
        assert error in str(raised.value)


def test_an_arm_may_have_other_sets() -> None:
    main = load_config(None, [*NEEDED, *TWO])

    def arm(**settings: Any) -> DataConfig:
        return control_config(main, ControlConfig(name="x", settings={"data": settings}), Path("run")).data

    assert arm(validation="v").validation_prefixes == {"validation": "v"}
    assert arm(validation_sets={"easy": {"weight": 1}}).validation_weights == {"easy": 0.5, "hard": 0.5}
    assert arm(validation_weighting="worst-case").validation_prefixes == main.data.validation_prefixes
    one = load_config(None, [*NEEDED, "data.validation=v"])
    sets = {"data.validation_sets": {"a": {"prefix": "a"}}}
    assert control_config(one, ControlConfig(name="x", settings=sets), Path("run")).data.validation is None


# --- what else reads them


def sets_of(folder: Path, sizes: dict[str, int]) -> dict[str, str]:
    return {name: write_chain_shard(folder / name, size, seed=size, noise=0.1) for name, size in sizes.items()}


def test_samples_of_a_mixture_have_the_shares_of_their_sets(tmp_path: Path) -> None:
    prefixes = sets_of(tmp_path, {"small": 4, "large": 10})
    sets = [(0.75, ValidationSet.open(prefixes["small"])), (0.25, ValidationSet.open(prefixes["large"]))]
    samples = ValidationSamples(sets, 64, False, seed=1)
    assert len(samples) == 40  # 30 of the small one, 10 of the large one
    seen = [tuple(samples[index]["tokens"].tolist()) for index in range(len(samples))]
    assert len(set(seen[:30])) == 4
    assert len(set(seen[30:])) == 10
    alone = ValidationSamples([(1.0, sets[1][1])], 64, False, seed=1)
    assert [tuple(alone[index]["tokens"].tolist()) for index in range(len(alone))] == seen[30:]


# --- the stages


def start(folder: Path, **changes: Any) -> Path:
    """A run with two sets up to the warm-up's selection: one like what the proxy knows, one of random tokens."""
    run = folder / "run"
    run.mkdir(parents=True)
    shutil.copy(tiny_config(folder, control=False, rounds=1), run / "run.yaml")
    sets = {
        "easy": ValidationSetConfig(str(folder / "valid"), 3.0),
        "hard": ValidationSetConfig(write_chain_shard(folder / "hard", 40, seed=9, noise=0.95)),
    }
    edit_config(
        run, data__validation=None, data__validation_sets=sets, data__validation_weighting="worst-case",
        data__validation_rate=2.0, bilevel__gamma=0.0, bilevel__outer_steps=STEPS, bilevel__lr_proxy=1e-3, **changes,
    )  # fmt: skip
    inventory.run(run)
    select.run(run, None)
    return run


def metrics(run: Path) -> list[dict[str, float]]:
    lines = (RunPaths(run).bilevel(1) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]


def one_rank(rank: int, folder: Path) -> dict[str, Any]:
    """The stage undisturbed, and stopped between checkpoints and continued."""
    for name in ("run", "killed"):
        warmup_proxy.run(folder / name)
    bilevel.run(folder / "run", 1)
    kill_bilevel(folder / "killed", steps=4)
    bilevel.run(folder / "killed", 1)
    return {name: metrics(folder / name) for name in ("run", "killed")}


def two_ranks(rank: int, folder: Path) -> list[dict[str, float]]:
    bilevel.run(folder / "two", 1)
    return metrics(folder / "two")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sets")
    run = start(folder)
    for name in ("killed", "two"):
        shutil.copytree(run, folder / name)
    result: dict[str, Any] = run_ranks(one_rank, 1, folder, timeout=240)[0]
    shutil.copytree(RunPaths(run).warmup_proxy, RunPaths(folder / "two").warmup_proxy)
    return result | {"two": run_ranks(two_ranks, 2, folder, timeout=240)[0], "folder": run}


def test_worst_case_turns_to_the_harder_set(found: dict[str, Any]) -> None:
    steps = found["run"]
    assert len(steps) == STEPS
    weights = np.array([[step["validation_weight/easy"], step["validation_weight/hard"]] for step in steps])
    losses = np.array([[step["validation_loss/easy"], step["validation_loss/hard"]] for step in steps])
    np.testing.assert_allclose(weights[0], [0.75, 0.25])
    assert (losses[:, 1] > losses[:, 0]).all()
    expected = weights[:-1] * np.exp(2.0 * losses[:-1])
    np.testing.assert_allclose(weights[1:], expected / expected.sum(1, keepdims=True), rtol=1e-6)
    assert (np.diff(weights[:, 1]) > 0).all()
    values = [step["validation_loss"] for step in steps]
    np.testing.assert_allclose(values, (weights * losses).sum(1), rtol=1e-12)


def test_two_ranks_see_the_same_losses_and_weights(found: dict[str, Any]) -> None:
    for one, two in zip(found["run"], found["two"], strict=True):
        for name in one:
            if name.startswith("validation_"):
                assert two[name] == pytest.approx(one[name], rel=1e-4), name


def test_a_kill_changes_nothing(found: dict[str, Any]) -> None:
    assert found["killed"] == found["run"]


def test_the_inventory_holds_all_sets(found: dict[str, Any]) -> None:
    path = RunPaths(found["folder"]).inventory
    content = read_json(path)
    assert "validation" not in content
    assert list(content["validation_sets"]) == ["easy", "hard"]
    inventory = Inventory.read(path)
    assert {name: record.domain for name, record in inventory.validation.items()} == {"easy": "easy", "hard": "hard"}
    only = replace(inventory, validation={"easy": inventory.validation["easy"]})
    assert only.digest != inventory.digest


def test_ngrams_of_a_mixture(found: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(found["folder"], run)
    config = edit_config(run, method="dsir", dsir__features="tokens", dsir__ngrams=1, dsir__num_buckets=256)
    sets = Inventory.read(RunPaths(run).inventory)
    hashing = ngrams.make_hashing(config)
    mixture, _ = ngrams._count_validation(hashing, sets, config.data.validation_weights)
    parts = {}
    for name, record in sets.validation.items():
        alone = replace(sets, validation={name: record})
        counts, _ = ngrams._count_validation(hashing, alone, {name: 1.0})
        parts[name] = counts / counts.sum()
    np.testing.assert_allclose(mixture, 0.75 * parts["easy"] + 0.25 * parts["hard"], rtol=1e-12)
