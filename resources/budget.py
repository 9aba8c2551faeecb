"""Resource constraints: estimators of an architecture's expected cost, and the objective that meets a budget.

SNAS (Xie et al. 2019, section 2.4) adds eta E_Z[C(Z)] to the loss. C is linear in Z and a sum over edges, so that its
gradient in alpha is had in three ways, all with credit per edge.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from loading.batches import DataInfo
from model_search import Network
from objective import Objective, Terms
from options import UserError
from options.constraint_option import LEVELS, ConstraintOptions
from options.default_option import TrainOptions
from resources import cost, latency
from resources.cost import Deployed, Table
from sampling import Z

Alphas = Sequence[nn.Parameter]  # normal, reduce: each (E, O)

GAIN = 4.0  # eta for an excess as large as what the average architecture costs
USE = 0.95  # of a budget, where a child that exceeds it has to change
RAMP = 0.5  # part of the run in which the budget falls to its value


def _rows(z: Sequence[Tensor]) -> Tensor:
    """Both cells' rows as a Table has them, (2 E, O); the mean over cells that drew their own."""
    return torch.cat([draw.flatten(0, -3).mean(0) if draw.dim() > 2 else draw for draw in z])


def expected(table: Table, alphas: Alphas) -> Tensor:
    """E[C] = fixed + sum_ek softmax(alpha_e)_k C_ek."""
    return table.fixed + (F.softmax(_rows(alphas), -1) * table.costs).sum()


def expectation(table: Table, alphas: Alphas, z: Z) -> Tensor:
    """E[C] itself: exact, without noise; Z plays no part."""
    return expected(table, alphas)


def reparametrization(table: Table, alphas: Alphas, z: Z) -> Tensor:
    """C(Z) = fixed + sum_ek Z_ek C_ek through the very Z that the network ran.

    Its gradient is that of E[C] under the Concrete distribution, which tends to the exact one as T falls to 0.
    """
    return table.fixed + (_rows(z) * table.costs).sum()


def policy_gradient(table: Table, alphas: Alphas, z: Z) -> Tensor:
    """C of the one-hot choice next to Z; its gradient is the score function's, unbiased at every temperature.

    argmax_k Z_ek is distributed as softmax(alpha_e) (the Gumbel-max trick), so that
    sum_e (C_e(k) - b_e) grad log softmax(alpha_e)_k is an unbiased estimate, with the baseline b_e = E[C_e].
    """
    ops = table.costs.shape[-1]
    chosen = _rows([F.one_hot(draw.detach().argmax(-1), ops).to(table.costs.dtype) for draw in z])  # (2 E, O)
    log_p = F.log_softmax(_rows(alphas), -1)  # (2 E, O)
    baseline = (log_p.detach().exp() * table.costs).sum(-1, keepdim=True)  # (2 E, 1)
    score = (chosen * (table.costs - baseline) * log_p).sum()
    return table.fixed + (chosen * table.costs).sum() + score - score.detach()


ESTIMATORS: Mapping[str, Callable[[Table, Alphas, Z], Tensor]] = {
    "expectation": expectation,
    "reparametrization": reparametrization,
    "policy_gradient": policy_gradient,
}


def child_cost(table: Table, alphas: Alphas) -> Tensor:
    """The cost of the child that alpha stands for: the argmax of every edge."""
    return table.fixed + table.costs.gather(-1, _rows(alphas).argmax(-1, keepdim=True)).sum()


@torch.no_grad()
def project(alphas: Alphas, bounds: Sequence[tuple[Table, float]], least: float = 0.0) -> None:
    """Change alpha as little as it takes for its child to be within all budgets: the likeliest one that is becomes it.

    argmax_x sum_ek x_ek log p_ek subject to sum_ek x_ek C_ek <= B - fixed is an integer programme, solved exactly. On
    every edge where it differs from the argmax the two logits are exchanged.

    Args:
        alphas: changed in place, and only if the child exceeds a budget.
        bounds: (table, budget) pairs, each within the table's range.
        least: the share of a single budget that the new child uses, if any architecture does.
    """
    if all(child_cost(table, alphas) <= budget for table, budget in bounds):
        return
    log_p = F.log_softmax(_rows(alphas), -1).cpu().double()  # (2 E, O)
    edges, ops = log_p.shape
    one_each = LinearConstraint(np.kron(np.eye(edges), np.ones(ops)), 1, 1)
    for share in (least, 0.0) if least and len(bounds) == 1 else (0.0,):
        rules = [one_each]
        for table, budget in bounds:
            costs = table.costs.cpu().double().flatten().numpy()[None] / budget
            fixed = float(table.fixed) / budget
            rules.append(LinearConstraint(costs, share - fixed if share else -np.inf, 1 - fixed))
        found = milp(
            -log_p.flatten().numpy(),
            constraints=rules,
            integrality=np.ones(edges * ops),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
        if found.x is not None:
            break
    if found.x is None:
        raise ValueError("no architecture is within all budgets")
    chosen = torch.from_numpy(found.x).view(edges, ops).argmax(-1).to(alphas[0].device)
    for alpha, best in zip(alphas, chosen.split([len(alpha) for alpha in alphas]), strict=True):
        top = alpha.argmax(-1, keepdim=True)
        wanted = best[:, None]
        high, low = alpha.gather(-1, top), alpha.gather(-1, wanted)
        high = torch.where((top != wanted) & (high == low), torch.nextafter(high, high + 1), high)  # a tie
        alpha.scatter_(-1, top, low).scatter_(-1, wanted, high)


class Constrained(Objective):
    """Cross-entropy + sum over measures of eta_m times a penalty.

    The penalty is (C - fixed) / U, U the same of the uniform architecture: 1 means as dear as the average of all
    operations, in every measure and for every size of network; or log2(1 + that), which is 1 there too.

    Without budgets eta is fixed. With a budget B, eta is a multiplier that follows the excess after every step,

        eta = GAIN * max(0, min(E[C], C(child)) - B_t) / U,

    where B_t falls from the average architecture's cost to B over the first RAMP of the run, so that the search chooses
    what it gives up. From then on alpha is projected after every epoch: where the child exceeds a budget, the likeliest
    architecture within all of them becomes the child (one that uses a single budget up to USE). Late in a search
    p_alpha is nearly decided and its gradients vanish, so that no eta would bring the child to where it has to be, and
    one that adds up (an integral) has it end far below.

    Args:
        alphas: gives [alpha_normal, alpha_reduce].
        tables: what the architectures cost, per measure that matters, deployed as they will be.
        budgets: the largest cost allowed, per measure; those without one have the fixed eta.
        eta: the fixed weight; multipliers start at 0.
        steps: of the whole run; budgets need them.
        estimator: a name of ESTIMATORS.
        logarithmic: the penalty's form.
    """

    fixed: Tensor  # (M,), a row for every measure
    costs: Tensor  # (M, 2 E, O)
    budgets: Tensor  # (M,), inf where there is none
    eta: Tensor  # (M,)
    step: Tensor  # ()

    def __init__(
        self,
        alphas: Callable[[], Alphas],
        tables: Mapping[str, Table],
        budgets: Mapping[str, float],
        eta: float,
        steps: int = 1,
        estimator: str = "expectation",
        logarithmic: bool = False,
    ) -> None:
        super().__init__()
        self.alphas, self.steps, self.measures = alphas, steps, list(tables)
        self.estimate, self.logarithmic = ESTIMATORS[estimator], logarithmic
        self.bounded = [measure in budgets for measure in tables]
        # eta = 0 without a budget is main.py, bit for bit
        self.priced = [bounded or eta != 0.0 for bounded in self.bounded]
        # Buffers, since measured latencies would not be the same when a run resumes
        self.register_buffer("costs", torch.stack([table.costs for table in tables.values()]))
        fixed, limits = [float(table.fixed) for table in tables.values()], [budgets.get(name, inf) for name in tables]
        self.register_buffer("fixed", torch.tensor(fixed, dtype=torch.float64))
        self.register_buffer("budgets", torch.tensor(limits, dtype=torch.float64))
        self.register_buffer("eta", torch.tensor([0.0 if bounded else eta for bounded in self.bounded]))
        self.register_buffer("step", torch.zeros(()))
        self.register_load_state_dict_pre_hook(_from_tables)

    def table(self, index: int) -> Table:
        """Of a measure."""
        return Table(self.fixed[index], self.costs[index])

    def forward(self, logits: Tensor, targets: Tensor, z: Z) -> tuple[Tensor, Terms]:
        """See Objective."""
        loss, terms = super().forward(logits, targets, z)
        for index, priced in enumerate(self.priced):
            if priced:
                table = self.table(index)
                penalty = (self.estimate(table, self.alphas(), z) - table.fixed) / table.uniform()
                loss = loss + self.eta[index] * (torch.log2(1 + penalty) if self.logarithmic else penalty)
        return loss, terms

    @torch.no_grad()
    def after_step(self) -> None:
        """Set the multipliers; nothing waits for the device."""
        self.step += 1
        alphas = self.alphas()
        for index, bounded in enumerate(self.bounded):
            if bounded:
                table, budget = self.table(index), self.budgets[index]
                start = torch.maximum(budget, table.fixed + table.uniform())
                limit = start + (budget - start) * (self.step / (RAMP * self.steps)).clamp_max(1)
                least = torch.minimum(expected(table, alphas), child_cost(table, alphas))
                self.eta[index] = (GAIN * (least - limit) / table.uniform()).clamp_min(0)

    @torch.no_grad()
    def after_epoch(self) -> None:
        """Project alpha onto the architectures within the budgets, after the first RAMP of the run."""
        bounds = [(self.table(i), self.budgets[i].item()) for i, bounded in enumerate(self.bounded) if bounded]
        if self.step.item() >= RAMP * self.steps:
            project(self.alphas(), bounds, USE)

    @torch.no_grad()
    def report(self) -> dict[str, Any]:
        """Expected cost, the child's, the budget, eta, per measure."""
        row: dict[str, Any] = {}
        alphas = self.alphas()
        for index, measure in enumerate(self.measures):
            table = self.table(index)
            row[f"cost_{measure}"] = expected(table, alphas).item()
            row[f"child_{measure}"] = child_cost(table, alphas).item()
            if self.bounded[index]:
                row[f"budget_{measure}"] = self.budgets[index].item()
            row[f"eta_{measure}"] = self.eta[index].item()
        return row | {"eta": self.eta.sum().item()}

    def summary(self, row: Mapping[str, Any]) -> str:
        """How far from the budget."""
        parts = []
        for measure in self.measures:
            child, eta = row[f"child_{measure}"], row[f"eta_{measure}"]
            text = f"{measure} {cost.show(child)} (expected {cost.show(row[f'cost_{measure}'])}"
            if f"budget_{measure}" in row:
                text += f"; {100 * (child / row[f'budget_{measure}'] - 1):+.1f} % of the budget"
            parts.append(f"{text}), eta {eta:.3f}")
        return "  ".join(parts)


def _from_tables(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
    """Checkpoints of earlier versions have tables by measure and cell instead of the buffers."""
    stored = state.pop("_extra_state", None)
    if stored is not None:
        tables = stored["tables"].values()
        state["costs"] = torch.stack([torch.cat([t["normal"], t["reduce"]]) for t in tables])
        state["fixed"] = torch.tensor([t["fixed"] for t in tables], dtype=torch.float64)
        limits = [stored["budgets"].get(name, inf) for name in stored["tables"]]
        state["budgets"] = torch.tensor(limits, dtype=torch.float64)


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
    steps = opt.epochs * info.steps(opt.batch_size)
    return Constrained(
        network.alphas,
        {measure: tables[measure] for measure in measures},
        budgets,
        opt.eta,
        steps,
        opt.estimator,
        opt.penalty == "log",
    )


def _latencies(info: DataInfo, opt: ConstraintOptions) -> Table:
    """Measured on this machine, or found in cache_dir; with a note where the sum over operations says too little."""
    found = latency.find(opt.space, opt.nodes, deployed(info, opt), opt.cache_dir)
    print(f"latency  {found.summary()}")
    if found.correlation < 0.7:
        print("note: that is a poor prediction; measure again on a quiet machine (remove latency-*.json in cache_dir)")
    return found.table(opt.space, opt.nodes, deployed(info, opt))


def deployed(info: DataInfo, opt: ConstraintOptions) -> Deployed:
    """The child's network, of which the budget speaks."""
    child = Deployed.of(info, opt.child_init_channels or opt.init_channels, opt.child_layers or opt.layers)
    size = opt.child_image_size
    return replace(child, image_size=(size, size)) if size else child


def find_budgets(opt: ConstraintOptions, tables: dict[str, Table]) -> dict[str, float]:
    """The budgets of the options by measure, each within reach."""
    budgets = dict(opt.targets())
    for measure, budget in budgets.items():
        low, high = tables[measure].range()
        if not low <= budget < high:
            what = "below the cheapest" if budget < low else "not below the dearest"
            raise UserError(
                f"--target_{measure} {cost.show(budget)} is {what} architecture of this size; children here have "
                f"{cost.show(low)} to {cost.show(high)}, "
                f"{cost.show(float(tables[measure].fixed + tables[measure].uniform()))} on average; "
                "--child_init_channels and --child_layers change that"
            )
    if opt.level != "none":
        table = tables[opt.measure]
        budgets[opt.measure] = float(table.fixed + LEVELS[opt.level] * table.uniform())
    return budgets
