"""Is a search worth it on these images? The found cell against random ones, a plain CNN, also as long, and a ResNet.

Everything is trained with one recipe on one split and tested once; interrupted, the same command goes on.
"""

import hashlib
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import options
from options import UserError
from options.child_option import ChildOptions
from options.compare_option import CONTENDERS, OWN, CompareOptions
from options.default_option import TrainOptions

_PEERS = 1_000_000  # their seeds are not those of the other random cells
Rows = dict[str, dict[int, dict[str, Any]]]  # of each contender its figures by seed
LeftOut = set[tuple[str, int]]  # contender and seed


class Unfinished(UserError):
    """There is nothing to compare yet."""


class Stage(NamedTuple):
    """A search or a training."""

    kind: str  # search, or a contender
    seed: int
    opt: TrainOptions | ChildOptions

    def done(self) -> bool:
        """Whether it was finished before; raises UserError if it was of other options or images."""
        from training.opening import finished

        return finished(self.opt, "genotype.json" if self.kind == "search" else "test.json")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what is missing, print table and verdict, write both; returns the content of comparison.json."""
    opt = options.parse(CompareOptions, argv, "compare.py", __doc__)
    import utils

    with utils.no_denormals():  # in every thread from the beginning
        return _compare(opt)


def _compare(opt: CompareOptions) -> dict[str, Any]:
    """The comparison of these options; see main."""
    import utils
    from child import comparison

    folder = Path(opt.experiments_dir) / opt.name
    stages = [*_stages(opt, {})]  # what is wrong with the options is said before the first search, not after it
    utils.writable(folder, "experiments_dir")
    found, left_out = _others(opt, stages)
    _train(opt, stages, found, left_out)
    rows = {name: [its[seed] for seed in sorted(its)] for name, its in found.items()}
    lacking = sum(opt.n - len(its) for its in rows.values()) - len(left_out)
    if lacking:
        print(f"note: {lacking} trainings of {opt.n * len(rows)} are not done yet")
    rows = {name: its for name, its in rows.items() if its}
    if "found" not in rows or len(rows) < 2:
        raise Unfinished("not every contender has been trained yet; give more --minutes")
    gaps = comparison.compare(rows)
    best, groups = comparison.against_best_of(rows), _groups(opt, rows)
    more = {"differences": gaps, "against_best_of": best, "over_groups": groups, "left_out": sorted(left_out)}
    text = f"{comparison.table(rows)}\n\n{comparison.verdict(rows, gaps, best)}"
    if len({row["machine"] for its in rows.values() for row in its}) > 1:
        text += "\n\nThe runs are of several machines or versions, and so are minutes and milliseconds."
    if groups:
        text += f"\n\n{comparison.verdict_over_groups(groups)}"
    result = {"setting": options.to_dict(opt), "recipes": _recipes(opt, stages), "runs": rows}
    utils.write_atomic(folder / "comparison.json", json.dumps(result | more, indent=1) + "\n")
    utils.write_atomic(folder / "comparison.md", text + "\n")
    comparison.draw(rows, folder / "comparison.png")
    print(f"\n{text}\n\nwritten  {folder / 'comparison.json'}, comparison.md, comparison.png")
    return result | more


def _recipes(opt: CompareOptions, stages: Sequence[Stage]) -> dict[str, Any]:
    """What all rounds have alike: the options of a search and of a training, and which images are in which part."""
    from loading import records
    from training.opening import FREE

    def of(run: Any) -> dict[str, Any]:
        return {name: value for name, value in options.to_dict(run).items() if name not in OWN | FREE}

    found: dict[str, Any] = {"search": of(stages[0].opt), "training": of(stages[1].opt), "split": None}
    drawn = _split(opt)
    if drawn.is_file():
        named = json.dumps([sorted(part) for part in records.read_split(drawn).split.values()])
        found["split"] = hashlib.sha256(named.encode()).hexdigest()
    plain: dict[str, Any] = json.loads(json.dumps(found))  # as it is in a file
    return plain


def _split(opt: CompareOptions) -> Path:
    """The split.json of all runs."""
    return Path(opt.split or Path(opt.experiments_dir) / f"{opt.name}_search_0" / "split.json")


def _others(opt: CompareOptions, stages: Sequence[Stage]) -> tuple[Rows, LeftOut]:
    """The whole rounds of --others but those that are begun here, and what could not be had in them."""
    from child import comparison

    found: Rows = {name: {} for name in CONTENDERS if name in opt.contenders}
    left_out: LeftOut = set()
    recipes = _recipes(opt, stages) if opt.others else {}
    usual = {"search": options.to_dict(TrainOptions()), "training": options.to_dict(ChildOptions())}
    for path in opt.others:
        rounds, lacking, theirs = comparison.read_rounds(Path(path), [*found])
        for kind, default in usual.items():  # an option that was not there yet had its default
            for name, value in recipes[kind].items():
                there = theirs[kind].get(name, default[name])
                if there != value:
                    raise UserError(f"--others {path}: --{name} of its {kind} is {there} there, {value} here")
        if theirs["split"] != recipes["split"]:
            raise UserError(f"--others {path}: its runs had another split of the images than --split {opt.split}")
        here = {seed for seed in rounds if (Path(opt.experiments_dir) / f"{opt.name}_found_{seed}").exists()}
        taken = [seed for seed in rounds if 0 <= seed < opt.n and seed not in here and seed not in found["found"]]
        for seed in taken:
            for name, row in rounds[seed].items():
                found[name][seed] = row
            left_out |= {pair for pair in lacking if pair[1] == seed}
        print(f"others   {len(taken)} rounds of {path}")
    return found, left_out


def _train(opt: CompareOptions, stages: Sequence[Stage], found: Rows, left_out: LeftOut) -> None:
    """Run what is missing of this part; adds the figures of all that is finished, and what cannot be had."""
    elsewhere = {*found["found"]}
    seconds: dict[str, list[float]] = {}  # of what ran now, by kind
    start, late = time.monotonic(), False
    for number, stage in enumerate(_stages(opt, found)):
        if stage.seed in elsewhere:
            continue
        if not stage.done():
            late = late or (opt.minutes is not None and time.monotonic() - start > 60 * opt.minutes)
            if late or stage.seed not in opt.seeds():
                continue
            own = {*opt.seeds()} - elsewhere
            left = _left([other.kind for other in stages[number:] if other.seed in own], seconds)
            print(f"--- {number + 1} of {len(stages)}: {stage.opt.name}{left}", flush=True)
            began = time.monotonic()
            try:
                _run(stage)
            except UserError as error:
                if not str(error).startswith("--match_params"):
                    raise
                print(f"note: {stage.opt.name} is left out: {error}")
                left_out.add((stage.kind, stage.seed))
                continue
            seconds.setdefault(stage.kind, []).append(time.monotonic() - began)
        if stage.kind != "search":
            found[stage.kind][stage.seed] = _figures(stage, opt)
    if late:
        print(f"note: --minutes {opt.minutes:g} are over; the same command goes on with what is left")
    for stage in _stages(opt, found) if len(opt.seeds()) < opt.n else ():  # of others, which ended meanwhile
        new = stage.kind != "search" and stage.seed not in {*found[stage.kind]} | elsewhere
        if new and stage.done():
            found[stage.kind][stage.seed] = _figures(stage, opt)


def _stages(opt: CompareOptions, rows: Rows) -> Iterator[Stage]:
    """Every search and training, a round a seed; those of which the sizes are not known yet, in a process of others.

    Args:
        opt: the options.
        rows: what was found so far: the others get the parameters of the found cell of their round, and long its time.
    """
    places = [f"--experiments_dir={opt.experiments_dir}", f"--visualizations_dir={opt.visualizations_dir}"]
    common = [f"--dataset={opt.dataset}", *places, "--resume=True"]
    drawn = f"--split={_split(opt)}"
    for seed in range(opt.n):
        name = f"{opt.name}_search_{seed}"
        given = [f"--config={opt.search_config}", *opt.search_options, *common, f"--name={name}", f"--seed={seed}"]
        split = [drawn] if seed or opt.split else []
        search = options.parse(TrainOptions, [*given, *split], "compare.py: search_options", "")
        if search.nodes != 4 and {"random", "peer"} & {*opt.contenders}:
            raise UserError("random cells have 4 nodes, a search with --nodes cannot be compared with them")
        yield Stage("search", seed, search)
        for kind in (contender for contender in CONTENDERS if contender in opt.contenders):
            found = rows.get("found", {}).get(seed)
            if kind != "found" and rows and not found:
                continue
            size = [f"--match_params={found['params'] if found else 1}"]
            given = [f"--config={opt.retrain_config}", *opt.retrain_options, *common, drawn]
            given += [f"--name={opt.name}_{kind}_{seed}", f"--seed={seed}"]
            if kind == "found":
                given += [f"--genotype={name}"]
            elif kind in ("random", "peer"):
                drawn_from = seed if kind == "random" else _PEERS + seed
                given += [f"--genotype=random:{drawn_from}", f"--space={search.space}", *size]
                given += [f"--match_flops={found['flops'] if found else 1}"] if kind == "peer" else []
            else:
                given += [f"--network={'plain' if kind == 'long' else kind}", f"--genotype={name}", *size]
            if kind == "long" and found:
                plain = rows["plain"].get(seed)
                if not plain:
                    continue
                epochs = round(plain["epochs"] * found["training"] / plain["training"])
                given += [f"--epochs={max(plain['epochs'], epochs)}"]
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


def _groups(opt: CompareOptions, rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Differences of the found cells to each other contender over the groups of --group_pattern, where there is one."""
    from child import comparison

    base = Path(opt.experiments_dir)
    places = [base / f"{opt.name}_found_{row['seed']}" / "split.json" for row in rows["found"]]
    here = next((path for path in places if path.exists()), None)
    pattern = json.loads(here.read_text(encoding="utf-8"))["group_pattern"] if here else None
    if pattern is None:
        return {}
    files = {
        name: [base / f"{opt.name}_{name}_{row['seed']}" / "guesses.csv" for row in its] for name, its in rows.items()
    }
    if not all(path.exists() for its in files.values() for path in its):
        print("note: trainings of --others or of an earlier version have no guesses.csv: no intervals over groups")
        return {}
    return {
        name: comparison.over_groups(files["found"], its, pattern) for name, its in files.items() if name != "found"
    }


def _figures(stage: Stage, opt: CompareOptions) -> dict[str, Any]:
    """Of a finished training; the minutes are those of its epochs, for a found cell with its search."""
    import torch

    import utils
    from child import source
    from loading.augmentation import symmetries
    from report import runs
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
    training = runs.minutes_of(folder)
    search = runs.searched(base / f"{opt.name}_search_{stage.seed}") if stage.kind == "found" else {}
    before = search.get("minutes", 0.0)
    kept = ("acc", "balanced_acc", "params", "flops", "test_images", "seed")
    more = {"minutes": training + before, "training": training, "epochs": child.epochs}
    more |= {"latency_ms": statistics.median(calls), "valid_acc": content["metrics"].get("valid_acc")}
    more |= {"machine": (options.heads(folder / "options.yaml") + ["", ""])[1]} | ({"search": search} if search else {})
    return {name: figures[name] for name in kept} | more


if __name__ == "__main__":
    options.entry(main)
