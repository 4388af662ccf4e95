"""Megatron's real trainer on a CPU: parallel layouts, resume, a user's own script, and the stages of a run."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata, load

from megatron_bliss import stopping
from megatron_bliss.artifacts import RunPaths
from megatron_bliss.config import ModelConfig, RunConfig, load_config, save_config
from megatron_bliss.errors import UserError
from megatron_bliss.mcore.architectures import PRESETS, padded_vocab_size, resolve
from megatron_bliss.mcore.arguments import Files, decay_arguments, training_arguments
from megatron_bliss.mcore.checkpoint_files import iteration_path, iterations, read_iteration, write_iteration
from megatron_bliss.stages import pretrain as stage
from megatron_bliss.stages.pretrain import decay_branch
from tests.distributed import run_ranks
from tests.launch import finish, losses, run, start
from tests.selections import select
from tests.tiny_run import SEQUENCE_LENGTH, VOCAB_SIZE, tiny_config, write_chain_shard

USER_SCRIPT = Path(__file__).parent / "scripts" / "pretrain_gpt.py"
STEPS = 8


def user_arguments(folder: Path, *more: str) -> list[str]:
    """A user's arguments: a model, a weighted blend, checkpoints in the middle and at the end."""
    data = [word for prefix in ("walk", "noise") for word in ("1", str(folder / prefix))]
    return [
        *resolve(ModelConfig(preset="tiny", hidden_size=32, ffn_hidden_size=64)).megatron_flags(),
        *f"--seq-length {SEQUENCE_LENGTH} --micro-batch-size 2 --global-batch-size 8".split(),
        *f"--train-samples {8 * STEPS} --lr 1e-2 --lr-decay-style constant --seed 3".split(),
        *f"--tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE} --padded-vocab-size {VOCAB_SIZE}".split(),
        *("--data-path", *data, "--split", "100,0,0", "--data-cache-path", str(folder / "cache")),
        *f"--eval-iters 0 --eval-interval 100 --log-interval 1 --save-interval {STEPS // 2}".split(),
        *("--ckpt-format", "torch_dist", *more),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    for seed, (name, noise) in enumerate({"walk": 0.05, "noise": 0.5}.items()):
        write_chain_shard(folder / name, 120, seed, noise)
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[int, str]:
    """Losses of the user's script on one rank, without a selection; it leaves a checkpoint at half way."""
    words = [str(USER_SCRIPT), *user_arguments(folder, "--save", str(folder / "checkpoint"))]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_bliss.hooks", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # as the ranks of `launch` have: sums depend on it
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = losses(done.stdout)
    assert sorted(found) == [1, *range(3, STEPS + 1)]
    assert float(found[STEPS]) < float(found[1]) - 0.1  # it learns
    return found


def test_keeping_everything_gives_the_same_losses(folder: Path, plain: dict[int, str]) -> None:
    select(folder / "everything", {str(folder / name): np.arange(120) for name in ("walk", "noise")})
    words = ["--selection", folder / "everything", USER_SCRIPT, *user_arguments(folder)]
    text = run("megatron_bliss.hooks", words, folder / "hooked.log")
    assert "Building SelectedGPTDataset" in text
    assert losses(text) == plain


@pytest.mark.parametrize("layout", ["--tensor-model-parallel-size", "--pipeline-model-parallel-size"])
def test_a_checkpoint_of_one_rank_goes_on_at_two(layout: str, folder: Path, plain: dict[int, str]) -> None:
    """Same losses to 1e-5 (fp32, sums in another order)."""
    resume = ["--load", str(folder / "checkpoint"), "--ckpt-step", str(STEPS // 2), layout, "2"]
    words = [USER_SCRIPT, *user_arguments(folder, *resume)]
    found = losses(run("megatron_bliss.hooks", words, folder / f"{layout[2:8]}.log", num_ranks=2))
    assert sorted(found) == [5, 7, 8]
    for iteration, loss in found.items():
        assert float(loss) == pytest.approx(float(plain[iteration]), abs=1e-5)


def test_two_data_parallel_ranks_with_the_distributed_optimizer(folder: Path, plain: dict[int, str]) -> None:
    """Same losses to 1e-5 (fp32, sums in another order)."""
    words = [USER_SCRIPT, *user_arguments(folder, "--use-distributed-optimizer")]
    found = losses(run("megatron_bliss.hooks", words, folder / "data.log", num_ranks=2))
    assert sorted(found) == sorted(plain)
    for iteration, loss in found.items():
        assert float(loss) == pytest.approx(float(plain[iteration]), abs=1e-5)


# Stages


def write_run(folder: Path) -> tuple[RunPaths, RunConfig]:
    config = load_config(tiny_config(folder, control=False), ["target.save_interval=4"])
    paths = RunPaths(folder / "run")
    save_config(config, paths.config)
    prefixes = [prefix for domain in config.data.pool for prefix in domain.prefixes]
    for number, directory in enumerate((paths.warmup_selection, paths.selection(1))):
        select(directory, {prefix: np.arange(number, 600, 5) for prefix in prefixes})
    return paths, config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunPaths, RunConfig, dict[int, str]]:
    """A run after warm-up (6 steps) and its first round (6 more), never disturbed, and all losses."""
    paths, config = write_run(tmp_path_factory.mktemp("stages"))
    found: dict[int, str] = {}
    for name, words in {"warmup-target": [], "pretrain": ["--round", "1"]}.items():
        log = paths.root / f"{name}.log"
        found |= losses(run("megatron_bliss.cli", [name, "--run", paths.root, *words], log))
    assert sorted(found) == [1, 3, 4, 5, 6, 7, 9, 10, 11, 12]
    return paths, config, found


def test_rounds_are_one_line_of_iterations(trained: tuple[RunPaths, RunConfig, dict[int, str]]) -> None:
    paths, _, _ = trained
    assert read_iteration(paths.warmup_target) == 6
    assert read_iteration(paths.target) == 12
    text = (paths.root / "pretrain.log.0").read_text()
    rates = set(re.findall(r"learning rate: (\S+)", text))
    assert rates == {"1.000000E-03"}  # the main line never decays
    samples = [int(count) for count in re.findall(r"consumed samples: +(\d+)", text)]
    assert samples == [4 * step for step in range(7, 13)]


def test_a_killed_round_resumes_to_the_same_numbers(
    trained: tuple[RunPaths, RunConfig, dict[int, str]], tmp_path: Path
) -> None:
    paths, config, undisturbed = trained
    again = RunPaths(tmp_path / "run")
    shutil.copytree(paths.root, again.root)
    shutil.rmtree(again.target)
    save_config(config, again.config)
    command = ["pretrain", "--run", again.root, "--round", "1"]

    log = tmp_path / "killed.log"
    [process] = start("megatron_bliss.cli", command, log)
    deadline = time.monotonic() + 120
    while read_iteration(again.target) is None and process.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    assert finish([process], 10) == [-9]
    # as if the kill had come while Megatron wrote an index, and while it named its newest checkpoint
    for index in again.index_cache.glob("*-shuffle_index.npy"):
        os.truncate(index, index.stat().st_size // 2)
    (again.target / "latest_checkpointed_iteration.txt").write_text("")

    text = run("megatron_bliss.cli", command, tmp_path / "resumed.log")
    assert losses(text) == {step: undisturbed[step] for step in (9, 11, 12)}  # after the checkpoint at 8
    first, second = (saved_tensors(iteration_path(each.target, 12)) for each in (paths, again))
    assert first.keys() == second.keys()
    assert any("optimizer" in name for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_round_that_is_stopped_goes_on_to_the_same_numbers(
    trained: tuple[RunPaths, RunConfig, dict[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked after its first step, at 7, where no checkpoint is due; that one is gone in the end."""
    paths, config, undisturbed = trained
    again = RunPaths(tmp_path / "run")
    shutil.copytree(paths.root, again.root)
    shutil.rmtree(again.target)
    save_config(config, again.config)
    command = ["pretrain", "--run", again.root, "--round", "1"]
    torchrun = ["--standalone", "--nproc-per-node", "1", "-m", "--", "megatron_bliss.cli", *command]
    (tmp_path / "stop").touch()
    monkeypatch.setenv(stopping.STOP_FILE, str(tmp_path / "stop"))
    processes = start("megatron_bliss.torchrun", torchrun, tmp_path / "stopped.log")
    assert finish(processes, 400) == [stopping.EXIT_CODE]
    text = (tmp_path / "stopped.log.0").read_text()
    assert "[pretrain] 7/12 iterations | stopped; called again, it goes on from there" in text
    assert "Traceback" not in text
    assert iterations(again.target) == [7]

    (tmp_path / "stop").unlink()
    resumed = losses(run("megatron_bliss.cli", command, tmp_path / "resumed.log"))
    assert {step: resumed[step] for step in (10, 11, 12)} == {step: undisturbed[step] for step in (10, 11, 12)}
    assert iterations(again.target) == iterations(paths.target)
    first, second = (saved_tensors(iteration_path(each.target, 12)) for each in (paths, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def saved_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor in a checkpoint: parameters and optimizer states."""
    reader = FileSystemReader(directory)
    saved = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in saved.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    return state


def test_a_round_is_not_continued_on_another_selection(trained: tuple[RunPaths, RunConfig, dict[int, str]]) -> None:
    paths, _, _ = trained
    stage._remember_selection(paths.target, 1, paths.selection(1))
    with pytest.raises(UserError, match=r"is not the selection that round 1 of .* was begun with"):
        stage._remember_selection(paths.target, 1, paths.warmup_selection)


def test_a_finished_round_is_left_alone(
    trained: tuple[RunPaths, RunConfig, dict[int, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    paths, _, _ = trained
    stage.run(paths.root, 1)
    assert "is already at iteration 12" in capsys.readouterr().out


def _decay_twice(rank: int, run_dir: Path) -> list[str]:
    import contextlib
    import io

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        first = decay_branch(run_dir, 1)
        second = decay_branch(run_dir, 1)
    assert first == second
    return [str(first), shown.getvalue()]


def test_the_decay_branch_comes_down_and_leaves_the_main_line(
    trained: tuple[RunPaths, RunConfig, dict[int, str]],
) -> None:
    paths, _, _ = trained
    [(directory, text)] = run_ranks(_decay_twice, 1, paths.root)
    assert Path(directory) == paths.evaluation(1) / "decay" / "iter_0000015"
    assert (Path(directory) / "metadata.json").is_file()
    assert sorted(losses(text)) == [13, 15]
    rates = [float(rate) for rate in re.findall(r"learning rate: (\S+)", text)]
    assert rates == pytest.approx([6.7e-4, 3.4e-4, 1e-5])  # from 1e-3 to 1e-5 in three steps
    assert read_iteration(paths.target) == 12


def test_a_decay_branch_starts_afresh_when_its_start_or_its_data_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, _ = write_run(tmp_path)
    weights = iteration_path(paths.target, 12) / "metadata.json"
    weights.parent.mkdir(parents=True)
    weights.write_text("first")
    begun: list[tuple[Path | None, list[int]]] = []  # where each training was loaded from, and what it found

    def train(config: RunConfig, selection: Path, files: Any, arguments: Any, end: int, online: Any) -> None:
        begun.append((files.load, iterations(files.save)))
        (iteration_path(files.save, end)).mkdir(parents=True)
        (iteration_path(files.save, end) / "metadata.json").write_text("{}")
        write_iteration(files.save, end)

    monkeypatch.setattr(stage, "_train", train)
    fresh = (paths.evaluation(1) / "start", [])
    branch = decay_branch(paths.root, 1)
    assert decay_branch(paths.root, 1) == branch
    assert begun == [fresh]
    assert "afresh" not in capsys.readouterr().out

    weights.write_text("second")
    decay_branch(paths.root, 1)
    assert begun == [fresh] * 2
    assert "decay was made from another target" in capsys.readouterr().out

    shutil.rmtree(paths.selection(1))
    shutil.copytree(paths.warmup_selection, paths.selection(1))
    decay_branch(paths.root, 1)
    decay_branch(paths.root, 1)
    assert begun == [fresh] * 3
    assert "decay was made from another selection" in capsys.readouterr().out


def _load_bare(rank: int, run_dir: Path) -> dict[str, Any]:
    from megatron_bliss.config import read_saved_config
    from megatron_bliss.mcore import parallel
    from megatron_bliss.mcore.checkpoints import load_target

    config = read_saved_config(run_dir / "run.yaml")
    context = parallel.initialize(1, False, 1)
    model = load_target(run_dir / "target", context, config.target.model, VOCAB_SIZE)
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def test_flags_and_bare_model_are_one_architecture(trained: tuple[RunPaths, RunConfig, dict[int, str]]) -> None:
    """A checkpoint of pretrain() has the bare model's parameters, all of them, and loads into it."""
    paths, config, _ = trained
    [bare] = run_ranks(_load_bare, 1, paths.root)
    assert sum(values.size for values in bare.values()) == resolve(config.target.model).num_parameters(VOCAB_SIZE)
    tensors = saved_tensors(iteration_path(paths.target, 12))
    saved = {name: tensor.numpy() for name, tensor in tensors.items() if not name.startswith("optimizer")}
    assert sum(values.size for values in saved.values()) == sum(values.size for values in bare.values())
    for name, values in bare.items():
        # in checkpoints a norm belongs to the linear layer behind it, and the layers of a kind are one tensor
        kept_as = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
        kept_as = kept_as.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
        layer = re.search(r"layers\.(\d+)\.", kept_as)
        found = saved[kept_as.replace(layer[0], "layers.")][int(layer[1])] if layer else saved[kept_as]
        assert np.array_equal(found, values), name


# Arguments and architectures


def value_of(words: list[str], flag: str) -> str:
    assert words.count(flag) == 1
    return words[words.index(flag) + 1]


def test_arguments_of_the_main_line_and_of_a_decay_branch(tmp_path: Path) -> None:
    config = load_config(tiny_config(tmp_path), ["target.extra_args=[--log-throughput]", "target.model.bf16=true"])
    files = Files(tmp_path / "data.json", tmp_path / "cache", tmp_path / "target", tmp_path / "warmup")
    words = training_arguments(config, files)  # warm-up 6 steps, two rounds of 6, batches of 4
    assert words[-1] == "--log-throughput"
    assert "--bf16" in words
    assert value_of(words, "--phase-transition-iterations") == "6,12"
    assert value_of(words, "--train-samples") == str(18 * 4)
    assert int(value_of(words, "--lr-decay-samples")) - int(value_of(words, "--lr-wsd-decay-samples")) == 18 * 4
    assert value_of(words, "--lr-warmup-samples") == "8"

    branch = decay_arguments(config, 2, files)
    assert value_of(branch, "--phase-transition-iterations") == "6,12"  # it goes on in the second round's data
    assert value_of(branch, "--train-samples") == value_of(branch, "--lr-decay-samples") == str(21 * 4)
    assert value_of(branch, "--lr-wsd-decay-samples") == str(3 * 4)
    assert "--phase-transition-iterations" not in decay_arguments(config, 0, files)


def test_settings_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path, files = tiny_config(tmp_path), Files(tmp_path, tmp_path, tmp_path)
    with pytest.raises(UserError, match="lr_warmup_steps is 18, but training ends after 18 steps"):
        training_arguments(load_config(path, ["target.lr_warmup_steps=18"]), files)
    with pytest.raises(UserError, match="sequence_length is 4096, but tiny is made for at most 2048"):
        training_arguments(load_config(path, ["data.sequence_length=4096"]), files)
    with pytest.raises(UserError, match="preset 'pythia-9m' is not known"):
        resolve(ModelConfig(preset="pythia-9m"))
    with pytest.raises(UserError, match="hidden_size 65 is not a multiple"):
        resolve(ModelConfig(preset="tiny", hidden_size=65))


def test_presets_have_the_sizes_of_their_names() -> None:
    """Parameters with the vocabulary they were published for, in millions, within 4 %."""
    sizes = {name: architecture.num_parameters(50_304) / 1e6 for name, architecture in PRESETS.items()}
    published = {"31m": 30.5, "70m": 70.4, "160m": 162.3, "410m": 405.3, "1b": 1011.8, "2.8b": 2775.2}
    for name, size in published.items():
        assert sizes[f"pythia-{name}"] == pytest.approx(size, rel=1e-3)
    assert PRESETS["llama-0.5b"].num_parameters(32_000) == pytest.approx(5e8, rel=0.04)
    assert padded_vocab_size(50_254) == 50_304
    # the usual estimate, 6 operations a parameter and token, holds where attention and embedding are small
    large = PRESETS["pythia-2.8b"]
    assert large.flops_per_token(512, 128) == pytest.approx(6 * large.num_parameters(128), rel=0.05)
