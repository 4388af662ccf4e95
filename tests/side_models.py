"""Ranks' work for tests/test_side_models.py: models, checkpoints, warm-up and scoring in several layouts."""

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_bliss.artifacts import RunPaths
from megatron_bliss.bilevel.optimizer import AdamSettings
from megatron_bliss.config import ModelConfig, RunConfig, read_saved_config, save_config
from megatron_bliss.data.inventory import Inventory
from megatron_bliss.errors import StageError, UserError
from megatron_bliss.mcore import checkpoint_files, checkpoints, parallel
from megatron_bliss.mcore.batches import Batch, make_batch
from megatron_bliss.mcore.models import build_language_model, logits, token_losses
from megatron_bliss.mcore.parallel import ParallelContext
from megatron_bliss.mcore.score_model import build_score_model
from megatron_bliss.mcore.space import MegatronSpace
from megatron_bliss.stages import inventory, score, select, warmup_proxy
from megatron_bliss.stages.warmup_proxy import loss_and_gradient
from tests.tiny_run import tiny_config

VOCAB_SIZE = 200
MODELS = {
    "pythia": ModelConfig(preset="tiny", hidden_size=32, ffn_hidden_size=64),
    "llama": ModelConfig(
        preset="llama-0.5b", num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4
    ),
}  # fmt: skip
LAYOUTS = {"tp": (2, False), "sp": (2, True), "dp": (1, False)}  # on two ranks


def sequences() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, VOCAB_SIZE, length) for length in (17, 9, 2, 12)]


def batch(context: ParallelContext, whole: bool = False) -> Batch:
    """This rank's part of the sequences, or all of them."""
    rows = sequences() if whole else sequences()[context.dp_rank :: context.dp_size]
    return make_batch(rows, context.device, context.length_multiple)


def randomise(model: torch.nn.Module) -> None:
    """Give weight to what starts at zero or one (biases, norms, head), so that a mistake in it shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def space_of(model: torch.nn.Module, context: ParallelContext) -> MegatronSpace:
    return MegatronSpace(model, context, AdamSettings(), distributed=False)


def _by_row(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[s·b, v] to [b, s, v]."""
    return values.view(batch.tokens.shape[1], batch.tokens.shape[0], -1).transpose(0, 1)


def measure(model: Any, score_model: Any, context: ParallelContext) -> dict[str, Any]:
    """Losses, logits and scores of all sequences, and gradients of the mean loss and of a weighted sum of scores."""
    whole = batch(context, whole=True)
    with torch.no_grad():
        found: dict[str, Any] = {
            "losses": (token_losses(model, whole) * whole.loss_mask)[:, :16].numpy(),
            "scores": score_model(whole).numpy(),
            "logits": _by_row(logits(model, replace(whole, labelled=None)), whole)[:, :16].numpy(),
        }
    space, score_space = space_of(model, context), space_of(score_model, context)
    num_tokens = sum(len(sequence) - 1 for sequence in sequences())
    loss, gradient = loss_and_gradient(model, space, [batch(context)], num_tokens)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])[context.dp_rank :: context.dp_size]
    (score_model(batch(context)) * weights).sum().backward()
    score_gradient = score_space.accumulator()
    score_space.harvest_(score_gradient)
    score_gradient = score_space.reduce_gradients(score_gradient)
    found["loss"] = float(loss)
    found["norms"] = float(space.norm(gradient)), float(score_space.norm(score_gradient))
    return found | {"gradients": {"model": {"gradient": gradient}, "score": {"gradient": score_gradient}}}


def _models(config: ModelConfig, context: ParallelContext) -> dict[str, Any]:
    return {
        "model": build_language_model(config, VOCAB_SIZE, context),
        "score": build_score_model(config, VOCAB_SIZE, context),
    }


def _numpy(gradients: dict[str, Any]) -> dict[str, Any]:
    return {name: [part.numpy() for part in by_name["gradient"]] for name, by_name in gradients.items()}


def one_rank(rank: int, folder: Path) -> dict[str, Any]:
    """Reference numbers; saves the models they come from, for other layouts to load."""
    results: dict[str, Any] = {}
    context = parallel.initialize(1, False, seed=3)
    for name, config in MODELS.items():
        models = _models(config, context)
        results[f"{name} initial"] = float(sum(p.double().abs().sum() for p in models["model"].parameters()))
        for model in models.values():
            randomise(model)
        checkpoints.save(folder / name, 1, models, {}, {"note": name})
        found = measure(models["model"], models["score"], context)
        results[name] = found | {"gradients": _numpy(found["gradients"])}
        results[f"{name} pooling"] = _pooling(models["score"], context)
    for name, config in MODELS.items():
        results[f"{name} recomputed"] = _recomputed(folder / name, config, context)
    results["bf16"] = _bf16(folder / "bf16", context)
    results["prune"] = _prune(folder / "prune", context)
    results["backbone"] = _backbone(folder / "pythia", context)
    results["warmup"] = _warmup(folder)
    results["scores"] = _scores(folder)
    return results


def _recomputed(folder: Path, config: ModelConfig, context: ParallelContext) -> dict[str, Any]:
    models = {
        "model": build_language_model(config, VOCAB_SIZE, context, recompute=True),
        "score": build_score_model(config, VOCAB_SIZE, context, recompute=True),
    }
    checkpoints.load(folder, models, {})
    found = measure(models["model"], models["score"], context)
    return found | {"gradients": _numpy(found["gradients"])}


def _pooling(score_model: Any, context: ParallelContext) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of sequences in one padded batch, each alone, and by hand from the hidden states of each alone."""
    from megatron.core.models.gpt import GPTModel

    from megatron_bliss.mcore.models import positions

    alone, by_hand = [], []
    with torch.no_grad():
        together = score_model(batch(context, whole=True)).numpy()
        for sequence in sequences():
            single = make_batch([sequence], context.device)
            alone.append(score_model(single).item())
            states = GPTModel.forward(score_model, single.tokens, positions(single.tokens), None)
            by_hand.append(score_model.score_head(states.mean(0)).item())
    return together, np.array(alone), np.array(by_hand)


def _bf16(folder: Path, context: ParallelContext) -> dict[str, Any]:
    config = ModelConfig(preset="tiny", hidden_size=32, ffn_hidden_size=64, bf16=True)
    model, again = (build_language_model(config, VOCAB_SIZE, context) for _ in range(2))
    space, other = space_of(model, context), space_of(again, context)
    for master in space.masters:
        master.add_(1e-4)  # lost in bfloat16, kept in the masters
    space.push()
    checkpoints.save(folder, 7, {"model": model}, {"model": {"master": space.masters}}, {})
    checkpoints.load(folder, {"model": again}, {"model": {"master": other.masters}})
    score_model = build_score_model(config, VOCAB_SIZE, context)
    scores = score_model(batch(context))
    return {
        "dtypes": sorted({str(p.dtype) for p in model.parameters()}),
        "head": str(score_model.score_head.weight.dtype),
        "scores": str(scores.dtype),
        "losses": str(token_losses(model, batch(context)).dtype),
        "same": all(torch.equal(a, b) for a, b in zip(space.masters, other.masters, strict=True))
        and all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)),
    }


def _prune(folder: Path, context: ParallelContext) -> dict[str, Any]:
    model = build_language_model(MODELS["pythia"], VOCAB_SIZE, context)
    for iteration in (1, 2, 3, 10):
        checkpoints.save(folder, iteration, {"model": model}, {}, {"at": iteration}, keep=2)
    return {
        "files": sorted(path.name for path in folder.iterdir()),
        "latest": checkpoint_files.read_iteration(folder),
        "common": checkpoints.load(folder, {"model": model}, {}),
    }


def _backbone(folder: Path, context: ParallelContext) -> bool:
    models = _models(MODELS["pythia"], context)
    checkpoints.load_model(folder, models["model"])
    checkpoints.load_backbone(folder, models["score"])
    proxy = dict(models["model"].named_parameters())
    is_same = all(torch.equal(proxy[n], p) for n, p in models["score"].named_parameters() if "score_head" not in n)
    return is_same and not any(p.any() for p in models["score"].score_head.parameters())


def _final_parameters(folder: Path) -> list[np.ndarray]:
    context = parallel.initialize(1, False, seed=9)
    config = read_saved_config(RunPaths(folder).config)
    model = build_language_model(config.proxy.model, config.data.tokenizer.vocab_size, context)
    checkpoints.load_model(RunPaths(folder).warmup_proxy, model)
    return [parameter.detach().numpy() for parameter in model.parameters()]


class _KillError(Exception):
    pass


def _warmup(folder: Path) -> dict[str, Any]:
    """The warm-up undisturbed, and the same one stopped after its first checkpoint and continued."""
    warmup_proxy.run(folder / "run")
    save = checkpoints.save

    def save_and_die(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        raise _KillError

    checkpoints.save = save_and_die
    try:
        warmup_proxy.run(folder / "killed")
    except _KillError:
        reached = checkpoint_files.read_iteration(RunPaths(folder / "killed").warmup_proxy)
    finally:
        checkpoints.save = save
    warmup_proxy.run(folder / "killed")
    return {
        "reached": reached,
        "undisturbed": _final_parameters(folder / "run"),
        "continued": _final_parameters(folder / "killed"),
        "metrics": [(RunPaths(folder / name).warmup_proxy / "metrics.jsonl").read_text() for name in ("run", "killed")],
    }


def save_score_model(folder: Path) -> None:
    """A score model with a head that is not zero, where the bilevel stage would leave it."""
    config = read_saved_config(RunPaths(folder).config)
    context = parallel.initialize(1, False, seed=4)
    model = build_score_model(config.proxy.model, config.data.tokenizer.vocab_size, context)
    randomise(model)
    checkpoints.save(RunPaths(folder).bilevel(1), 1, {checkpoints.SCORE: model}, {}, {})


def read_scores(folder: Path) -> dict[str, np.ndarray]:
    paths = RunPaths(folder)
    return {r.name: np.load(paths.scores(1) / f"{r.name}.npy") for r in Inventory.read(paths.inventory).pool}


def new_run(folder: Path, **changes: Any) -> Path:
    """`folder/run`, a tiny run without controls that has its inventory; settings are changed as by `edit_config`."""
    run = folder / "run"
    run.mkdir()
    shutil.copy(tiny_config(folder, control=False), run / "run.yaml")
    edit_config(run, **changes)
    inventory.run(run)
    return run


def selected_run(folder: Path, **changes: Any) -> Path:
    """The same with its warm-up's selection."""
    run = new_run(folder, **changes)
    select.run(run, None)
    return run


def edit_config(folder: Path, **changes: Any) -> RunConfig:
    """Rewrite settings of a run directory: `section__key=value`."""
    path = RunPaths(folder).config
    config = read_saved_config(path)
    for key, value in changes.items():
        *sections, name = key.split("__")
        section: Any = config
        for part in sections:
            section = getattr(section, part)
        setattr(section, name, value)
    save_config(config, path)
    return config


def _scores(folder: Path) -> dict[str, Any]:
    """Scores in one go, with other batches, and in two runs of the stage."""
    run = folder / "run"
    save_score_model(run)
    score.run(run, 1)
    results: dict[str, Any] = {"whole": read_scores(run)}
    (RunPaths(run).scores(1) / "manifest.json").unlink()
    edit_config(run, scoring__batch_tokens=20, scoring__chunk_sequences=7)
    write, count = score.ScoreWriter.write, []

    def write_and_die(self: Any, *args: Any) -> None:
        write(self, *args)
        count.append(self.num_scored)
        if len(count) == 3:
            raise _KillError

    score.ScoreWriter.write = write_and_die  # type: ignore[method-assign]
    with contextlib.suppress(_KillError):
        score.run(run, 1)
    results["scored before the kill"] = count[-1]
    score.run(run, 1)
    score.run(run, 1)  # nothing is left
    score.ScoreWriter.write = write  # type: ignore[method-assign]
    results["writes"], results["in pieces"] = len(count), read_scores(run)
    edit_config(run, method="perplexity", scoring__batch_tokens=512, scoring__chunk_sequences=1000)
    score.run(run, 1)
    results["proxy loss"] = read_scores(run)
    return results


def two_ranks(rank: int, folder: Path) -> dict[str, Any]:
    """The same numbers from the same checkpoints in every layout of two ranks."""
    results: dict[str, Any] = {}
    for layout, (tensor_parallel, sequence_parallel) in LAYOUTS.items():
        context = parallel.initialize(tensor_parallel, sequence_parallel, seed=3)
        for name, config in MODELS.items():
            models = _models(config, context)
            total = torch.stack([p.double().abs().sum() for p in models["model"].parameters()])
            space = space_of(models["model"], context)
            results[f"{layout} {name} initial"] = float(space._count_once(total))
            results[f"{layout} common"] = checkpoints.load(folder / name, models, {})
            found = measure(models["model"], models["score"], context)
            checkpoints.save(folder / f"{layout}-{name}", 2, models, found.pop("gradients"), {})
            results[f"{layout} {name}"] = found
    results["agree"] = _agree(rank, context)
    # gradients of every layout, made whole by loading them at TP 1
    for layout in LAYOUTS:
        for name, config in MODELS.items():
            models = _models(config, context)
            vectors = {key: {"gradient": space_of(model, context).zeros()} for key, model in models.items()}
            checkpoints.load(folder / f"{layout}-{name}", models, vectors)
            results[f"{layout} {name} gradients"] = _numpy(vectors)
    for layout, (tensor_parallel, sequence_parallel) in LAYOUTS.items():
        run = folder / f"run-{layout}"
        if rank == 0:
            edit_config(run, proxy__tensor_parallel=tensor_parallel, proxy__sequence_parallel=sequence_parallel)
        torch.distributed.barrier()
        warmup_proxy.run(run)
        results[f"{layout} warmup"] = (RunPaths(run).warmup_proxy / "metrics.jsonl").read_text() if rank == 0 else ""
        save_score_model(run)
        score.run(run, 1)
        results[f"{layout} scores"] = read_scores(run)
    return results


def _agree(rank: int, context: ParallelContext) -> list[str]:
    seen = []
    for failing, error in ((1, UserError("bad file")), (0, ValueError("broken"))):
        try:
            with parallel.agreed(context):
                if rank == failing:
                    raise error
            seen.append("went on")
        except SystemExit as ended:
            seen.append(f"exit {ended.code}")
        except Exception as raised:
            seen.append(type(raised).__name__)
    with parallel.agreed(context):
        pass
    assert parallel.same(context, 7, "the number of steps") == 7
    try:
        parallel.same(context, 100 * rank, "the number of steps")
    except SystemExit as ended:
        seen.append(f"exit {ended.code}")
    except StageError as raised:
        seen.append(str(raised).partition(".")[0])
    return seen
