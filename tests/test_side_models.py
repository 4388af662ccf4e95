"""Proxy and score model under tensor, sequence and data parallelism; their checkpoints, warm-up and scoring.

Everything is float32 on two gloo ranks; one rank gives the reference. Sums are taken in another order, so values agree
to a few units in the last place of the largest: 2e-6 of the scale for losses and scores, 1e-5 for gradients.
"""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bliss.errors import UserError
from tests.distributed import run_ranks
from tests.side_models import LAYOUTS, MODELS, one_rank, selected_run, two_ranks

CASES = [(layout, name) for layout in LAYOUTS for name in MODELS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directories up to the warm-up's selection, one for each layout, with one shard of sequences longer than a
    window."""
    folder = tmp_path_factory.mktemp("side")
    run = selected_run(
        folder, data__sequence_length=20, target__log_interval=1, target__save_interval=4, warmup__proxy_steps=10,
        scoring__batch_tokens=512,
    )  # fmt: skip
    for name in ("killed", *(f"run-{layout}" for layout in LAYOUTS)):
        shutil.copytree(run, folder / name)
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    return run_ranks(one_rank, 1, folder, timeout=300)[0]


@pytest.fixture(scope="module")
def two(folder: Path, one: dict[str, Any]) -> list[dict[str, Any]]:
    return run_ranks(two_ranks, 2, folder, timeout=300)


def close(found: Any, expected: Any, tolerance: float) -> None:
    """Within `tolerance` of the largest expected number."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(), 1e-3))


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_losses_and_scores_do_not_depend_on_the_layout(
    one: dict[str, Any], two: list[dict[str, Any]], layout: str, name: str
) -> None:
    reference = one[name]
    for found in (result[f"{layout} {name}"] for result in two):
        close(found["losses"], reference["losses"], 2e-6)
        close(found["scores"], reference["scores"], 2e-6)
    loss = sum(result[f"{layout} {name}"]["loss"] for result in two) if layout == "dp" else found["loss"]
    close(loss, reference["loss"], 2e-6)


@pytest.mark.parametrize(("layout", "name"), [case for case in CASES if case[0] != "dp"])
def test_logits_are_the_ranks_parts_of_the_vocabulary(
    one: dict[str, Any], two: list[dict[str, Any]], layout: str, name: str
) -> None:
    whole = np.concatenate([result[f"{layout} {name}"]["logits"] for result in two], axis=-1)
    close(whole, one[name]["logits"], 2e-6)


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_gradients_do_not_depend_on_the_layout(
    one: dict[str, Any], two: list[dict[str, Any]], layout: str, name: str
) -> None:
    for model, gradients in one[name]["gradients"].items():
        assert all(np.abs(gradient).max() > 0 for gradient in gradients)
        for result in two:
            for found, expected in zip(result[f"{layout} {name} gradients"][model], gradients, strict=True):
                close(found, expected, 1e-5)
    for result in two:
        np.testing.assert_allclose(result[f"{layout} {name}"]["norms"], one[name]["norms"], rtol=1e-5)


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_initial_weights_do_not_depend_on_the_layout(
    one: dict[str, Any], two: list[dict[str, Any]], layout: str, name: str
) -> None:
    np.testing.assert_allclose(two[1][f"{layout} {name} initial"], one[f"{name} initial"], rtol=1e-12)
    assert two[0][f"{layout} common"] == {"note": "llama"}


@pytest.mark.parametrize("name", MODELS)
def test_recomputing_activations_changes_nothing(one: dict[str, Any], name: str) -> None:
    found, expected = one[f"{name} recomputed"], one[name]
    assert found["loss"] == expected["loss"]
    for model, gradients in expected["gradients"].items():
        for part, whole in zip(found["gradients"][model], gradients, strict=True):
            np.testing.assert_array_equal(part, whole)


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_the_head_of_the_mean_over_real_positions(one: dict[str, Any], name: str) -> None:
    together, alone, by_hand = one[f"{name} pooling"]
    assert np.ptp(together) > 0.01
    close(alone, together, 2e-6)
    close(by_hand, together, 2e-6)


def test_bf16_models_keep_a_float32_head_and_exact_masters(one: dict[str, Any]) -> None:
    assert one["bf16"] == {
        "dtypes": ["torch.bfloat16"],
        "head": "torch.float32",
        "scores": "torch.float32",
        "losses": "torch.float32",
        "same": True,
    }


def test_old_checkpoints_are_pruned_and_the_newest_named(one: dict[str, Any]) -> None:
    assert one["prune"] == {
        "files": ["iter_0000003", "iter_0000010", "latest_checkpointed_iteration.txt"],
        "latest": 10,
        "common": {"at": 10},
    }


def test_a_proxys_checkpoint_initialises_the_score_models_backbone(one: dict[str, Any]) -> None:
    assert one["backbone"]


def test_a_resumed_warmup_ends_in_the_same_bits(one: dict[str, Any]) -> None:
    warmup = one["warmup"]
    assert warmup["reached"] == 4
    for continued, undisturbed in zip(warmup["continued"], warmup["undisturbed"], strict=True):
        np.testing.assert_array_equal(continued, undisturbed)
    whole, continued = warmup["metrics"]
    assert whole == continued
    losses = [json.loads(line)["loss"] for line in whole.splitlines()]
    assert len(losses) == 10
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_warmup_does_not_depend_on_the_layout(one: dict[str, Any], two: list[dict[str, Any]], layout: str) -> None:
    expected = [json.loads(line)["loss"] for line in one["warmup"]["metrics"][0].splitlines()]
    found = [json.loads(line)["loss"] for line in two[0][f"{layout} warmup"].splitlines()]
    # Adam divides by the size of gradients, so the rounding of tiny ones grows from step to step
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_score_files_do_not_depend_on_the_layout(one: dict[str, Any], two: list[dict[str, Any]], layout: str) -> None:
    for shard, expected in one["scores"]["whole"].items():
        np.testing.assert_allclose(two[0][f"{layout} scores"][shard], expected, rtol=0, atol=1e-5)


def test_score_files_do_not_depend_on_batches_or_interruptions(one: dict[str, Any]) -> None:
    scores = one["scores"]
    assert scores["scored before the kill"] == 21
    total = 0
    for shard, expected in scores["whole"].items():
        np.testing.assert_allclose(scores["in pieces"][shard], expected, rtol=0, atol=1e-5)
        assert np.isnan(expected).any()
        assert np.nanstd(expected) > 0.01
        total += -(-int(np.isfinite(expected).sum()) // 7)
    assert scores["writes"] == total  # no chunk twice


def test_the_proxy_finds_learnable_text_easier(one: dict[str, Any]) -> None:
    losses = {shard: -np.nanmean(values) for shard, values in one["scores"]["proxy loss"].items()}
    assert 0 < losses["walk"] < losses["noise"] < 10


def test_all_ranks_learn_of_one_that_failed(two: list[dict[str, Any]]) -> None:
    late = "the ranks do not see the same files: the number of steps is 0 on some and 100 on others"
    assert [result["agree"] for result in two] == [["exit 2", "ValueError", late], ["UserError", "exit 1", "exit 1"]]


def test_a_checkpoint_cannot_run_code(one: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    from megatron_bliss.mcore import checkpoint_files, checkpoints

    class Call:
        def __reduce__(self) -> tuple[Any, ...]:
            return (print, ("code ran",))

    path = checkpoint_files.find(folder / "pythia")
    damaged = tmp_path / path.name
    shutil.copytree(path, damaged)
    for content in (Call(), {"state_dict_metadata": Call()}):
        (damaged / ".metadata").write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match=r"refers to builtins\.print"):
            checkpoints._read({}, damaged)
    # a dotted name would reach what an allowed module has imported
    names = b"".join(
        b"\x8c" + bytes([len(word)]) + word for word in (b"torch.distributed.checkpoint.filesystem", b"os.system")
    )
    (damaged / ".metadata").write_bytes(b"\x80\x04" + names + b"\x93.")
    with pytest.raises(UserError, match=r"refers to torch\S*filesystem\.os\.system"):
        checkpoints._read({}, damaged)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    from megatron_bliss.mcore import checkpoint_files

    with pytest.raises(UserError, match="holds no complete checkpoint"):
        checkpoint_files.find(tmp_path)
