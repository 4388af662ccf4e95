"""`report.html`: one file that needs no network, from the files of a run, finished or not."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from megatron_bliss.artifacts import RunPaths, atomic_write, read_json
from megatron_bliss.orchestration.cost import arm_costs, quantity
from megatron_bliss.orchestration.logs import clock
from megatron_bliss.report import figures
from megatron_bliss.report.collect import RunFiles, collect
from megatron_bliss.report.result import demo_result, result_path

_NOTABLE = 0.005  # nats; differences below it are called none


@dataclass(frozen=True)
class LedgerRow:
    """Floating-point operations of one stage in all rounds of an arm."""

    arm: str
    stage: str
    tokens: str
    flops: str
    share: str  # of the arm's training


def write(run_dir: Path) -> None:
    """Write `report.html`; numbers are those of `result.json` where there is one.

    :raises UserError: if there is no run, or no arm has been evaluated yet.
    """
    run = collect(run_dir)
    result = read_json(result_path(run_dir)) if result_path(run_dir).exists() else demo_result(run_dir)
    environment = Environment(
        loader=PackageLoader("megatron_bliss", "report"), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {"loss": _loss, "quantity": _quantity, "flops": _flops, "clock": clock}
    page = environment.get_template("page.html").render(
        title=run.run_dir.name,
        run=run,
        result=result,
        summary=summary(result),
        domains=[domain.name for domain in run.config.data.pool],
        figures={
            "loss": figures.loss_curves(run),
            "kept": figures.kept_shares(run),
            "bilevel": figures.bilevel_curves(run),
        },
        ledger=ledger(run),
    )
    with atomic_write(RunPaths(run_dir).report, "w") as stream:
        stream.write(page)


def summary(result: dict[str, Any]) -> list[str]:
    """What came out, in plain sentences, good or bad."""
    main = result["main_arm"]
    arms = result["arms"]
    ours = arms.get(main, {}).get("test_loss")
    if ours is None:
        return [f"The arm {main} has no loss yet at the step where all arms can be compared."]
    sentences = [
        f"After {result['iteration']} steps, warm-up included, the LLM trained on what {main} selected has a loss of "
        f"{ours:.3f} ({result['measure']} of the learning rate)."
    ]
    random = next((name for name, arm in arms.items() if arm["method"] == "random" and name != main), None)
    for name, arm in arms.items():
        if name != main and arm["test_loss"] is not None:
            sentences.append(_comparison(main, ours, name, arm["test_loss"], is_random=name == random))
    if (gain := result["speedup_over_random"]) is not None:
        sentences.append(_speedup_sentence(main, gain, result["speedup_is_lower_bound"]))
    spent, training = arms[main]["selection_flops"], arms[main]["train_flops"]
    if spent:
        sentences.append(
            f"Selecting took {spent / training:.0%} of the floating-point operations of the training itself."
        )
    if result["auc_target_domain"] is not None:
        sentences.append(
            f"The scores rank a sequence of the domain {result['target_domain']} above another one with probability "
            f"{result['auc_target_domain']:.2f} (0.5 would be chance)."
        )
    return sentences


def _comparison(main: str, ours: float, name: str, theirs: float, is_random: bool) -> str:
    difference = theirs - ours
    if difference >= _NOTABLE:
        return f"{name} is at {theirs:.3f}, which is {difference:.3f} worse."
    verdict = "no different" if difference > -_NOTABLE else f"{-difference:.3f} better"
    if is_random:
        return f"{name} is at {theirs:.3f}, {verdict}: the selection by {main} did not help here."
    return f"{name} is at {theirs:.3f}, {verdict}: a simpler rule does as well here as {main}."


def _speedup_sentence(main: str, gain: float, is_lower_bound: bool) -> str:
    if is_lower_bound:
        return f"Random data had not reached that loss after {gain:.1f} times the steps of {main} since the warm-up."
    if gain <= 1:
        return f"Random data reached that loss in {gain:.1f} times the steps: {main} was not faster."
    return f"Random data needed {gain:.1f} times the steps of {main} since the warm-up to reach that loss."


def ledger(run: RunFiles) -> list[LedgerRow]:
    """What each arm spent on what, over all rounds, estimated from sizes; the warm-up, which arms share, in each."""
    rows = []
    for files in run.arms:
        arm, costs = files.arm, arm_costs(files.arm, run.pool)
        numbers = range(1, arm.config.rounds + 1)
        by_stage = {"warm-up of the LLM": [costs[arm.stage_name("warmup-target")]]}
        if arm.method.scored_by != "none":
            by_stage["warm-up of the proxy"] = [costs[arm.stage_name("warmup-proxy")]]
        for command in ("bilevel", "score", "pretrain", "evaluate"):
            found = [costs[name] for n in numbers if (name := arm.stage_name(command, n)) in costs]
            if found:
                by_stage[command] = found
        training = sum(cost.flops or 0 for name in ("warm-up of the LLM", "pretrain") for cost in by_stage[name])
        for stage, parts in by_stage.items():
            unknown = any(cost.flops is None for cost in parts)
            flops = math.nan if unknown else sum(cost.flops or 0 for cost in parts)
            tokens = math.nan if unknown else sum(cost.tokens or 0 for cost in parts)
            share = "" if unknown else f"{flops / training:.1%}"
            rows.append(LedgerRow(files.name, stage, _quantity(tokens), _flops(flops), share))
    return rows


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _quantity(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else quantity(value)


def _flops(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.2e}"
