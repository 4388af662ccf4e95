"""Figures of the report as SVG text, drawn from what `report.json` holds; None where there is nothing to show.

They are as wide as a phone's screen, so that their text stays readable there; the page sets them side by side.
"""

import io
import math
from collections.abc import Iterator
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    "axes.titlesize": 10,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
}
_WIDTH, _PANEL = 5.2, 3.6  # inches
_POOL = "#c9c9c9"
# What the bilevel loop notes, in the order of interest: title, and what a reader makes of it.
BILEVEL = {
    "validation_loss": ("Loss on the validation set", "of the proxy; should fall"),
    "train_loss": ("Loss on the pool", "of the proxy, every sequence counted alike"),
    "weighted_loss": ("Weighted loss on the pool", "of the proxy, by the score model's weights"),
    "kl": ("KL: proxy against LLM", "how far the proxy is from the LLM it stands for; should not grow"),
    "weight_entropy": ("Entropy of the weights", "its maximum is equal weights; near 0, one sequence has all"),
    "residual": ("Residual of the linear system", "0 is solved, 1 is no better than nothing"),
    "score_std": ("Spread of the scores", "near 0 they tell nothing apart"),
    "score_mean": ("Mean score", "only differences between scores matter"),
    "z_norm": ("‖z‖", "length of the solution of the linear system"),
    "contained": ("Steps held back", "share whose curvature was negative or not finite"),
    "score_gradient_norm": ("Gradient norm", "of the score model"),
    "tokens_per_second": ("Tokens a second", "of the loop"),
}


def loss_curves(facts: dict[str, Any]) -> str | None:
    """Loss of every arm against the LLM's steps, with the decay branches as separate marks."""
    arms = facts["arms"]
    if not any(arm["curve"] or arm["decays"] for arm in arms.values()):
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, 3.6), layout="constrained")
        axes = figure.subplots()
        _draw_ends(axes, facts)
        for (name, arm), colour in zip(arms.items(), colours(len(arms)), strict=True):
            steps, losses = _line(arm["curve"])
            label = name
            if steps:
                axes.plot(steps, losses, color=colour, marker=".", linewidth=1.4, label=label)
                label = "_"  # in the legend once
            if arm["decays"]:
                axes.plot(*_line(arm["decays"]), "D", color=colour, markerfacecolor="none", label=label)
        main = arms[facts["main_arm"]]["curve"]
        if main:
            axes.axhline(main[-1]["loss"], color=_COLOURS[0], linewidth=0.8, linestyle=":")
        axes.set_xlabel("optimizer steps of the LLM, warm-up included")
        axes.set_ylabel(f"{facts['measured_on']} loss, nats a token")
        axes.legend()
        return svg(figure, f"{facts['measured_on']} loss of every arm against the LLM's steps")


def _line(points: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    return [point["step"] for point in points], [point["loss"] for point in points]


def _draw_ends(axes: Axes, facts: dict[str, Any]) -> None:
    """Where the data changes: at the end of the warm-up and of each round."""
    for number, step in enumerate(facts["ends"]):
        axes.axvline(step, color="#b9c0c5", linewidth=0.8, linestyle="--")
        name = "warm-up" if number == 0 else f"round {number}"
        axes.annotate(name, (step, 1.0), xycoords=("data", "axes fraction"), fontsize=7, color="#5c666e",
                      rotation=90, ha="right", va="top", xytext=(-1, -2), textcoords="offset points")  # fmt: skip


def domain_losses(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """A panel a domain: held-out loss of every arm, and the main arm's training loss."""
    arms = facts["arms"]
    for domain in facts["domains"]:
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(_PANEL, 2.3), layout="constrained")
            axes = figure.subplots()
            for entry in facts["rounds"]:
                training = entry["training"]
                if training and f"loss/{domain}" in training:
                    losses = [math.nan if x is None else x for x in training[f"loss/{domain}"]]
                    axes.plot(training["step"], losses, color=_COLOURS[0], linewidth=0.6, alpha=0.45)
            is_empty = not axes.lines
            for (name, arm), colour in zip(arms.items(), colours(len(arms)), strict=True):
                points = [p for p in arm["curve"] or arm["decays"] if p["domain_loss"].get(domain) is not None]
                if points:
                    losses = [point["domain_loss"][domain] for point in points]
                    axes.plot(_line(points)[0], losses, color=colour, marker=".", linewidth=1.2, label=name)
                    is_empty = False
            if is_empty:
                continue
            _draw_ends(axes, facts)
            axes.set_xlabel("steps")
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=7)
            yield domain, svg(figure, f"loss on the domain {domain} against the LLM's steps")


def kept_shares(facts: dict[str, Any], name: str) -> str | None:
    """Share of every domain in the tokens that an arm was offered and kept, by round."""
    made = facts["arms"][name]["kept"]
    if not made:
        return None
    domains = facts["domains"]
    offered = [sum(entry["offered_share"].get(d, 0) for entry in made) / len(made) for d in domains]
    series: list[tuple[str, Any, list[float]]] = [("in the pool", _POOL, offered)]
    for place, entry in enumerate(made):
        depth = 0.45 + 0.55 * (place + 1) / len(made)
        shares = [entry["kept_share"].get(domain, 0) for domain in domains]
        series.append((f"kept in round {entry['round']}", (0.04, 0.43, 0.31, depth), shares))
    width = 0.8 / len(series)
    with mpl.rc_context(STYLE):
        height = 0.9 + len(domains) * (0.12 + 0.12 * len(series)) + 0.16 * math.ceil(len(series) / 3)
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.subplots()
        for place, (label, colour, shares) in enumerate(series):
            positions = [row + place * width for row in range(len(domains))]
            axes.barh(positions, [100 * share for share in shares], height=width, color=colour, label=label)
        axes.set_yticks([row + 0.4 - width / 2 for row in range(len(domains))], domains)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("% of tokens")
        figure.legend(loc="outside upper left", ncols=3, fontsize=8)
        return svg(figure, f"share of every domain in the pool and in what {name} kept")


def scores(selection: dict[str, Any]) -> str | None:
    """Histogram of a round's scores, and of those that were kept."""
    found = selection.get("score_distribution")
    if not found:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(_PANEL, 2.3), layout="constrained")
        axes = figure.subplots()
        for part, colour, label in (("candidates", _POOL, "all candidates"), ("kept", _COLOURS[0], "kept")):
            axes.stairs(found[part], found["edges"], fill=True, color=colour, label=label)
        axes.set_xlabel("score, higher is better")
        axes.set_ylabel("sequences")
        axes.legend(fontsize=8)
        return svg(figure, "how many sequences have which score, and which of them are kept")


def lengths(selection: dict[str, Any]) -> str | None:
    """Share of the tokens by length of their sequence, in the pool and kept."""
    rows = selection.get("lengths")
    if not rows:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(_PANEL, 0.8 + 0.3 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for place, (part, colour, label) in enumerate((("pool", _POOL, "pool"), ("kept", _COLOURS[0], "kept"))):
            positions = [row + 0.4 * place for row in range(len(rows))]
            axes.barh(positions, [100 * row[f"{part}_share"] for row in rows], 0.4, color=colour, label=label)
        names = [f"{row['from']}–{row['to']}" if row["to"] > 1 else str(row["to"]) for row in rows]
        axes.set_yticks([row + 0.2 for row in range(len(rows))], names)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("% of tokens")
        axes.set_ylabel("tokens in the sequence")
        axes.legend(fontsize=8)
        return svg(figure, "share of the tokens by length of their sequence, in the pool and kept")


def bilevel_curves(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """A panel a quantity that the bilevel loop of the main arm has noted, one line a round."""
    rounds = [entry for entry in facts["rounds"] if entry["bilevel"]]
    noted = {key for entry in rounds for key in entry["bilevel"]} - {"step"}
    for key in (*(key for key in BILEVEL if key in noted), *sorted(noted - BILEVEL.keys())):
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(_PANEL, 2.1), layout="constrained")
            axes = figure.subplots()
            for entry, colour in zip(rounds, colours(len(rounds)), strict=True):
                if key in entry["bilevel"]:
                    pairs = zip(entry["bilevel"]["step"], entry["bilevel"][key], strict=True)
                    points = [(step, value) for step, value in pairs if value is not None]  # not all are of every step
                    label = f"round {entry['round']}"
                    axes.plot(*zip(*points, strict=True), linewidth=1, color=colour, label=label)
            axes.set_xlabel("outer steps")
            if len(rounds) > 1:
                axes.legend(fontsize=7)
            yield key, svg(figure, f"{key.replace('_', ' ')} against outer steps")


def colours(count: int) -> list[str]:
    return [_COLOURS[place % len(_COLOURS)] for place in range(count)]


def svg(figure: Figure, description: str) -> str:
    """The figure as an <svg> element that can stand inside HTML.

    :param description: what is to be seen, for those who hear the page.
    """
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1)
