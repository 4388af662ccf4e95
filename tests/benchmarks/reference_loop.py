"""The bilevel loop as the authors of BLISS run it (arXiv 2510.06048), in plain torch: what the engine is timed against.

One outer step, in phases:

    inner step                   weights of the batch; gradient of G = Σ P_i L_i + γ KL + λ‖θ‖²; clipped AdamW step
    target forwards              one for the inner step's KL, one for the Hessian's
    validation gradient          ∇f
    gradient with graph          ∇G at the new point, built so that it can be differentiated again
    Hessian-vector products      z from the constant 1/numel by three clipped steps along (H + δI) z − ∇f
    per-sequence gradients       ∇s_i and ∇L_i of one sequence after the other; g_i = ⟨z, ∇L_i⟩
    combine and update           ∇Φ = −Σ P_i (g_i − Σ_j P_j g_j) ∇s_i; clipped AdamW step on the score model

It departs from the published code where that is a mistake that costs nothing to avoid: attention is causal and the
weights of a batch sum to 1. Its target runs with a graph nobody uses where `target_graph` says so, as theirs does.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_bliss.mcore.batches import Batch


@dataclass
class Phases:
    """Seconds by phase. Time inside a nested phase counts for the inner one alone."""

    seconds: dict[str, float] = field(default_factory=dict)
    _nested: list[float] = field(default_factory=list)  # seconds of phases inside each open phase

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        self._nested.append(0.0)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - began
            own = elapsed - self._nested.pop()
            self.seconds[name] = self.seconds.get(name, 0.0) + own
            if self._nested:
                self._nested[-1] += elapsed


@dataclass
class Models:
    """Parameters and functions of the three models; logits are [b, s, vocabulary] of tokens [b, s]."""

    proxy: torch.nn.Module
    proxy_logits: Callable[[Tensor], Tensor]
    target_logits: Callable[[Tensor], Tensor]
    score: torch.nn.Module
    score_logits: Callable[[Batch], Tensor]  # raw scores, [b]


@dataclass(frozen=True)
class Settings:
    """The authors' numbers for a 410M model."""

    inner_steps: int = 1
    lr_proxy: float = 1e-5
    lr_score: float = 1e-5
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_grad: float = 1.0
    gamma: float = 1e-2  # γ
    ridge: float = 1e-6  # λ
    z_steps: int = 3
    z_lr: float = 1e-2
    damping: float = 1e-2  # δ
    target_graph: bool = True


@dataclass(frozen=True)
class Hypergradient:
    """What one outer step found."""

    z: list[Tensor]
    derivatives: Tensor  # g_i, [n]
    gradient: list[Tensor]  # ∇Φ, like the score model's parameters
    validation_loss: Tensor


class ReferenceLoop:
    """Outer steps over one batch of the pool and one of the validation set each."""

    def __init__(self, models: Models, settings: Settings) -> None:
        self.models, self.settings, self.phases = models, settings, Phases()
        self.proxy_parameters = list(models.proxy.parameters())
        self.score_parameters = list(models.score.parameters())
        self.proxy_optimizer = self._adamw(self.proxy_parameters, settings.lr_proxy)
        self.score_optimizer = self._adamw(self.score_parameters, settings.lr_score)

    def step(self, batch: Batch, validation: Batch) -> Hypergradient:
        """One outer step."""
        for _ in range(self.settings.inner_steps):
            with self.phases("inner step"):
                self.inner_step(batch)
        found = self.hypergradient(batch, validation)
        with self.phases("combine and update"):
            self._update(self.score_optimizer, self.score_parameters, found.gradient)
        return found

    def inner_step(self, batch: Batch) -> None:
        value = self._lower_objective(batch, self._weights(batch))
        self._update(self.proxy_optimizer, self.proxy_parameters, torch.autograd.grad(value, self.proxy_parameters))

    def hypergradient(self, batch: Batch, validation: Batch) -> Hypergradient:
        """z, g_i and ∇Φ at the parameters of this moment."""
        weights = self._weights(batch)
        with self.phases("validation gradient"):
            value = self._mean_loss(validation)
            validation_gradient = torch.autograd.grad(value, self.proxy_parameters)
        with self.phases("gradient with graph"):
            objective = self._lower_objective(batch, weights)
            lower_gradient = torch.autograd.grad(objective, self.proxy_parameters, create_graph=True)
        with self.phases("Hessian-vector products"):
            z = self._solve(lower_gradient, validation_gradient)
            del objective, lower_gradient
        with self.phases("per-sequence gradients"):
            derivatives, score_gradients = self._per_sequence(batch, z)
        with self.phases("combine and update"):
            gradient = combine(weights, derivatives, score_gradients)
        return Hypergradient(z, derivatives, gradient, value.detach())

    def _solve(self, lower_gradient: tuple[Tensor, ...], right_hand_side: tuple[Tensor, ...]) -> list[Tensor]:
        settings = self.settings
        numel = sum(parameter.numel() for parameter in self.proxy_parameters)
        z = [torch.full_like(parameter, 1 / numel) for parameter in self.proxy_parameters]
        for _ in range(settings.z_steps):
            products = torch.autograd.grad(
                lower_gradient, self.proxy_parameters, grad_outputs=z, retain_graph=True, materialize_grads=True
            )
            residual = [
                product + settings.damping * part - rhs
                for product, part, rhs in zip(products, z, right_hand_side, strict=True)
            ]
            clip_(residual, settings.clip_grad)
            z = [part - settings.z_lr * slope for part, slope in zip(z, residual, strict=True)]
        return z

    def _per_sequence(self, batch: Batch, z: list[Tensor]) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """g_i, [n], and ∇s_i of every sequence."""
        derivatives, score_gradients = [], []
        for index in range(len(batch.tokens)):
            sequence = _rows(batch, index)
            score = self.models.score_logits(sequence).sigmoid().sum()
            score_gradients.append(torch.autograd.grad(score, self.score_parameters))
            loss = self._sequence_losses(self.models.proxy_logits(sequence.tokens), sequence).sum()
            gradient = torch.autograd.grad(loss, self.proxy_parameters)
            derivatives.append(sum((a * b).sum() for a, b in zip(z, gradient, strict=True)))
        return torch.stack(derivatives), score_gradients  # type: ignore[arg-type]

    @torch.no_grad()
    def _weights(self, batch: Batch) -> Tensor:
        """P_i: softmax of the scores, [n]."""
        return self.models.score_logits(batch).sigmoid().softmax(0)

    def _lower_objective(self, batch: Batch, weights: Tensor) -> Tensor:
        """G, with a graph that can be differentiated twice."""
        logits = self.models.proxy_logits(batch.tokens)
        weighted = (weights * self._sequence_losses(logits, batch)).sum()
        with self.phases("target forwards"), torch.set_grad_enabled(self.settings.target_graph):
            target = self.models.target_logits(batch.tokens)
        log_proxy, log_target = _log_softmax(logits), _log_softmax(target)
        kl = (log_target.exp() * (log_target - log_proxy)).sum(-1)
        ridge = sum(parameter.square().sum() for parameter in self.proxy_parameters)
        return weighted + self.settings.gamma * _mean(kl, batch.loss_mask) + self.settings.ridge * ridge

    def _sequence_losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """L_i, [n]."""
        mask = batch.loss_mask.to(logits.dtype)
        return (_cross_entropy(logits, batch.labels) * mask).sum(1) / mask.sum(1)

    def _mean_loss(self, batch: Batch) -> Tensor:
        """f: the mean over the labelled tokens."""
        return _mean(_cross_entropy(self.models.proxy_logits(batch.tokens), batch.labels), batch.loss_mask)

    def _adamw(self, parameters: list[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
        settings = self.settings
        return torch.optim.AdamW(parameters, lr=lr, betas=settings.betas, weight_decay=settings.weight_decay)

    def _update(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: list[torch.nn.Parameter],
        gradient: tuple[Tensor, ...] | list[Tensor],
    ) -> None:
        for parameter, part in zip(parameters, gradient, strict=True):
            parameter.grad = part
        torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip_grad)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def combine(weights: Tensor, derivatives: Tensor, score_gradients: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """−Σ_i P_i (g_i − Σ_j P_j g_j) ∇s_i."""
    coefficients = -weights * (derivatives - (weights * derivatives).sum())
    parts = zip(*score_gradients, strict=True)
    return [
        sum((c * part for c, part in zip(coefficients, of_all, strict=True)), torch.zeros_like(of_all[0]))
        for of_all in parts
    ]


@torch.no_grad()
def clip_(vector: list[Tensor], max_norm: float) -> None:
    """Scale in place to at most `max_norm`."""
    norm = torch.stack([part.square().sum() for part in vector]).sum().sqrt()
    for part in vector:
        part.mul_((max_norm / norm).clamp_max(1.0))


def _log_softmax(logits: Tensor) -> Tensor:
    """Over the whole vocabulary, in float32 at least."""
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return -_log_softmax(logits).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum()


def _rows(batch: Batch, index: int) -> Batch:
    """One sequence as a batch."""
    row = slice(index, index + 1)
    return Batch(batch.tokens[row], batch.labels[row], batch.loss_mask[row], batch.lengths[row], None)
