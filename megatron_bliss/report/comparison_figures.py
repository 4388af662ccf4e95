"""Figures of a comparison as SVG text; None where there is nothing to show."""

from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from megatron_bliss.report.comparison import SeedRun
from megatron_bliss.report.figures import STYLE, colours, svg


def differences(found: dict[str, Any]) -> str | None:
    """Every arm's paired difference to the random arm: a dot a seed, a bar at the mean."""
    drawn = {name: arm for name, arm in found["arms"].items() if arm["difference"]}
    if not drawn:
        return None
    order = sorted(drawn, key=lambda name: drawn[name]["difference"]["mean"], reverse=True)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.9 + 0.34 * len(order)), layout="constrained")
        axes = figure.subplots()
        for row, name in enumerate(order):
            mean = drawn[name]["difference"]["mean"]
            dots = [one["difference"] for one in drawn[name]["seeds"].values() if one["difference"] is not None]
            colour = colours(3)[0] if mean < 0 else colours(3)[2]
            axes.barh(row, mean, height=0.6, color=colour, alpha=0.35)
            axes.plot(dots, [row] * len(dots), "o", color=colour, markersize=4)
        axes.axvline(0, color="#1d2328", linewidth=0.8)
        axes.set_yticks(range(len(order)), order)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"{found['measured_on']} loss minus that of random data, nats a token (left is better)")
        return svg(figure, "difference of every arm's loss to random data's")


def domain_differences(found: dict[str, Any]) -> str | None:
    """Mean difference to the random arm on every domain's held-out sequences, as a table of colours."""
    drawn = {name: arm["domain_difference"] for name, arm in found["arms"].items() if arm["domain_difference"]}
    domains = sorted({domain for by_domain in drawn.values() for domain in by_domain})
    if not domains:
        return None
    values = np.full((len(drawn), len(domains)), np.nan)
    for row, by_domain in enumerate(drawn.values()):
        for column, domain in enumerate(domains):
            if by_domain.get(domain):
                values[row, column] = by_domain[domain]["mean"]
    limit = max(float(np.nanmax(np.abs(values))), 1e-9)
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(7.2, 1.1 + 0.3 * len(drawn)), layout="constrained")
        axes = figure.subplots()
        axes.imshow(values, cmap="RdYlGn_r", vmin=-limit, vmax=limit, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            axes.text(column, row, "" if np.isnan(value) else f"{value:+.2f}", ha="center", va="center", fontsize=7)
        axes.set_xticks(range(len(domains)), domains, rotation=30, ha="right")
        axes.set_yticks(range(len(drawn)), list(drawn))
        return svg(figure, "difference of every arm's loss to random data's, domain by domain")


def loss_curves(runs: list[SeedRun]) -> str | None:
    """Loss of every arm on the main line against the LLM's steps: mean over seeds, and a band of their spread."""
    names = list(dict.fromkeys(files.name for one in runs for files in one.run.arms if files.curve))
    if not names:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.subplots()
        for place, (name, colour) in enumerate(zip(names, colours(len(names)), strict=True)):
            by_step: dict[int, list[float]] = {}
            for one in runs:
                files = one.arm(name)
                for point in files.curve if files else []:
                    by_step.setdefault(point.iteration, []).append(point.loss)
            steps = sorted(by_step)
            means, spreads = (np.array([f(by_step[step]) for step in steps]) for f in (np.mean, np.std))
            axes.fill_between(steps, means - spreads, means + spreads, color=colour, alpha=0.12, linewidth=0)
            axes.plot(steps, means, color=colour, linestyle=("-", "--", ":")[place // 6 % 3], linewidth=1.4, label=name)
        axes.set_xlabel("optimizer steps of the LLM, warm-up included")
        measured = "test" if runs[0].run.config.data.test else "validation"
        axes.set_ylabel(f"loss on the {measured} set, nats a token")
        axes.legend(ncols=2)
        return svg(figure, "loss of every arm against the LLM's steps, mean over seeds")
