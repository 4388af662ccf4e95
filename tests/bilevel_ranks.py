"""Ranks' work for tests/test_bilevel_ranks.py: the engine and the stage on Megatron models in several layouts."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_bliss.artifacts import RunPaths
from megatron_bliss.bilevel import objective
from megatron_bliss.bilevel.curvature import Exact, FiniteDifference, Pool, check_exact, make_curvature
from megatron_bliss.bilevel.hypergradient import score_gradient, score_logits
from megatron_bliss.bilevel.loop import BilevelLoop, LoopSettings
from megatron_bliss.bilevel.solvers import Averaged
from megatron_bliss.bilevel.space import group_sum_
from megatron_bliss.config import ModelConfig, read_saved_config
from megatron_bliss.errors import UserError
from megatron_bliss.mcore import checkpoint_files, checkpoints, models, parallel
from megatron_bliss.mcore.batches import make_batch, mean_losses
from megatron_bliss.mcore.losses import Divergence, VocabShard, token_terms_
from megatron_bliss.mcore.lower_level import MegatronLowerLevel, MegatronUpperLevel, MicroBatch, micro_batches
from megatron_bliss.mcore.models import build_language_model
from megatron_bliss.mcore.parallel import ParallelContext
from megatron_bliss.mcore.score_model import build_score_model
from megatron_bliss.stages import bilevel, select, warmup_proxy
from tests.side_models import edit_config, randomise

VOCAB_SIZE = 100  # padded to 128: the second of two ranks holds 28 columns that are no tokens
SMALL = ModelConfig(preset="tiny", hidden_size=32, ffn_hidden_size=64)
LAYOUTS = {"tp": (2, False), "sp": (2, True), "dp": (1, False)}  # on two ranks
GAMMA, RIDGE = 0.5, 1e-3


def data(context: ParallelContext, seed: int, size: int, count: int = 8) -> list[MicroBatch]:
    """This rank's micro-batches of a global batch of sequences of several lengths."""
    random = np.random.default_rng(seed)
    rows = [random.integers(0, VOCAB_SIZE, int(length)) for length in random.integers(4, 18, count)]
    mine = rows[context.dp_rank :: context.dp_size]
    batches = [
        make_batch(mine[start : start + size], context.device, context.length_multiple)
        for start in range(0, len(mine), size)
    ]
    return micro_batches(batches, context)


def build(context: ParallelContext, gamma: float = GAMMA) -> tuple[dict[str, Any], Any, Any]:
    """Models by name, and the two levels made of them."""
    named = {
        "model": build_language_model(SMALL, VOCAB_SIZE, context),
        "target": build_language_model(SMALL, VOCAB_SIZE, context).requires_grad_(False),
        "score": build_score_model(SMALL, VOCAB_SIZE, context),
    }
    lower = MegatronLowerLevel(named["model"], named["target"], context, VOCAB_SIZE, gamma)
    return named, lower, MegatronUpperLevel(named["score"], context)


def evaluate(context: ParallelContext, lower: Any, upper: Any, size: int) -> dict[str, Any]:
    """Every part of a hypergradient at one point, z being the validation gradient."""
    before = [parameter.clone() for parameter in lower.space.parameters]
    z = lower.space.zeros()
    value = sum(lower.add_validation_gradient(batch, z) for batch in data(context, 2, size))
    lower.space.reduce_gradients(z)
    batches = data(context, 1, size)
    logits = score_logits(upper, batches)
    scores = objective.scores_from_logits(torch.cat([part.detach() for part in logits]))
    weights = objective.importance_weights(scores, "softmax", lower.space.dp_group)
    pool = Pool(lower, batches, weights.split([len(part) for part in logits]), RIDGE)
    evaluation = FiniteDifference().evaluate(pool, z)
    coefficients = objective.score_coefficients(weights, evaluation.derivatives, "softmax", lower.space.dp_group)
    hypergradient = score_gradient(upper, batches, logits, coefficients)
    return {
        "value": float(group_sum_(torch.as_tensor(value), lower.space.dp_group)),
        "kl": float(evaluation.kl),
        "z": float(lower.space.norm(z)),
        "weights": weights.numpy(),
        "losses": evaluation.losses.numpy(),
        "derivatives": evaluation.derivatives.numpy(),
        "same": all(torch.equal(a, b) for a, b in zip(before, lower.space.parameters, strict=True)),
        "no grad": all(parameter.grad is None for parameter in lower.space.parameters),
        "vectors": {
            "model": {"gradient": evaluation.gradient, "product": evaluation.product},
            "score": {"hypergradient": hypergradient},
        },
    }


def train(context: ParallelContext, lower: Any, upper: Any, size: int) -> list[dict[str, float]]:
    """Metrics of a few outer steps."""
    settings = LoopSettings(3, inner_steps=2, lr_proxy=1e-3, lr_score=1e-3, ridge=RIDGE)
    curvature, solver = make_curvature("finite-difference", lower.space), Averaged(lower.space, 0.05, 1.0, 0.9)
    loop: BilevelLoop[MicroBatch] = BilevelLoop(lower, upper, curvature, solver, settings)
    return [loop.step(data(context, 10 + step, size), data(context, 20 + step, size)) for step in range(3)]


def arrays(vectors: dict[str, Any]) -> dict[str, np.ndarray]:
    """Each vector as one flat array."""
    return {
        name: torch.cat([part.flatten() for part in vector]).numpy()
        for by_name in vectors.values()
        for name, vector in by_name.items()
    }


def one_rank(rank: int, folder: Path) -> dict[str, Any]:
    """Reference numbers; saves the models they come from, for other layouts to load."""
    context = parallel.initialize(1, False, seed=3)
    named, lower, upper = build(context)
    for model in named.values():
        randomise(model)
    checkpoints.save(folder / "models", 1, named, {}, {})
    found: dict[str, Any] = {}
    for size in (8, 3):  # one micro-batch, and three of unequal size
        found[f"micro-batch {size}"] = evaluate(context, lower, upper, size)
        found[f"micro-batch {size}"]["vectors"] = arrays(found[f"micro-batch {size}"]["vectors"])
    found["plain"] = _plain(context, lower)
    found["exact"] = _exact(context, lower)
    found["bf16"] = _bf16(context, folder, lower)
    found["train"] = train(context, lower, upper, 4)
    found["losses"] = losses(context)
    found["stage"] = _stage(folder)
    return found


def _plain(context: ParallelContext, lower: Any) -> dict[str, Any]:
    """The terms of G and its gradient by autograd through plain formulas."""
    [batch] = data(context, 1, 8)
    weights = torch.full((8,), 1 / 8)
    with torch.no_grad():
        target = models.logits(lower.target, batch.batch.tokens)[..., :VOCAB_SIZE]
    logits = models.logits(lower.proxy, batch.batch.tokens)[..., :VOCAB_SIZE]
    sequence_losses = mean_losses(objective.cross_entropy(logits, batch.batch.labels), batch.batch)
    kl = (objective.kl_divergence(logits, target) * batch.batch.loss_mask).sum() / batch.batch.loss_mask.sum()
    ((weights * sequence_losses).sum() + GAMMA * kl).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in lower.space.parameters])
    for parameter in lower.space.parameters:
        parameter.grad = None
    gradient, found_losses, found_kl = Pool(lower, [batch], [weights], 0.0).gradient()
    return {
        "losses": (found_losses.numpy(), sequence_losses.detach().numpy()),
        "kl": (float(found_kl), float(kl)),
        "gradient": (torch.cat([part.flatten() for part in gradient]).numpy(), expected.numpy()),
    }


def _exact(context: ParallelContext, lower: Any) -> dict[str, Any]:
    """Double backward through Megatron's layers beside finite differences."""
    batches = data(context, 1, 8)
    pool = Pool(lower, batches, [torch.full((8,), 1 / 8)], RIDGE)
    direction = pool.gradient()[0]
    check_exact(pool, direction)
    products = Exact(lower.space).product(pool, direction), FiniteDifference().product(pool, direction)
    return {
        name: torch.cat([p.flatten() for p in v]).numpy() for name, v in zip(("exact", "fd"), products, strict=True)
    }  # type: ignore[union-attr]


def _bf16(context: ParallelContext, folder: Path, lower: Any) -> dict[str, Any]:
    """Derivatives of a bfloat16 proxy with float32 masters beside those of the float32 one."""
    half = build_language_model(replace(SMALL, bf16=True), VOCAB_SIZE, context)
    checkpoints.load_model(folder / "models", half)
    other = MegatronLowerLevel(half, lower.target, context, VOCAB_SIZE, GAMMA)
    before = [parameter.clone() for parameter in other.space.parameters]
    batches = data(context, 1, 8)
    z = Pool(lower, batches, [torch.full((8,), 1 / 8)], RIDGE).gradient()[0]
    found = {
        name: FiniteDifference().evaluate(Pool(level, batches, [torch.full((8,), 1 / 8)], RIDGE), z)
        for name, level in (("bf16", other), ("fp32", lower))
    }
    return {
        "same": all(torch.equal(a, b) for a, b in zip(before, other.space.parameters, strict=True)),
        "dtypes": {str(parameter.dtype) for parameter in other.space.parameters},
        "derivatives": [found[name].derivatives.numpy() for name in ("bf16", "fp32")],
        "product": [torch.cat([p.flatten() for p in found[name].product or []]).numpy() for name in ("bf16", "fp32")],
    }


def losses(context: ParallelContext) -> dict[str, Any]:
    """Errors of the vocabulary-parallel losses and gradients against plain formulas in float64."""
    errors: dict[str, float] = {}
    generator = torch.Generator().manual_seed(0)
    for vocab_size in (100, 50):  # with 50 of 128 columns, the second of two ranks holds padding only
        proxy, target = (3 * torch.randn(40, 128, generator=generator) for _ in range(2))
        labels = torch.randint(0, vocab_size, (40,), generator=generator)
        weights, kl_weights = (torch.rand(40, generator=generator) for _ in range(2))
        width = 128 // context.tp_size
        columns = slice(context.tp_rank * width, (context.tp_rank + 1) * width)
        for direction in ("target_proxy", "proxy_target", None):
            plain = proxy[:, :vocab_size].double().requires_grad_()
            ce = objective.cross_entropy(plain, labels)
            kl = torch.zeros_like(ce)
            if direction is not None:
                kl = objective.kl_divergence(plain, target[:, :vocab_size].double(), direction)
            (weights * ce + kl_weights * kl).sum().backward()
            whole = torch.nn.functional.pad(plain.grad, (0, 128 - vocab_size))[:, columns]
            mine = proxy[:, columns].clone()
            divergence = None if direction is None else Divergence(target[:, columns], direction)
            shard = VocabShard.of(context, vocab_size)
            quiet = token_terms_(mine, labels, shard, divergence)
            assert torch.equal(mine, proxy[:, columns])  # without weights nothing is overwritten
            found = token_terms_(mine, labels, shard, divergence, weights, kl_weights)
            assert all(torch.equal(a, b) for a, b in zip(quiet, found, strict=True))
            for name, actual, expected in (("ce", found[0], ce), ("kl", found[1], kl), ("gradient", mine, whole)):
                errors[f"{vocab_size} {direction} {name}"] = float((actual - expected).detach().abs().max())
    return errors


def _stage(folder: Path) -> dict[str, Any]:
    """The stage undisturbed, and stopped between checkpoints and continued."""
    for name in ("run", "killed"):
        warmup_proxy.run(folder / name)
    for layout in LAYOUTS:
        shutil.copytree(RunPaths(folder / "run").warmup_proxy, RunPaths(folder / f"run-{layout}").warmup_proxy)
    bilevel.run(folder / "run", 1)
    step, count = bilevel.BilevelLoop.step, []

    def step_and_die(self: Any, *args: Any) -> Any:
        if len(count) == 4:
            raise KeyboardInterrupt
        count.append(1)
        return step(self, *args)

    bilevel.BilevelLoop.step = step_and_die  # type: ignore[method-assign]
    try:
        bilevel.run(folder / "killed", 1)
    except KeyboardInterrupt:
        reached = checkpoint_files.read_iteration(RunPaths(folder / "killed").bilevel(1))
    finally:
        bilevel.BilevelLoop.step = step  # type: ignore[method-assign]
    bilevel.run(folder / "killed", 1)
    results: dict[str, Any] = {"reached": reached}
    for name in ("run", "killed"):
        results[name] = {"metrics": metrics(folder / name), "parameters": _final(folder / name)}
    bilevel.run(folder / "run", 1)  # finished: nothing changes
    assert metrics(folder / "run") == results["run"]["metrics"]
    results["changed"] = _changed(folder)
    results["second round"] = _second_round(folder / "run")
    return results


def _changed(folder: Path) -> list[list[str]]:
    """Metrics of a finished run, of its stages called again after another warm-up selection, and once more."""
    run = folder / "changed"
    shutil.copytree(folder / "run", run)
    found = [metrics(run)]
    shutil.rmtree(RunPaths(run).warmup_selection)
    edit_config(run, seed=8)
    select.run(run, None)
    for _ in range(2):
        warmup_proxy.run(run)
        bilevel.run(run, 1)
        found.append(metrics(run))
    return found


def _second_round(run: Path) -> dict[str, bool]:
    """What a second round starts with: the score model of the first, or a fresh one; the warm-up's proxy."""
    context, paths = parallel.initialize(1, False, seed=9), RunPaths(run)
    config = read_saved_config(paths.config)
    old = bilevel.build(paths, config, 1, context, is_fresh=False)[1]
    checkpoints.load(paths.bilevel(1), old, {})
    carried = bilevel.build(paths, config, 2, context, is_fresh=True)[1]
    config.bilevel.restart_score = True
    fresh = bilevel.build(paths, config, 2, context, is_fresh=True)[1]

    def same(a: Any, b: Any) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))

    config.bilevel.gamma = 0.1
    try:
        bilevel.build(paths, config, 2, context, is_fresh=True)
        needs_target = False
    except UserError:
        needs_target = True
    return {
        "score model carries over": same(carried["score"], old["score"]),
        "head restarts": not fresh["score"].score_head.weight.any(),
        "proxy restarts": same(carried["model"], fresh["model"]) and not same(carried["model"], old["model"]),
        "KL needs a target": needs_target,
    }


def metrics(run: Path) -> list[str]:
    return (RunPaths(run).bilevel(1) / "metrics.jsonl").read_text().splitlines()


def _final(run: Path) -> list[np.ndarray]:
    context = parallel.initialize(1, False, seed=9)
    config = read_saved_config(RunPaths(run).config)
    built = bilevel.build(RunPaths(run), config, 1, context, is_fresh=False)[1]
    checkpoints.load(RunPaths(run).bilevel(1), built, {})
    return [parameter.detach().numpy() for model in built.values() for parameter in model.parameters()]


def two_ranks(rank: int, folder: Path) -> dict[str, Any]:
    """The same numbers from the same models in every layout of two ranks."""
    results: dict[str, Any] = {}
    vectors = {}
    for layout, (tensor_parallel, sequence_parallel) in LAYOUTS.items():
        context = parallel.initialize(tensor_parallel, sequence_parallel, seed=3)
        named, lower, upper = build(context)
        checkpoints.load(folder / "models", named, {})
        found = evaluate(context, lower, upper, 3)
        trainable = {name: named[name] for name in ("model", "score")}
        checkpoints.save(folder / f"vectors-{layout}", 1, trainable, found.pop("vectors"), {})
        results[layout] = found
        results[f"{layout} train"] = train(context, lower, upper, 4)
        if layout == "tp":
            results["losses"] = losses(context)
            try:
                Exact(lower.space)
            except UserError as error:
                results["refused"] = str(error)
    # vectors of every layout, made whole by loading them at TP 1
    for layout in LAYOUTS:
        named, lower, upper = build(context)
        vectors = {
            "model": {"gradient": lower.space.zeros(), "product": lower.space.zeros()},
            "score": {"hypergradient": upper.space.zeros()},
        }
        checkpoints.load(folder / f"vectors-{layout}", {name: named[name] for name in vectors}, vectors)
        results[layout]["vectors"] = arrays(vectors)
    for layout, (tensor_parallel, sequence_parallel) in LAYOUTS.items():
        run = folder / f"run-{layout}"
        if rank == 0:
            edit_config(run, proxy__tensor_parallel=tensor_parallel, proxy__sequence_parallel=sequence_parallel)
        torch.distributed.barrier()
        bilevel.run(run, 1)
        results[f"{layout} stage"] = metrics(run) if rank == 0 else []
    return results
