"""A bilevel problem small enough for dense linear algebra: softmax regression (strongly convex with a ridge) or a
one-layer network (not convex), float64 unless asked otherwise. A batch is [b] samples; a sample stands for a sequence.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_bliss.bilevel.levels import LowerTerms
from megatron_bliss.bilevel.objective import cross_entropy, kl_divergence
from megatron_bliss.bilevel.optimizer import AdamSettings, Optimizer
from megatron_bliss.bilevel.space import ParameterSpace, Vector


@dataclass
class Samples:
    x: Tensor  # [b, d]
    y: Tensor  # [b], classes
    total: int  # samples of the global batch

    def split(self, size: int) -> list["Samples"]:
        return [Samples(x, y, self.total) for x, y in zip(self.x.split(size), self.y.split(size), strict=True)]


def make_samples(count: int, dimension: int, classes: int, seed: int, dtype: torch.dtype = torch.float64) -> Samples:
    """Labels follow a fixed linear rule with noise, so that losses of samples differ."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, dimension, generator=generator, dtype=torch.float64)
    rule = torch.randn(dimension, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(count, classes, generator=generator, dtype=torch.float64)
    return Samples(x.to(dtype), (x @ rule + noise).argmax(1), count)


class ToyLower:
    def __init__(
        self, dimension: int, classes: int, width: int = 0, gamma: float = 0.1, dtype: torch.dtype = torch.float64
    ) -> None:
        torch.manual_seed(0)
        layers: list[torch.nn.Module] = [torch.nn.Linear(dimension, width or classes, bias=False)]
        if width:
            layers += [torch.nn.Tanh(), torch.nn.Linear(width, classes)]
        self.model = torch.nn.Sequential(*layers).to(dtype)
        self.target = torch.nn.Linear(dimension, classes).to(dtype).requires_grad_(False)
        self.gamma = gamma
        self.space = ParameterSpace(list(self.model.parameters()))

    def objective(self, batch: Samples, weights: Tensor) -> Tensor:
        logits = self.model(batch.x)
        kl = kl_divergence(logits, self.target(batch.x)).sum() / batch.total
        return (weights * cross_entropy(logits, batch.y)).sum() + self.gamma * kl

    def add_gradient(
        self, batch: Samples, weights: Tensor, gradient: Vector, outputs: Tensor | None = None
    ) -> LowerTerms:
        self.objective(batch, weights).backward()
        self.space.harvest_(gradient)
        with torch.no_grad():
            kl = kl_divergence(self.model(batch.x), self.target(batch.x)).sum() / batch.total
        return LowerTerms(self.losses(batch), kl)

    @torch.no_grad()
    def losses(self, batch: Samples) -> Tensor:
        return cross_entropy(self.model(batch.x), batch.y)

    def outputs(self, batch: Samples) -> Tensor:
        return self.model(batch.x)

    @torch.no_grad()
    def values(self, batch: Samples) -> Tensor:
        return self.model(batch.x).to(self.space.masters[0].dtype)

    @torch.no_grad()
    def slope(self, ahead: Tensor, batch: Samples, distance: Tensor) -> Tensor:
        return (ahead - self.values(batch)) / distance.to(ahead.dtype)

    def add_gauss_newton(
        self, outputs: Tensor, batch: Samples, weights: Tensor, along: Tensor, product: Vector, keeps_graph: bool
    ) -> Tensor:
        tangent, p = along, outputs.detach().softmax(1)
        mean = (p * tangent).sum(1, keepdim=True)
        total = weights + self.gamma / batch.total
        torch.autograd.backward(outputs, total[:, None] * p * (tangent - mean), retain_graph=keeps_graph)
        self.space.harvest_(product)
        return mean[:, 0] - tangent.gather(1, batch.y[:, None])[:, 0]

    def validation(self, batch: Samples) -> Tensor:
        return cross_entropy(self.model(batch.x), batch.y).sum() / batch.total

    def add_validation_gradient(self, batch: Samples, gradient: Vector, weight: Tensor | None = None) -> Tensor:
        value = self.validation(batch)
        (value if weight is None else weight * value).backward()
        self.space.harvest_(gradient)
        return value.detach()


class ToyUpper:
    def __init__(self, dimension: int, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(1)
        self.model = torch.nn.Linear(dimension, 1).to(dtype)
        self.space = ParameterSpace(list(self.model.parameters()))

    def logits(self, batch: Samples) -> Tensor:
        return self.model(batch.x).squeeze(1)


def make_optimizer(space: ParameterSpace, lr: float) -> Optimizer:
    settings = AdamSettings(lr=lr)
    inner = torch.optim.AdamW(space.masters, lr=lr, betas=settings.betas, weight_decay=settings.weight_decay)
    return Optimizer(space, inner, space.masters, settings)


def flat(vector: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in vector])


def unflat(values: Tensor, space: ParameterSpace) -> Vector:
    pieces = values.split([master.numel() for master in space.masters])
    return [piece.view_as(master) for piece, master in zip(pieces, space.masters, strict=True)]


def dense_hessian(lower: ToyLower, batch: Samples, weights: Tensor, ridge: float) -> Tensor:
    """∇² G by autograd over a flat vector of all parameters: [p, p]. It shares no code with the engine."""
    names = [name for name, _ in lower.model.named_parameters()]

    def value(theta: Tensor) -> Tensor:
        pieces = dict(zip(names, unflat(theta, lower.space), strict=True))
        logits = torch.func.functional_call(lower.model, pieces, (batch.x,))
        kl = kl_divergence(logits, lower.target(batch.x)).sum() / batch.total
        return (weights * cross_entropy(logits, batch.y)).sum() + lower.gamma * kl + ridge * theta.square().sum()

    return torch.autograd.functional.hessian(value, flat(lower.space.masters).clone())


def dense_gauss_newton(lower: ToyLower, batch: Samples, weights: Tensor, ridge: float) -> Tensor:
    """Jᵀ B J + 2λI from the dense Jacobian of the logits: [p, p]. It shares no code with the engine."""
    names = [name for name, _ in lower.model.named_parameters()]

    def logits(theta: Tensor) -> Tensor:
        pieces = dict(zip(names, unflat(theta, lower.space), strict=True))
        return torch.func.functional_call(lower.model, pieces, (batch.x,))

    theta = flat(lower.space.masters).clone()
    jacobian = torch.autograd.functional.jacobian(logits, theta)  # [b, classes, p]
    p = logits(theta).softmax(1)
    b = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    total = weights + lower.gamma / batch.total
    product = torch.einsum("b,bip,bij,bjq->pq", total, jacobian, b, jacobian)
    return product + 2 * ridge * torch.eye(len(theta), dtype=theta.dtype)


def sample_gradients(lower: ToyLower, batch: Samples) -> Tensor:
    """∇ L_i of every sample, one backward pass each: [b, p]."""
    rows = []
    for x, y in zip(batch.x, batch.y, strict=True):
        loss = cross_entropy(lower.model(x[None]), y[None]).sum()
        rows.append(flat(torch.autograd.grad(loss, lower.space.parameters)))
    return torch.stack(rows)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
