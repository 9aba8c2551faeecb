"""A report: one page of a search, or of several side by side, that needs no other file."""

import base64
import io
import random
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape
from PIL import Image

import options
import sampling
import utils
import visualize
from child import comparison
from genotypes import SPACES, edge_list, find_op, num_nodes
from loading import pixels
from loading.sets import DataInfo
from options.constraint_option import ConstraintOptions
from options.default_option import TrainOptions
from report import charts, runs
from report.runs import Search, Trained
from resources import cost
from search import doubts

_OWN = {"name", "experiments_dir", "visualizations_dir", "resume", "overwrite"}  # options that tell nothing of a search
_SAMPLES = 12  # images that are shown of the right guesses, and of the wrong ones


def write(searches: Sequence[Search], wanted: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write FOLDER/report.html and its charts as files of their own.

    Args:
        searches: one, or several to compare.
        wanted: of the deployed child, see runs.deployed.
        folder: made if missing.
    Returns:
        The files written, the page first.
    """
    files: dict[str, str] = {}
    several = len(searches) > 1
    figures = {"curves": charts.curves({search.name: search.rows or [dict(search.row)] for search in searches})}
    parts = [_of_search(number, search, wanted, figures, several) for number, search in enumerate(searches)]
    if several:
        figures["cost"] = _against_cost(searches, parts)
    page = _page(parts, {name: charts.for_page(svg, name, name) for name, svg in figures.items()})
    for name, svg in figures.items():
        files[f"report_{name}.svg"] = charts.for_file(svg)
    for name, text in {"report.html": page, **files}.items():
        with utils.replacing(folder / name) as new:
            new.write_text(text, encoding="utf-8", errors="replace")
    return [folder / "report.html", *(folder / name for name in files)]


def _page(parts: Sequence[Mapping[str, Any]], figures: Mapping[str, str]) -> str:
    loader = PackageLoader("report", "template")
    environment = Environment(
        loader=loader, autoescape=select_autoescape(default=True), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    title = " and ".join(part["name"] for part in parts)
    template = environment.get_template("page.html")
    return template.render(title=title, searches=parts, figures=figures, several=len(parts) > 1)


def _of_search(
    number: int, search: Search, wanted: Mapping[str, Any], figures: dict[str, str], several: bool
) -> dict[str, Any]:
    """What the page says of a search; its charts go into `figures`, but for several searches."""
    history, prefix = search.history(), f"s{number}"
    trained, compared = runs.trained_of(search), runs.comparison_of(search)
    stacked = [torch.stack([pair[k] for pair in history.values()]).softmax(-1) for k in (0, 1)]  # (T, E, O)
    if not several:
        for kind, p in zip(("normal", "reduce"), stacked, strict=True):
            figures[f"probabilities_{kind}"] = charts.probabilities(
                kind, [*history], p.numpy(), SPACES[search.opt.space]
            )
        if trained:
            figures["confusion"] = charts.confusion(trained[0].test["confusion"], [*trained[0].test["per_class_acc"]])
        if compared:
            figures["comparison"] = charts.points(compared["accuracies"], "test accuracy, %")
    # what is expected and budgeted is of the deployment that was searched for
    priced = any(name.startswith("cost_") for name in search.row) and not any(wanted.values())
    deployed = cost.Deployed.planned(search.info, runs.deployed(search, wanted))
    costs = deployed.price(search.genotype)
    margins = [sampling.margin(alpha).item() for alpha in search.alphas]
    return {
        "name": search.name,
        "prefix": prefix,
        "facts": _facts(search, costs),
        "options": _unusual(search),
        "doubts": doubts(search.genotype, search.opt.layers, search.chosen, *margins),
        "chosen": search.chosen,
        "cells": _cells(search, prefix),
        "slider": None if several else _slider(search, stacked, [*history], prefix),
        "costs": _costs(search, costs, priced),
        "priced": priced,
        "deployed": f"C = {deployed.init_channels}, {deployed.layers} cells, {_size(deployed.image_size)}",
        "params": costs["params"],
        "trained": [_of_training(one) for one in trained],
        "samples": _samples(search, trained[0]) if trained and not several else {},
        "classes": _classes(search, trained[0]) if trained else [],
        "comparison": _compared(compared),
        "commands": _commands(search, trained),
    }


def _facts(search: Search, costs: Mapping[str, int]) -> list[tuple[str, str]]:
    row, info, took = search.row, search.info, runs.minutes_of(search.folder)
    begun = options.heads(search.folder / "options.yaml")
    height, width = info.image_size
    sizes = ", ".join(f"{sum(counts):,} {name}" for name, counts in info.counts.items())
    valid = f"{row['valid_acc']:.2f} % of the validation images (balanced {row['valid_balanced_acc']:.2f} %)"
    child = f"{row['child_valid_acc']:.2f} % (balanced {row['child_valid_balanced_acc']:.2f} %), without retraining"
    left = " and ".join(f"{sampling.entropy(alpha).item():.2f}" for alpha in search.alphas)
    uniform = f"{sampling.entropy(search.alphas[0] * 0).item():.2f}"
    return [
        ("data", f"{search.opt.dataset}: {len(info.classes)} classes, {width}x{height}x{info.channels}; {sizes}"),
        ("epochs", f"{search.epoch} of {search.opt.epochs}, seed {search.opt.seed}"),
        ("supernet at a sampled Z", valid),
        ("its likeliest child", child),
        ("child", f"{costs['params']:,} parameters, {costs['flops'] / 1e6:,.2f} Mflops (multiply-adds) an image"),
        ("entropy", f"{left} nats of {uniform} (normal and reduction cell)"),
        ("time", f"{took:.1f} minutes" if took else "unknown"),
        ("begun on", begun[1] if len(begun) > 1 else "unknown"),
    ]


def _size(size: Sequence[int]) -> str:
    return f"{size[1]}x{size[0]}"


def _unusual(search: Search) -> list[tuple[str, Any, Any]]:
    """Options that differ from their defaults: name, value, default."""
    kind = ConstraintOptions if search.constrained else TrainOptions
    usual, given = options.to_dict(kind()), options.to_dict(search.opt)
    return [(name, given[name], value) for name, value in usual.items() if given[name] != value and name not in _OWN]


def _cells(search: Search, prefix: str) -> dict[str, Markup]:
    """The genotype's cells as SVG."""
    found = {}
    for place, (kind, nodes, concat) in enumerate(search.genotype.cells()):
        shown = visualize.op_probabilities(search.alphas[place], search.opt.space)
        graph, name = visualize.cell_graph(kind, nodes, concat, shown), charts.CELLS[kind]
        graph.attr(label="")
        content, reason = visualize.drawn(graph, "svg")
        found[name] = escape(reason) or charts.for_page(content.decode(), f"{prefix}-final-{kind}", name)
    return found


def _slider(search: Search, stacked: Sequence[torch.Tensor], epochs: Sequence[int], prefix: str) -> dict[str, Any]:
    """What the page's script moves: cells with all edges, and the probabilities of every epoch."""
    nodes = num_nodes(len(search.alphas[0]))
    pictures = {}
    for place, kind in enumerate(("normal", "reduce")):
        graph = visualize.every_edge(kind, search.opt.space, stacked[place][-1].tolist())
        content, reason = visualize.drawn(graph, "svg")
        pictures[charts.CELLS[kind]] = escape(reason) or charts.for_page(
            content.decode(), f"{prefix}-{kind}", f"the {charts.CELLS[kind]} of an epoch"
        )
    rows = {row["epoch"]: row for row in search.rows}
    words = []
    for epoch in epochs:
        row = rows.get(epoch, {})
        more = [
            f"{text} {row[name]:.2f} %"
            for name, text in (("valid_acc", "sampled Z"), ("child_valid_acc", "child"))
            if name in row
        ]
        words.append(
            ", ".join([f"epoch {epoch}", *more, *([f"T {row['temperature']:.2f}"] if "temperature" in row else [])])
        )
    ops = SPACES[search.opt.space]
    edges = [(node, source) for node, source in edge_list(nodes)]
    data = {
        "prefix": prefix,
        "ops": ops,
        "colours": [visualize.COLOURS.get(find_op(op).kind, "#333333") for op in ops],
        "boxes": [f"{node}-{source}" for node, source in edges],
        "edges": [f"{charts.state(source)} to {node}" for node, source in edges],
        "words": words,
        "p": {kind: _rounded(p) for kind, p in zip(("normal", "reduce"), stacked, strict=True)},
    }
    return {"pictures": pictures, "data": data, "last": len(epochs) - 1}


def _rounded(p: torch.Tensor) -> list[Any]:
    return [[[round(v, 3) for v in edge] for edge in epoch] for epoch in p.tolist()]


def _costs(search: Search, costs: Mapping[str, int], priced: bool) -> list[tuple[str, str, str, str, str]]:
    """measure, of this child, expected, budget, eta."""
    found = []
    for measure in ("params", "flops", "mac", "latency_ms"):
        own = f"{costs[measure]:,}" if measure in costs else "-"
        row = search.row
        if priced and f"cost_{measure}" in row:
            own = own if measure in costs else cost.show(row[f"child_{measure}"])
            budget = row.get(f"budget_{measure}")
            more = (
                cost.show(row[f"cost_{measure}"]),
                cost.show(budget) if budget else "-",
                f"{row[f'eta_{measure}']:.4f}",
            )
            found.append((measure, own, *more))
        elif measure in costs:
            found.append((measure, own, "-", "-", "-"))
    return found


def _of_training(trained: Trained) -> dict[str, Any]:
    test = trained.test
    return {
        "name": trained.folder.name,
        "acc": test["acc"],
        "balanced": test.get("balanced_acc"),
        "images": test.get("test_images"),
        "params": test["params"],
        "mflops": test["flops"] / 1e6,
        "epochs": trained.opt.get("epochs"),
        "seed": test.get("seed"),
        "minutes": trained.minutes,
    }


def _classes(search: Search, trained: Trained) -> list[tuple[str, int, float | None]]:
    """name, training images, test accuracy."""
    counts = dict(zip(search.info.classes, search.info.counts["train"], strict=True))
    return [(name, counts.get(name, 0), acc) for name, acc in trained.test["per_class_acc"].items()]


def _samples(search: Search, trained: Trained) -> dict[str, list[dict[str, str]]]:
    """Test images that the child guessed wrong, the surest first, and some that it guessed right."""
    root, rows = Path(str(trained.opt.get("dataset"))), []
    for row in comparison.read_guesses(trained.folder / "guesses.csv"):
        with suppress(KeyError, TypeError, ValueError):
            rows.append(_Guess(row["image"], row["class"], row["guess"], float(row["probability"])))
    wrong = sorted((row for row in rows if row.label != row.guess), key=lambda row: -row.share)
    right = [row for row in rows if row.label == row.guess]
    random.Random(0).shuffle(right)
    found: dict[str, list[dict[str, str]]] = {}
    for title, its in {"wrong, the surest first": wrong, "right, some of them": right}.items():
        shown = [one for row in its[:_SAMPLES] if (one := _sample(search.info, root, row))]
        found |= {title: shown} if shown else {}
    return found


class _Guess(NamedTuple):
    """A row of guesses.csv."""

    image: str
    label: str
    guess: str
    share: float


def _sample(info: DataInfo, root: Path, row: _Guess) -> dict[str, str] | None:
    """An image as the network saw it; nothing where it cannot be read or is not of the data set."""
    if Path(row.image).is_absolute() or ".." in Path(row.image).parts:  # a guesses.csv may say anything
        return None
    height, width = info.image_size
    try:
        mode = "L" if info.channels == 1 else "RGB"
        values = pixels.preprocess(root / row.image, mode, (width, height), info.white)[0]  # (C, H, W)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    file = io.BytesIO()
    Image.fromarray(values[0] if info.channels == 1 else values.transpose(1, 2, 0)).save(file, "PNG")
    data = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"data": data, "class": row.label, "guess": row.guess, "share": f"{100 * row.share:.0f} %"}


def _compared(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """The cells of the table of runs.comparison_of, and its sentence."""
    if not found:
        return None
    lines = found["table"].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]
    return {"head": cells[0], "rows": cells[1:], "verdict": found["verdict"]}


def _commands(search: Search, trained: Sequence[Trained]) -> list[str]:
    script = "main_constraint.py" if search.constrained else "main.py"
    config = search.folder / "options.yaml"
    base = search.folder.parent
    lies = [] if base == Path("experiments") else ["--experiments_dir", str(base)]
    again = ["python", script, "--config", str(config), "--name", f"{search.name}_again", "--resume", "False"]
    child = ["python", "retrain.py", "--genotype", search.name, "--dataset", search.opt.dataset]
    for one in trained[:1]:
        child = [
            "python",
            "retrain.py",
            "--config",
            str(one.folder / "options.yaml"),
            "--name",
            f"{one.folder.name}_again",
        ]
        child += ["--resume", "False"]
    export = [["python", "export_model.py", "--checkpoint", one.folder.name] for one in trained[:1]]
    return [shlex.join(command) for command in (again, [*child, *lies], *([*one, *lies] for one in export))]


def _against_cost(searches: Sequence[Search], parts: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy of the children against their parameters: tested where every one is, else on validation images."""
    tested = all(part["trained"] for part in parts)
    if tested:
        places = [(part["name"], part["trained"][0]["params"], part["trained"][0]["acc"]) for part in parts]
    else:
        places = [(s.name, part["params"], s.row["child_valid_acc"]) for s, part in zip(searches, parts, strict=True)]
    label = "test accuracy, %" if tested else "child on validation images, %"
    return charts.against_cost(places, label, "parameters of the child")
