"""Loss by domain during Megatron's real training: against a script that notes every sample, and in several layouts."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bliss.config import ModelConfig
from megatron_bliss.mcore.architectures import resolve
from megatron_bliss.mcore.domain_loss import _figures
from megatron_bliss.mcore.script import PACKAGED_SCRIPT
from tests.launch import losses, run
from tests.selections import select
from tests.tiny_run import SEQUENCE_LENGTH, VOCAB_SIZE, write_chain_shard

SCRIPT = Path(__file__).parent / "scripts" / "domain_gpt.py"
STEPS, INTERVAL = 6, 2


def arguments(folder: Path, *more: str) -> list[str]:
    """Three shards, two of which are of one domain; two micro-batches a step and more."""
    data = [word for prefix in ("walk", "noise", "more") for word in ("1", str(folder / prefix))]
    return [
        *resolve(ModelConfig(preset="tiny", hidden_size=32, ffn_hidden_size=64)).megatron_flags(),
        *f"--seq-length {SEQUENCE_LENGTH} --micro-batch-size 2 --global-batch-size 8".split(),
        *f"--train-samples {8 * STEPS} --lr 1e-2 --lr-decay-style constant --seed 3".split(),
        *f"--tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE} --padded-vocab-size {VOCAB_SIZE}".split(),
        *("--data-path", *data, "--split", "100,0,0", "--data-cache-path", str(folder / "cache")),
        *f"--eval-iters 0 --eval-interval 100 --log-interval {INTERVAL} --eod-mask-loss".split(),
        *more,
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("domains")
    for seed, (name, noise) in enumerate({"walk": 0.05, "noise": 0.5, "more": 0.9}.items()):
        write_chain_shard(folder / name, 120, seed, noise)
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def recorded(folder: Path) -> tuple[dict[int, str], list[dict[str, Any]]]:
    """Megatron's losses and ours by domain, of one rank, beside RECORD."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECORD", str(folder / "record"))
        words = ["--metrics", folder / "metrics.jsonl", SCRIPT, *arguments(folder)]
        text = run("megatron_bliss.hooks", words, folder / "recorded.log")
    return losses(text), lines(folder / "metrics.jsonl")


def test_losses_by_domain_are_those_of_every_sample(
    folder: Path, recorded: tuple[dict[int, str], list[dict[str, Any]]]
) -> None:
    """Within 1e-6, relative: float64 sums of the same float32 losses."""
    samples, (_, found) = lines(folder / "record"), recorded
    assert [line["step"] for line in found] == [2, 4, 6]
    for line in found:
        within = [sample for sample in samples if line["step"] - INTERVAL < sample["step"] <= line["step"]]
        assert len(within) == 8 * INTERVAL
        for number, name in enumerate(("walk", "noise", "more")):
            own = [sample for sample in within if sample["dataset"] == number]
            tokens = sum(sample["tokens"] for sample in own)
            assert line[f"tokens/{name}"] == tokens > 0
            assert line[f"loss/{name}"] == pytest.approx(sum(sample["loss"] for sample in own) / tokens, rel=1e-6)
        total = sum(sample["loss"] for sample in within) / sum(sample["tokens"] for sample in within)
        assert line["loss"] == pytest.approx(total, rel=1e-6)


def test_training_is_the_same_without(folder: Path, recorded: tuple[dict[int, str], list[dict[str, Any]]]) -> None:
    text = run("megatron_bliss.hooks", [PACKAGED_SCRIPT, *arguments(folder)], folder / "plain.log")
    assert losses(text) == recorded[0]


def test_tokens_that_online_selection_leaves_out_are_not_counted(
    folder: Path, recorded: tuple[dict[int, str], list[dict[str, Any]]]
) -> None:
    """Up to the first synchronisation all tokens count, afterwards half of each micro-batch; nothing of the reference's
    own steps ever does."""
    write_chain_shard(folder / "valid", 60, 9, 0.0)
    online = [word for setting in ("sync_interval=4", "reference_steps=2", "keep=0.5") for word in ("--set", setting)]
    path = folder / "online.jsonl"
    words = ["--metrics", path, "--online", "blade", *online, "--validation", folder / "valid", PACKAGED_SCRIPT]
    save = ["--save", str(folder / "save"), "--save-interval", "100"]
    run("megatron_bliss.hooks", [*words, *arguments(folder, *save)], folder / "online.log")
    found, plain = lines(path), recorded[1]
    assert found[:2] == plain[:2]
    kept, of = (sum(v for k, v in part[2].items() if k.startswith("tokens/")) for part in (found, plain))
    assert kept == pytest.approx(of / 2, abs=8)  # eight micro-batches, each rounded


LAYOUTS = {
    "tp": ["--tensor-model-parallel-size", "2"],
    "dp": ["--use-distributed-optimizer"],
    "pp": ["--pipeline-model-parallel-size", "2"],
}


def check_layout(folder: Path, layout: str, expected: list[dict[str, Any]]) -> None:
    """The same tokens of every domain, and over all domains the loss that Megatron logs (7 digits). Models of several
    parts are drawn in another way, so only data-parallel ranks have the same losses: to 1e-5, for the order of sums."""
    select(folder / f"{layout}-selection", {str(folder / name): np.arange(120) for name in ("walk", "noise", "more")})
    path = folder / f"{layout}.jsonl"
    words = ["--metrics", path, "--selection", folder / f"{layout}-selection", PACKAGED_SCRIPT]
    text = run("megatron_bliss.hooks", [*words, *arguments(folder, *LAYOUTS[layout])], folder / layout, num_ranks=2)
    logged = {int(step): float(loss) for step, loss in re.findall(r"iteration +(\d+)/.*?lm loss: (\S+) \|", text)}
    found = lines(path)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, other in zip(found, expected, strict=True):
        assert set(line) == set(other)
        if line["step"] > INTERVAL:  # what Megatron logs first is the mean of other steps
            assert line["loss"] == pytest.approx(logged[line["step"]], rel=2e-6)
        for name, value in line.items():
            if name.startswith("tokens/"):
                assert value == other[name]
            elif layout == "dp":
                assert value == pytest.approx(other[name], abs=1e-5), name


def test_two_tensor_parallel_ranks(folder: Path, recorded: tuple[dict[int, str], list[dict[str, Any]]]) -> None:
    check_layout(folder, "tp", recorded[1])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp", "pp"])
def test_other_layouts(layout: str, folder: Path, recorded: tuple[dict[int, str], list[dict[str, Any]]]) -> None:
    check_layout(folder, layout, recorded[1])


def test_datasets_of_one_domain_are_added_up_and_unread_ones_left_out() -> None:
    sums = [[6.0, 2.0], [1.0, 4.0], [3.0, 1.0], [0.0, 0.0]]
    assert _figures(["a", "b", "a", "c"], sums) == {
        "loss": 10 / 7, "loss/a": 3.0, "loss/b": 0.25, "tokens/a": 3.0, "tokens/b": 4.0,
    }  # fmt: skip
    assert _figures(["a"], [[0.0, 0.0]]) == {}
