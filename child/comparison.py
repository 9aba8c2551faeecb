"""What a search is worth: the found cell against what a user would take instead, with n and intervals."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import bootstrap, permutation_test

NAMES = {"found": "found cell", "random": "random cell", "plain": "plain CNN", "resnet": "small ResNet"}
_RESAMPLES = 9999

Rows = Mapping[str, Sequence[Mapping[str, Any]]]  # of each contender: acc, balanced_acc, params, flops, minutes, ...


def difference(first: Sequence[float], second: Sequence[float]) -> dict[str, float | None]:
    """mean(first) - mean(second), its 95 % bootstrap interval over runs, and the p of a permutation test.

    Interval and p are None where a side has one run, or all runs agree.
    """
    gap: dict[str, float | None] = {"difference": statistics.mean(first) - statistics.mean(second)}
    gap |= {"low": None, "high": None, "p": None}
    if min(len(first), len(second)) < 2 or len({*first}) + len({*second}) == 2:
        return gap

    def means(a: Any, b: Any, axis: int = -1) -> Any:
        return np.mean(a, axis=axis) - np.mean(b, axis=axis)

    both, random = (np.asarray(first), np.asarray(second)), np.random.default_rng(0)
    found = bootstrap(both, means, n_resamples=_RESAMPLES, method="percentile", vectorized=True, rng=random)
    tested = permutation_test(both, means, n_resamples=_RESAMPLES, vectorized=True, rng=random)
    interval = found.confidence_interval
    return gap | {"low": float(interval.low), "high": float(interval.high), "p": float(tested.pvalue)}


def compare(rows: Rows) -> dict[str, dict[str, float | None]]:
    """The difference of the found cells' test accuracies to each other contender's."""
    found = [row["acc"] for row in rows["found"]]
    others = {name: [row["acc"] for row in its] for name, its in rows.items() if name != "found" and its}
    return {name: difference(found, accuracies) for name, accuracies in others.items()}


def verdict(gaps: Mapping[str, Mapping[str, float | None]]) -> str:
    """One sentence for people: what the search gained over each contender, or that nothing is shown."""
    parts = []
    for name, gap in gaps.items():
        points, low, high = gap["difference"], gap["low"], gap["high"]
        assert points is not None
        if low is None or high is None:
            shown = "one run of each shows nothing"
        else:
            sure = low > 0 or high < 0
            shown = f"{low:.1f} to {high:.1f}" + ("" if sure else ", so nothing is shown")
        verb = "gained" if points >= 0 else "lost"
        parts.append(f"{verb} {abs(points):.1f} points ({shown}) against a {NAMES[name]}")
    return f"At the same parameters the search {'; '.join(parts)}."


def table(rows: Rows) -> str:
    """A Markdown table of all contenders."""
    head = "contender | n | test accuracy, mean | sd | balanced | parameters | Mflops | ms an image | minutes"
    lines = [f"| {head} |", "|" + " --- |" * (head.count("|") + 1)]
    for name, its in rows.items():
        if its:
            mean = {key: statistics.mean(row[key] for row in its) for key in its[0]}
            sd = f"{statistics.stdev(row['acc'] for row in its):.2f}" if len(its) > 1 else "-"
            cells = [NAMES[name], str(len(its)), f"{mean['acc']:.2f} %", sd, f"{mean['balanced_acc']:.2f} %"]
            cells += [f"{mean['params']:,.0f}", f"{mean['flops'] / 1e6:.2f}", f"{mean['latency_ms']:.2f}"]
            lines.append("| " + " | ".join([*cells, f"{mean['minutes']:.1f}"]) + " |")
    return "\n".join(lines)


def draw(rows: Rows, path: Path) -> None:
    """Every run's test accuracy, and the mean of each contender, as a picture; raises ImportError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    shown = [name for name, its in rows.items() if its]
    for place, name in enumerate(shown):
        values = [row["acc"] for row in rows[name]]
        offsets = np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else [0.0]
        axes.scatter(np.asarray(offsets) + place, values, color=f"C{place}", zorder=3)
        axes.hlines(statistics.mean(values), place - 0.25, place + 0.25, color=f"C{place}", linewidth=2)
    axes.set_xticks(range(len(shown)), [f"{NAMES[name]}\nn = {len(rows[name])}" for name in shown])
    axes.set_ylabel("test accuracy, %")
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=150)
