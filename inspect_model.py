"""Reload a search's checkpoint, print its state and the derived genotype, and draw both cells."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import options
from options import UserError
from options.constraint_option import ConstraintOptions, DeployedOptions

if TYPE_CHECKING:
    from genotypes import Genotype
    from resources.cost import Deployed


@dataclass(frozen=True)
class InspectOptions(DeployedOptions):
    """What to look at. Everything else comes from the checkpoint."""

    experiment: str = "search"
    """Name of the experiment: a folder of experiments_dir."""
    epoch: str = "last"
    """Epoch whose checkpoint is read, or last."""
    out: str | None = None
    """A file to write the genotype to, as retrain.py --genotype takes it. Nothing is overwritten."""
    visualize: bool = True
    """Draw the cells to visualizations_dir/EXPERIMENT/."""
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
        if Path(self.experiment).name != self.experiment:
            raise UserError(f"--experiment {self.experiment} is not the name of a folder; give --experiments_dir too")


class Inspected(NamedTuple):
    """What inspection found."""

    epoch: int
    metrics: dict[str, Any]
    genotype: "Genotype"
    params: int
    flops: int
    mac: int
    files: list[Path]


def main(argv: Sequence[str] | None = None) -> Inspected:
    """Print and draw a checkpoint; returns what was printed."""
    opt = options.parse(InspectOptions, argv, "inspect_model.py", __doc__)
    import genotypes
    import utils
    import visualize
    from child import cells
    from loading.sets import DataInfo
    from resources.cost import Deployed
    from training import checkpoint

    folder, place = Path(opt.experiments_dir) / opt.experiment, Path(opt.visualizations_dir) / opt.experiment
    content = checkpoint.load(_checkpoint_path(folder, opt))
    content["metrics"] = _Row(content["metrics"])
    if opt.visualize:
        utils.claim(place, folder, "visualizations_dir")
    if opt.out is not None:
        if Path(opt.out).exists():
            raise UserError(f"--out {opt.out} exists; name another file")
        utils.writable(Path(opt.out).parent, "out")
    run = options.restore(ConstraintOptions, content["options"])  # those of main.py and more
    wanted = {field.name: getattr(opt, field.name) for field in fields(DeployedOptions)}
    run = replace(run, **{name: value for name, value in wanted.items() if value is not None})
    state = content["parts"]["network"]
    alphas = [state["alpha_normal"], state["alpha_reduce"]]
    genotype = genotypes.derive(alphas[0], alphas[1], run.space, "top2" if opt.rule == "top2" else "argmax")
    chosen = opt.rule == "search" and run.select > 0 and content["epoch"] == run.epochs
    if chosen and not (folder / "genotype.json").is_file():
        print("note: --select was interrupted, here is the likeliest child; --resume True goes on")
        chosen = False
    if chosen:
        genotype = cells.read_genotype(folder / "genotype.json")
    info = DataInfo(**content["data"])
    deployed = Deployed.planned(info, run)
    costs = deployed.price(genotype)
    _report(content, run, alphas, genotype, chosen)
    _report_costs(deployed, costs, content["metrics"], chosen)
    files: list[Path] = []
    if opt.out is not None:
        utils.write_atomic(Path(opt.out), genotype.to_json() + "\n")
        print(f"written     {opt.out}")
    if opt.visualize:
        plain = opt.rule == "search" or (opt.rule == "argmax" and not run.select)
        ending = f"_epoch_{content['epoch']}" + ("" if plain else f"_{opt.rule}")
        files = visualize.draw_genotype(genotype, place, ending, alphas)
        print("pictures    " + ", ".join(str(path) for path in files))
    return Inspected(content["epoch"], content["metrics"], genotype, **costs, files=files)


def _checkpoint_path(folder: Path, opt: InspectOptions) -> Path:
    from training import checkpoint

    known = checkpoint.epochs(folder, "weights")
    if not known:
        base = Path(opt.experiments_dir)
        others = sorted(p.name for p in base.iterdir() if checkpoint.epochs(p, "weights")) if base.is_dir() else []
        hint = f"experiments with one: {', '.join(others)}" if others else f"{base} has none: run main.py first"
        raise UserError(f"--experiment {opt.experiment}: no search checkpoint in {folder}; {hint}")
    epoch = known[-1] if opt.epoch == "last" else int(opt.epoch)
    if epoch not in known:
        raise UserError(f"--epoch {epoch} is not kept in {folder}; there are {', '.join(map(str, known))}")
    return checkpoint.path_of(folder, "weights", epoch)


class _Row(dict[str, Any]):
    """A row of metrics.jsonl."""

    def __missing__(self, column: str) -> Any:
        raise UserError(f"the checkpoint has no {column} among its metrics: it is not main.py's; take another --epoch")


def _report(
    content: dict[str, Any], run: ConstraintOptions, alphas: list[Any], genotype: "Genotype", chosen: bool
) -> None:
    import sampling
    import search

    info, row = content["data"], content["metrics"]
    height, width = info["image_size"]
    print(f"experiment  {run.name}, epoch {content['epoch']} of {run.epochs}, seed {run.seed}")
    print(f"data        {run.dataset}: {len(info['classes'])} classes, {width}x{height}x{info['channels']}")
    print(f"loss        train {row['train_loss']:.4f}, valid {row['valid_loss']:.4f}")
    print(
        f"accuracy    train {row['train_acc']:.2f} %, valid {row['valid_acc']:.2f} % (a sampled Z), "
        f"child {row['child_valid_acc']:.2f} % (argmax, the supernet's weights)"
    )
    print(f"balanced    valid {row['valid_balanced_acc']:.2f} %, child {row['child_valid_balanced_acc']:.2f} %")
    print(f"temperature {row['temperature']:.4f}")
    uniform = sampling.entropy(alphas[0] * 0).item()
    found = [sampling.entropy(alpha).item() for alpha in alphas]
    print(f"entropy     normal {found[0]:.2f}, reduce {found[1]:.2f} nats (uniform: {uniform:.2f})")
    leads = [sampling.margin(alpha).item() for alpha in alphas]
    print(f"margin      normal {leads[0]:.3f}, reduce {leads[1]:.3f}: the lead of the likeliest op, mean over edges")
    for warning in search.doubts(genotype, run.layers, chosen, *leads):
        print(warning)
    print(f"genotype    {'chosen by --select: ' if chosen else ''}an op:input for each edge kept")
    for kind, nodes, _ in genotype.cells():
        for index, node in enumerate(nodes):
            edges = "  ".join(f"{op}:{source}" for op, source in node) or "no input: zeros"
            print(f"  {kind:6s} node {index}: {edges}")


def _report_costs(deployed: "Deployed", costs: dict[str, int], row: dict[str, Any], chosen: bool) -> None:
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
