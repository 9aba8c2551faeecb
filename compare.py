"""Is a search worth it on these images? The found cell against random cells, a plain CNN and a small ResNet.

Everything is trained with one recipe on one split and tested once; interrupted, the same command goes on.
"""

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import options
from options import UserError
from options.child_option import ChildOptions
from options.compare_option import CONTENDERS, CompareOptions
from options.default_option import TrainOptions


class Stage(NamedTuple):
    """A search or a training."""

    kind: str  # search, or a contender
    seed: int
    opt: TrainOptions | ChildOptions

    def done(self) -> bool:
        """Whether it was finished before; raises UserError if it was of other options or images."""
        from training.run import finished

        return finished(self.opt, "genotype.json" if self.kind == "search" else "test.json")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what is missing, print table and verdict, write both; returns the content of comparison.json."""
    opt = options.parse(CompareOptions, argv, "compare.py", __doc__)
    import utils
    from child import comparison

    folder = Path(opt.experiments_dir) / opt.name
    stages = [*_stages(opt, {})]  # what is wrong with the options is said before the first search, not after it
    utils.writable(folder, "experiments_dir")
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS if name in opt.contenders}
    seconds: dict[str, list[float]] = {}  # of what ran now, by kind
    start = time.monotonic()
    for number, stage in enumerate(_stages(opt, rows)):
        title = f"--- {number + 1} of {len(stages)}: {stage.opt.name}"
        if not stage.done():
            if opt.minutes is not None and time.monotonic() - start > 60 * opt.minutes:
                print(f"note: --minutes {opt.minutes:g} are over; the same command goes on with what is left")
                break
            print(title + _left([other.kind for other in stages[number:]], seconds), flush=True)
            began = time.monotonic()
            try:
                _run(stage)
            except UserError as error:
                if not str(error).startswith("--match_params"):
                    raise
                print(f"note: {stage.opt.name} is left out: {error}")
                continue
            seconds.setdefault(stage.kind, []).append(time.monotonic() - began)
        if stage.kind != "search":
            rows[stage.kind].append(_figures(stage, opt))
    rows = {name: its for name, its in rows.items() if its}
    if "found" not in rows or len(rows) < 2:
        raise UserError("not every contender has been trained yet; give more --minutes")
    gaps = comparison.compare(rows)
    text = f"{comparison.table(rows)}\n\n{comparison.verdict(rows, gaps)}"
    result = {"setting": options.to_dict(opt), "commit": utils.commit(12), "processor": utils.processor(), "runs": rows}
    utils.write_atomic(folder / "comparison.json", json.dumps(result | {"differences": gaps}, indent=1) + "\n")
    utils.write_atomic(folder / "comparison.md", text + "\n")
    try:
        comparison.draw(rows, folder / "comparison.png")
    except ImportError:
        print("note: the picture needs matplotlib: pip install -r requirements-dev.txt")
    print(f"\n{text}\n\nwritten  {folder / 'comparison.json'}, comparison.md, comparison.png")
    return result | {"differences": gaps}


def _stages(opt: CompareOptions, rows: dict[str, list[dict[str, Any]]]) -> Iterator[Stage]:
    """Every search and training, a round a seed.

    Args:
        opt: the options.
        rows: what was found so far: the others get the parameters of the found cell of their round.
    """
    places = [f"--experiments_dir={opt.experiments_dir}", f"--visualizations_dir={opt.visualizations_dir}"]
    common = [f"--dataset={opt.dataset}", *places, "--resume=True"]
    split = f"--split={Path(opt.experiments_dir) / f'{opt.name}_search_0' / 'split.json'}"
    for seed in range(opt.n):
        name = f"{opt.name}_search_{seed}"
        given = [f"--config={opt.search_config}", *opt.search_options, *common, f"--name={name}", f"--seed={seed}"]
        search = options.parse(TrainOptions, [*given, *([split] if seed else [])], "compare.py: search_options", "")
        if search.nodes != 4 and "random" in opt.contenders:
            raise UserError("random cells have 4 nodes, a search with --nodes cannot be compared with them")
        yield Stage("search", seed, search)
        for kind in (contender for contender in CONTENDERS if contender in opt.contenders):
            found = rows.get("found", [])
            size = found[seed]["params"] if len(found) > seed else 1
            of = {
                "found": [f"--genotype={name}"],
                "random": [f"--genotype=random:{seed}", f"--space={search.space}", f"--match_params={size}"],
            }.get(kind, [f"--network={kind}", f"--genotype={name}", f"--match_params={size}"])
            given = [f"--config={opt.retrain_config}", *opt.retrain_options, *common, split, *of]
            given += [f"--name={opt.name}_{kind}_{seed}", f"--seed={seed}"]
            yield Stage(kind, seed, options.parse(ChildOptions, given, "compare.py: retrain_options", ""))


def _left(kinds: list[str], seconds: dict[str, list[float]]) -> str:
    """About how long the stages of these kinds will take, once one of each kind has run."""
    if not {*kinds} <= seconds.keys():
        return ""
    return f", about {sum(statistics.mean(seconds[kind]) for kind in kinds) / 60:.0f} minutes left"


def _run(stage: Stage) -> None:
    import search
    from child import retraining
    from objective import Objective

    if isinstance(stage.opt, TrainOptions):
        search.run_search(stage.opt, lambda network, info, opt: Objective())
    else:
        retraining.run_retrain(stage.opt)


def _figures(stage: Stage, opt: CompareOptions) -> dict[str, Any]:
    """Of a finished training; the minutes are those of its epochs, for a found cell with its search."""
    import torch

    import utils
    from child import source
    from loading.augmentation import symmetries
    from training import checkpoint

    child = stage.opt
    assert isinstance(child, ChildOptions)
    base = Path(opt.experiments_dir)
    folder = base / child.name
    figures = json.loads((folder / "test.json").read_text(encoding="utf-8"))
    content = checkpoint.load(checkpoint.path_of(folder, "child", child.epochs))
    network, data = source.load_child(content)[0], content["data"]
    images = symmetries(torch.zeros(1, data["channels"], *data["image_size"]), child.test_flip)
    with torch.no_grad():
        calls = utils.in_turns({"ms": lambda: 1000 * utils.timed(lambda: [network(x) for x in images])}, 30)["ms"]
    ran = [folder, *([base / f"{opt.name}_search_{stage.seed}"] if stage.kind == "found" else [])]
    took = sum(row["epoch_seconds"] for run in ran for row in utils.read_metrics(run / "metrics.jsonl"))
    kept = ("acc", "balanced_acc", "params", "flops", "test_images", "seed")
    return {name: figures[name] for name in kept} | {"minutes": took / 60, "latency_ms": statistics.median(calls)}


if __name__ == "__main__":
    options.entry(main)
