"""Figures of the report as SVG text. Each takes what was collected and returns None where there is nothing to show."""

import io
import math
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_bliss.report.collect import ArmFiles, RunFiles

_COLOURS = ("#0b6e4f", "#8a8a8a", "#c8553d", "#3d5a98", "#b8860b", "#6d4c8f")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small files, and it can be searched
    "svg.hashsalt": "megatron-bliss",  # the same figure gives the same bytes
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
}
_BILEVEL_TITLES = {
    "train_loss": "loss on the pool's batch",
    "weighted_loss": "weighted loss on the pool's batch",
    "validation_loss": "loss on the validation batch",
    "kl": "KL between target and proxy",
    "weight_entropy": "entropy of the weights",
    "z_norm": "‖z‖",
    "residual": "residual of the linear system",
    "contained": "steps of z that were held back",
    "score_mean": "mean score",
    "score_std": "spread of the scores",
    "score_gradient_norm": "gradient norm of the score model",
    "tokens_per_second": "tokens a second",
}


def loss_curves(run: RunFiles) -> str | None:
    """Loss of every arm against the LLM's steps, with the decay branches as separate marks."""
    drawn = [files for files in run.arms if files.curve or files.decays]
    if not drawn:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        axes = figure.subplots()
        for files, colour in zip(run.arms, colours(len(run.arms)), strict=True):
            _draw_arm(axes, files, colour)
        main = run.arms[0].curve
        if main:
            axes.axhline(main[-1].loss, color=_COLOURS[0], linewidth=0.8, linestyle=":")
        axes.set_xlabel("optimizer steps of the LLM, warm-up included")
        axes.set_ylabel(f"loss on the {'test' if run.config.data.test else 'validation'} set, nats a token")
        axes.legend()
        return svg(figure)


def _draw_arm(axes: Axes, files: ArmFiles, colour: str) -> None:
    if files.curve:
        points = [(point.iteration, point.loss) for point in files.curve]
        axes.plot(*zip(*points, strict=True), color=colour, marker=".", linewidth=1.4, label=files.name)
    if files.decays:
        points = [(point.iteration, point.loss) for point in files.decays]
        label = f"{files.name}, after decay"
        axes.plot(*zip(*points, strict=True), "D", color=colour, markerfacecolor="none", label=label)


def kept_shares(run: RunFiles) -> str | None:
    """Share of every domain in the tokens that were offered and kept, by arm and round."""
    drawn = [files for files in run.arms if any(entry.kept for entry in files.rounds)]
    if not drawn:
        return None
    domains = [domain.name for domain in run.config.data.pool]
    num_bars = 1 + run.config.rounds
    with mpl.rc_context(STYLE):
        height = 1.0 + len(drawn) * (0.5 + 0.14 * num_bars * len(domains))
        figure = Figure(figsize=(7.2, height), layout="constrained")
        panels = figure.subplots(len(drawn), 1, squeeze=False, sharex=True)[:, 0]
        for axes, files in zip(panels, drawn, strict=True):
            _draw_kept(axes, files, domains, num_bars)
        panels[-1].set_xlabel("% of tokens")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=min(num_bars, 4))
        return svg(figure)


def _draw_kept(axes: Axes, files: ArmFiles, domains: list[str], num_bars: int) -> None:
    made = [entry for entry in files.rounds if entry.kept]
    width = 0.8 / num_bars
    offered = [sum(entry.kept[domain].slice_tokens for entry in made if domain in entry.kept) for domain in domains]
    series: list[tuple[str, Any, list[float]]] = [("in the pool", "#c9c9c9", _shares(offered))]
    for place, entry in enumerate(made):
        kept = [entry.kept[domain].kept_tokens if domain in entry.kept else 0 for domain in domains]
        depth = 0.45 + 0.55 * (place + 1) / len(made)
        series.append((f"kept in round {entry.number}", (0.04, 0.43, 0.31, depth), _shares(kept)))
    for place, (label, colour, shares) in enumerate(series):
        positions = [row + place * width for row in range(len(domains))]
        axes.barh(positions, [100 * share for share in shares], height=width, color=colour, label=label)
    axes.set_yticks([row + 0.4 - width / 2 for row in range(len(domains))], domains)
    axes.invert_yaxis()
    axes.set_title(files.name, loc="left", fontweight="bold")
    axes.grid(axis="y", visible=False)


def _shares(amounts: list[int]) -> list[float]:
    total = sum(amounts)
    return [amount / total if total else 0.0 for amount in amounts]


def bilevel_curves(run: RunFiles) -> str | None:
    """Everything the bilevel loop of the main arm has noted, step by step, one line a round."""
    rounds = [entry for entry in run.arms[0].rounds if entry.bilevel]
    found = dict.fromkeys(key for entry in rounds for line in entry.bilevel for key in line)
    keys = [key for key in found if key not in ("step", "schema")]
    if not keys:
        return None
    num_rows = math.ceil(len(keys) / 3)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 0.4 + 1.9 * num_rows), layout="constrained")
        panels = figure.subplots(num_rows, 3, squeeze=False).flatten()
        for axes, key in zip(panels, keys, strict=False):
            for entry, colour in zip(rounds, colours(len(rounds)), strict=True):
                steps = [line.get("step", place + 1) for place, line in enumerate(entry.bilevel)]
                values = [line.get(key, math.nan) for line in entry.bilevel]
                axes.plot(steps, values, linewidth=1, color=colour, label=f"round {entry.number}")
            axes.set_title(_BILEVEL_TITLES.get(key, key.replace("_", " ")), loc="left")
        for axes in panels[len(keys) :]:
            axes.axis("off")
        panels[0].legend()
        return svg(figure)


def colours(count: int) -> list[str]:
    return [_COLOURS[place % len(_COLOURS)] for place in range(count)]


def svg(figure: Figure) -> str:
    """The figure as an <svg> element that can stand inside HTML."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
