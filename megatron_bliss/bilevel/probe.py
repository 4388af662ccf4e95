"""What single optimizer steps do to a loss, each taken back before the next."""

from collections.abc import Callable, Mapping

from torch import Tensor

from megatron_bliss.bilevel.optimizer import Optimizer
from megatron_bliss.bilevel.space import Vector


class Probe:
    """Steps from one and the same state.

    :param optimizer: its learning rate is that of the steps.
    :param state: `master` and the moments that every step starts from, this rank's own; copied.
    :param count: optimizer steps that led to it.
    :param loss: what the steps are judged by, at the parameters of that moment: a float64 scalar.
    """

    def __init__(
        self, optimizer: Optimizer, state: Mapping[str, Vector], count: int, loss: Callable[[], Tensor]
    ) -> None:
        self._optimizer, self._count, self._loss = optimizer, count, loss
        self._state = {name: [part.clone() for part in vector] for name, vector in state.items()}
        self._restore()
        self.before = loss()

    def influence(self, gradient: Vector) -> Tensor:
        """By how much a step lowers the loss, a float64 scalar: above 0 where it helps. Parameters and optimizer are
        then what they were, to the bit.

        :param gradient: reduced; overwritten.
        """
        self._optimizer.step(gradient, 1.0)
        after = self._loss()
        self._restore()
        return self.before - after

    def _restore(self) -> None:
        self._optimizer.load(self._state, self._count)
