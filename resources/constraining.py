"""The resource-constrained search: from its options to its objective."""

from loading.batches import DataInfo
from model_search import Network
from options import UserError
from options.constraint_option import LEVELS, ConstraintOptions
from options.default_option import TrainOptions
from resources import cost, latency
from resources.budget import Constrained


def make_objective(network: Network, info: DataInfo, opt: TrainOptions) -> Constrained:
    """The objective of the options.

    Raises:
        UserError: a budget that no architecture meets, or that all do.
    """
    assert isinstance(opt, ConstraintOptions)
    tables = cost.tables(opt.space, opt.nodes, deployed(info, opt))
    by_measure = opt.level != "none" or not opt.targets()  # --measure is about something
    if opt.target_latency_ms is not None or (by_measure and opt.measure == "latency_ms"):
        tables["latency_ms"] = _latencies(info, opt)
    budgets = find_budgets(opt, tables)
    measures = list(budgets) or [opt.measure]
    steps = opt.epochs * max(1, sum(info.counts["train"]) // opt.batch_size)
    return Constrained(
        network.alphas,
        {measure: tables[measure] for measure in measures},
        budgets,
        opt.eta,
        steps,
        opt.estimator,
        opt.penalty == "log",
    )


def _latencies(info: DataInfo, opt: ConstraintOptions) -> cost.Table:
    """Measured on this machine, or found in cache_dir; with a note where the sum over operations says too little."""
    found = latency.find(opt.space, opt.nodes, deployed(info, opt), opt.cache_dir)
    print(f"latency  {found.summary()}")
    if found.correlation < 0.7:
        print("note: that is a poor prediction; measure again on a quiet machine (remove latency-*.json in cache_dir)")
    return found.table(opt.space, opt.nodes, deployed(info, opt))


def deployed(info: DataInfo, opt: ConstraintOptions) -> cost.Deployed:
    """The child's network, of which the budget speaks."""
    height, width = info.image_size
    if opt.child_image_size:
        height = width = opt.child_image_size
    return cost.Deployed(
        opt.child_init_channels or opt.init_channels,
        opt.child_layers or opt.layers,
        (height, width),
        len(info.classes),
        info.channels,
    )


def find_budgets(opt: ConstraintOptions, tables: dict[str, cost.Table]) -> dict[str, float]:
    """The budgets of the options by measure, each within reach."""
    budgets = dict(opt.targets())
    for measure, budget in budgets.items():
        low, high = tables[measure].range()
        if not low <= budget < high:
            what = "below the cheapest" if budget < low else "not below the dearest"
            raise UserError(
                f"--target_{measure} {cost.show(budget)} is {what} architecture of this size; children here have "
                f"{cost.show(low)} to {cost.show(high)}, "
                f"{cost.show(tables[measure].fixed + tables[measure].uniform())} on average; "
                "--child_init_channels and --child_layers change that"
            )
    if opt.level != "none":
        table = tables[opt.measure]
        budgets[opt.measure] = table.fixed + LEVELS[opt.level] * table.uniform()
    return budgets
