"""KL from the target's top k: against float64 formulas, what truncation loses, tensor-parallel ranks, a trained model.

Values and gradients in float32 agree with autograd in float64 to 1e-5 (absolute; KL and weights are of order one).
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_bliss.bilevel import objective
from megatron_bliss.mcore.losses import LogitsDivergence, VocabShard, token_terms_
from megatron_bliss.mcore.top_k import TopK, TopKDivergence, top_k_of
from tests.distributed import run_ranks

DIRECTIONS = ("target_proxy", "proxy_target")
WIDTH, TOKENS = 128, 40


def _logits(seed: int, vocab_size: int) -> Tensor:
    """Padding columns hold large numbers, which must not matter."""
    logits = 3 * torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
    logits[:, vocab_size:] = 50
    return logits


def _losses(rank: int, size: int, group: Any, vocab_size: int, k: int, direction: str) -> dict[str, np.ndarray]:
    """KL, its gradient and the top k on this rank's columns."""
    width = WIDTH // size
    columns = slice(rank * width, (rank + 1) * width)
    shard = VocabShard(vocab_size, rank, group)
    known = top_k_of(_logits(1, vocab_size)[:, columns], shard, k)
    proxy, labels = _logits(0, vocab_size)[:, columns].clone(), torch.arange(TOKENS) % vocab_size
    weights, kl_weights = torch.linspace(0, 1, TOKENS), torch.linspace(1, 2, TOKENS)
    divergence = TopKDivergence(known, direction)
    quiet = token_terms_(proxy.clone(), labels, shard, divergence)
    ce, kl = token_terms_(proxy, labels, shard, divergence, weights, kl_weights)
    assert torch.equal(quiet[0], ce)
    assert torch.equal(quiet[1], kl)
    found = {"ce": ce, "kl": kl, "gradient": proxy, "ids": known.ids, "log_probs": known.log_probs}
    return {name: values.numpy() for name, values in found.items()}


def _expected(vocab_size: int, k: int, direction: str) -> dict[str, np.ndarray]:
    proxy = _logits(0, vocab_size)[:, :vocab_size].double().requires_grad_()
    target = _logits(1, vocab_size)[:, :vocab_size].double().softmax(-1)
    top = target.sort(descending=True).indices[:, :k]
    outcome = torch.full((TOKENS, vocab_size), k).scatter(1, top, torch.arange(k).expand(TOKENS, k))

    def outcomes(probabilities: Tensor) -> Tensor:
        return torch.zeros(TOKENS, k + 1, dtype=torch.float64).scatter_add(1, outcome, probabilities)

    q, p = outcomes(target), outcomes(proxy.softmax(-1))
    first, second = (q, p) if direction == "target_proxy" else (p, q)
    if k == vocab_size:
        first, second = first[:, :-1], second[:, :-1]
    kl = (first * (first / second).log()).sum(-1)
    ce = objective.cross_entropy(proxy, torch.arange(TOKENS) % vocab_size)
    (torch.linspace(0, 1, TOKENS) * ce + torch.linspace(1, 2, TOKENS) * kl).sum().backward()
    assert proxy.grad is not None
    gradient = torch.nn.functional.pad(proxy.grad, (0, WIDTH - vocab_size))
    return {"ce": ce.detach().numpy(), "kl": kl.detach().numpy(), "gradient": gradient.numpy(), "ids": top.numpy()}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("vocab_size", "k"), [(100, 1), (100, 10), (100, 99), (100, 100), (50, 7)])
def test_values_and_gradients(vocab_size: int, k: int, direction: str) -> None:
    _compare([_losses(0, 1, None, vocab_size, k, direction)], _expected(vocab_size, k, direction))


def _compare(found: list[dict[str, np.ndarray]], expected: dict[str, np.ndarray]) -> None:
    gradient = np.concatenate([rank["gradient"] for rank in found], axis=1)
    np.testing.assert_allclose(gradient, expected["gradient"], rtol=0, atol=1e-5)
    for rank in found:
        np.testing.assert_array_equal(rank["ids"], expected["ids"])
        np.testing.assert_allclose(rank["ce"], expected["ce"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(rank["kl"], expected["kl"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(np.exp(rank["log_probs"]).sum(-1), 1, rtol=0, atol=1e-6)


def _two_ranks(rank: int) -> list[dict[str, np.ndarray]]:
    torch.distributed.init_process_group("gloo")
    group = torch.distributed.group.WORLD
    return [_losses(rank, 2, group, *case) for case in _CASES]


# with 50 ids the second of two ranks holds nothing but padding; 90 of 100 are more than a rank's columns
_CASES = [(100, 10, "target_proxy"), (100, 10, "proxy_target"), (50, 7, "target_proxy"), (100, 90, "proxy_target")]


def test_two_tensor_parallel_ranks() -> None:
    ranks = run_ranks(_two_ranks, 2, timeout=60)
    for index, case in enumerate(_CASES):
        _compare([rank[index] for rank in ranks], _expected(*case))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("k", [1, 10, 100])
def test_plain_formula_is_the_same_and_twice_differentiable(k: int, direction: str) -> None:
    known = top_k_of(_logits(1, 100), VocabShard(100, 0, None), k)
    divergence = TopKDivergence(known, direction)
    logits = _logits(0, 100)[:, :100].requires_grad_()
    kl = divergence.plain(logits)
    expected = _expected(100, k, direction)
    np.testing.assert_allclose(kl.detach().numpy(), expected["kl"], rtol=0, atol=1e-5)
    [slope] = torch.autograd.grad(kl.sum(), logits, create_graph=True)
    [second] = torch.autograd.grad((slope * torch.ones_like(slope).cumsum(-1)).sum(), logits)
    assert torch.isfinite(second).all()


def _differences(proxy: Tensor, target: Tensor, k: int, direction: str) -> tuple[Tensor, Tensor, Tensor]:
    """Per token: the true KL, what the top k give, and what the chain rule says is lost. float64."""
    p, q = proxy.double().softmax(-1), target.double().softmax(-1)
    known = top_k_of(target, VocabShard(target.shape[1], 0, None), k)
    _, found = token_terms_(
        proxy.clone(), torch.zeros(len(proxy), dtype=torch.int64), VocabShard(proxy.shape[1], 0, None),
        TopKDivergence(known, direction),
    )  # fmt: skip
    first, second = (q, p) if direction == "target_proxy" else (p, q)
    outside = torch.ones_like(p).scatter(1, known.ids, 0.0)
    rest, other = first * outside, second * outside
    conditional = rest * ((rest / rest.sum(1, keepdim=True)) / (other / other.sum(1, keepdim=True))).log().nan_to_num()
    return (first * (first / second).log()).sum(1), found, conditional.sum(1)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_truncation_loses_is_the_divergence_within_the_rest(direction: str) -> None:
    proxy, target = _logits(0, WIDTH), _logits(1, WIDTH)
    before = torch.full((TOKENS,), -1.0)
    for k in (1, 4, 16, 64, 127):
        true, found, lost = _differences(proxy, target, k, direction)
        np.testing.assert_allclose(found + lost, true, rtol=0, atol=1e-5)
        assert (found < true + 1e-5).all()
        assert (found > before - 1e-5).all()  # more is known, less is lost
        before = found


def _trained(seed: int, steps: int) -> Tensor:
    """Logits of a small model of a Markov chain over 256 ids with Zipfian successors, at 512 tokens."""
    generator = torch.Generator().manual_seed(0)
    successors = torch.rand(256, 256, generator=generator).argsort(-1)
    zipf = 1 / torch.arange(1, 257) ** 1.5
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Embedding(256, 32), torch.nn.Linear(32, 256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(steps):
        tokens = torch.randint(0, 256, (1024,))
        labels = successors[tokens, torch.multinomial(zipf, 1024, replacement=True)]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(tokens), labels).backward()
        optimizer.step()
    with torch.no_grad():
        logits: Tensor = model(torch.arange(512) % 256)
    return logits


def test_truncation_on_a_trained_model() -> None:
    proxy, target = _trained(1, 150), _trained(2, 300)
    lost = {}
    for k in (1, 4, 16, 64, 256):
        true, found, _ = _differences(proxy, target, k, "target_proxy")
        lost[k] = float(1 - found.double().mean() / true.mean())
    print({k: f"{share:.2%}" for k, share in lost.items()})
    assert lost[1] > lost[4] > lost[16] > lost[64] > lost[256]
    assert lost[64] < 0.25
    assert abs(lost[256]) < 1e-5


def test_all_ids_known_is_the_live_divergence() -> None:
    shard, labels = VocabShard(100, 0, None), torch.arange(TOKENS)
    weights = torch.ones(TOKENS)
    results = []
    for divergence in (
        LogitsDivergence(_logits(1, 100)), TopKDivergence(top_k_of(_logits(1, 100), shard, 100)),
    ):  # fmt: skip
        logits = _logits(0, 100)
        results.append((*token_terms_(logits, labels, shard, divergence, weights, weights), logits))
    for live, known in zip(*results, strict=True):
        assert torch.allclose(live, known, rtol=0, atol=1e-5)


def test_a_mass_that_is_nothing_stays_finite() -> None:
    """The target is certain, then the proxy is."""
    certain, flat = torch.zeros(1, 8), torch.zeros(1, 8)
    certain[:, 3] = 200
    shard, label, one = VocabShard(8, 0, None), torch.tensor([3]), torch.ones(1)
    for proxy, target in ((flat, certain), (certain, flat)):
        known = top_k_of(target, shard, 2)
        assert torch.isfinite(known.log_probs).all()
        for direction in DIRECTIONS:
            logits = proxy.clone()
            _, kl = token_terms_(logits, label, shard, TopKDivergence(known, direction), one, one)
            assert torch.isfinite(kl).all()
            assert torch.isfinite(logits).all()


def test_top_k_is_a_dataclass_of_what_is_stored() -> None:
    known = top_k_of(_logits(1, 100), VocabShard(100, 0, None), 5)
    assert isinstance(known, TopK)
    assert known.ids.dtype == torch.int64
    assert known.log_probs.shape == (TOKENS, 6)
    assert (known.log_probs[:, :-2] >= known.log_probs[:, 1:-1]).all()
