"""When a selection is not to be trusted, and what is done then."""

from dataclasses import dataclass


@dataclass
class GuardsConfig:
    """Thresholds of the report's warnings, and an action. All of it may be changed while a run is under way.

    The action is for rounds whose scores degenerate (`score_spread`, `unscored`), or that follow one in which the LLM
    got worse (`loss_increase`); everything else is a warning of the report.
    """

    action: str = "none"  # none: say so and go on | stop | random: a random selection of the same size |
    # rollback: scores by the last score model that is trusted; a random selection if there is none
    score_spread: float = 1e-3  # scores are a constant if their 10th and 90th percentile are not further apart
    unscored: float = 0.01  # share of scores that are not a number; with an action, `score` goes on over them
    domain_share: float = 0.8  # of the kept tokens, by one domain that is less than half as much of the pool
    fidelity: float = 0.1  # rank correlation of the scores with what helps the LLM; below it all through its interval
    kl_growth: float = 2.0  # the KL of a round's last tenth of steps over that of its first
    gain: float = 0.005  # nats that the main arm's loss must be below that of random data
    loss_increase: float = 0.1  # nats that the LLM's validation loss, after decay, may rise by in a round
    validation_sequences: int = 200  # that a validation set should have at least
    contamination: float = 0.05  # share of a validation set that stands in the pool
