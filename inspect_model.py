"""Reload a search's checkpoint, print its state and the derived genotype, draw both cells, write a report."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import options
from options import UserError
from options.constraint_option import DeployedOptions

if TYPE_CHECKING:
    from genotypes import Genotype
    from report.runs import Search
    from resources.cost import Deployed


_FRAMES = 60  # epochs of an animation at most


@dataclass(frozen=True)
class InspectOptions(DeployedOptions):
    """What to look at. Everything else comes from the checkpoint."""

    experiment: str | None = None
    """Name of the experiment: a folder of experiments_dir. Without one all are listed; several, A,B,C, are compared
    by --report True."""
    epoch: str = "last"
    """Epoch whose checkpoint is read, or last."""
    out: str | None = None
    """A file to write the genotype to, as retrain.py --genotype takes it. Nothing is overwritten."""
    visualize: bool = True
    """Draw the cells to visualizations_dir/EXPERIMENT/."""
    report: bool = False
    """Write visualizations_dir/EXPERIMENT/report.html: one page with curves, cells that a slider moves, figures."""
    animate: bool = False
    """Draw the cells over the epochs to visualizations_dir/EXPERIMENT/normal.webp and reduction.webp."""
    rule: Literal["search", "argmax", "top2"] = "search"
    """How the genotype is derived: as the search does, by --select in the last epoch if it has that, else by argmax
    (SNAS, none included); top2 (DARTS) is for comparison."""
    experiments_dir: str = "experiments"
    """Where runs lie."""
    visualizations_dir: str = "visualizations"
    """Where pictures go."""

    def check(self) -> None:
        """Raise UserError where a value is not allowed."""
        super().check()
        if self.epoch != "last" and not re.fullmatch("[0-9]+", self.epoch):
            raise UserError(f"--epoch {self.epoch} is neither a number nor last")
        for name in self.names():
            if not name or Path(name).name != name:
                raise UserError(f"--experiment {name} is not the name of a folder; give --experiments_dir too")
        asked = [f"--{name}" for name in ("report", "animate", "out") if getattr(self, name)]
        if self.experiment is None and asked:
            raise UserError(f"{asked[0]} is about one of the runs; give --experiment too")
        if len(self.names()) > 1 and ("--report" not in asked or asked[1:] or len({*self.names()}) < len(self.names())):
            raise UserError(
                f"--experiment {self.experiment}: several, each once, are compared by --report True, without --out "
                "and --animate"
            )

    def names(self) -> list[str]:
        """Of the experiments: a name may have commas, where there is such a folder."""
        if self.experiment is None:
            return []
        whole = (Path(self.experiments_dir) / self.experiment).is_dir()
        return [self.experiment] if whole else self.experiment.split(",")


class Inspected(NamedTuple):
    """What inspection found."""

    epoch: int
    metrics: dict[str, Any]
    genotype: "Genotype"
    params: int
    flops: int
    mac: int
    files: list[Path]


def main(argv: Sequence[str] | None = None) -> Inspected | None:
    """Print and draw a checkpoint, list the runs, or compare several; returns what was printed of one checkpoint."""
    opt = options.parse(InspectOptions, argv, "inspect_model.py", __doc__)
    import utils
    import visualize
    from report import runs
    from resources.cost import Deployed

    base = Path(opt.experiments_dir)
    if opt.experiment is None:
        _list(base)
        return None
    wanted = {field.name: getattr(opt, field.name) for field in fields(DeployedOptions)}
    searches = [runs.read_search(base, name, opt.epoch, opt.rule) for name in opt.names()]
    place = Path(opt.visualizations_dir) / "+".join(search.name for search in searches)
    if opt.visualize or opt.report or opt.animate:
        utils.claim(place, base / place.name, "visualizations_dir")
    if len(searches) > 1:
        _write_report(searches, wanted, place)
        return None
    (search,) = searches
    if opt.out is not None:
        if Path(opt.out).exists():
            raise UserError(f"--out {opt.out} exists; name another file")
        utils.writable(Path(opt.out).parent, "out")
    deployed = Deployed.planned(search.info, runs.deployed(search, wanted))
    costs = deployed.price(search.genotype)
    _report(search)
    _report_costs(deployed, costs, search.row, search.chosen)
    files: list[Path] = []
    if opt.out is not None:
        utils.write_atomic(Path(opt.out), search.genotype.to_json() + "\n")
        print(f"written     {opt.out}")
    if opt.visualize:
        plain = opt.rule == "search" or (opt.rule == "argmax" and not search.opt.select)
        ending = f"_epoch_{search.epoch}" + ("" if plain else f"_{opt.rule}")
        files = visualize.draw_genotype(search.genotype, place, ending, search.alphas)
        print("pictures    " + ", ".join(str(path) for path in files))
    if opt.animate:
        files += _animate(search, place)
    if opt.report:
        files += _write_report(searches, wanted, place)
    return Inspected(search.epoch, dict(search.row), search.genotype, **costs, files=files)


def _animate(search: "Search", place: Path) -> list[Path]:
    import visualize

    history = search.history()
    step = -(-len(history) // _FRAMES)
    epochs = [*history][::-1][::step][::-1]  # the last one for certain
    written = []
    for index, (kind, name) in enumerate((("normal", "normal"), ("reduce", "reduction"))):
        frames = {epoch: history[epoch][index].float().softmax(-1).tolist() for epoch in epochs}
        path = place / f"{name}.webp"
        reason = visualize.animate(kind, search.opt.space, frames, path)
        print(f"note: {path} is not drawn: {reason}" if reason else f"animation   {path}: {len(epochs)} epochs")
        written += [] if reason else [path]
    return written


def _write_report(searches: "Sequence[Search]", wanted: Mapping[str, Any], place: Path) -> list[Path]:
    from report import page

    files = page.write(searches, wanted, place)
    print(f"report      {files[0]}")
    return files


def _list(base: Path) -> None:
    """The runs with their best figures, a few lines each that fit a terminal."""
    from report import runs

    found = runs.listing(base)
    if not found:
        raise UserError(f"{base} holds no run: run main.py first, or give --experiments_dir")
    for run in found:
        took = f", {run.minutes:.0f} minutes" if run.minutes >= 1 else ""
        print(f"{run.name}: {run.kind}, epoch {run.epochs}{took}, {run.data}")
        if run.figures:
            print(f"    {run.figures}")
    print("--experiment NAME shows a search, NAME,OTHER --report True compares several")


def _report(found: "Search") -> None:
    import sampling
    import search

    run, info, row, alphas, chosen = found.opt, found.info, found.row, found.alphas, found.chosen
    height, width = info.image_size
    print(f"experiment  {run.name}, epoch {found.epoch} of {run.epochs}, seed {run.seed}")
    print(f"data        {run.dataset}: {len(info.classes)} classes, {width}x{height}x{info.channels}")
    print(f"loss        train {row['train_loss']:.4f}, valid {row['valid_loss']:.4f}")
    print(
        f"accuracy    train {row['train_acc']:.2f} %, valid {row['valid_acc']:.2f} % (a sampled Z), "
        f"child {row['child_valid_acc']:.2f} % (argmax, the supernet's weights)"
    )
    print(f"balanced    valid {row['valid_balanced_acc']:.2f} %, child {row['child_valid_balanced_acc']:.2f} %")
    print(f"temperature {row['temperature']:.4f}")
    uniform = sampling.entropy(alphas[0] * 0).item()
    left = [sampling.entropy(alpha).item() for alpha in alphas]
    print(f"entropy     normal {left[0]:.2f}, reduce {left[1]:.2f} nats (uniform: {uniform:.2f})")
    leads = [sampling.margin(alpha).item() for alpha in alphas]
    print(f"margin      normal {leads[0]:.3f}, reduce {leads[1]:.3f}: the lead of the likeliest op, mean over edges")
    for warning in search.doubts(found.genotype, run.layers, chosen, *leads):
        print(warning)
    print(f"genotype    {'chosen by --select: ' if chosen else ''}an op:input for each edge kept")
    for kind, nodes, _ in found.genotype.cells():
        for index, node in enumerate(nodes):
            edges = "  ".join(f"{op}:{source}" for op, source in node) or "no input: zeros"
            print(f"  {kind:6s} node {index}: {edges}")


def _report_costs(deployed: "Deployed", costs: dict[str, int], row: Mapping[str, Any], chosen: bool) -> None:
    from resources import cost

    height, width = deployed.image_size
    print(
        f"cost        the child at C = {deployed.init_channels}, {deployed.layers} cells, {width}x{height}"
        f"{', ImageNet stem' if deployed.stem == 'imagenet' else ''}: {costs['params']:,} parameters, "
        f"{costs['flops'] / 1e6:,.2f} Mflops (multiply-adds), "
        f"{costs['mac'] / 1e6:,.2f} M elements of memory access an image"
    )
    for measure in (name.removeprefix("cost_") for name in row if name.startswith("cost_")):
        budget = row.get(f"budget_{measure}")
        within = f", budget {cost.show(budget)}" if budget else ""
        print(
            f"resources   {measure} of {'the likeliest' if chosen else 'the'} child as deployed "
            f"{cost.show(row[f'child_{measure}'])}, expected "
            f"{cost.show(row[f'cost_{measure}'])}{within}; eta {row[f'eta_{measure}']:.4f}"
        )


if __name__ == "__main__":
    options.entry(main)
