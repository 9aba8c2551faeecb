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
The split few has 1,280 and 320 of those tuned on, as many as the bundled data set: for compare.py --dataset
fashion_mnist --split data/fashion_few.json.

The comparison, fixed before its first run and made of two searches in turn: N = 20 searches, seeds 0 to 19;
of each the found cell, a random cell with its parameters (5 %), one with its multiply-adds (10 %) too, a plain CNN and
a ResNet with its parameters; one recipe, one training each. The unit is the search. Primary: found less random, Welch's
interval; further: permutation p, the percentile of the median found cell among the random ones, the best of k random
cells in equal time. Another machine goes on with what is left: --others '[evidence_compare/comparison.json]'.
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
from benchmarks.study import SEARCH, TRAIN, EvidenceOptions, Job
from child import comparison
from genotypes import Genotype
from options import UserError
from options.default_option import TrainOptions
from report.runs import searched
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


def _of_gap(sampler: str) -> list[str]:
    return ["--select=0", "--warmup_epochs=0", "--epochs=10", f"--sampler={sampler}"]


_BARE = ["--select=0", "--arch_weight_decay=0"]
# Searches: a word for folders, a line for people, what differs from the preset
REMEDIES: dict[str, tuple[str, list[str]]] = {
    "taken": ("as first compared: the best of 16 finalists", []),
    "frozen": ("the same, alpha frozen: random search with shared weights", ["--warmup_epochs=19"]),
    "likeliest": ("the likeliest child", ["--select=0"]),
    "no_decay": ("the likeliest, no decay of alpha", _BARE),
    "exponential": (
        "straight_through, 10 epochs, temperature from 1 to 0.03 exponentially",
        [*_of_gap("straight_through"), "--temp_schedule=exponential", "--anneal_rate=0.0056"],
    ),
    "per_cell": (
        "straight_through, 10 epochs, a Z for each cell",
        [*_of_gap("straight_through"), "--resample_cell=True"],
    ),
}
SAMPLERS = ("concrete", "truncated", "straight_through", "dsnas", "softmax")  # of the stage gap
_TRAINED = ("concrete", "straight_through", "softmax")  # those of them whose likeliest children are trained
_POOL = 8  # random cells that the cells of all these searches are held against


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
    names = {(name, kind): f"recipe_{_slug(name)}_{kind}" for name in RECIPE for kind in of}
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


def _slug(name: str) -> str:
    """A name for folders."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def _compared(opt: EvidenceOptions) -> dict[str, Any] | None:
    """The result of compare.py with the presets of the study, once it is complete."""
    data = f"--data_dir={opt.data_dir}"
    argv = ["--dataset=fashion_mnist", "--name=evidence_compare", f"--n={opt.n}", f"--part={opt.part}"]
    argv += ["--contenders=[found,random,peer,plain,resnet]", f"--split={study.split_file(opt, 'study')}"]
    argv += [f"--search_config={SEARCH}", f"--search_options={json.dumps([data, *opt.search_options])}"]
    argv += [f"--retrain_config={TRAIN}", f"--retrain_options={json.dumps([data, *opt.retrain_options])}"]
    argv += [f"--experiments_dir={opt.experiments_dir}", f"--visualizations_dir={opt.visualizations_dir}"]
    argv += [f"--minutes={opt.minutes}"] if opt.minutes else []
    argv += [f"--others={json.dumps(opt.others)}"] if opt.others else []
    try:
        result = compare.main(argv)
    except compare.Unfinished:
        return None
    names, runs, left_out = result["setting"]["contenders"], result["runs"], result["left_out"]
    whole = sum(len(runs.get(name, [])) for name in names) + len(left_out) == opt.n * len(names)
    return result if whole else None


def _remedies(opt: EvidenceOptions) -> dict[str, Any] | None:
    """Searches of every kind, those of the stage gap too; their cells against a pool of random ones."""
    kinds = {f"remedy_{key}": kind for key, kind in REMEDIES.items()}
    kinds |= {f"gap_{name}": (f"{name}, 10 epochs, no warm-up, the likeliest", _of_gap(name)) for name in _TRAINED}

    def of_kind(key: str, seed: int) -> list[Job]:
        trained = ["--genotype=" + study.folder(opt, f"{key}_search", seed).name]
        search = study.search(opt, "tuning", f"{key}_search", seed, kinds[key][1])
        return [search, study.train(opt, "tuning", f"{key}_found", seed, trained)]

    rounds = [of_kind(key, seed) for seed in range(opt.tries) for key in kinds]
    rounds += [
        [study.train(opt, "tuning", "pool", seed, [f"--genotype=random:{seed}", f"--match_params={opt.params}"])]
        for seed in range(_POOL)
    ]
    size, convs = f"--match_params={opt.params}", "--space=convs"
    rounds += [
        [study.train(opt, "tuning", "convs", seed, [f"--genotype=random:{seed}", size, convs])]
        for seed in range(opt.tries)
    ]
    if not study.work(opt, rounds):
        return None
    cells = [study.result(opt, "pool", seed) for seed in range(_POOL)]
    rows: list[list[Any]] = [["random", len(cells), *_spread(cells), "", "", ""]]
    convs_cells = [study.result(opt, "convs", seed) for seed in range(opt.tries)]
    rows += [["random, --space convs", len(convs_cells), *_spread(convs_cells), "", "", ""]]
    runs: dict[str, Any] = {"random": cells, "random_convs": convs_cells}
    for key, (words, remedy) in kinds.items():
        found = [study.result(opt, f"{key}_found", seed) for seed in range(opt.tries)]
        searches = [searched(study.folder(opt, f"{key}_search", seed)) for seed in range(opt.tries)]
        gap = comparison.difference([run["acc"] for run in found], [run["acc"] for run in cells])
        interval = "one run" if gap["low"] is None else f"{gap['low']:+.2f} to {gap['high']:+.2f}"
        minutes, free = (statistics.mean(run[figure] for run in searches) for figure in ("minutes", "free"))
        more = [f"{gap['difference']:+.2f} ({interval})", f"{free:.0f} %", f"{minutes:.1f}"]
        rows.append([words, opt.tries, *_spread(found), *more])
        runs[key] = {"options": remedy, "found": found, "searches": searches, "against_random": gap}
    head = ["search", "n", "accuracy, mean", "sd", "parameters", "Mflops", "against random cells (95 %)"]
    table = record.table([*head, "pools and skips", "minutes of search"], rows)
    return record.publish("evidence", opt, {"runs": runs}, table, "remedies", "evidence")


def _spread(runs: Sequence[Mapping[str, Any]]) -> tuple[str, str, str, str]:
    """Mean and deviation of the accuracies, mean of the parameters and of the multiply-adds."""
    accuracies = [run["acc"] for run in runs]
    sd = f"{statistics.stdev(accuracies):.2f}" if len(runs) > 1 else "-"
    params, flops = (statistics.mean(run[figure] for run in runs) for figure in ("params", "flops"))
    return f"{statistics.mean(accuracies):.2f} %", sd, f"{params:,.0f}", f"{flops / 1e6:.1f}"


def _compare(opt: EvidenceOptions) -> dict[str, Any] | None:
    """The comparison of compare.py, and the rest of the analysis."""
    result = _compared(opt)
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
    searches = [row["search"] for row in runs["found"]]
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
    more = {"recipes": result["recipes"], "runs": runs, "derivation_gaps": gaps, "analysis": analysis}
    kept = {name: result[name] for name in ("differences", "against_best_of")}
    return record.publish("evidence", opt, more | kept, text, "compare", "evidence")


def _picture(opt: EvidenceOptions, name: str) -> Path:
    path = Path(opt.out) / "evidence" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _gap(opt: EvidenceOptions) -> dict[str, Any] | None:
    """The child with the supernet's weights against the sampled supernet, an epoch at a time, by sampler."""
    rounds = [
        [study.search(opt, "tuning", f"gap_{name}_search", seed, _of_gap(name))]
        for seed in range(opt.tries)
        for name in SAMPLERS
    ]
    if not study.work(opt, rounds):
        return None
    runs: dict[str, list[list[dict[str, float]]]] = {}
    for name in SAMPLERS:
        folders = [study.folder(opt, f"gap_{name}_search", seed) for seed in range(opt.tries)]
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
    """All samplers, and once more those that lose little."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    for panel, axes in enumerate(figure.subplots(1, 2)):
        for place, (name, its) in enumerate(runs.items()):
            if panel and name == "softmax":
                continue
            for number, log in enumerate(its):
                points = [row["child_valid_acc"] - row["valid_acc"] for row in log]
                label = name.replace("_", " ") if number == panel == 0 else None
                style = {"color": f"C{place}", "marker": "osd^v"[place], "ms": 3, "linewidth": 1}
                axes.plot([row["epoch"] for row in log], points, label=label, **style)
        axes.axhline(0, color="0.4", linewidth=1)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.set_title("without softmax" if panel else "all", fontsize=9)
    figure.axes[0].set_ylabel("child less sampled supernet,\npoints of validation accuracy")
    figure.legend(loc="outside upper center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=150)


def _ranking(opt: EvidenceOptions) -> dict[str, Any] | None:
    """Whether accuracy with shared weights orders the random cells as their own training does: Kendall's tau."""
    import torch

    from loading.batches import Data
    from model_search import Network
    from training import checkpoint
    from training.run import Run

    seeds = [seed for seed in range(opt.n) if (study.folder(opt, "compare_random", seed) / "test.json").exists()]
    cells = [study.result(opt, "compare_random", seed) for seed in seeds]
    rows, taus = [], []
    for number in range(opt.tries):
        folder = study.folder(opt, "compare_search", number)
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
