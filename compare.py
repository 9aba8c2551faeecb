"""Is a search worth it on these images? The found cell against random cells, a plain CNN and a small ResNet.

Everything is trained with one recipe on one split and tested once; interrupted, the same command goes on.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import options
from options.child_option import ChildOptions
from options.compare_option import CompareOptions
from options.default_option import TrainOptions


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what is missing, print table and verdict, write both; returns the content of comparison.json."""
    opt = options.parse(CompareOptions, argv, "compare.py", __doc__)
    import utils
    from child import comparison

    folder, start = Path(opt.experiments_dir) / opt.name, time.monotonic()
    utils.writable(folder, "experiments_dir")
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in opt.contenders}
    for number, (kind, run) in enumerate(stages := _stages(opt, rows)):
        passed = (time.monotonic() - start) / 60
        if opt.minutes is not None and passed > opt.minutes:
            print(f"note: --minutes {opt.minutes:g} are over; the same command goes on with what is left")
            break
        left = f", about {passed / number * (len(stages) - number):.0f} minutes left" if number else ""
        print(f"--- {number + 1} of {len(stages)}: {kind}{left}", flush=True)
        run()
    if not all(rows.values()):
        raise options.UserError("not every contender has been trained yet; give more --minutes")
    gaps = comparison.compare(rows)
    text = f"{comparison.table(rows)}\n\n{comparison.verdict(gaps)}"
    result = {"setting": options.to_dict(opt), "commit": utils.commit(12), "processor": utils.processor(), "runs": rows}
    utils.write_atomic(folder / "comparison.json", json.dumps(result | {"differences": gaps}, indent=1) + "\n")
    utils.write_atomic(folder / "comparison.md", text + "\n")
    try:
        comparison.draw(rows, folder / "comparison.png")
    except ImportError:
        print("note: the picture needs matplotlib: pip install -r requirements-dev.txt")
    print(f"\n{text}\n\nwritten  {folder / 'comparison.json'}, comparison.md, comparison.png")
    return result | {"differences": gaps}


def _stages(opt: CompareOptions, rows: dict[str, list[dict[str, Any]]]) -> list[tuple[str, Callable[[], None]]]:
    """(what it is, does it) of every search and training, contender by contender within a round."""
    places = [f"--experiments_dir={opt.experiments_dir}", f"--visualizations_dir={opt.visualizations_dir}"]
    common = [f"--dataset={opt.dataset}", *places]
    split = Path(opt.experiments_dir) / f"{opt.name}_search_0" / "split.json"
    stages: list[tuple[str, Callable[[], None]]] = []
    for kind, name, config, more in (  # what is wrong is said before the first search, not after it
        (TrainOptions, "search", opt.search_config, opt.search_options),
        (ChildOptions, "retrain", opt.retrain_config, opt.retrain_options),
    ):
        options.parse(kind, [f"--config={config}", *more, *common], f"compare.py: --{name}_options", "")
    for seed in range(opt.n):
        search = f"{opt.name}_search_{seed}"

        def look(search: str = search, seed: int = seed) -> None:
            of = [] if seed == 0 else [f"--split={split}"]
            given = [f"--config={opt.search_config}", *opt.search_options, *common, *of, f"--name={search}"]
            _search(options.parse(TrainOptions, [*given, f"--seed={seed}", "--resume=True"], "main.py", ""))

        stages.append((search, look))
        for contender in opt.contenders:

            def train(kind: str = contender, search: str = search, seed: int = seed) -> None:
                given = [f"--config={opt.retrain_config}", *opt.retrain_options, *common, f"--split={split}"]
                given += [f"--name={opt.name}_{kind}_{seed}", f"--seed={seed}", "--resume=True"]
                size = rows["found"][seed]["params"] if kind != "found" else 0
                given += {
                    "found": [f"--genotype={search}"],
                    "random": [f"--genotype=random:{seed}", f"--match_params={size}"],
                }.get(kind, [f"--network={kind}", f"--genotype={search}", f"--match_params={size}"])
                row = _train(options.parse(ChildOptions, given, "retrain.py", ""))
                row["minutes"] += _minutes(Path(opt.experiments_dir) / search) if kind == "found" else 0.0
                rows[kind].append(row)

            stages.append((f"{opt.name}_{contender}_{seed}", train))
    return stages


def _search(opt: TrainOptions) -> None:
    import search
    from objective import Objective
    from training.run import finished

    if not finished(opt, "genotype.json"):
        search.run_search(opt, lambda network, info, opt: Objective())


def _train(opt: ChildOptions) -> dict[str, Any]:
    """The figures of a training, run now if it is not finished."""
    import torch

    import utils
    from child import retraining, source
    from training import checkpoint
    from training.run import finished

    if not finished(opt, "test.json"):
        retraining.run_retrain(opt)
    folder = Path(opt.experiments_dir) / opt.name
    figures = json.loads((folder / "test.json").read_text(encoding="utf-8"))
    content = checkpoint.load(checkpoint.path_of(folder, "child", opt.epochs))
    network, data = source.load_child(content)[0], content["data"]
    image = torch.zeros(1, data["channels"], *data["image_size"])
    with torch.no_grad():
        calls = utils.in_turns({"ms": lambda: 1000 * utils.timed(lambda: network(image))}, 30)["ms"]
    kept = ("acc", "balanced_acc", "params", "flops", "test_images", "seed")
    return {name: figures[name] for name in kept} | {
        "minutes": _minutes(folder),
        "latency_ms": sorted(calls)[len(calls) // 2],
    }


def _minutes(folder: Path) -> float:
    """That the epochs of a run took."""
    import utils

    return sum(row["epoch_seconds"] for row in utils.read_metrics(folder / "metrics.jsonl")) / 60


if __name__ == "__main__":
    options.entry(main)
