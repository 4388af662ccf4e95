"""What a reader should know before trusting a run: pure functions of what `report.json` holds.

The thresholds are the run's own (`guards` in its settings), and are in the JSON.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from megatron_bliss.stages.guards import all_but_the_same
from megatron_bliss.wording import counted

Facts = dict[str, Any]


def warnings(facts: Facts) -> list[dict[str, Any]]:
    """All that apply: `name` of the warning, `round` or None, and a `sentence` with value and threshold."""
    return [
        {"name": name, "round": number, "sentence": sentence}
        for name, look in WARNINGS.items()
        for number, sentence in look(facts)
    ]


Found = Iterator[tuple[int | None, str]]  # round, sentence


def constant_scores(facts: Facts) -> Found:
    limit = facts["guards"]["score_spread"]
    for number, chosen in _selections(facts):
        if found := chosen.get("score_distribution"):
            spread = found["percentiles"][90] - found["percentiles"][10]
            if spread < limit:
                yield number, f"{all_but_the_same(number, spread, limit)} What was kept is as good as random."


def one_domain(facts: Facts) -> Found:
    limit = facts["guards"]["domain_share"]
    for number, chosen in _selections(facts):
        for row in chosen.get("domains", ()):
            if row["kept_share"] > limit and row["candidates_share"] < limit / 2:
                yield (
                    number,
                    f"{row['domain']} is {row['kept_share']:.0%} of what was kept in round {number}, and "
                    f"{row['candidates_share']:.0%} of what was offered (guards.domain_share={limit:g}). The "
                    "LLM learns little else; selection.quotas set a limit.",
                )


def unfaithful_scores(facts: Facts) -> Found:
    limit = facts["guards"]["fidelity"]
    for entry in facts["arms"][facts["main_arm"]]["fidelity"]:
        scores, proxy = (entry["correlations"][name] for name in ("scores_target", "proxy_target"))
        if scores["high"] is not None and scores["high"] < limit:
            yield (
                entry["round"],
                f"The scores of round {entry['round']} hardly rank what helps the LLM: their rank correlation with it "
                f"is {_with_interval(scores)} over {entry['sequences']} sequences, below guards.fidelity={limit:g}. "
                f"The proxy's own is {_with_interval(proxy)}: if that is low as well, a larger proxy or a longer "
                "warm-up may stand for the LLM better; if not, the score model has learned too little "
                "(bilevel.outer_steps, mates.sample_size).",
            )


def diverging_kl(facts: Facts) -> Found:
    limit = facts["guards"]["kl_growth"]
    for entry in facts["rounds"]:
        values = (entry["bilevel"] or {}).get("kl", [])
        known = [value for value in values if value is not None]
        if not known:
            continue
        tenth = max(len(known) // 10, 1)
        first, last = float(np.mean(known[:tenth])), float(np.mean(known[-tenth:]))
        if values[-1] is None or last > limit * first:
            how = "is no longer a number" if values[-1] is None else f"grew from {first:.3g} to {last:.3g}"
            yield (
                entry["round"],
                f"The proxy moved away from the LLM in round {entry['round']}: their KL {how} "
                f"(guards.kl_growth={limit:g}). Scores learned on it may not hold for the LLM; raise bilevel.gamma or "
                "lower bilevel.lr_proxy.",
            )


def no_better_than_random(facts: Facts) -> Found:
    result, main = facts["result"], facts["main_arm"]
    if result is None or result["arms"].get(main, {}).get("test_loss") is None:
        return
    ours, limit = result["arms"][main]["test_loss"], facts["guards"]["gain"]
    for name, arm in result["arms"].items():
        if name != main and arm["method"] == "random" and arm["test_loss"] is not None:
            gain = arm["test_loss"] - ours
            if gain < limit:
                yield (
                    None,
                    f"{main} is no better than random data: its loss is {ours:.3f}, that of {name} "
                    f"{arm['test_loss']:.3f} (guards.gain={limit:g}). The cost of selecting bought nothing.",
                )


def rising_loss(facts: Facts) -> Found:
    limit = facts["guards"]["loss_increase"]
    decays = {point["round"]: point["validation_loss"] for point in facts["arms"][facts["main_arm"]]["decays"]}
    for number, loss in decays.items():
        before = decays.get(number - 1)
        if before is not None and loss > before + limit:
            yield (
                number,
                f"The LLM got worse on the validation set in round {number}: from {before:.3f} to {loss:.3f} "
                f"(guards.loss_increase={limit:g}).",
            )


def small_validation_set(facts: Facts) -> Found:
    limit = facts["guards"]["validation_sequences"]
    for name, found in facts["validation_sets"].items():
        if found["num_sequences"] < limit:
            yield (
                None,
                f"The set {name} has {counted(found['num_sequences'], 'sequence')} "
                f"(guards.validation_sequences={limit}). The scores may fit these few and nothing else.",
            )


def contaminated_validation_set(facts: Facts) -> Found:
    limit = facts["guards"]["contamination"]
    for name, found in facts["validation_sets"].items():
        if found["contaminated_share"] is not None and found["contaminated_share"] > limit:
            read = found["read_tokens"] / max(found["pool_tokens"], 1)
            yield (
                None,
                f"About {found['contaminated_share']:.0%} of the set {name} stand word for word in the pool "
                f"({found['found']} of its sequences; {read:.0%} of the pool was looked at; "
                f"guards.contamination={limit:g}). Its loss can fall by heart; take these texts out of the pool.",
            )


def _with_interval(correlation: dict[str, float | None]) -> str:
    if correlation["spearman"] is None or correlation["low"] is None:
        return "not known"
    return f"{correlation['spearman']:.2f} ({correlation['low']:.2f} to {correlation['high']:.2f})"


def _selections(facts: Facts) -> Iterator[tuple[int, dict[str, Any]]]:
    for entry in facts["rounds"]:
        if entry["selection"]:
            yield entry["round"], entry["selection"]


WARNINGS: dict[str, Callable[[Facts], Found]] = {
    "constant scores": constant_scores,
    "one domain": one_domain,
    "unfaithful scores": unfaithful_scores,
    "diverging KL": diverging_kl,
    "no better than random": no_better_than_random,
    "rising loss": rising_loss,
    "small validation set": small_validation_set,
    "contaminated validation set": contaminated_validation_set,
}
