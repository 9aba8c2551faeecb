"""Charts of a report as SVG: for the page, whose colours they take, and as files for papers."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup, escape

from child import comparison
from genotypes import edge_list, num_nodes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010101"  # stands for the colour of text, on the page that of its theme
# Okabe and Ito's colours, which the colour-blind tell apart, and what stands for them until the page or file is made
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKS = tuple(f"#01020{number}" for number in range(len(COLOURS)))
CELLS = {"normal": "normal cell", "reduce": "reduction cell"}
_LINES = ("-", "--", ":", "-.")
_PANELS: dict[str, dict[str, str]] = {  # title, columns of metrics.jsonl with their names
    "loss, nats": {"train_loss": "training", "valid_loss": "sampled Z", "child_valid_loss": "child"},
    "accuracy, %": {"train_acc": "training", "valid_acc": "sampled Z", "child_valid_acc": "child"},
    "entropy of the cells, nats": {"entropy_normal": "normal", "entropy_reduce": "reduction"},
    "temperature": {"temperature": ""},
    "pools and skips of the child, %": {"child_free_share": ""},
}

Rows = Sequence[Mapping[str, Any]]


@contextmanager
def _figure(width: float, height: float) -> Iterator["Figure"]:
    """An empty figure in inches; its letters are 8 points where they can be."""
    import matplotlib
    from matplotlib.figure import Figure

    sizes = {"font.size": 8, "axes.titlesize": 8, "legend.fontsize": 7, "lines.linewidth": 1.3, "axes.linewidth": 0.6}
    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    words = {"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "snas", "axes.facecolor": "none"}
    style: Any = {**sizes, **dict.fromkeys(inks, INK), **words, "legend.frameon": False}
    with matplotlib.rc_context(style):
        yield Figure(figsize=(width, height), layout="constrained", facecolor="none")


def _svg(figure: "Figure") -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def name_of(text: str) -> str:
    """A name as matplotlib and XML take it: no formula, nothing that does not print, no leading underscore."""
    plain = "".join(letter if letter.isprintable() else "\ufffd" for letter in text.encode("utf-8", "replace").decode())
    return plain.replace("$", r"\$") if not plain.startswith("_") else "\u200b" + plain.replace("$", r"\$")


def for_page(svg: str, prefix: str, words: str) -> Markup:
    """An SVG file as an element of a page: names of its own, the page's colours, words for those who cannot see it."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    for number, mark in enumerate(_MARKS):
        svg = svg.replace(mark, f"var(--c{number})")
    svg = re.sub(r'\b(id="|xlink:href="#|url\(#)', lambda match: f"{match[1]}{prefix}-", svg)
    head, rest = svg.split(">", 1)
    head = re.sub(r'\s(?:width|height)="[^"]*"', "", head)
    return Markup(f'{head} role="img" aria-label="{escape(words)}">{rest}')


def for_file(svg: str) -> str:
    """An SVG file with colours for paper."""
    for mark, colour in zip(_MARKS, COLOURS, strict=True):
        svg = svg.replace(mark, colour)
    return svg.replace(INK, "#000000")


def curves(runs: Mapping[str, Rows]) -> str:
    """Columns of metrics.jsonl over the epochs; of several runs each has a colour, of one each column."""
    panels = _PANELS | _budgets(runs)
    panels = {
        title: names
        for title, names in panels.items()
        if any(row.get(n) is not None for n in names for its in runs.values() for row in its)
    }
    across = 3
    from matplotlib.ticker import MaxNLocator

    with _figure(7.1, 1.9 * -(-len(panels) // across) + (0.8 if len(runs) > 1 else 0)) as figure:
        for place, (title, names) in enumerate(panels.items()):
            axes = figure.add_subplot(-(-len(panels) // across), across, place + 1)
            _lines(axes, runs, names)
            axes.set_title(title)
            axes.grid(alpha=0.2, linewidth=0.5)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(runs) > 1:
            handles, labels = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper left")
        return _svg(figure)


def _budgets(runs: Mapping[str, Rows]) -> dict[str, dict[str, str]]:
    """A panel for each measure of a constrained search."""
    columns = {name for rows in runs.values() for row in rows for name in row}
    measures = sorted(name.removeprefix("cost_") for name in columns if name.startswith("cost_"))
    return {
        f"{measure} of the child": {
            f"child_{measure}": "child",
            f"cost_{measure}": "expected",
            f"budget_{measure}": "budget",
        }
        for measure in measures
    }


def _lines(axes: "Axes", runs: Mapping[str, Rows], names: Mapping[str, str]) -> None:
    several = len(runs) > 1
    for number, (run, rows) in enumerate(runs.items()):
        for place, (name, words) in enumerate(names.items()):
            points = [(row["epoch"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
            if points:
                colour = _MARKS[(number if several else place) % len(_MARKS)]
                label = (name_of(run) if place == 0 else None) if several else words or None
                style = _LINES[place % len(_LINES)]
                axes.plot(
                    *zip(*points, strict=True), style, color=colour, label=label, marker="" if points[1:] else "o"
                )
    if axes.get_legend_handles_labels()[0] and not several:
        axes.legend()
    styles = ("solid", "dashed", "dotted", "dash-dotted")
    shown = "\n".join(f"{styles[place % 4]}: {words}" for place, words in enumerate(names.values()))
    axes.set_xlabel(f"epoch\n{shown}" if several and len(names) > 1 else "epoch")


def probabilities(kind: str, epochs: Sequence[int], p: Any, ops: Sequence[str]) -> str:
    """p(op | edge) over the epochs: a panel for each edge.

    Args:
        kind: normal or reduce. epochs: T of them. p: (T, E, O). ops: names of the O operations.
    """
    edges = edge_list(num_nodes(p.shape[1]))
    across = 5
    down = -(-len(edges) // across)
    with _figure(7.1, 0.5 + 1.15 * down) as figure:
        for place, (node, source) in enumerate(edges):
            axes = figure.add_subplot(down, across, place + 1)
            drawn = axes.imshow(p[:, place].T, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            axes.set_title(f"{state(source)} to {node}", fontsize=7)
            axes.set_yticks(range(len(ops)), ops if place % across == 0 else [""] * len(ops), fontsize=5)
            last = len(epochs) - 1
            axes.set_xticks([0, last] if last else [0], [str(epochs[0]), str(epochs[-1])][: 1 + bool(last)], fontsize=6)
            axes.tick_params(length=0)
        bar = figure.colorbar(drawn, ax=figure.axes, shrink=0.6, pad=0.01)
        bar.set_label("p(op | edge)")
        figure.suptitle(f"{CELLS[kind]}, first to last epoch", fontsize=8)
        return _svg(figure)


def state(number: int) -> str:
    """The name of a state of a cell."""
    return ("c_{k-2}", "c_{k-1}")[number] if number < 2 else str(number - 2)


def confusion(table: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """Shares of each true class (rows) by guess."""
    counts = np.array(table, dtype=float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = min(7.1, 2 + 0.32 * len(classes))
    with _figure(size, size * 0.9) as figure:
        axes = figure.add_subplot()
        axes.imshow(shares, cmap="cividis", vmin=0, vmax=1)
        names = [name_of(name if len(name) < 16 else f"{name[:14]}..") for name in classes]
        if len(classes) <= 40:
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
            axes.set_yticks(range(len(names)), names, fontsize=6)
        for row, its in enumerate(table) if len(classes) <= 15 else ():
            for column, count in enumerate(its):
                if count:
                    colour = "#000000" if shares[row, column] > 0.5 else "#ffffff"
                    axes.text(column, row, str(count), ha="center", va="center", fontsize=6, color=colour)
        axes.set_xlabel("guess")
        axes.set_ylabel("class")
        return _svg(figure)


def points(groups: Mapping[str, Sequence[float]], label: str) -> str:
    """Values of each group as points, and their mean as a line."""
    with _figure(6, 2.6) as figure:
        comparison.dots(figure.add_subplot(), groups, label, _MARKS)
        return _svg(figure)


def against_cost(places: Sequence[tuple[str, float, float]], label: str, measure: str) -> str:
    """Accuracy against cost: (name, cost, accuracy) of each run."""
    with _figure(4.2, 2.6) as figure:
        axes = figure.add_subplot()
        for number, (name, cost, accuracy) in enumerate(places):
            axes.scatter([cost], [accuracy], s=24, color=_MARKS[number % len(_MARKS)], label=name_of(name))
        axes.set_xlabel(measure)
        axes.set_ylabel(label)
        axes.margins(0.2)
        axes.grid(alpha=0.2, linewidth=0.5)
        axes.legend()
        return _svg(figure)
