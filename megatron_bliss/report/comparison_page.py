"""A comparison for people: the table it ends with, a sentence an arm, and `comparison.html`, which needs no network."""

import sys
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megatron_bliss.artifacts import atomic_write
from megatron_bliss.orchestration.logs import clock
from megatron_bliss.report import comparison, comparison_figures
from megatron_bliss.report.page import environment
from megatron_bliss.report.statistics import BETTER, NO_DIFFERENCE, WORSE
from megatron_bliss.wording import counted

_WIDTH = 160  # of the table where there is no terminal
COLUMNS = (
    "loss", "− random", "× random's steps", "× all's steps",
    "selection FLOPs", "training FLOPs", "selection", "training",
)  # fmt: skip


def write(out: Path) -> None:
    """Write `comparison.json`, `comparison.html` and its first figure as `comparison.svg`, and print the table.

    :raises UserError: if there is no comparison, or nothing of it has been measured.
    """
    found = comparison.write(out)
    runs, differences = comparison.seed_runs(out), comparison_figures.differences(found)
    page = (
        environment()
        .get_template("comparison.html")
        .render(
            title=out.absolute().name,
            found=found,
            columns=COLUMNS,
            rows={name: cells(arm) for name, arm in found["arms"].items()},
            sentences=sentences(found),
            domains=sorted({domain for arm in found["arms"].values() for domain in arm["domain_loss"]}),
            number=number,
            figures={
                "differences": differences,
                "curves": comparison_figures.loss_curves(runs),
                "domains": comparison_figures.domain_differences(found),
            },
        )
    )
    with atomic_write(out / "comparison.html", "w") as stream:
        stream.write(page)
    if differences:
        with atomic_write(out / "comparison.svg", "w") as stream:
            stream.write(differences)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    console.print(table(found))
    for sentence in sentences(found):
        console.print(sentence, soft_wrap=True, highlight=False)
    console.print(
        f"{out / 'comparison.html'} shows curves and domains, comparison.json has the numbers.", soft_wrap=True
    )


def table(found: dict[str, Any]) -> Table:
    """One line an arm, the best first; mean ± standard deviation over seeds."""
    measured = [len(arm["seeds"]) for arm in found["arms"].values()]
    seeds = counted(max(measured), "seed") if min(measured) == max(measured) else f"at most {max(measured)} seeds"
    title = (
        f"{found['measured_on']} loss {found['measure']} at step {found['iteration']}; "
        f"mean ± standard deviation of {seeds}"
    )
    shown = Table("arm", title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        shown.add_column(column, justify="right", no_wrap=True)
    for name in by_loss(found):
        shown.add_row(name, *cells(found["arms"][name]))
    return shown


def by_loss(found: dict[str, Any]) -> list[str]:
    """Names of the arms, the best first; those without a loss at the end."""

    def loss(name: str) -> float:
        value = found["arms"][name]["test_loss"]
        return value["mean"] if value else float("inf")

    return sorted(found["arms"], key=loss)


def cells(arm: dict[str, Any]) -> list[str]:
    """Under `COLUMNS`."""
    return [
        number(arm["test_loss"], ".3f"),
        number(arm["difference"], "+.3f"),
        number(arm["speedup_over_random"], ".1f"),
        number(arm["speedup_over_all"], ".1f"),
        _mean(arm["selection_flops"], ".1e"),
        _mean(arm["train_flops"], ".1e"),
        clock(arm["selection_s"]["mean"]) if arm["selection_s"] else "–",
        clock(arm["train_s"]["mean"]) if arm["train_s"] else "–",
    ]


def number(found: dict[str, Any] | None, style: str) -> str:
    """Mean ± spread; a lower bound as such."""
    if not found:
        return "–"
    bound = "> " if found.get("lower_bound") else ""
    around = "" if found["std"] is None else f" ± {format(found['std'], style.lstrip('+'))}"
    return f"{bound}{format(found['mean'], style)}{around}"


def _mean(found: dict[str, Any] | None, style: str) -> str:
    return format(found["mean"], style) if found else "–"


def sentences(found: dict[str, Any]) -> list[str]:
    """What came out for each arm, good or bad."""
    name_of_random = found["baselines"]["random"]
    if name_of_random is None:
        return ["There is no random arm, so nothing says whether selection helped."]
    said = []
    for name in by_loss(found):
        arm, difference = found["arms"][name], found["arms"][name]["difference"]
        if name == name_of_random:
            continue
        if difference is None:
            said.append(f"{name} has not been measured beside {name_of_random} yet.")
            continue
        by = f"{abs(difference['mean']):.3f} nats"
        words = {
            BETTER: f"better than {name_of_random} by {by}, more than the spread over seeds",
            WORSE: f"worse than {name_of_random} by {by}, more than the spread over seeds",
            NO_DIFFERENCE: f"no different from {name_of_random}: {by} apart, within the spread over seeds",
        }.get(arm["verdict"], f"{difference['mean']:+.3f} nats from {name_of_random} with one seed, which says little")
        said.append(f"{name} is {words}.")
    return said
