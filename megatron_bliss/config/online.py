"""Online token selection in the LLM's training loop (DESIGN §2.2)."""

from dataclasses import dataclass


@dataclass
class OnlineConfig:
    """Which tokens of a batch carry loss, by their excess loss over a reference: L(model) − L(reference).

    It holds in all rounds of a run, not in the warm-up. Steps are the LLM's iterations, those of the warm-up counted.
    """

    method: str = "none"  # none | blade: the reference is synchronised from the model and trained a little further |
    # rho1: a reference that stays | self: a running average of the model
    keep: float = 0.6  # share of the tokens with loss that keep it, those with the largest excess loss
    scope: str = "micro-batch"  # the tokens that compete: micro-batch | sequence | global-batch (one more forward pass)
    sync_interval: int = 1000  # steps between synchronisations; before the first one all tokens carry loss
    reference_steps: int = 300  # optimizer steps of the reference after each (blade), or once (rho1)
    reference_batch_size: int | None = None  # sequences of the pool in each of them, and as many of the validation set;
    # None: the global batch size
    lambda_: float = 1.0  # weight of the training loss beside the validation loss in them
    average: float = 0.9  # what is left of the old average at a synchronisation (self)
    reference: str | None = None  # directory of its checkpoint (rho1); null: at the first step it is made of the
    # model, trained on the validation set alone
    offload: bool = False  # the reference's parameters are on the host between the steps
