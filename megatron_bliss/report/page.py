"""`report.json` and `report.html`: one file that needs no network, from the files of a run, finished or not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megatron_bliss.artifacts import RunPaths, atomic_write, read_json, write_json
from megatron_bliss.orchestration.cost import quantity
from megatron_bliss.orchestration.logs import clock
from megatron_bliss.report import figures
from megatron_bliss.report.facts import report_facts
from megatron_bliss.report.result import result_path

STYLES: dict[str, Callable[[Any], str]] = {
    "plain": str,
    "count": lambda value: f"{value:,}",
    "quantity": quantity,
    "bytes": lambda value: f"{quantity(value)}B",
    "loss": lambda value: f"{value:.4f}",
    "score": lambda value: f"{value:.4g}",
    "two": lambda value: f"{value:.2f}",
    "percent": lambda value: f"{value:.1%}",
    "flops": lambda value: f"{value:.2e}",
    "hours": lambda value: f"{value:.3g}",
    "clock": clock,
}


def json_path(run_dir: Path) -> Path:
    return run_dir / "report.json"


def write(run_dir: Path) -> None:
    """Write `report.json` and `report.html`; what is in `result.json`, where there is one, is in them.

    :raises UserError: if there is no run.
    """
    result = read_json(result_path(run_dir)) if result_path(run_dir).exists() else None
    facts = report_facts(run_dir, result)
    write_json(json_path(run_dir), facts)
    with atomic_write(RunPaths(run_dir).report, "w") as stream:
        stream.write(html(facts))


def html(facts: dict[str, Any]) -> str:
    """:param facts: what `report.json` holds."""
    selections = [(place, entry["selection"]) for place, entry in enumerate(facts["rounds"]) if entry["selection"]]
    drawn = {
        "loss": figures.loss_curves(facts),
        "domains": dict(figures.domain_losses(facts)),
        "kept": {name: figures.kept_shares(facts, name) for name in facts["arms"]},
        "scores": {place: figures.scores(selection) for place, selection in selections},
        "lengths": {place: figures.lengths(selection) for place, selection in selections},
        "bilevel": dict(figures.bilevel_curves(facts)),
    }
    return environment().get_template("page.html").render(
        facts=facts, show=shown(facts), figures=drawn, bilevel_words=figures.BILEVEL
    )  # fmt: skip


def environment() -> Environment:
    """Templates of this package; what is not marked as safe is escaped."""
    return Environment(loader=PackageLoader("megatron_bliss", "report"), autoescape=True, undefined=StrictUndefined)


def shown(facts: dict[str, Any]) -> Callable[..., Markup]:
    """A function that shows a value of the JSON, named by its keys: a <data> element that carries value and keys."""

    def show(*keys: str | int, style: str = "plain") -> Markup:
        value: Any = facts
        for key in keys:
            value = value[key]
        text = "–" if value is None else STYLES[style](value)
        place, exact = json.dumps(keys, ensure_ascii=False), json.dumps(value)
        return Markup('<data value="{}" data-of="{}">{}</data>').format(exact, place, text)

    return show
