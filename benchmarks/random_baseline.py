"""The found cell against random cells of the same size, retrained with the same recipe.

    python -m benchmarks.random_baseline --experiment quick

Runs that are finished are skipped, interrupted ones go on. Writes docs/random_baseline.json and .md.
"""

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse.typing import PositiveInt

import options
import retrain
from genotypes import Genotype
from options import UserError
from options.child_option import ChildOptions
from training.run import check_same_options


@dataclass(frozen=True)
class BaselineOptions:
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
    out: str = "docs/random_baseline"
    """The results, without ending."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what is missing and write the table; returns the content of the JSON file."""
    opt = options.parse(BaselineOptions, argv, "python -m benchmarks.random_baseline", __doc__ or "")
    cell = _cell(opt)
    Path(opt.out).parent.mkdir(parents=True, exist_ok=True)
    found = [_one(opt, f"found_{seed}", seed, ["--genotype", opt.experiment]) for seed in range(opt.seeds)]
    if any(figures.pop("genotype") != cell.to_dict() for figures in found):
        raise UserError(f"the finished retrainings are of another cell than --experiment {opt.experiment} has now")
    size = str(found[0]["params"])
    matched = ["--space", cell.space, "--match_params", size, "--split"]
    matched.append(str(Path(opt.experiments_dir) / opt.experiment / "split.json"))
    drawn = [
        _one(opt, f"random_{seed}", seed, ["--genotype", f"random:{seed}", *matched]) for seed in range(opt.random)
    ]
    result = {
        "command": "python -m benchmarks.random_baseline",
        "experiment": opt.experiment,
        "recipe": opt.preset,
        "machine": f"{platform.machine()}, {platform.system()}",
        "found": found,
        "random": [{k: v for k, v in figures.items() if k != "genotype"} for figures in drawn],
    }
    Path(f"{opt.out}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    Path(f"{opt.out}.md").write_text(_markdown(opt, result), encoding="utf-8")
    print(f"written  {opt.out}.md, {opt.out}.json")
    return result


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
    name = f"{opt.experiment}_{name}"
    folder = Path(opt.experiments_dir) / name
    path = folder / "test.json"
    argv = ["--config", opt.preset, "--name", name, "--experiments_dir", opt.experiments_dir, "--seed", str(seed)]
    argv += [*genotype, "--resume", "True"]
    if not path.exists():
        print(f"--- {name}")
        retrain.main(argv)
    stored = yaml.safe_load((folder / "options.yaml").read_text(encoding="utf-8"))
    check_same_options(options.parse(ChildOptions, argv, "retrain.py", ""), stored, folder)
    figures = json.loads(path.read_text(encoding="utf-8"))
    return {
        key: figures[key]
        for key in ("acc", "balanced_acc", "loss", "ece", "params", "flops", "seed", "test_images", "genotype")
    }


def _markdown(opt: BaselineOptions, result: dict[str, Any]) -> str:
    lines = [
        "# The found cell against random ones",
        "",
        f"Every row was retrained from scratch with `{opt.preset}` on the same images and tested once on the same "
        f"{result['found'][0]['test_images']} images that neither search nor training saw. Random cells are uniform "
        "over the search space, drawn until their child has the found one's number of parameters, give or take 5 %.",
        "",
        f"    {result['command']} --experiment {opt.experiment} --seeds {opt.seeds} --random {opt.random}",
        "",
        "| cell | n | test accuracy, mean | sd | lowest | highest | parameters | Mflops |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for label, kind in ((f"found by `{opt.experiment}`", "found"), ("random", "random")):
        rows = result[kind]
        acc = [row["acc"] for row in rows]
        spread = f"{statistics.stdev(acc):.2f}" if len(acc) > 1 else "-"
        lines.append(
            f"| {label} | {len(acc)} | {statistics.mean(acc):.2f} % | {spread} | {min(acc):.2f} % | {max(acc):.2f} % | "
            f"{statistics.mean(row['params'] for row in rows):,.0f} | "
            f"{statistics.mean(row['flops'] for row in rows) / 1e6:.2f} |"
        )
    count = result["found"][0]["test_images"]
    lines += [
        "",
        f"One standard error of an accuracy of 85 % on {count} images is "
        f"{100 * (0.85 * 0.15 / count) ** 0.5:.1f} points. "
        "The n of the first row are seeds of one cell, those of the second are cells.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    options.entry(main)
