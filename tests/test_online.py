"""Online token selection in Megatron's own trainer: plain losses at keep 1, any layout, resume, noise."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bliss.artifacts import RunPaths
from megatron_bliss.config import ModelConfig, OnlineConfig, load_config, save_config
from megatron_bliss.mcore.architectures import resolve
from megatron_bliss.mcore.arguments import Files, training_arguments
from megatron_bliss.mcore.checkpoint_files import read_iteration
from megatron_bliss.mcore.script import PACKAGED_SCRIPT
from megatron_bliss.methods import online_method
from megatron_bliss.stages.pretrain import decay_branch
from tests.distributed import run_ranks
from tests.launch import finish, losses, run, start
from tests.selections import select
from tests.test_run import outcome
from tests.tiny_run import SEQUENCE_LENGTH, VOCAB_SIZE, megatron_bliss, tiny_config, write_chain_shard

USER_SCRIPT = Path(__file__).parent / "scripts" / "pretrain_gpt.py"
KILLED_SCRIPT = USER_SCRIPT.with_name("killed_in_reference_steps.py")
SEQUENCE_PARALLEL_SCRIPT = USER_SCRIPT.with_name("sequence_parallel_gpt.py")
STEPS = 10
LOOP = "--eval-iters 0 --eval-interval 100 --log-interval 1 --save-interval 4 --ckpt-format torch_dist"
BLADE = ["--online", "blade", "--set", "sync_interval=3", "--set", "reference_steps=4"]


def arguments(folder: Path, *more: str, steps: int = STEPS) -> list[str]:
    data = [word for prefix in ("walk", "noise") for word in ("1", str(folder / prefix))]
    return [
        *resolve(ModelConfig(preset="tiny", hidden_size=32, ffn_hidden_size=64)).megatron_flags(),
        *f"--seq-length {SEQUENCE_LENGTH} --micro-batch-size 2 --global-batch-size 8".split(),
        *f"--train-samples {8 * steps} --lr 1e-2 --lr-decay-style constant --seed 3".split(),
        *f"--tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE} --padded-vocab-size {VOCAB_SIZE}".split(),
        *("--data-path", *data, "--split", "100,0,0", "--data-cache-path", str(folder / "cache")),
        *LOOP.split(),
        *more,
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("online")
    for seed, (name, noise) in enumerate({"walk": 0.05, "noise": 1.0, "valid": 0.0}.items()):
        write_chain_shard(folder / name, 120, seed, noise)
    return folder


def train(
    folder: Path,
    name: str,
    online: list[str],
    *more: str,
    ranks: int = 1,
    steps: int = STEPS,
    script: Path = USER_SCRIPT,
) -> dict[int, str]:
    words = [*online, script, *arguments(folder, "--save", str(folder / name), *more, steps=steps)]
    return losses(run("megatron_bliss.hooks", words, folder / f"{name}.log", num_ranks=ranks, timeout=600))


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
        pytest.param(
            "sequence", ["--tensor-model-parallel-size", "2", "--ckpt-step", "4"], "micro-batch", marks=pytest.mark.slow
        ),
        ("data", ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"], "micro-batch"),
        pytest.param("global", ["--use-distributed-optimizer"], "global-batch", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_choose_as_one(
    name: str, more: list[str], scope: str, folder: Path, undisturbed: dict[int, str]
) -> None:
    """Losses and excess of the kept tokens to 1e-4 (fp32, sums in another order): another token moves them by more."""
    one = undisturbed if scope == "micro-batch" else train(folder, "one-global", blade(folder, f"scope={scope}"))
    other = "undisturbed" if scope == "micro-batch" else "one-global"
    start_from = ["--load", str(folder / other)] if "--ckpt-step" in more else []
    script = SEQUENCE_PARALLEL_SCRIPT if name == "sequence" else USER_SCRIPT
    two = train(folder, name, blade(folder, f"scope={scope}"), *more, *start_from, ranks=2, script=script)
    assert 10 in two
    for iteration, loss in two.items():
        if iteration in one:
            assert float(loss) == pytest.approx(float(one[iteration]), abs=1e-4)
    mine = metrics(folder, name)
    theirs = [line for line in metrics(folder, other) if line["step"] >= mine[0]["step"]]
    for line, expected in zip(mine, theirs, strict=True):
        for key in line.keys() - {"seconds"}:
            assert line[key] == pytest.approx(expected[key], abs=1e-4), key


@pytest.mark.slow
def test_bf16_selects_like_float32(folder: Path, undisturbed: dict[int, str]) -> None:
    """One rank, and two with the distributed optimizer: parameters in bfloat16, masters in float32, the reference's
    masters too. bfloat16 has 8 bits, so losses near 5.5 agree with float32 to 0.05, and to 0.1 what is measured of the
    tokens that are kept, some of which are others.
    """
    found = {
        "bf16": train(folder, "bf16", blade(folder), "--bf16"),
        "bf16-shared": train(folder, "bf16-shared", blade(folder), "--bf16", "--use-distributed-optimizer", ranks=2),
    }
    expected = metrics(folder, "undisturbed")
    for name, losses_found in found.items():
        assert {step: pytest.approx(float(loss), abs=0.05) for step, loss in undisturbed.items()} == {
            step: float(loss) for step, loss in losses_found.items()
        }
        for line, theirs in zip(metrics(folder, name), expected, strict=True):
            for key in line.keys() - {"seconds"}:
                assert line[key] == pytest.approx(theirs[key], abs=0.1), (name, key)


def test_a_kill_amid_the_reference_steps_changes_nothing(
    folder: Path, undisturbed: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second synchronisation begins after six steps, two past the checkpoint; it is killed at its second step."""
    monkeypatch.setenv("KILLED", str(folder / "was-killed"))
    save = ["--save", str(folder / "killed"), "--load", str(folder / "killed")]
    killed = [*blade(folder), KILLED_SCRIPT, *arguments(folder, *save)]
    assert finish(start("megatron_bliss.hooks", killed, folder / "killed.log"), 120) == [-9]
    assert read_iteration(folder / "killed") == 4
    words = [*blade(folder), USER_SCRIPT, *arguments(folder, *save)]
    resumed = losses(run("megatron_bliss.hooks", words, folder / "resumed.log"))
    assert resumed == {step: undisturbed[step] for step in (5, 7, 8, 9, 10)}
    ours, theirs = ([line | {"seconds": 0} for line in metrics(folder, name)] for name in ("killed", "undisturbed"))
    assert ours == theirs


@pytest.mark.slow
def test_sequences_and_tokens_chosen_in_one_run_are_the_same_after_a_kill_amid_the_reference_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second synchronisation begins after 14 steps: in round 2, two past the checkpoint that round 1 ends with."""
    settings = tiny_config(tmp_path, control=False)
    online = ["online.method=blade", "online.sync_interval=7", "online.reference_steps=4"]

    def do(name: str, exit_code: int) -> None:
        done = megatron_bliss("run", settings, "--run", tmp_path / name, *online, f"target.script={KILLED_SCRIPT}")
        assert done.returncode == exit_code, done.stdout + done.stderr

    was_killed = tmp_path / "was-killed"
    monkeypatch.setenv("KILLED", str(was_killed))
    do("killed", 1)
    assert was_killed.exists()
    assert read_iteration(RunPaths(tmp_path / "killed").target) == 12
    do("killed", 0)
    do("undisturbed", 0)
    ours, theirs = (everything(tmp_path / name) for name in ("killed", "undisturbed"))
    assert {"round-0001/selection/walk.npy", "round-0002/evaluation/results.json"} < ours.keys()
    assert [line["step"] for line in ours["round-0002/online/metrics.jsonl"]] == [13, 14, 15, 15, 16, 17, 18]
    assert [line["step"] for line in ours["round-0002/pretrain/metrics.jsonl"]] == [13, 14, 15, 16, 17, 18]
    assert ours == theirs


def everything(run_dir: Path) -> dict[str, Any]:
    """`outcome`, and what each step of the LLM noted: losses by domain, and what was measured of the tokens kept."""
    found: dict[str, Any] = outcome(run_dir)
    for path in sorted([*run_dir.rglob("online/metrics.jsonl"), *run_dir.rglob("pretrain/metrics.jsonl")]):
        lines = map(json.loads, path.read_text().splitlines())
        found[str(path.relative_to(run_dir))] = [
            {key: value for key, value in line.items() if key != "seconds"} for line in lines
        ]
    return found


def test_a_reference_that_stays_and_an_average_select_too(folder: Path, undisturbed: dict[int, str]) -> None:
    rho1 = ["--online", "rho1", "--set", f"reference={folder / 'undisturbed'}"]
    train(folder, "rho1", rho1, steps=4)
    steps = metrics(folder, "rho1")
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert steps[0]["reference_loss"] < steps[0]["loss"] - 0.3  # ten steps ahead
    assert steps[0]["kept_excess"] > steps[0]["excess"] > 0

    tuned = ["--online", "rho1", "--set", "reference_steps=4", "--validation", str(folder / "valid")]
    train(folder, "tuned", tuned, steps=4)
    made, *steps = metrics(folder, "tuned")
    assert (made["step"], made["sync"]) == (1, 1.0)
    assert made["reference_validation_loss"] < made["reference_first_validation_loss"] - 0.1
    assert "reference_train_loss" not in made
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert all("sync" not in line for line in steps)
    assert not online_method(OnlineConfig("rho1")).is_due(5, num_syncs=1)

    train(folder, "average", ["--online", "self", "--set", "sync_interval=2"], steps=5)
    steps = metrics(folder, "average")
    assert [(line["step"], line.get("sync")) for line in steps] == [(3, 1.0), (5, 2.0), (5, None)]
    assert steps[-1]["kept_share"] == pytest.approx(39 / 64)  # ⌈0.6 · 64⌉ of each micro-batch


def test_a_pipeline_is_refused_in_a_sentence(folder: Path) -> None:
    layout = ["--pipeline-model-parallel-size", "2"]
    words = [*blade(folder), USER_SCRIPT, *arguments(folder, *layout)]
    assert finish(start("megatron_bliss.hooks", words, folder / "refused.log", num_ranks=2), 120) != [0, 0]
    text = "".join(Path(folder / f"refused.log.{rank}").read_text() for rank in range(2))
    assert "--pipeline-model-parallel-size is 2, which online token selection (blade) does not support" in text
    assert "Traceback" not in text


def test_noise_is_hardly_kept_after_the_second_synchronisation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the tokens are random. The noise share of what is kept is at most a third of the pool's.

    While there is something left to learn, that is: a model that knows the walk has no excess loss on it either.
    """
    for seed, (name, noise) in enumerate({"walk": 0.0, "noise": 1.0, "valid": 0.0}.items()):
        write_chain_shard(tmp_path / name, 400, seed, noise)
    record = tmp_path / "kept.jsonl"
    monkeypatch.setenv("RECORD", str(record))
    online = blade(tmp_path, "sync_interval=20", "reference_steps=40", "keep=0.4")
    script = USER_SCRIPT.with_name("recording_kept_gpt.py")
    words = [*online, script, *arguments(tmp_path, "--lr", "2e-3", steps=60)]
    run("megatron_bliss.hooks", words, tmp_path / "planted.log")
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    late = [row for row in rows if row["step"] >= 40]  # the second comes after 40 steps
    in_pool = sum(row["noise"] for row in late) / sum(row["tokens"] for row in late)
    in_kept = sum(row["noise_kept"] for row in late) / sum(row["kept"] for row in late)
    assert in_pool == pytest.approx(0.5, abs=0.1)
    assert in_kept <= in_pool / 3


def _decay(rank: int, run_dir: Path) -> str:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as shown:
        decay_branch(run_dir, 1)
    return shown.getvalue()


def test_a_run_selects_tokens_as_the_hook_does_and_its_decay_branch_leaves_the_reference(tmp_path: Path) -> None:
    online = {"sync_interval": 4, "reference_steps": 2, "offload": "true"}
    settings = ["online.method=blade", *(f"online.{key}={value}" for key, value in online.items())]
    config = load_config(tiny_config(tmp_path, control=False), [*settings, "warmup.target_steps=0"])
    paths = RunPaths(tmp_path / "run")
    save_config(config, paths.config)
    prefixes = [prefix for domain in config.data.pool for prefix in domain.prefixes]
    select(paths.selection(1), {prefix: np.arange(0, 600, 5) for prefix in prefixes})
    in_run = losses(
        run("megatron_bliss.cli", ["pretrain", "--run", paths.root, "--round", "1"], tmp_path / "stage.log")
    )

    files = Files(paths.target.with_name("target-data.json"), paths.index_cache, tmp_path / "hook" / "target")
    words = [word for key, value in online.items() for word in ("--set", f"{key}={value}")]
    words += ["--online", "blade", "--validation", config.data.validation, "--selection", str(paths.selection(1))]
    words += [str(PACKAGED_SCRIPT), *training_arguments(config, files)]
    assert losses(run("megatron_bliss.hooks", words, tmp_path / "hook.log")) == in_run
    lines = (paths.online(1) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 5, 6]  # a synchronisation, two steps

    [text] = run_ranks(_decay, 1, paths.root)
    assert sorted(losses(text)) == [7, 9]
    assert "synchronised" not in text  # though one would be due after 8 steps
