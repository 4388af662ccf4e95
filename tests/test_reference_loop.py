"""The benchmark's reference loop against dense linear algebra in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_bliss.bilevel.objective import kl_divergence
from megatron_bliss.mcore.batches import Batch, make_batch
from tests.benchmarks.reference_loop import Models, Phases, ReferenceLoop, Settings
from tests.toy_bilevel import flat

VOCAB_SIZE = 7
SETTINGS = Settings(gamma=0.3, ridge=0.05, lr_proxy=0.1, clip_grad=0.25, z_lr=0.4, damping=0.2)


class TinyModel(torch.nn.Module):
    """Embedding, mean over the tokens so far, tanh, linear: [b, s] to [b, s, outputs]."""

    def __init__(self, outputs: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = torch.nn.Embedding(VOCAB_SIZE, 3)
        self.output = torch.nn.Linear(3, outputs)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        count = torch.arange(1, tokens.shape[1] + 1)[:, None]
        output: Tensor = self.output(torch.tanh(2 * self.embedding(tokens).cumsum(1) / count))
        return output


def _batch(seed: int) -> Batch:
    random = np.random.default_rng(seed)
    rows = [random.integers(0, VOCAB_SIZE, length) for length in (6, 9, 4, 8)]
    masks = [random.random(len(row)) < 0.7 for row in rows]
    for mask in masks:
        mask[1] = True
    return make_batch(rows, torch.device("cpu"), loss_masks=masks)


@pytest.fixture
def loop() -> ReferenceLoop:
    proxy, target, score = TinyModel(VOCAB_SIZE, 0), TinyModel(VOCAB_SIZE, 1), TinyModel(1, 2)
    models = Models(proxy, proxy, target, score, lambda batch: score(batch.tokens).mean((1, 2)))
    return ReferenceLoop(models, SETTINGS)


def _losses(logits: Tensor, batch: Batch) -> Tensor:
    mask = batch.loss_mask.double()
    token_losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")
    return (token_losses * mask).sum(1) / mask.sum(1)


def _proxy_logits(loop: ReferenceLoop, theta: Tensor, batch: Batch) -> Tensor:
    proxy = loop.models.proxy
    pieces = theta.split([parameter.numel() for parameter in proxy.parameters()])
    named = {name: piece.view_as(p) for (name, p), piece in zip(proxy.named_parameters(), pieces, strict=True)}
    logits: Tensor = torch.func.functional_call(proxy, named, (batch.tokens,))
    return logits


def _dense_z(loop: ReferenceLoop, batch: Batch, validation: Batch, weights: Tensor) -> tuple[Tensor, list[float]]:
    """Three clipped steps with an explicit Hessian, and the norms before clipping."""
    theta = flat(loop.proxy_parameters).detach().clone()
    target = loop.models.target_logits(batch.tokens).detach()

    def lower(values: Tensor) -> Tensor:
        logits = _proxy_logits(loop, values, batch)
        kl = (kl_divergence(logits, target) * batch.loss_mask).sum() / batch.loss_mask.sum()
        return (weights * _losses(logits, batch)).sum() + 0.3 * kl + 0.05 * values.square().sum()

    def upper(values: Tensor) -> Tensor:
        logits, mask = _proxy_logits(loop, values, validation), validation.loss_mask.bool()
        return torch.nn.functional.cross_entropy(logits[mask], validation.labels[mask])

    matrix = torch.autograd.functional.hessian(lower, theta) + 0.2 * torch.eye(len(theta), dtype=torch.float64)
    right_hand_side = torch.autograd.functional.jacobian(upper, theta)
    z, norms = torch.full_like(theta, 1 / len(theta)), []
    for _ in range(3):
        residual = matrix @ z - right_hand_side
        norms.append(float(residual.norm()))
        z = z - 0.4 * residual * min(1.0, 0.25 / norms[-1])
    return z, norms


def test_hypergradient_equals_the_dense_formula(loop: ReferenceLoop) -> None:
    batch, validation = _batch(0), _batch(1)
    loop.inner_step(batch)
    scores = loop.models.score_logits(batch).sigmoid()
    z, norms = _dense_z(loop, batch, validation, scores.softmax(0).detach())
    assert norms[0] > 0.25 > norms[2]  # clipping takes part, and not always
    theta = flat(loop.proxy_parameters).detach()
    derivatives = torch.autograd.functional.jacobian(lambda v: _losses(_proxy_logits(loop, v, batch), batch), theta) @ z
    expected = torch.autograd.grad(-(scores.softmax(0) * derivatives).sum(), loop.score_parameters)

    found = loop.hypergradient(batch, validation)
    assert torch.allclose(flat(found.z), z, rtol=1e-9, atol=1e-12)
    assert torch.allclose(found.derivatives, derivatives, rtol=1e-9, atol=1e-12)
    assert torch.allclose(flat(found.gradient), flat(expected), rtol=1e-9, atol=1e-12)


def test_inner_step_is_adamw_on_the_lower_objective(loop: ReferenceLoop) -> None:
    batch, before = _batch(0), flat(loop.proxy_parameters).detach().clone()
    weights = loop.models.score_logits(batch).sigmoid().softmax(0).detach()
    logits = loop.models.proxy_logits(batch.tokens)
    kl = (kl_divergence(logits, loop.models.target_logits(batch.tokens).detach()) * batch.loss_mask).sum()
    value = (weights * _losses(logits, batch)).sum() + 0.3 * kl / batch.loss_mask.sum()
    slope = flat(torch.autograd.grad(value, loop.proxy_parameters)) + 2 * 0.05 * before
    loop.inner_step(batch)
    # AdamW's first step is lr times the gradient's sign, and decays the weights; epsilon shows in small gradients
    slope = slope * min(1.0, 0.25 / float(slope.norm()))
    expected = before * (1 - 0.1 * SETTINGS.weight_decay) - 0.1 * slope / (slope.abs() + 1e-8)
    assert torch.allclose(flat(loop.proxy_parameters), expected, rtol=1e-9, atol=1e-9)


def test_step_takes_the_hypergradient_after_the_inner_step_and_no_graph_changes_nothing() -> None:
    found = []
    for target_graph in (True, False):
        proxy, target, score = TinyModel(VOCAB_SIZE, 0), TinyModel(VOCAB_SIZE, 1), TinyModel(1, 2)
        models = Models(proxy, proxy, target, score, lambda batch, score=score: score(batch.tokens).mean((1, 2)))  # type: ignore[misc]
        loop = ReferenceLoop(models, Settings(target_graph=target_graph))
        before = flat(loop.score_parameters).detach().clone()
        found.append(flat(loop.step(_batch(0), _batch(1)).gradient))
        assert not torch.equal(flat(loop.score_parameters), before)
        assert set(loop.phases.seconds) == {
            "inner step", "target forwards", "validation gradient", "gradient with graph", "Hessian-vector products",
            "per-sequence gradients", "combine and update",
        }  # fmt: skip
    assert torch.equal(*found)


def test_nested_phases_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 4.0, 10.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    phases = Phases()
    with phases("outer"), phases("inner"):
        pass
    assert phases.seconds == {"inner": 3.0, "outer": 7.0}
