"""Ranks' work for tests/test_influence.py: probing steps and the fit, in several layouts, whole and interrupted."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_bliss.artifacts import RunPaths, read_json
from megatron_bliss.config import read_saved_config
from megatron_bliss.data.inventory import Inventory
from megatron_bliss.mcore import checkpoint_files, checkpoints, parallel
from megatron_bliss.mcore.batches import make_batch
from megatron_bliss.mcore.models import build_language_model, token_losses
from megatron_bliss.stages import fit_influence, influence, score, warmup_proxy
from megatron_bliss.stages.influence_data import InfluenceSample, reference_sets
from megatron_bliss.stages.side_training import whole_vectors
from tests.side_models import edit_config, read_scores

LAYOUTS = ("dp", "sp")  # of two ranks: data parallel with the distributed optimizer; tensor and sequence parallel


class _KillError(Exception):
    pass


def one_rank(rank: int, folder: Path) -> dict[str, Any]:
    """Warms up the proxy that all layouts probe."""
    run = folder / "run"
    warmup_proxy.run(run)
    for name in ("killed", "planted", "bf16", *(f"run-{layout}" for layout in LAYOUTS)):
        shutil.copytree(run, folder / name)
    edit_config(folder / "bf16", proxy__model__bf16=True)
    edit_config(folder / "run-dp", proxy__distributed_optimizer=True, tracking__tensorboard=True)
    edit_config(folder / "run-sp", proxy__tensor_parallel=2, proxy__sequence_parallel=True)
    influence.run(run, 1)
    fit_influence.run(run, 1)
    score.run(run, 1)
    return {
        "domains": _domains(run),
        "by hand": _by_hand(run, count=6),
        "killed": _killed(folder / "killed"),
        "planted": _planted(folder / "planted"),
        "restored": [_restored(run), _restored(folder / "bf16")],
        "scores": read_scores(run),
        **_found(run),
    }


def two_ranks(rank: int, folder: Path) -> dict[str, Any]:
    found = {}
    for layout in LAYOUTS:
        run = folder / f"run-{layout}"
        influence.run(run, 1)
        fit_influence.run(run, 1)
        found[layout] = _found(run)
    return found


def _found(run: Path) -> dict[str, Any]:
    paths = RunPaths(run)
    return {
        "influence": influence.read(paths.influence(1)),
        "fit": read_json(fit_influence.fit_path(paths.influence_model(1))),
        "metrics": (paths.influence_model(1) / "metrics.jsonl").read_text(),
    }


def _sample(run: Path) -> tuple[Any, Any, Inventory]:
    paths = RunPaths(run)
    config, inventory = read_saved_config(paths.config), Inventory.read(paths.inventory)
    return config, InfluenceSample(config, inventory, 1), inventory


def _domains(run: Path) -> list[str]:
    """Of the probed sequences."""
    _, sample, inventory = _sample(run)
    return [inventory.pool[index].domain for index, _ in sample._samples]


def _by_hand(run: Path, count: int) -> list[float]:
    """Influences of the first sequences by torch's AdamW and clipping, in float64."""
    config, sample, inventory = _sample(run)
    context = parallel.initialize(1, False, seed=1)
    model = build_language_model(config.proxy.model, config.data.tokenizer.vocab_size, context)
    parameters = list(model.parameters())
    directory = RunPaths(run).warmup_proxy
    names = ("master", "exp_avg", "exp_avg_sq")
    saved = {name: [torch.zeros_like(parameter) for parameter in parameters] for name in names}
    checkpoints.load(directory, {"model": model}, {"model": saved})
    steps = checkpoint_files.read_iteration(directory)
    assert steps == config.warmup.proxy_steps
    model.double()
    [drawn] = reference_sets(config, inventory, 1)
    reference = make_batch(drawn.tokens, context.device, 1, drawn.masks)

    def loss() -> float:
        with torch.no_grad():
            losses = token_losses(model, reference)
        return float((losses * reference.loss_mask).sum() / reference.loss_mask.sum())

    before, found = loss(), []
    for index in range(count):
        optimizer = torch.optim.AdamW(parameters, lr=config.warmup.proxy_lr, betas=(0.9, 0.95), weight_decay=0.1)
        for parameter, average, square in zip(parameters, saved["exp_avg"], saved["exp_avg_sq"], strict=True):
            state = {"exp_avg": average.double(), "exp_avg_sq": square.double()}
            optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **state}
        batch = make_batch([sample.get(index)[0]], context.device)
        losses = token_losses(model, batch)
        (losses * batch.loss_mask).sum().div(batch.loss_mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        found.append(before - loss())
        with torch.no_grad():
            for parameter, master in zip(parameters, saved["master"], strict=True):
                parameter.copy_(master)
                parameter.grad = None
    return found


def _restored(run: Path) -> dict[str, Any]:
    """Whether a probing step moves anything, and whether all is as it was afterwards."""
    config, sample, inventory = _sample(run)
    context = parallel.initialize(1, False, seed=1)
    probe = influence.SequenceProbe(config, RunPaths(run).warmup_proxy, reference_sets(config, inventory, 1), context)
    optimizer = probe._probe._optimizer

    def bits() -> list[np.ndarray]:
        tensors = [part for vector in whole_vectors(optimizer).values() for part in vector]
        steps = [torch.as_tensor(state["step"]) for state in optimizer.inner.state.values()]
        return [tensor.detach().float().numpy().copy() for tensor in (*tensors, *probe._space.parameters, *steps)]

    before, influences = bits(), [float(probe(sample.get(index)[0])) for index in (0, 1, 0)]
    after = bits()
    return {
        "dtypes": sorted({str(parameter.dtype) for parameter in probe._space.parameters}),
        "same": all(np.array_equal(one, other) for one, other in zip(before, after, strict=True)),
        "influences": influences,
    }


def _planted(run: Path) -> dict[str, Any]:
    """What the fit reports where the influence is the share of tokens in the lower half of the vocabulary."""
    config, sample, _ = _sample(run)
    directory = RunPaths(run).influence(1)
    directory.mkdir(parents=True)
    half = config.data.tokenizer.vocab_size // 2
    np.save(directory / "influence.npy", np.array([(sample.get(i)[0] < half).mean() for i in range(len(sample))]))
    fit_influence.run(run, 1)
    return read_json(fit_influence.fit_path(RunPaths(run).influence_model(1)))


def _killed(run: Path) -> dict[str, Any]:
    """Both stages, each stopped between two writes and called again."""
    probe, save, calls = influence.SequenceProbe.__call__, checkpoints.save, []

    def probe_and_die(self: Any, tokens: np.ndarray) -> Any:
        calls.append(len(tokens))
        if len(calls) == 30:
            raise _KillError
        return probe(self, tokens)

    def save_and_die(*arguments: Any, **keywords: Any) -> None:
        save(*arguments, **keywords)
        raise _KillError

    influence.SequenceProbe.__call__ = probe_and_die  # type: ignore[method-assign]
    try:
        influence.run(run, 1)
    except _KillError:
        reached = len(influence.read(RunPaths(run).influence(1)))
    influence.run(run, 1)
    influence.SequenceProbe.__call__ = probe  # type: ignore[method-assign]
    checkpoints.save = save_and_die
    try:
        fit_influence.run(run, 1)
    except _KillError:
        fitted = checkpoint_files.read_iteration(RunPaths(run).influence_model(1))
    finally:
        checkpoints.save = save
    fit_influence.run(run, 1)
    score.run(run, 1)
    found = {"reached": reached, "calls": len(calls), "fitted": fitted, "scores": read_scores(run)}
    return found | _found(run)
