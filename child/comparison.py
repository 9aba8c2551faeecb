"""What a search is worth: the found cell against what a user would take instead, with n and intervals."""

import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from math import comb
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import t

from loading import splits
from options import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = {
    "found": "found cell",
    "random": "random cell",
    "peer": "random cell with its multiply-adds",
    "plain": "plain CNN",
    "resnet": "small ResNet",
    "long": "plain CNN trained as long",
}

Rows = Mapping[str, Sequence[Mapping[str, Any]]]  # of each contender: acc, balanced_acc, params, flops, minutes, ...
Gap = dict[str, float | None]


_READ = ("acc", "balanced_acc", "params", "flops", "epochs", "minutes", "training", "latency_ms")


def read_rounds(
    path: Path, contenders: Sequence[str]
) -> tuple[dict[int, dict[str, dict[str, Any]]], set[tuple[str, int]], dict[str, Any]]:
    """The whole rounds of a comparison.json of another machine.

    Args:
        path: the file. contenders: whom a whole round has, but for those that could not be had.
    Returns:
        by seed the row of each contender; contender and seed of what could not be had; the recipes.
    Raises:
        UserError: it is no such file, or a figure in it is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        runs, recipes = content["runs"], content["recipes"]
        rows = {name: {int(row["seed"]): dict(row) for row in runs.get(name, [])} for name in contenders}
        lacking = {(str(name), int(seed)) for name, seed in content["left_out"]}
        lacking -= {(name, seed) for name, its in rows.items() for seed in its}
        numbers = [float(row[figure]) for its in rows.values() for row in its.values() for figure in _READ]
        good = all(math.isfinite(number) and number >= 0 for number in numbers)
        good = good and all(row["training"] > 0 and row["params"] > 0 for its in rows.values() for row in its.values())
        good = good and all({"free", "valid_acc"} <= row["search"].keys() for row in rows["found"].values())
        good = good and all(isinstance(recipes[kind], dict) for kind in ("search", "training")) and "split" in recipes
        good = good and all(isinstance(row["machine"], str) for its in rows.values() for row in its.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        good = False
    if not good:
        raise UserError(
            f"--others {path} is no comparison.json, or of an earlier version: compare.py writes it anew there"
        )
    seeds = [seed for seed in rows["found"] if all(seed in rows[c] or (c, seed) in lacking for c in contenders)]
    return {seed: {c: rows[c][seed] for c in contenders if seed in rows[c]} for seed in seeds}, lacking, recipes


def difference(first: Sequence[float], second: Sequence[float]) -> Gap:
    """mean(first) - mean(second), its 95 % interval over runs and p by Welch's t test, for which a few runs do.

    t = difference / s, s^2 = sum of var_i / n_i, with s^4 / sum of (var_i / n_i)^2 / (n_i - 1) degrees of freedom.
    Interval and p are None where a side has one run, or the runs of each side agree.
    """
    gap: Gap = {"difference": statistics.mean(first) - statistics.mean(second), "low": None, "high": None, "p": None}
    if min(len(first), len(second)) < 2 or len({*first}) == len({*second}) == 1:
        return gap
    parts = [(statistics.variance(side) / len(side), len(side) - 1) for side in (first, second)]
    error, points = sum(part for part, _ in parts) ** 0.5, statistics.mean(first) - statistics.mean(second)
    freedom = error**4 / sum(part**2 / n for part, n in parts)
    half = float(t.ppf(0.975, freedom)) * error
    return gap | {"low": points - half, "high": points + half, "p": float(2 * t.sf(abs(points) / error, freedom))}


def compare(rows: Rows) -> dict[str, Gap]:
    """The difference of the found cells' test accuracies to each other contender's."""
    found = [row["acc"] for row in rows["found"]]
    others = {name: [row["acc"] for row in its] for name, its in rows.items() if name != "found" and its}
    return {name: difference(found, accuracies) for name, accuracies in others.items()}


_ENOUGH = 10  # runs of each side for an interval by bootstrap


def best_of(valid: Sequence[float], acc: Sequence[float], k: int) -> float:
    """The test accuracy to expect of the best of k cells: drawn without replacement, the best on validation images.

    The i-th best of n is the best of k in C(n - 1 - i, k - 1) of C(n, k) draws. Ties are broken by order.
    """
    n = len(acc)
    ranked = [acc[i] for i in sorted(range(n), key=lambda i: -valid[i])]
    return sum(value * comb(n - 1 - place, k - 1) for place, value in enumerate(ranked)) / comb(n, k)


def against_best_of(rows: Rows, draws: int = 4000) -> dict[str, Any] | None:
    """The found cells against the best of as many random ones as are trained in the time of a search and its training.

    That number is `in_time`, and `k` is that or all there are; the interval is that of a bootstrap over both, if they
    are many. None where a random cell has no validation accuracy or its training takes longer.
    """
    found, random = rows.get("found", []), rows.get("random", [])
    if len(found) < 2 or len(random) < 2 or any(row.get("valid_acc") is None for row in random):
        return None
    in_time = int(statistics.median(r["minutes"] for r in found) / statistics.median(r["minutes"] for r in random))
    k = min(in_time, len(random))
    if k < 2:
        return None
    rng = np.random.default_rng(0)

    def gap(first: Sequence[int], second: Sequence[int]) -> float:
        chosen = [random[i] for i in second]
        best = best_of([row["valid_acc"] for row in chosen], [row["acc"] for row in chosen], k)
        return statistics.mean(found[i]["acc"] for i in first) - best

    sizes = len(found), len(random)
    result = {
        "k": k,
        "in_time": in_time,
        "difference": gap(range(sizes[0]), range(sizes[1])),
        "low": None,
        "high": None,
    }
    if min(sizes) < _ENOUGH or k > len(random) / 4:
        return result  # a bootstrap over few runs is far too sure
    samples = [gap(*(rng.integers(0, size, size).tolist() for size in sizes)) for _ in range(draws)]
    low, high = np.quantile(samples, [0.025, 0.975]).tolist()
    return result | {"low": low, "high": high}


def _shown(points: float, low: float, high: float) -> str:
    """The interval of a gain or a loss, for people."""
    ends = (low, high) if points >= 0 else (-high, -low)
    return f"{ends[0]:.1f} to {ends[1]:.1f}" + ("" if ends[0] > 0 else ", so nothing is shown")


def over_groups(
    found: Sequence[Path], others: Sequence[Path], pattern: str, draws: int = 2000
) -> dict[str, dict[str, float]]:
    """Differences of accuracy and balanced accuracy, their intervals those of a bootstrap over groups and over runs.

    Images of one scene are right or wrong together, so that the images themselves are no sample of scenes to come.

    Args:
        found, others: guesses.csv of the runs, all of the same images.
        pattern: the --group_pattern; images without a match are groups of their own.
        draws: of the bootstrap.
    """
    tables = [[read_guesses(path) for path in side] for side in (found, others)]
    first = tables[0][0]
    classes = {name: place for place, name in enumerate(sorted({row["class"] for row in first}))}
    groups: dict[str, int] = {}
    places = []
    group = splits.group_of([row["image"] for row in first], pattern)
    for row in first:
        places.append((groups.setdefault(group(row["image"]), len(groups)), classes[row["class"]]))
    index = tuple(np.array(places).T)
    total = np.zeros((len(groups), len(classes)))
    np.add.at(total, index, 1)
    right = [np.zeros((len(side), *total.shape)) for side in tables]  # (runs, groups, classes)
    for counts, side in zip(right, tables, strict=True):
        for number, table in enumerate(side):
            np.add.at(counts[number], index, [row["class"] == row["guess"] for row in table])
    rng = np.random.default_rng(0)

    def gaps(weights: Any, runs: Sequence[Any]) -> list[float]:
        pairs = [
            (weights @ counts[chosen].mean(0), weights @ total) for counts, chosen in zip(right, runs, strict=True)
        ]
        plain = [100 * hits.sum() / all_.sum() for hits, all_ in pairs]
        balanced = [100 * (hits[all_ > 0] / all_[all_ > 0]).mean() for hits, all_ in pairs]
        return [plain[0] - plain[1], balanced[0] - balanced[1]]

    every = [np.arange(len(side)) for side in tables]
    samples = []
    for _ in range(draws):
        weights = np.bincount(rng.integers(0, len(groups), len(groups)), minlength=len(groups)).astype(float)
        samples.append(gaps(weights, [rng.choice(side, len(side)) for side in every]))
    low, high = np.quantile(samples, [0.025, 0.975], axis=0)
    points = gaps(np.ones(len(groups)), every)
    return {
        name: {"difference": float(points[i]), "low": float(low[i]), "high": float(high[i]), "groups": len(groups)}
        for i, name in enumerate(("acc", "balanced_acc"))
    }


def verdict_over_groups(groups: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """What the found cells gained or lost on groups that nobody saw, for people."""
    parts = []
    for name, gaps in groups.items():
        acc, balanced = (f"{gap['difference']:+.1f} ({gap['low']:+.1f} to {gap['high']:+.1f})" for gap in gaps.values())
        parts.append(f"{acc} points of accuracy and {balanced} of balanced accuracy against a {NAMES[name]}")
    count = next(iter(next(iter(groups.values())).values()))["groups"]
    return f"Over the {count} groups of the test images (intervals over groups and runs): {'; '.join(parts)}."


def read_guesses(path: Path) -> list[dict[str, str]]:
    """The rows of a guesses.csv, none where there is no such file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def verdict(rows: Rows, gaps: Mapping[str, Gap], best: Mapping[str, Any] | None = None) -> str:
    """One sentence for people: what the search gained or lost against each contender, or that nothing is shown.

    Args:
        rows: of each contender. gaps: of compare. best: of against_best_of.
    """
    parts = []
    for name, gap in gaps.items():
        points, low, high = gap["difference"], gap["low"], gap["high"]
        assert points is not None
        verb = "gained" if points >= 0 else "lost"
        if low is None or high is None:
            few = min(len(rows["found"]), len(rows[name])) < 2
            shown = "one run shows nothing" if few else "the runs of each agree"
        else:
            shown = _shown(points, low, high)
        own, other = (statistics.mean(row["params"] for row in rows[which]) for which in ("found", name))
        size = 100 * (other / own - 1)
        more = f" with {abs(size):.0f} % {'more' if size > 0 else 'fewer'} parameters" if abs(size) > 2 else ""
        parts.append(f"{verb} {abs(points):.1f} points ({shown}) against a {NAMES[name]}{more}")
    if best is not None:
        points = best["difference"]
        few = best["low"] is None
        words = f"({'too few runs for an interval' if few else _shown(points, best['low'], best['high'])})"
        time = "in the same time" if best["k"] == best["in_time"] else f"where {best['in_time']} take the same time"
        parts.append(
            f"{'gained' if points >= 0 else 'lost'} {abs(points):.1f} points {words} against the best of {best['k']} "
            f"random cells, trained {time} and chosen on validation images"
        )
    return f"The search {'; '.join(parts)}."


def table(rows: Rows) -> str:
    """A Markdown table of all contenders."""
    head = "contender | n | test accuracy, mean | sd | balanced | parameters | Mflops | ms an image | minutes"
    lines = [f"| {head} |", "|" + " --- |" * (head.count("|") + 1)]
    for name, its in rows.items():
        if its:
            shown = ("acc", "balanced_acc", "params", "flops", "latency_ms", "minutes")
            mean = {key: statistics.mean(row[key] for row in its) for key in shown}
            sd = f"{statistics.stdev(row['acc'] for row in its):.2f}" if len(its) > 1 else "-"
            cells = [NAMES[name], str(len(its)), f"{mean['acc']:.2f} %", sd, f"{mean['balanced_acc']:.2f} %"]
            cells += [f"{mean['params']:,.0f}", f"{mean['flops'] / 1e6:.2f}", f"{mean['latency_ms']:.2f}"]
            lines.append("| " + " | ".join([*cells, f"{mean['minutes']:.1f}"]) + " |")
    return "\n".join(lines)


def dots(axes: "Axes", groups: Mapping[str, Sequence[float]], label: str, colours: Sequence[str]) -> None:
    """The values of each group as points, and their mean as a line."""
    for place, values in enumerate(groups.values()):
        spread = np.linspace(-0.15, 0.15, len(values)) if len(values) > 1 else np.zeros(1)
        colour = colours[place % len(colours)]
        axes.scatter(place + spread, values, s=12, color=colour, zorder=3)
        axes.hlines(statistics.mean(values), place - 0.3, place + 0.3, color=colour)
    axes.set_xticks(range(len(groups)), [f"{fill(name, 14)}\nn = {len(its)}" for name, its in groups.items()])
    axes.set_ylabel(label)
    axes.grid(axis="y", alpha=0.3, linewidth=0.5)


def draw(rows: Rows, path: Path) -> None:
    """Every run's test accuracy, and the mean of each contender, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    groups = {NAMES[name]: [row["acc"] for row in its] for name, its in rows.items() if its}
    dots(figure.add_subplot(), groups, "test accuracy, %", [f"C{number}" for number in range(10)])
    figure.savefig(path, dpi=150)
