"""Is a search worth it? The study of docs/evidence.md on Fashion-MNIST, a stage at a time, each of which goes on.

    python -m benchmarks.evidence --stage prepare --source /usr/share/datasets/fashion-mnist
    python -m benchmarks.evidence --stage recipe
    python -m benchmarks.evidence --stage remedies
    python -m benchmarks.evidence --stage compare --part 1/2 & python -m benchmarks.evidence --stage compare --part 2/2
    python -m benchmarks.evidence --stage gap
    python -m benchmarks.evidence --stage ranking

What is chosen (recipe, remedies) is chosen on images that the comparison does not use: its 5,000 images are drawn from
the first 25,000 training images, and its test images are the data set's own 10,000; what is tuned has 5,000 of the next
25,000, and 10,000 of the rest to be judged on. Of each 5,000, 4,000 are trained on and 1,000 validate, for all alike.

The comparison, fixed before its first run: N = 20 searches, seeds 0 to 19; of each the found cell, a random cell with
its parameters (5 %), one with its multiply-adds (10 %) too, a plain CNN and a ResNet with its parameters; one recipe,
one training each. The unit is the search. Primary: found less random, Welch's interval; further: permutation p, the
percentile of the median found cell among the random ones, the best of k random cells in equal time.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau, percentileofscore, permutation_test

import compare
import options
from benchmarks import record, study
from benchmarks.study import SEARCH, TRAIN, EvidenceOptions
from child import comparison
from genotypes import Genotype
from options import UserError
from options.default_option import TrainOptions
from training import selection
from utils import read_metrics

# What the recipe is varied by, one thing at a time
RECIPE: dict[str, list[str]] = {
    "as it is": [],
    "without averaging over mirror images": ["--tta=False"],
    "without label smoothing": ["--label_smoothing=0"],
    "weight decay 1e-3": ["--weight_decay=1e-3"],
    "cutout of 8 pixels": ["--cutout=True", "--cutout_length=8"],
    "drop path 0.1": ["--drop_path_prob=0.1"],
    "moving average of the weights, 0.99": ["--ema_decay=0.99"],
    "40 epochs": ["--epochs=40"],
}
# Searches
REMEDIES: dict[str, list[str]] = {
    "as it is": [],
    "the likeliest child": ["--select=0"],
    "alpha frozen: random search with shared weights": ["--warmup_epochs=19"],
    "straight-through": ["--sampler=straight_through"],
    "truncated, 12 epochs": ["--sampler=truncated", "--epochs=12", "--warmup_epochs=3"],
    "SNAS as published: concrete, 12 epochs, the likeliest child": [
        *("--sampler=concrete", "--epochs=12", "--warmup_epochs=0", "--select=0"),
    ],
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """A stage; returns what its JSON file holds once it is complete."""
    opt = record.parse(EvidenceOptions, argv, "evidence", __doc__)
    stages: dict[str, Callable[[EvidenceOptions], dict[str, Any] | None]]
    stages = {"prepare": study.prepare, "recipe": _recipe, "remedies": _remedies, "compare": _compare}
    result = (stages | {"gap": _gap, "ranking": _ranking})[opt.stage](opt)
    if result is None and opt.stage != "prepare":
        print("note: runs are missing; the same command goes on, the parts of other processes are theirs")
    return result


def _recipe(opt: EvidenceOptions) -> dict[str, Any] | None:
    """Each variant of the recipe on the same random cells, and on a plain CNN."""
    size = f"--match_params={opt.params}"
    of: dict[str, Callable[[int], list[str]]]
    of = {"cells": lambda seed: [f"--genotype=random:{seed}", size], "plain": lambda _: ["--network=plain", size]}
    names = {(name, kind): f"recipe_{study.slug(name)}_{kind}" for name in RECIPE for kind in of}
    rounds = [
        [study.train(opt, "tuning", label, seed, [*of[kind](seed), *RECIPE[name]])]
        for (name, kind), label in names.items()
        for seed in range(opt.tries)
    ]
    if not study.work(opt, rounds):
        return None
    runs = {
        f"{name}, {kind}": [study.result(opt, label, s) for s in range(opt.tries)]
        for (name, kind), label in names.items()
    }
    rows = []
    for name, kind in names:
        own, base = ([run["acc"] for run in runs[f"{which}, {kind}"]] for which in (name, "as it is"))
        changes = [a - b for a, b in zip(own, base, strict=True)]
        minutes = statistics.mean(run["minutes"] for run in runs[f"{name}, {kind}"])
        gain = f"{statistics.mean(changes):+.2f} ({min(changes):+.2f} to {max(changes):+.2f})"
        rows.append([kind, name, len(own), f"{statistics.mean(own):.2f} %", gain, f"{minutes:.1f}"])
    head = ["network", "recipe", "n", "accuracy, mean", "change, same network and seed (lowest to highest)", "minutes"]
    return record.publish("evidence", opt, {"runs": runs}, record.table(head, rows), "recipe", "evidence")


def _compared(opt: EvidenceOptions, split: str, name: str, n: int, more: Sequence[str]) -> dict[str, Any] | None:
    """The result of compare.py with the presets of the study, once it is complete."""
    data = f"--data_dir={opt.data_dir}"
    argv = ["--dataset=fashion_mnist", f"--name=evidence_{name}", f"--n={n}", f"--split={study.split_file(opt, split)}"]
    argv += [f"--search_config={SEARCH}", f"--retrain_config={TRAIN}", f"--part={opt.part}"]
    argv += [f"--retrain_options={json.dumps([data, *opt.retrain_options])}"]
    argv += [f"--experiments_dir={opt.experiments_dir}", f"--visualizations_dir={opt.visualizations_dir}"]
    argv += [f"--minutes={opt.minutes}"] if opt.minutes else []
    try:
        result = compare.main([*argv, *more])
    except compare.Unfinished:
        return None
    names, runs, left_out = result["setting"]["contenders"], result["runs"], result["left_out"]
    whole = sum(len(runs.get(name, [])) for name in names) + len(left_out) == n * len(names)
    return result if whole else None


def _remedies(opt: EvidenceOptions) -> dict[str, Any] | None:
    """Searches of every kind; their cells against random ones of the same size, each and all together."""
    runs: dict[str, Any] = {}
    for name, remedy in REMEDIES.items():
        of_search = [f"--data_dir={opt.data_dir}", *opt.search_options, *remedy]
        more = ["--contenders=[found,random]", f"--search_options={json.dumps(of_search)}"]
        result = _compared(opt, "tuning", f"remedy_{study.slug(name)}", opt.tries, more)
        if result is not None:
            searches = [study.searched(opt, f"remedy_{study.slug(name)}_search_{seed}") for seed in range(opt.tries)]
            runs[name] = {"options": remedy, **result["runs"], "searches": searches}
    if len(runs) < len(REMEDIES):
        return None
    cells = [run for its in runs.values() for run in its["random"]]
    rows: list[list[Any]] = [["random", len(cells), *_spread(cells), "", "", "", ""]]
    for name, its in runs.items():
        gap = comparison.difference([run["acc"] for run in its["found"]], [run["acc"] for run in cells])
        minutes, free = (statistics.mean(run[key] for run in its["searches"]) for key in ("minutes", "free"))
        own = statistics.mean(a["acc"] - b["acc"] for a, b in zip(its["found"], its["random"], strict=True))
        interval = "one run" if gap["low"] is None else f"{gap['low']:+.2f} to {gap['high']:+.2f}"
        words = f"{gap['difference']:+.2f} ({interval})"
        rows.append([name, opt.tries, *_spread(its["found"]), words, f"{own:+.2f}", f"{free:.0f} %", f"{minutes:.1f}"])
    head = ["search", "n", "accuracy, mean", "sd", "parameters", "against all random cells (95 %)"]
    head += ["against those of its sizes", "free", "minutes of search"]
    return record.publish("evidence", opt, {"runs": runs}, record.table(head, rows), "remedies", "evidence")


def _spread(runs: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    """Mean and deviation of the accuracies, mean of the parameters."""
    accuracies = [run["acc"] for run in runs]
    sd = f"{statistics.stdev(accuracies):.2f}" if len(runs) > 1 else "-"
    return f"{statistics.mean(accuracies):.2f} %", sd, f"{statistics.mean(run['params'] for run in runs):,.0f}"


def _compare(opt: EvidenceOptions) -> dict[str, Any] | None:
    """The comparison of compare.py, and the rest of the analysis."""
    of_search = json.dumps([f"--data_dir={opt.data_dir}", *opt.search_options])
    contenders = "--contenders=[found,random,peer,plain,resnet]"
    result = _compared(opt, "study", "compare", opt.n, [contenders, f"--search_options={of_search}"])
    if result is None:
        return None
    runs = result["runs"]
    found, cells = ([row["acc"] for row in runs[name]] for name in ("found", "random"))
    tested = permutation_test(
        (found, cells), lambda a, b: np.mean(a) - np.mean(b), n_resamples=20_000, rng=np.random.default_rng(0)
    )
    analysis = {
        "permutation_p": float(tested.pvalue),
        "percentile_of_median": float(percentileofscore(cells, statistics.median(found))),
        "relative_improvement": 100 * (statistics.mean(found) / statistics.mean(cells) - 1),
    }
    names = [f"compare_search_{seed}" for seed in range(opt.n)]
    searches = [study.searched(opt, name) for name in names]
    gaps = [run["child_valid_acc"] - run["valid_acc"] for run in searches]
    text = (
        f"{comparison.table(runs)}\n\n{comparison.verdict(runs, result['differences'], result['against_best_of'])}\n\n"
        f"Permutation p of found against random {analysis['permutation_p']:.4f}; the median found cell is at the "
        f"{analysis['percentile_of_median']:.0f}th percentile of the random ones; relative improvement "
        f"{analysis['relative_improvement']:.2f} %. Pools and skips are "
        f"{statistics.mean(run['free'] for run in searches):.0f} % of the operations of found cells (uniform 43 %).\n\n"
        "![test accuracy of every run](evidence/compare.png)"
    )
    comparison.draw(runs, _picture(opt, "compare"))
    more = {"runs": runs, "searches": searches, "derivation_gaps": gaps, "analysis": analysis}
    kept = {name: result[name] for name in ("differences", "against_best_of")}
    return record.publish("evidence", opt, more | kept, text, "compare", "evidence")


def _picture(opt: EvidenceOptions, name: str) -> Path:
    path = Path(opt.out) / "evidence" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _gap(opt: EvidenceOptions) -> dict[str, Any] | None:
    """The child with the supernet's weights against the sampled supernet, an epoch at a time, by sampler."""
    samplers = ("concrete", "straight_through", "dsnas", "softmax")
    more = ["--select=0", "--warmup_epochs=0", "--epochs=10"]
    rounds = [
        [study.search(opt, "tuning", f"gap_{name}", seed, [*more, f"--sampler={name}"])]
        for seed in range(opt.tries)
        for name in samplers
    ]
    if not study.work(opt, rounds):
        return None
    runs: dict[str, list[list[dict[str, float]]]] = {}
    for name in samplers:
        folders = [Path(opt.experiments_dir) / f"evidence_gap_{name}_{seed}" for seed in range(opt.tries)]
        kept = ("epoch", "temperature", "valid_acc", "child_valid_acc")
        runs[name] = [
            [{key: row[key] for key in kept} for row in read_metrics(folder / "metrics.jsonl")] for folder in folders
        ]
    rows = []
    for name, its in runs.items():
        ends = [[log[-1][key] for log in its] for key in ("valid_acc", "child_valid_acc")]
        gaps = [child - sampled for sampled, child in zip(*ends, strict=True)]
        shown = [f"{statistics.mean(values):.2f} %" for values in ends]
        rows.append([name, len(its), *shown, f"{statistics.mean(gaps):+.2f} ({min(gaps):+.2f} to {max(gaps):+.2f})"])
    head = ["sampler", "n", "supernet at a fresh Z", "its child", "difference (lowest to highest), points"]
    _draw_gaps(runs, _picture(opt, "gap"))
    text = f"{record.table(head, rows)}\n\n![the child less the sampled supernet](evidence/gap.png)"
    return record.publish("evidence", opt, {"runs": runs}, text, "gap", "evidence")


def _draw_gaps(runs: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for place, (name, its) in enumerate(runs.items()):
        for number, log in enumerate(its):
            points = [row["child_valid_acc"] - row["valid_acc"] for row in log]
            label = name.replace("_", " ") if number == 0 else None
            axes.plot([row["epoch"] for row in log], points, color=f"C{place}", marker="osd^"[place], ms=3, label=label)
    axes.axhline(0, color="0.4", linewidth=1)
    axes.set_xlabel("epoch")
    axes.set_ylabel("child less sampled supernet,\npoints of validation accuracy")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=150)


def _ranking(opt: EvidenceOptions) -> dict[str, Any] | None:
    """Whether accuracy with shared weights orders the random cells as their own training does: Kendall's tau."""
    import torch

    from loading.batches import Data
    from model_search import Network
    from training import checkpoint
    from training.run import Run

    seeds = [s for s in range(opt.n) if (Path(opt.experiments_dir) / f"evidence_compare_random_{s}/test.json").exists()]
    cells = [study.result(opt, "compare_random", seed) for seed in seeds]
    rows, taus = [], []
    for number in range(opt.tries):
        folder = Path(opt.experiments_dir) / f"evidence_compare_search_{number}"
        newest = checkpoint.newest(folder, "weights")
        if newest is None or len(cells) < 2:
            raise UserError("the ranking needs the searches and random cells of --stage compare")
        content = checkpoint.load(newest)
        search = options.restore(TrainOptions, content["options"])
        run = Run(search, "weights", folder, torch.device("cpu"), Data(search, content["split"]), content["epoch"])
        network = Network.from_checkpoint(content)
        shared = [selection.figures_of(run, network, Genotype.from_dict(cell["genotype"])) for cell in cells]
        found: dict[str, Any] = {
            "search": number,
            "shared_loss": [f.loss for f in shared],
            "shared_acc": [f.acc for f in shared],
        }
        own = [cell["acc"] for cell in cells]
        for key, sign in (("shared_loss", -1), ("shared_acc", 1)):
            found[f"tau_{key}"] = float(kendalltau([sign * value for value in found[key]], own).statistic)
        taus.append(found)
        rows.append([number, len(cells), f"{found['tau_shared_loss']:.2f}", f"{found['tau_shared_acc']:.2f}"])
    valid = float(kendalltau([cell["valid_acc"] for cell in cells], [cell["acc"] for cell in cells]).statistic)
    rows.append(["own training", len(cells), "", f"{valid:.2f}"])
    head = ["weights of search", "random cells", "tau of the validation loss", "tau of the validation accuracy"]
    figures = {"cells": cells, "searches": taus, "tau_of_own_validation": valid}
    return record.publish("evidence", opt, figures, record.table(head, rows), "ranking", "evidence")


if __name__ == "__main__":
    options.entry(main)
