"""The found cell against random cells of the same size, retrained with the same recipe.

    python -m benchmarks.random_baseline --experiment quick

Runs that are finished are skipped, interrupted ones go on. Writes docs/child.md and docs/child/random_baseline.json.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt

import options
import retrain
from benchmarks import record, runner
from benchmarks.record import Recorded
from genotypes import Genotype
from options import UserError
from options.child_option import ChildOptions


@dataclass(frozen=True)
class BaselineOptions(Recorded):
    """What is compared."""

    experiment: str = "quick"
    """The finished search whose cell is compared."""
    preset: str = "options/presets/retrain_quick.yaml"
    """The recipe of every retraining."""
    seeds: PositiveInt = 3
    """Retrainings of the found cell, each with its own seed."""
    random: PositiveInt = 10
    """Random cells, each retrained once with its own seed."""
    experiments_dir: str = "experiments"
    """Where the search lies and the retrainings go, as EXPERIMENT_found_SEED and EXPERIMENT_random_SEED."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what is missing and write the table; returns the content of the JSON file."""
    opt = record.parse(BaselineOptions, argv, "random_baseline", __doc__)
    cell = _cell(opt)
    found = [_one(opt, f"found_{seed}", seed, ["--genotype", opt.experiment]) for seed in range(opt.seeds)]
    if any(figures.pop("genotype") != cell.to_dict() for figures in found):
        raise UserError(f"the finished retrainings are of another cell than --experiment {opt.experiment} has now")
    size = str(found[0]["params"])
    matched = ["--space", cell.space, "--match_params", size, "--split"]
    matched.append(str(Path(opt.experiments_dir) / opt.experiment / "split.json"))
    drawn = [
        _one(opt, f"random_{seed}", seed, ["--genotype", f"random:{seed}", *matched]) for seed in range(opt.random)
    ]
    cells = {"found": found, "random": drawn}
    for figures in drawn:
        del figures["genotype"]
    return record.publish("random_baseline", opt, cells, _text(opt, cells), topic="child")


def _cell(opt: BaselineOptions) -> Genotype:
    """The genotype of the search; raises UserError."""
    path = Path(opt.experiments_dir) / opt.experiment / "genotype.json"
    try:
        cell = Genotype.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--experiment {opt.experiment}: {error}") from None
    if (len(cell.normal), len(cell.reduce)) != (4, 4):
        raise UserError(f"--experiment {opt.experiment}: random cells have 4 nodes, its own have another number")
    return cell


def _one(opt: BaselineOptions, name: str, seed: int, genotype: list[str]) -> dict[str, Any]:
    """Test figures of one retraining, run now if it is not finished; a finished one must be of this recipe."""
    argv = ["--config", opt.preset, "--name", f"{opt.experiment}_{name}", "--experiments_dir", opt.experiments_dir]
    folder = runner.run_once(retrain, ChildOptions, [*argv, "--seed", str(seed), *genotype], "test.json")
    figures = json.loads((folder / "test.json").read_text(encoding="utf-8"))
    return {
        key: figures[key]
        for key in ("acc", "balanced_acc", "loss", "ece", "params", "flops", "seed", "test_images", "genotype")
    }


def _text(opt: BaselineOptions, cells: dict[str, list[dict[str, Any]]]) -> str:
    rows = []
    for kind, figures in cells.items():
        acc = [row["acc"] for row in figures]
        sd = f"{statistics.stdev(acc):.2f}" if len(acc) > 1 else "-"
        params, flops = (statistics.mean(row[measure] for row in figures) for measure in ("params", "flops"))
        accuracies = [f"{statistics.mean(acc):.2f} %", sd, f"{min(acc):.2f} %", f"{max(acc):.2f} %"]
        rows.append([kind, len(acc), *accuracies, f"{params:,.0f}", f"{flops / 1e6:.2f}"])
    count = cells["found"][0]["test_images"]
    head = ["cell", "n", "test accuracy, mean", "sd", "lowest", "highest", "parameters", "Mflops"]
    return (
        f"The cell found by `{opt.experiment}` and random ones, uniform over the search space, drawn until their child "
        f"has its number of parameters, give or take 5 %. Each was retrained from scratch with `{opt.preset}` on the "
        f"same images and tested once on the same {count} images that neither search nor training saw. The n of the "
        f"first row are seeds of one cell, those of the second are cells; one standard error of an accuracy of 85 % on "
        f"{count} images is {100 * (0.85 * 0.15 / count) ** 0.5:.1f} points.\n\n{record.table(head, rows)}"
    )


if __name__ == "__main__":
    options.entry(main)
