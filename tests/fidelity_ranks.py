"""Ranks' work for tests/test_fidelity.py: usefulness to a target and to a proxy, by hand and in several layouts."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_bliss.artifacts import RunPaths, read_json
from megatron_bliss.config import read_saved_config
from megatron_bliss.data.inventory import Inventory
from megatron_bliss.data.scores import ScoreFiles
from megatron_bliss.mcore import checkpoints, parallel
from megatron_bliss.mcore.batches import make_batch
from megatron_bliss.mcore.models import build_language_model, token_losses
from megatron_bliss.mcore.score_model import build_score_model
from megatron_bliss.stages import fidelity, score
from megatron_bliss.stages.fidelity import PROXY, TARGET, Sample
from tests.side_models import edit_config, randomise
from tests.target_cache_ranks import save_target

LAYOUTS: dict[str, dict[str, Any]] = {  # of two ranks
    "dp": {},
    "tp": {"target__tensor_parallel": 2},
    "sp": {
        "target__tensor_parallel": 2, "target__sequence_parallel": True,
        "proxy__tensor_parallel": 2, "proxy__sequence_parallel": True,
    },
}  # fmt: skip


def one_rank(rank: int, folder: Path) -> dict[str, Any]:
    """Makes the models that all layouts measure with."""
    run = folder / "run"
    save_target(run, seed=1)
    _save_proxy(run)
    score.run(run, 1)
    for name in ("bf16", "recomputed", *LAYOUTS):
        shutil.copytree(run, folder / name)
    fidelity.run(run, 1)
    recompute = ["--recompute-granularity", "full"]
    edit_config(folder / "recomputed", target__extra_args=recompute, proxy__recompute=True)
    fidelity.run(folder / "recomputed", 1)
    edit_config(folder / "bf16", proxy__model__bf16=True)
    fidelity.run(folder / "bf16", 1)
    return {
        "by hand": {name: _by_hand(run, name, count=8) for name in (TARGET, PROXY)},
        "recomputed": _found(folder / "recomputed"),
        "bf16": _found(folder / "bf16"),
        "scores": _sample(run).scores(ScoreFiles(RunPaths(run).scores(1))),
        **_found(run),
    }


def two_ranks(rank: int, folder: Path) -> dict[str, Any]:
    found = {}
    for name, settings in LAYOUTS.items():
        if rank == 0:
            edit_config(folder / name, **settings)
        parallel.initialize(1, False, seed=1)
        torch.distributed.barrier()
        fidelity.run(folder / name, 1)
        found[name] = _found(folder / name)
    return found


def _save_proxy(run: Path) -> None:
    """A proxy that is much like the target, and a score model, as the bilevel loop would leave them."""
    config, paths = read_saved_config(RunPaths(run).config), RunPaths(run)
    context = parallel.initialize(1, False, seed=1)
    vocab_size = config.data.tokenizer.vocab_size
    proxy = build_language_model(config.proxy.model, vocab_size, context)
    score_model = build_score_model(config.proxy.model, vocab_size, context)
    checkpoints.load_model(paths.warmup_target, proxy)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in proxy.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    randomise(score_model)
    checkpoints.save(paths.bilevel(1), 1, {checkpoints.MODEL: proxy, checkpoints.SCORE: score_model}, {}, {})


def _found(run: Path) -> dict[str, Any]:
    directory = RunPaths(run).fidelity(1)
    measured = {name: np.load(directory / f"{name}.npy") for name in (TARGET, PROXY)}
    return measured | {"results": read_json(fidelity.results_path(directory))}


def _sample(run: Path) -> Sample:
    paths = RunPaths(run)
    return Sample.draw(read_saved_config(paths.config), Inventory.read(paths.inventory), 1)


def _by_hand(run: Path, name: str, count: int) -> list[float]:
    """⟨∇L, ∇L_i⟩ of the first sequences from whole gradients; the validation sets are measured in full."""
    paths = RunPaths(run)
    config, inventory = read_saved_config(paths.config), Inventory.read(paths.inventory)
    context = parallel.initialize(1, False, seed=1)
    model = build_language_model(config.target.model, config.data.tokenizer.vocab_size, context)
    checkpoints.load_model(paths.warmup_target if name == TARGET else paths.bilevel(1), model)
    parameters, length = list(model.parameters()), config.data.sequence_length

    def gradient(sequences: list[np.ndarray]) -> list[torch.Tensor]:
        """Of the mean loss over all predicted tokens; a window begins with the last token of the one before."""
        windows = [tokens[at : at + length + 1] for tokens in sequences for at in range(0, len(tokens) - 1, length)]
        batch = make_batch(windows, context.device)
        losses = token_losses(model, batch) * batch.loss_mask
        return list(torch.autograd.grad(losses.sum() / batch.loss_mask.sum(), parameters))

    upper = [torch.zeros_like(parameter) for parameter in parameters]
    for record in inventory.validation.values():
        found = gradient([tokens for tokens, _ in map(_validation(record).get, range(record.num_sequences))])
        for total, part in zip(upper, found, strict=True):
            total.add_(part, alpha=config.data.validation_weights["validation"])
    sample = _sample(run)
    return [
        float(sum((a * b).sum() for a, b in zip(upper, gradient([sample.get(i)[0]]), strict=True)))
        for i in range(count)
    ]


def _validation(record: Any) -> Any:
    from megatron_bliss.data.validation import ValidationSet

    return ValidationSet.of(record)
