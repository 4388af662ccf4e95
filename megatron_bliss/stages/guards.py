"""Guards: what is done where a round's scores are not to be trusted, as `guards.action` says.

They are asked once a round, when all its scores are there: about these scores, and about the LLM's validation loss
after the round before. What they do is in `round-N/guard.json`, which `select` and the next round's `bilevel` follow.
The LLM's own steps are never taken back.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_bliss.artifacts import RunPaths, read_json, write_json
from megatron_bliss.config import GuardsConfig, RunConfig
from megatron_bliss.data.inventory import Inventory
from megatron_bliss.data.score_check import check_scores
from megatron_bliss.errors import StageError
from megatron_bliss.methods import offline_method

STOP, RANDOM, ROLLBACK = "stop", "random", "rollback"


@dataclass(frozen=True)
class Guarded:
    """What guards did in a round."""

    action: str  # stop | random | rollback
    reasons: list[str]  # sentences
    trusted_round: int  # the last one whose score model is trusted; 0 for none
    schema: int = 1


def guarded(paths: RunPaths, round_number: int) -> Guarded | None:
    """What guards did in a round; None where they did nothing, or were not asked yet."""
    path = paths.guard(round_number)
    return Guarded(**read_json(path)) if path.exists() else None


def trusted_round(paths: RunPaths, round_number: int) -> int:
    """The last round, not after this one, whose score model is trusted; 0 for none."""
    found = guarded(paths, round_number) if round_number else None
    return found.trusted_round if found else round_number


def ask(paths: RunPaths, config: RunConfig, inventory: Inventory, round_number: int) -> Guarded | None:
    """Look at a round's finished scores and at the LLM, write `guard.json` or remove an earlier one, and say so.

    :raises StageError: if the run is to stop.
    """
    doubts = [*score_doubts(paths.scores(round_number), inventory, config.guards, round_number)]
    trusted = trusted_round(paths, round_number - 1) if doubts else round_number
    if loss_doubts := [*loss_doubts_of(paths, config.guards, round_number - 1)]:
        doubts += loss_doubts
        trusted = trusted_round(paths, max(round_number - 2, 0))
    for doubt in doubts:
        print(f"[guards] {doubt}", flush=True)
    if not doubts or config.guards.action == "none":
        paths.guard(round_number).unlink(missing_ok=True)
        return None
    found = Guarded(_action(config, trusted), doubts, trusted)
    write_json(paths.guard(round_number), asdict(found))
    print(f"[guards] {describe(found, round_number)}", flush=True)
    if found.action == STOP:
        raise StageError(
            f"{' '.join(doubts)} Stopped, as guards.action=stop says. To go on, call the run again with "
            "guards.action=random (a random selection of the same size), rollback (scores by the last score model that "
            "is trusted) or none"
        )
    return found


def _action(config: RunConfig, trusted: int) -> str:
    """A rollback needs an earlier score model; without one, the selection is random."""
    has_models = offline_method(config).scored_by == "score_model"
    return RANDOM if config.guards.action == ROLLBACK and not (trusted and has_models) else config.guards.action


def describe(found: Guarded, round_number: int) -> str:
    """What was done, in a sentence."""
    what = {
        STOP: "nothing is selected, and the run stops",
        RANDOM: "its selection is a random one of the same size",
        ROLLBACK: f"its selection is made by the score model of round {found.trusted_round}",
    }[found.action]
    return f"round {round_number} is not trusted: {what}"


def score_doubts(directory: Path, inventory: Inventory, guards: GuardsConfig, round_number: int) -> Iterator[str]:
    """Why a round's scores are not to be trusted."""
    found = check_scores(directory, inventory.pool)
    if found.unscored > guards.unscored:
        yield (
            f"{found.unscored:.1%} of the scores of round {round_number} are not a number "
            f"(guards.unscored={guards.unscored:g})."
        )
    if found.num_scores and found.spread < guards.score_spread:
        yield all_but_the_same(round_number, found.spread, guards.score_spread)


def all_but_the_same(round_number: int, spread: float, limit: float) -> str:
    """The sentence on a round's scores.

    :param spread: between their 10th and 90th percentile.
    """
    return (
        f"The scores of round {round_number} are all but the same: their 10th and 90th percentile are "
        f"{spread:.2g} apart (guards.score_spread={limit:g})."
    )


def loss_doubts_of(paths: RunPaths, guards: GuardsConfig, round_number: int) -> Iterator[str]:
    """Why the selection that the LLM was trained on in a round is not to be trusted; nothing before there are two
    rounds to compare."""
    results = [paths.evaluation(number) / "results.json" for number in (round_number - 1, round_number)]
    if round_number < 2 or not all(path.exists() for path in results):
        return
    before, after = (read_json(path)["decay"]["validation_loss"] for path in results)
    if after > before + guards.loss_increase:
        yield (
            f"The LLM's validation loss rose from {before:.3f} to {after:.3f} in round {round_number} "
            f"(guards.loss_increase={guards.loss_increase:g})."
        )
