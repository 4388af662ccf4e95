"""Online token selection in Megatron's own trainer: plain losses at keep 1, any layout, resume, noise."""

import json
from pathlib import Path

import pytest

from megatron_bliss.config import ModelConfig
from megatron_bliss.mcore.architectures import resolve
from megatron_bliss.mcore.checkpoint_files import read_iteration
from tests.launch import finish, losses, run, start
from tests.tiny_run import SEQUENCE_LENGTH, VOCAB_SIZE, write_chain_shard

USER_SCRIPT = Path(__file__).parent / "scripts" / "pretrain_gpt.py"
STEPS = 10
BLADE = ["--online", "blade", "--set", "sync_interval=3", "--set", "reference_steps=4"]


def arguments(folder: Path, *more: str, steps: int = STEPS) -> list[str]:
    data = [word for prefix in ("walk", "noise") for word in ("1", str(folder / prefix))]
    return [
        *resolve(ModelConfig(preset="tiny", hidden_size=32, ffn_hidden_size=64)).megatron_flags(),
        *f"--seq-length {SEQUENCE_LENGTH} --micro-batch-size 2 --global-batch-size 8".split(),
        *f"--train-samples {8 * steps} --lr 1e-2 --lr-decay-style constant --seed 3".split(),
        *f"--tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE} --padded-vocab-size {VOCAB_SIZE}".split(),
        *("--data-path", *data, "--split", "100,0,0", "--data-cache-path", str(folder / "cache")),
        *[
            "--eval-iters",
            "0",
            "--eval-interval",
            "100",
            "--log-interval",
            "1",
            "--save-interval",
            "4",
            "--ckpt-format",
            "torch_dist",
        ],
        *more,
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("online")
    for seed, (name, noise) in enumerate({"walk": 0.05, "noise": 1.0, "valid": 0.0}.items()):
        write_chain_shard(folder / name, 120, seed, noise)
    return folder


def train(folder: Path, name: str, online: list[str], *more: str, ranks: int = 1, steps: int = STEPS) -> dict[int, str]:
    words = [*online, USER_SCRIPT, *arguments(folder, "--save", str(folder / name), *more, steps=steps)]
    return losses(run("megatron_bliss.hooks", words, folder / f"{name}.log", num_ranks=ranks))


def blade(folder: Path, *settings: str) -> list[str]:
    return [*BLADE, *(word for s in settings for word in ("--set", s)), "--validation", str(folder / "valid")]


def metrics(folder: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / name / "online" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> dict[int, str]:
    return train(folder, "undisturbed", blade(folder))


def test_keeping_all_tokens_is_plain_training(folder: Path) -> None:
    plain = train(folder, "plain", [])
    assert train(folder, "everything", blade(folder, "keep=1")) == plain
    assert len([line for line in metrics(folder, "everything") if "sync" in line]) == 3


@pytest.mark.parametrize(
    ("name", "more", "scope"),
    [
        # initialisation depends on tensor parallelism, so it goes on from one rank's checkpoint, reference and all
        ("tensor", ["--tensor-model-parallel-size", "2", "--ckpt-step", "4"], "micro-batch"),
        ("data", ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"], "micro-batch"),
        ("global", ["--use-distributed-optimizer"], "global-batch"),
    ],
)
def test_two_ranks_choose_as_one(
    name: str, more: list[str], scope: str, folder: Path, undisturbed: dict[int, str]
) -> None:
    """Losses and excess of the kept tokens to 1e-4 (fp32, sums in another order): another token moves them by more."""
    one = undisturbed if scope == "micro-batch" else train(folder, "one-global", blade(folder, f"scope={scope}"))
    other = "undisturbed" if scope == "micro-batch" else "one-global"
    start_from = ["--load", str(folder / other)] if "--ckpt-step" in more else []
    two = train(folder, name, blade(folder, f"scope={scope}"), *more, *start_from, ranks=2)
    assert 10 in two
    for iteration, loss in two.items():
        if iteration in one:
            assert float(loss) == pytest.approx(float(one[iteration]), abs=1e-4)
    mine = metrics(folder, name)
    theirs = [line for line in metrics(folder, other) if line["step"] >= mine[0]["step"]]
    for line, expected in zip(mine, theirs, strict=True):
        for key in line.keys() - {"seconds"}:
            assert line[key] == pytest.approx(expected[key], abs=1e-4), key


def test_a_kill_amid_the_reference_steps_changes_nothing(folder: Path, undisturbed: dict[int, str]) -> None:
    """The second synchronisation begins after six steps, two past the checkpoint; it is killed at its second step."""
    save = ["--save", str(folder / "killed"), "--load", str(folder / "killed")]
    killed = [*blade(folder), USER_SCRIPT.with_name("killed_in_reference_steps.py"), *arguments(folder, *save)]
    assert finish(start("megatron_bliss.hooks", killed, folder / "killed.log"), 120) == [-9]
    assert read_iteration(folder / "killed") == 4
    words = [*blade(folder), USER_SCRIPT, *arguments(folder, *save)]
    resumed = losses(run("megatron_bliss.hooks", words, folder / "resumed.log"))
    assert resumed == {step: undisturbed[step] for step in (5, 7, 8, 9, 10)}
    ours, theirs = ([line | {"seconds": 0} for line in metrics(folder, name)] for name in ("killed", "undisturbed"))
    assert ours == theirs


def test_a_pipeline_is_refused_in_a_sentence(folder: Path) -> None:
    layout = ["--pipeline-model-parallel-size", "2"]
    words = [*blade(folder), USER_SCRIPT, *arguments(folder, *layout)]
    assert finish(start("megatron_bliss.hooks", words, folder / "refused.log", num_ranks=2), 120) != [0, 0]
    text = "".join(Path(folder / f"refused.log.{rank}").read_text() for rank in range(2))
    assert "--pipeline-model-parallel-size is 2, which online token selection (blade) does not support" in text
    assert "Traceback" not in text
