"""Searches under several budgets with several seeds: what the child costs, and its accuracy.

    python -m benchmarks.pareto --measure params --budgets='[20000, 30000, 40000]' --seeds 3

Each is a run of main_constraint.py; finished ones are skipped, interrupted ones go on. A search without a budget
(--eta 0) of every seed is run for comparison, unless --free False. Writes docs/budget.md, and beside it the
figures as budget/MEASURE.json and the picture budget/MEASURE.png.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import PositiveFloat, PositiveInt

import main_constraint
import options
import utils
from benchmarks import record, runner
from benchmarks.record import Recorded
from options.constraint_option import ConstraintOptions
from resources import cost
from training.opening import finished

Runs = list[dict[str, Any]]


@dataclass(frozen=True)
class ParetoOptions(Recorded):
    """What is swept."""

    measure: Literal["params", "flops", "mac", "latency_ms"] = "params"
    """What the budgets are about."""
    budgets: list[PositiveFloat] = field(default_factory=lambda: [20_000.0, 30_000.0, 40_000.0])
    """Budgets."""
    seeds: PositiveInt = 3
    """Searches of each budget."""
    free: bool = True
    """Search without a budget too."""
    preset: str = "options/presets/quick.yaml"
    """The recipe of every search."""
    options: list[str] = field(default_factory=list)
    """Further options of main_constraint.py, e.g. --options='[--image_size=14]'."""
    experiments_dir: str = "experiments"
    """Where the searches go, as pareto_MEASURE_BUDGET_SEED."""
    part: str = "1/1"
    """K/N takes every N-th search from the K-th on: N processes share them; the last one writes."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Run what is missing and write table and picture; returns the content of the JSON file once all is there."""
    opt = record.parse(ParetoOptions, argv, "pareto", __doc__)
    number, parts = options.part(opt.part)
    budgets = [*([None] if opt.free else []), *sorted(opt.budgets, reverse=True)]
    every = [(budget, seed) for budget in budgets for seed in range(opt.seeds)]
    for budget, seed in every[number - 1 :: parts]:
        _search(opt, budget, seed)
    runs = [_one(opt, budget, seed) for budget, seed in every if _finished(opt, budget, seed)]
    if len(runs) < len(every):
        print(f"note: {len(every) - len(runs)} searches of other parts are missing; the same command goes on")
        return None
    picture = Path(opt.out) / "budget" / f"{opt.measure}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    _draw(opt.measure, runs, picture)
    return record.publish("pareto", opt, {"runs": runs}, _text(opt, runs), opt.measure, "budget")


def _argv(opt: ParetoOptions, budget: float | None, seed: int) -> list[str]:
    """The command line of a search."""
    name = f"pareto_{opt.measure}_{'free' if budget is None else f'{budget:.12g}'}_{seed}"
    argv = ["--config", opt.preset, *opt.options, "--name", name, "--experiments_dir", opt.experiments_dir]
    argv += ["--seed", str(seed), "--measure", opt.measure]
    return argv + (["--eta", "0"] if budget is None else [f"--target_{opt.measure}", str(budget)])


def _search(opt: ParetoOptions, budget: float | None, seed: int) -> Path:
    """The folder of a search, run now if it is not finished; a finished one must be of this recipe."""
    return runner.run_once(main_constraint, ConstraintOptions, _argv(opt, budget, seed), "genotype.json")


def _finished(opt: ParetoOptions, budget: float | None, seed: int) -> bool:
    argv = [*_argv(opt, budget, seed), "--resume", "True"]
    return finished(options.parse(ConstraintOptions, argv, "main_constraint.py", ""), "genotype.json")


def _one(opt: ParetoOptions, budget: float | None, seed: int) -> dict[str, Any]:
    """The last row of metrics of a finished search."""
    row = utils.read_metrics(_search(opt, budget, seed) / "metrics.jsonl")[-1]
    return {
        "budget": budget,
        "seed": seed,
        "child": row[f"child_{opt.measure}"],
        "expected": row[f"cost_{opt.measure}"],
        "eta": row[f"eta_{opt.measure}"],
        "child_valid_acc": row["child_valid_acc"],
        "valid_acc": row["valid_acc"],
    }


def _groups(runs: Runs) -> list[tuple[float | None, Runs]]:
    budgets = list(dict.fromkeys(run["budget"] for run in runs))
    return [(budget, [run for run in runs if run["budget"] == budget]) for budget in budgets]


def _text(opt: ParetoOptions, every: Runs) -> str:
    rows = []
    for budget, runs in _groups(every):
        children = ", ".join(cost.show(run["child"]) for run in runs)
        used = "-" if budget is None else ", ".join(f"{100 * run['child'] / budget:.1f} %" for run in runs)
        accuracies = [run["child_valid_acc"] for run in runs]
        spread = f" (sd {statistics.stdev(accuracies):.2f})" if len(runs) > 1 else ""
        shown = "none" if budget is None else cost.show(budget)
        rows.append([shown, len(runs), children, used, f"{statistics.mean(accuracies):.2f} %{spread}"])
    head = [f"budget, {opt.measure}", "n", "the children", "of the budget", "child accuracy, mean"]
    recipe = " ".join([opt.preset, *opt.options])
    return (
        f"Every child is that of a search with `{recipe}` and its own seed; accuracy is that on the validation split "
        f"with the supernet's weights, without retraining.\n\n{record.table(head, rows)}\n\n"
        f"![children and budgets](budget/{opt.measure}.png)"
    )


def _draw(measure: str, every: Runs, path: Path) -> None:
    """Accuracy of every child over its cost, budgets as lines."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for number, (budget, runs) in enumerate(_groups(every)):
        color, label = f"C{number}", "no budget" if budget is None else f"budget {cost.show(budget)}"
        axes.scatter(
            [r["child"] for r in runs], [r["child_valid_acc"] for r in runs], color=color, label=label, zorder=3
        )
        if budget is not None:
            axes.axvline(budget, color=color, linestyle="--", linewidth=1)
    axes.set_xlabel(f"{measure} of the derived child")
    axes.set_ylabel("validation accuracy of the child, %")
    if measure != "latency_ms":
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    options.entry(main)
