"""Ranks' work for tests/test_bilevel_ranks.py: the engine and the stage on Megatron models in several layouts."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_bliss.artifacts import RunPaths
from megatron_bliss.bilevel import objective
from megatron_bliss.bilevel.curvature import (
    Exact,
    FiniteDifference,
    GaussNewton,
    NoCurvature,
    Pool,
    check_exact,
    make_curvature,
)
from megatron_bliss.bilevel.hypergradient import score_gradient, score_logits
from megatron_bliss.bilevel.loop import BilevelLoop, LoopSettings
from megatron_bliss.bilevel.optimizer import AdamSettings
from megatron_bliss.bilevel.solvers import Averaged
from megatron_bliss.bilevel.space import group_sum_
from megatron_bliss.config import ModelConfig, read_saved_config
from megatron_bliss.errors import UserError
from megatron_bliss.mcore import checkpoint_files, checkpoints, models, parallel
from megatron_bliss.mcore.batches import make_batch, mean_losses
from megatron_bliss.mcore.losses import LogitsDivergence, VocabShard, token_terms_
from megatron_bliss.mcore.lower_level import (
    MegatronLowerLevel,
    MegatronUpperLevel,
    MicroBatch,
    everywhere,
    labelled,
    micro_batches,
)
from megatron_bliss.mcore.models import build_language_model
from megatron_bliss.mcore.parallel import ParallelContext
from megatron_bliss.mcore.score_model import build_score_model
from megatron_bliss.mcore.space import MegatronSpace
from megatron_bliss.stages import bilevel, select, warmup_proxy
from tests.side_models import edit_config, randomise

VOCAB_SIZE = 100  # padded to 128: the second of two ranks holds 28 columns that are no tokens
SMALL = ModelConfig(preset="tiny", hidden_size=32, ffn_hidden_size=64)
# on two ranks: tensor-parallel size, sequence parallelism, distributed optimizer
LAYOUTS = {"tp": (2, False, False), "sp": (2, True, True), "dp": (1, False, False), "distributed": (1, False, True)}
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


ADAM = AdamSettings(lr=1e-3)


def build(
    context: ParallelContext,
    distributed: bool = False,
    saved: Path | None = None,
    bf16: bool = False,
    plain_kernels: bool = False,
) -> tuple[dict[str, Any], Any, Any]:
    """Models by name, with saved weights or random ones, and the two levels made of them."""
    named = {
        "model": build_language_model(replace(SMALL, bf16=bf16), VOCAB_SIZE, context, plain_kernels=plain_kernels),
        "target": build_language_model(SMALL, VOCAB_SIZE, context).requires_grad_(False),
        "score": build_score_model(SMALL, VOCAB_SIZE, context),
    }
    for name, model in named.items():
        if saved is None:
            randomise(model)
        else:
            checkpoints.load_model(saved, model, name)
    space = MegatronSpace(named["model"], context, ADAM, distributed)
    shard = VocabShard.of(context, VOCAB_SIZE)
    lower = MegatronLowerLevel(named["model"], space, named["target"], shard, GAMMA)
    return named, lower, MegatronUpperLevel(named["score"], MegatronSpace(named["score"], context, ADAM, distributed))


def evaluate(context: ParallelContext, lower: Any, upper: Any, size: int) -> dict[str, Any]:
    """Every part of a hypergradient at one point, z being the validation gradient."""
    before = _everything(lower)
    z = lower.space.accumulator()
    value = sum(lower.add_validation_gradient(batch, z) for batch in data(context, 2, size))
    z = lower.space.reduce_gradients(z)
    batches = data(context, 1, size)
    logits = score_logits(upper, batches)
    scores = objective.scores_from_logits(torch.cat(logits))
    weights = objective.importance_weights(scores, "softmax", lower.space.dp_group)
    pool = Pool(lower, batches, weights.split([len(part) for part in logits]), RIDGE)
    evaluation = FiniteDifference().evaluate(pool, z)
    gauss_newton = GaussNewton().evaluate(pool, z)
    idle = NoCurvature().evaluate(pool, z)
    coefficients = objective.score_coefficients(weights, evaluation.derivatives, "softmax", lower.space.dp_group)
    hypergradient = score_gradient(upper, batches, coefficients.split([len(part) for part in logits]))
    after = _everything(lower)
    return {
        "value": float(group_sum_(torch.as_tensor(value), lower.space.dp_group)),
        "kl": float(evaluation.kl),
        "z": float(lower.space.norm(z)),
        "weights": weights.numpy(),
        "losses": evaluation.losses.numpy(),
        "derivatives": evaluation.derivatives.numpy(),
        "gauss-newton derivatives": gauss_newton.derivatives.numpy(),
        "idle derivatives": idle.derivatives.numpy(),
        "changed": [name for name, values in before.items() if not _same(values, after[name])],
        "vectors": {
            "model": {
                name: lower.space.whole(vector)
                for name, vector in (
                    ("gradient", evaluation.gradient),
                    ("product", evaluation.product),
                    ("gauss-newton gradient", gauss_newton.gradient),
                    ("gauss-newton product", gauss_newton.product),
                    ("idle gradient", idle.gradient),
                )
            },
            "score": {"hypergradient": upper.space.whole(hypergradient)},
        },
    }


def _everything(lower: Any) -> dict[str, list[torch.Tensor]]:
    """What a hypergradient must leave as it was, to the last bit."""
    space = lower.space
    moments = space.optimizer(ADAM).moments()
    found = {
        "parameters": space.parameters,
        "masters": space.masters,
        "moments": [part for vector in moments.values() for part in vector],
        "gradient buffers": [parameter.main_grad for parameter in space.parameters],
        "gradients": [parameter.grad for parameter in space.parameters if parameter.grad is not None],
        "random numbers": [
            torch.get_rng_state(),
            *(torch.as_tensor(state) for state in get_cuda_rng_tracker().get_states().values()),
        ],
    }
    return {name: [tensor.detach().clone() for tensor in tensors] for name, tensors in found.items()}


def _same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def train(context: ParallelContext, lower: Any, upper: Any, size: int) -> list[dict[str, float]]:
    """Metrics of a few outer steps."""
    settings = LoopSettings(4, inner_steps=2, solve_interval=2, ridge=RIDGE)
    curvature, solver = make_curvature("finite-difference", lower.space), Averaged(lower.space, 0.05, 1.0, 0.9)
    optimizers = lower.space.optimizer(ADAM), upper.space.optimizer(ADAM)
    loop: BilevelLoop[MicroBatch] = BilevelLoop(lower, upper, curvature, solver, settings, *optimizers)
    return [loop.step(data(context, 10 + step, size), data(context, 20 + step, size)) for step in range(4)]


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
    checkpoints.save(folder / "models", 1, named, {}, {})
    found: dict[str, Any] = {}
    for size in (8, 3):  # one micro-batch, and three of unequal size
        found[f"micro-batch {size}"] = evaluate(context, lower, upper, size)
        found[f"micro-batch {size}"]["vectors"] = arrays(found[f"micro-batch {size}"]["vectors"])
    found["plain"] = _plain(context, lower)
    found["exact"] = _exact(context, folder)
    found["bf16"] = along_gradient(context, folder, distributed=False, bf16=True)
    found["fp32"] = along_gradient(context, folder, distributed=False, bf16=False)
    found["train"] = train(context, lower, upper, 4)
    found["losses"] = losses(context)
    found["stage"] = _stage(folder)
    return found


def _plain(context: ParallelContext, lower: Any) -> dict[str, Any]:
    """The terms of G and its gradient by autograd through plain formulas."""
    [batch] = data(context, 1, 8)
    weights = torch.full((8,), 1 / 8)
    whole = replace(batch.batch, labelled=None)  # padding too
    shape = (*reversed(whole.tokens.shape), -1)
    with torch.no_grad():
        target = models.logits(lower.target, whole)[:, :VOCAB_SIZE].view(shape).transpose(0, 1)
    logits = models.logits(lower.proxy, whole)[:, :VOCAB_SIZE].view(shape).transpose(0, 1)
    sequence_losses = mean_losses(objective.cross_entropy(logits, whole.labels), whole)
    kl = (objective.kl_divergence(logits, target) * whole.loss_mask).sum() / whole.loss_mask.sum()
    ((weights * sequence_losses).sum() + GAMMA * kl).backward()
    found = lower.space.accumulator()
    lower.space.harvest_(found)
    expected = torch.cat([part.flatten() for part in found])
    gradient, found_losses, found_kl = Pool(lower, [batch], [weights], 0.0).gradient()
    return {
        "losses": (found_losses.numpy(), sequence_losses.detach().numpy()),
        "kl": (float(found_kl), float(kl)),
        "gradient": (torch.cat([part.flatten() for part in gradient]).numpy(), expected.numpy()),
    }


def _exact(context: ParallelContext, folder: Path) -> dict[str, Any]:
    """Double backward through Megatron's layers beside finite differences."""
    _, lower, _ = build(context, saved=folder / "models", plain_kernels=True)
    batches = data(context, 1, 8)
    pool = Pool(lower, batches, [torch.full((8,), 1 / 8)], RIDGE)
    direction = pool.gradient()[0]
    check_exact(pool, direction)
    products = {"exact": Exact(lower.space).product(pool, direction), "fd": FiniteDifference().product(pool, direction)}
    products["gauss-newton"] = GaussNewton().product(pool, direction)
    products["dense gauss-newton"] = _gauss_newton(lower, batches[0], direction)
    found = {name: torch.cat([p.flatten() for p in vector or []]).numpy() for name, vector in products.items()}
    evaluation = GaussNewton().evaluate(pool, direction)
    found["derivatives"] = evaluation.derivatives.numpy()
    found["gradients"] = [flat(evaluation.gradient), flat(direction)]
    found["exact derivatives"] = _derivatives(lower, batches[0], direction)
    return found


def _gauss_newton(lower: Any, batch: MicroBatch, direction: Any) -> Any:
    """JᵀB J v by double backward through the logits (Jv) and autograd's own softmax, and the ridge's part."""
    logits = models.logits(lower.proxy, batch.batch)[:, :VOCAB_SIZE]
    cotangent = torch.zeros_like(logits, requires_grad=True)
    pulled = torch.autograd.grad(logits, lower.space.parameters, cotangent, create_graph=True)
    along = sum((part * v).sum() for part, v in zip(pulled, direction, strict=True))
    (tangent,) = torch.autograd.grad(along, cotangent, retain_graph=True)
    p = logits.detach().softmax(-1)
    lengths = batch.batch.loss_mask.sum(1)
    weights = labelled(batch.batch.loss_mask * (1 / 8 / lengths[:, None] + GAMMA / lengths.sum()), batch.batch)
    b = weights[:, None] * p * (tangent - (p * tangent).sum(-1, keepdim=True))
    products = torch.autograd.grad(logits, lower.space.parameters, b)
    return [part + 2 * RIDGE * v for part, v in zip(products, direction, strict=True)]


def _derivatives(lower: Any, batch: MicroBatch, direction: Any) -> Any:
    """⟨v, ∇L_i⟩ with one backward pass a sequence."""
    logits = models.logits(lower.proxy, batch.batch)[:, :VOCAB_SIZE]
    ce = everywhere(objective.cross_entropy(logits, labelled(batch.batch.labels, batch.batch)), batch.batch)
    found = []
    for loss in mean_losses(ce, batch.batch):
        gradient = torch.autograd.grad(loss, lower.space.parameters, retain_graph=True)
        found.append(float(sum((part * v).sum() for part, v in zip(gradient, direction, strict=True))))
    return np.array(found)


def along_gradient(context: ParallelContext, folder: Path, distributed: bool, bf16: bool) -> dict[str, Any]:
    """Products and derivatives along the float32 model's gradient of G, by either kind of differences."""
    batches = data(context, 1, 8)
    weights = [torch.full((len(batch.batch.tokens),), 1 / 8) for batch in batches]
    _, single, _ = build(context, False, folder / "models")
    direction = Pool(single, batches, weights, RIDGE).gradient()[0]
    _, lower, _ = build(context, distributed, folder / "models", bf16)
    before = _everything(lower)
    found: dict[str, Any] = {"dtypes": {str(parameter.dtype) for parameter in lower.space.parameters}}
    for name, curvature in (("fd", FiniteDifference()), ("gauss-newton", GaussNewton())):
        evaluation = curvature.evaluate(Pool(lower, batches, weights, RIDGE), lower.space.own(direction))
        vectors = {"gradient": evaluation.gradient, "product": evaluation.product or []}
        found[name] = {key: flat(lower.space.whole(vector)) for key, vector in vectors.items()}
        found[name]["derivatives"] = evaluation.derivatives.numpy()
    after = _everything(lower)
    found["changed"] = [name for name, values in before.items() if not _same(values, after[name])]
    return found


def flat(vector: Any) -> np.ndarray:
    return torch.cat([part.flatten() for part in vector]).numpy()


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
            divergence = None if direction is None else LogitsDivergence(target[:, columns], direction)
            shard = VocabShard.of(context, vocab_size)
            quiet = token_terms_(mine, labels, shard, divergence)
            assert torch.equal(mine, proxy[:, columns])  # without weights nothing is overwritten
            found = token_terms_(mine, labels, shard, divergence, weights, kl_weights)
            assert all(torch.equal(a, b) for a, b in zip(quiet, found, strict=True))
            for name, actual, expected in (("ce", found[0], ce), ("kl", found[1], kl), ("gradient", mine, whole)):
                errors[f"{vocab_size} {direction} {name}"] = float((actual - expected).detach().abs().max())
    return errors


def kill_bilevel(run: Path, steps: int) -> None:
    """The stage in round 1, killed after so many steps."""
    step, count = bilevel.BilevelLoop.step, []

    def step_and_die(self: Any, *args: Any) -> Any:
        if len(count) == steps:
            raise KeyboardInterrupt
        count.append(1)
        return step(self, *args)

    bilevel.BilevelLoop.step = step_and_die  # type: ignore[method-assign]
    try:
        with pytest.raises(KeyboardInterrupt):
            bilevel.run(run, 1)
    finally:
        bilevel.BilevelLoop.step = step  # type: ignore[method-assign]


def _stage(folder: Path) -> dict[str, Any]:
    """The stage undisturbed, and stopped between checkpoints and continued."""
    for name in ("run", "killed"):
        warmup_proxy.run(folder / name)
    for layout in LAYOUTS:
        shutil.copytree(RunPaths(folder / "run").warmup_proxy, RunPaths(folder / f"run-{layout}").warmup_proxy)
    bilevel.run(folder / "run", 1)
    kill_bilevel(folder / "killed", steps=4)
    results: dict[str, Any] = {"reached": checkpoint_files.read_iteration(RunPaths(folder / "killed").bilevel(1))}
    bilevel.run(folder / "killed", 1)
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
    for layout, (tensor_parallel, sequence_parallel, distributed) in LAYOUTS.items():
        context = parallel.initialize(tensor_parallel, sequence_parallel, seed=3)
        named, lower, upper = build(context, distributed, folder / "models")
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
        if tensor_parallel == 1:
            results[f"{layout} bf16"] = along_gradient(context, folder, distributed, bf16=True)
    # vectors of every layout, made whole by loading them at TP 1
    for layout in LAYOUTS:
        named, lower, upper = build(context)
        names = ("gradient", "product", "gauss-newton gradient", "gauss-newton product", "idle gradient")
        vectors = {
            "model": {name: lower.space.zeros() for name in names},
            "score": {"hypergradient": upper.space.zeros()},
        }
        checkpoints.load(folder / f"vectors-{layout}", {name: named[name] for name in vectors}, vectors)
        results[layout]["vectors"] = arrays(vectors)
    for layout, (tensor_parallel, sequence_parallel, distributed) in LAYOUTS.items():
        run = folder / f"run-{layout}"
        if rank == 0:
            edit_config(
                run,
                proxy__tensor_parallel=tensor_parallel,
                proxy__sequence_parallel=sequence_parallel,
                proxy__distributed_optimizer=distributed,
            )
        torch.distributed.barrier()
        bilevel.run(run, 1)
        results[f"{layout} stage"] = metrics(run) if rank == 0 else []
    return results
