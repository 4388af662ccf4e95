"""The output layer in blocks of tokens: losses and gradients beside autograd through all logits at once."""

import pytest
import torch
from torch import Tensor

from megatron_bliss.bilevel import objective
from megatron_bliss.mcore import output_layer
from megatron_bliss.mcore.losses import Divergence, VocabShard
from megatron_bliss.mcore.output_layer import Outputs, OutputsDivergence, backward, copied, slope
from megatron_bliss.mcore.top_k import TopKDivergence, top_k_of

TOKENS, WIDTH, HIDDEN, VOCAB_SIZE, PADDED = 17, 3, 6, 40, 48
SHARD = VocabShard(VOCAB_SIZE, 0, None)


@pytest.fixture(autouse=True, params=[5, 64])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, the last one short, or one."""
    monkeypatch.setattr(output_layer, "BLOCK_TOKENS", request.param)


class Model:
    """A layer in front of an output layer."""

    def __init__(self, dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> None:
        random = torch.Generator().manual_seed(0)
        self.x = torch.randn(tokens, WIDTH, generator=random).to(dtype)
        self.first = torch.randn(HIDDEN, WIDTH, generator=random).to(dtype).requires_grad_()
        self.weight = torch.randn(PADDED, HIDDEN, generator=random).to(dtype).requires_grad_()
        self.labels = torch.randint(0, VOCAB_SIZE, (tokens,), generator=random)
        self.weights, self.kl_weights = torch.rand(2, tokens, generator=random)
        self.target = Outputs(
            torch.randn(tokens, 2, generator=random).to(dtype), torch.randn(PADDED, 2, generator=random).to(dtype)
        )

    @property
    def parameters(self) -> list[Tensor]:
        return [self.first, self.weight]

    def outputs(self) -> Outputs:
        return Outputs((self.x @ self.first.t()).tanh(), self.weight)

    def logits(self) -> Tensor:
        return self.outputs().logits()[:, :VOCAB_SIZE].float()

    def gradients(self) -> list[Tensor]:
        found = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return [torch.empty(0) if gradient is None else gradient for gradient in found]


def divergences(model: Model) -> dict[str, Divergence | None]:
    known = top_k_of(model.target.logits(), SHARD, 4)
    return {
        "target_proxy": OutputsDivergence(model.target, "target_proxy"),
        "proxy_target": OutputsDivergence(model.target, "proxy_target"),
        "kept": OutputsDivergence(model.target, kept={}),
        "top k": TopKDivergence(known),
        "none": None,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["target_proxy", "proxy_target", "kept", "top k", "none"])
def test_gradients_are_those_of_all_logits_at_once(name: str, dtype: torch.dtype) -> None:
    model = Model(dtype)
    divergence = divergences(model)[name]
    logits = model.logits()
    cross_entropy = objective.cross_entropy(logits, model.labels)
    kl = torch.zeros_like(cross_entropy) if divergence is None else divergence.block(slice(None)).plain(logits)
    (model.weights @ cross_entropy + model.kl_weights @ kl).backward()
    expected = model.gradients()

    found = backward(model.outputs(), model.labels, SHARD, model.weights, divergence, model.kl_weights)

    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(found, (cross_entropy, kl), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.gradients(), expected, **close)
    losses = output_layer.token_losses(model.outputs(), model.labels, SHARD)
    torch.testing.assert_close(losses, cross_entropy, rtol=1e-5, atol=1e-5)


def test_gauss_newton_product_is_that_of_the_dense_jacobian() -> None:
    model, distance = Model(), torch.tensor(2e-3, dtype=torch.float64)
    random = torch.Generator().manual_seed(1)
    direction = [torch.randn(parameter.shape, generator=random) for parameter in model.parameters]

    def logits(first: Tensor, weight: Tensor) -> Tensor:
        return ((model.x.double() @ first.t()).tanh() @ weight.t())[:, :VOCAB_SIZE]

    point = tuple(parameter.detach().double() for parameter in model.parameters)
    at_point, tangent = torch.func.jvp(logits, point, tuple(part.double() for part in direction))
    p = at_point.softmax(-1)
    curved = model.weights.double()[:, None] * p * (tangent - (p * tangent).sum(-1, keepdim=True))
    _, pull = torch.func.vjp(logits, *point)
    along = (p * tangent).sum(-1) - tangent.gather(1, model.labels[:, None])[:, 0]

    def moved(factor: float) -> Outputs:
        with torch.no_grad():
            torch._foreach_add_(model.parameters, direction, alpha=factor)
            values = copied(model.outputs())
            torch._foreach_add_(model.parameters, direction, alpha=-factor)
        return values

    outputs, half = model.outputs(), float(distance) / 2
    found = output_layer.gauss_newton_backward(
        outputs, slope(moved(half), moved(-half), distance), model.labels, SHARD, model.weights, keeps_graph=True
    )

    torch.testing.assert_close(found.double(), along, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close([part.double() for part in model.gradients()], list(pull(curved)), rtol=1e-3, atol=1e-3)
    backward(outputs, model.labels, SHARD, model.weights)  # through the same graph


def test_logits_that_are_kept_are_made_once() -> None:
    model = Model()
    divergence, made = OutputsDivergence(model.target, kept={}), []
    rows = model.outputs().blocks()

    for _ in range(2):
        made.append([divergence.block(block).target_logits for block in rows])

    assert all(one is other for one, other in zip(*made, strict=True))
    torch.testing.assert_close(torch.cat(made[0]), model.target.logits())


def test_without_labels_there_is_a_gradient_of_zeros() -> None:
    model = Model(tokens=0)

    cross_entropy, _ = backward(model.outputs(), model.labels, SHARD, model.weights)

    assert cross_entropy.shape == (0,)
    assert [float(part.abs().sum()) for part in model.gradients()] == [0, 0]
    assert output_layer.token_losses(model.outputs(), model.labels, SHARD).shape == (0,)
