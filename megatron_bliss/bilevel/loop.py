"""The bilevel loop (arXiv 2510.06048, algorithm 1): one object that takes outer steps and can be stopped and resumed.

An outer step makes T AdamW steps on the proxy and one on the score model, for a global batch of the pool. The first
`solve_first` ones and then every `solve_interval`-th see a global batch of each validation set too and update z; the
others use the z that is there, and save the validation gradient and the curvature product.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_bliss.bilevel.curvature import Curvature, NoCurvature, Pool
from megatron_bliss.bilevel.hypergradient import directional_derivatives, score_gradient, score_logits
from megatron_bliss.bilevel.levels import LowerLevel, UpperLevel
from megatron_bliss.bilevel.objective import (
    Weights,
    entropy,
    importance_weights,
    score_coefficients,
    scores_from_logits,
)
from megatron_bliss.bilevel.optimizer import MOMENTS, Optimizer, lr_factor
from megatron_bliss.bilevel.set_weights import SetWeights, Upper
from megatron_bliss.bilevel.solvers import Solution, Solver
from megatron_bliss.bilevel.space import Vector, group_sum_


@dataclass(frozen=True)
class LoopSettings:
    """Numbers of the loop; `config.BilevelConfig` says what each means."""

    outer_steps: int
    inner_steps: int = 1
    solve_first: int = 0  # outer steps to begin with that all update z
    solve_interval: int = 1  # outer steps from one update to the next after them
    lr_warmup_fraction: float = 0.1
    ridge: float = 1e-6  # λ
    weights: Weights = "softmax"


class _Outcome(NamedTuple):
    """What an outer step found before the score model's."""

    losses: Tensor  # L_i, [local]
    kl: Tensor
    derivatives: Tensor  # g_i, [local]
    norms: list[Tensor]  # of the proxy's gradients, before clipping
    solved: tuple[Upper, Solution] | None  # f, and how z was updated; None where z is that of before


class BilevelLoop[Batch]:
    """:param lower: proxy, target and validation loss. :param upper: score model.
    :param proxy_optimizer: on the lower level's space. :param score_optimizer: on the upper level's.
    :param set_weights: of the validation sets; None for one set.
    """

    def __init__(
        self,
        lower: LowerLevel[Batch],
        upper: UpperLevel[Batch],
        curvature: Curvature,
        solver: Solver,
        settings: LoopSettings,
        proxy_optimizer: Optimizer,
        score_optimizer: Optimizer,
        set_weights: SetWeights | None = None,
    ) -> None:
        self.lower, self.upper, self.curvature, self.solver, self.settings = lower, upper, curvature, solver, settings
        self.proxy_optimizer, self.score_optimizer = proxy_optimizer, score_optimizer
        device = lower.space.masters[0].device
        self.set_weights = set_weights or SetWeights({"validation": 1.0}, 0.0, device)
        self.steps_done = 0

    @property
    def solves_next(self) -> bool:
        """Whether the next step updates z, for which it needs a batch of each validation set."""
        settings = self.settings
        return self.steps_done < settings.solve_first or self.steps_done % settings.solve_interval == 0

    def step(self, batches: Sequence[Batch], *validation: Sequence[Batch]) -> dict[str, float]:
        """One outer step.

        :param batches: this rank's micro-batches of the pool.
        :param validation: this rank's micro-batches of each validation set; not looked at unless `solves_next`.
        :returns: metrics, equal on all ranks but for rounding.
        """
        factor = lr_factor(self.steps_done, self.settings.outer_steps, self.settings.lr_warmup_fraction)
        parts = score_logits(self.upper, batches)
        logits = torch.cat(parts)
        weights = importance_weights(scores_from_logits(logits), self.settings.weights, self._dp_group)
        side = 1 if self.steps_done % 2 else -1
        pool = Pool(self.lower, batches, weights.split([len(part) for part in parts]), self.settings.ridge, side)
        if self.solver.is_simultaneous:
            outcome = self._simultaneous(pool, validation, factor)
        else:
            outcome = self._sequential(pool, validation, factor)
        coefficients = score_coefficients(weights, outcome.derivatives, self.settings.weights, self._dp_group)
        gradient = score_gradient(self.upper, batches, coefficients.split([len(part) for part in parts]))
        score_norm = self.score_optimizer.step(gradient, factor)
        self.steps_done += 1
        return self._metrics(logits, weights, outcome, score_norm)

    @property
    def _dp_group(self) -> Any:
        return self.lower.space.dp_group

    def _simultaneous(self, pool: Pool[Batch], validation: Sequence[Sequence[Batch]], factor: float) -> _Outcome:
        """All directions from one point and one z (SOBA, arXiv 2201.13409): the last inner step shares its gradient,
        which is that of a point close by where z is kept (`NoCurvature`)."""
        norms = [self.proxy_optimizer.step(pool.gradient()[0], factor) for _ in range(self.settings.inner_steps - 1)]
        solved = None
        if self.solves_next:
            value = self._validation(validation)
            evaluation = self.curvature.evaluate(pool, self.solver.z)
            solved = value, self.solver.step(lambda v: self.curvature.product(pool, v), evaluation.product)
        else:
            evaluation = NoCurvature().evaluate(pool, self.solver.z)
        norms.append(self.proxy_optimizer.step(evaluation.gradient, factor))
        return _Outcome(evaluation.losses, evaluation.kl, evaluation.derivatives, norms, solved)

    def _sequential(self, pool: Pool[Batch], validation: Sequence[Sequence[Batch]], factor: float) -> _Outcome:
        """Inner steps, then z at the point they reach, then g_i along it: the order of the paper."""
        norms = []
        for _ in range(self.settings.inner_steps):
            inner_gradient, losses, kl = pool.gradient()
            norms.append(self.proxy_optimizer.step(inner_gradient, factor))
        solved = None
        if self.solves_next:
            value = self._validation(validation)
            solved = value, self.solver.step(lambda v: self.curvature.product(pool, v))
        derivatives = directional_derivatives(pool.level, pool.batches, self.solver.z)
        return _Outcome(losses, kl, derivatives, norms, solved)

    def _validation(self, sets: Sequence[Sequence[Batch]]) -> Upper:
        """f over the global validation batches; its gradient goes to the solver."""
        gradient, losses = self.lower.space.accumulator(), []
        for batches, weight in zip(sets, self.set_weights.values, strict=True):
            parts = [self.lower.add_validation_gradient(batch, gradient, weight) for batch in batches]
            losses.append(torch.stack(parts).sum())
        self.solver.take_in(self.lower.space.reduce_gradients(gradient))
        return self.set_weights.take_in(group_sum_(torch.stack(losses), self._dp_group))

    def _metrics(self, logits: Tensor, weights: Tensor, outcome: _Outcome, score_norm: Tensor) -> dict[str, float]:
        losses = outcome.losses
        unsound = ~torch.isfinite(torch.stack([*outcome.norms, score_norm]))
        group = self._dp_group
        sums = torch.stack([torch.ones_like(logits).sum(), logits.sum(), logits.square().sum(), losses.sum()]).double()
        sums = torch.cat([sums, (weights * losses).sum().double()[None], weights.sum().double()[None]])
        count, total, squares, loss, weighted, weight = group_sum_(sums, group)
        figures = {
            "train_loss": loss / count,
            "weighted_loss": weighted / weight,
            "kl": outcome.kl,
            "weight_entropy": entropy(weights, group),
            "contained": unsound.double().sum(),  # solver steps and gradients that were not used
            "score_mean": total / count,
            "score_std": (squares / count - (total / count).square()).clamp_min(0).sqrt(),
            "score_gradient_norm": score_norm,
        }
        if outcome.solved is not None:
            upper, solution = outcome.solved
            figures |= {"validation_loss": upper.value, "z_norm": solution.norm, "residual": solution.residual}
            figures["contained"] = figures["contained"] + solution.contained
            if len(names := self.set_weights.names) > 1:
                figures |= {f"validation_loss/{name}": upper.losses[i] for i, name in enumerate(names)}
                figures |= {f"validation_weight/{name}": upper.weights[i] for i, name in enumerate(names)}
        numbers = torch.stack([figure.detach().double() for figure in figures.values()]).tolist()  # waits, once a step
        return dict(zip(figures, numbers, strict=True))

    def vectors(self) -> tuple[dict[str, Vector], dict[str, Vector]]:
        """What a checkpoint holds: whole vectors like the proxy's and like the score model's parameters, by name. All
        ranks call it."""
        lower = {"master": self.lower.space.masters, **self.proxy_optimizer.moments()}
        upper = {"master": self.upper.space.masters, **self.score_optimizer.moments()}
        lower |= self.solver.state_dict()["vectors"]
        return (
            {name: self.lower.space.whole(vector) for name, vector in lower.items()},
            {name: self.upper.space.whole(vector) for name, vector in upper.items()},
        )

    def scalars(self) -> dict[str, Any]:
        return {
            "steps_done": self.steps_done,
            "solver": self.solver.state_dict()["scalars"],
            "set_weights": self.set_weights.values.tolist(),
        }

    @torch.no_grad()
    def load(self, lower: dict[str, Vector], upper: dict[str, Vector], scalars: dict[str, Any]) -> None:
        """Continue from what `vectors()` and `scalars()` returned, to the same numbers."""
        self.steps_done = int(scalars["steps_done"])
        own = {name: self.lower.space.own(vector) for name, vector in lower.items()}
        self.proxy_optimizer.load(own, self.steps_done * self.settings.inner_steps)
        self.score_optimizer.load(
            {name: self.upper.space.own(vector) for name, vector in upper.items()}, self.steps_done
        )
        solver_vectors = {name: vector for name, vector in own.items() if name not in ("master", *MOMENTS)}
        self.solver.load_state_dict({"vectors": solver_vectors, "scalars": scalars["solver"]})
        if "set_weights" in scalars:  # checkpoints of one set may be without
            self.set_weights.load(scalars["set_weights"])
