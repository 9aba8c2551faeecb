"""Resource constraints: estimators of an architecture's expected cost, and the objective that meets a budget.

SNAS (Xie et al. 2019, section 2.4) adds eta E_Z[C(Z)] to the loss. C is linear in Z and a sum over edges, so that its
gradient in alpha is had in three ways, all with credit per edge.
"""

from collections.abc import Callable, Mapping
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from loading.sets import DataInfo
from model_search import Network
from objective import Objective, Terms
from options import UserError
from options.constraint_option import LEVELS, ConstraintOptions
from options.default_option import TrainOptions
from resources import cost, latency
from resources.cost import Deployed, Table
from resources.projection import Alphas, child_cost, project, rows
from sampling import Z

GAIN = 4.0  # eta for an excess as large as what the average architecture costs
USE = 0.95  # of a budget, where a child that exceeds it has to change
RAMP = 0.5  # part of the run in which the budget falls to its value


def expected(table: Table, alphas: Alphas) -> Tensor:
    """E[C] = fixed + sum_ek softmax(alpha_e)_k C_ek."""
    return table.fixed + (F.softmax(rows(alphas), -1) * table.costs).sum()


def expectation(table: Table, alphas: Alphas, z: Z) -> Tensor:
    """E[C] itself: exact, without noise; Z plays no part."""
    return expected(table, alphas)


def reparametrization(table: Table, alphas: Alphas, z: Z) -> Tensor:
    """C(Z) = fixed + sum_ek Z_ek C_ek through the very Z that the network ran.

    Its gradient is that of E[C] under the Concrete distribution, which tends to the exact one as T falls to 0.
    """
    return table.fixed + (rows(z) * table.costs).sum()


def policy_gradient(table: Table, alphas: Alphas, z: Z) -> Tensor:
    """C of the one-hot choice next to Z; its gradient is the score function's, unbiased at every temperature.

    argmax_k Z_ek is distributed as softmax(alpha_e) (the Gumbel-max trick), so that
    sum_e (C_e(k) - b_e) grad log softmax(alpha_e)_k is an unbiased estimate, with the baseline b_e = E[C_e].
    """
    ops = table.costs.shape[-1]
    chosen = rows([F.one_hot(draw.detach().argmax(-1), ops).to(table.costs.dtype) for draw in z])  # (2 E, O)
    log_p = F.log_softmax(rows(alphas), -1)  # (2 E, O)
    baseline = (log_p.detach().exp() * table.costs).sum(-1, keepdim=True)  # (2 E, 1)
    score = (chosen * (table.costs - baseline) * log_p).sum()
    return table.fixed + (chosen * table.costs).sum() + score - score.detach()


ESTIMATORS: Mapping[str, Callable[[Table, Alphas, Z], Tensor]] = {
    "expectation": expectation,
    "reparametrization": reparametrization,
    "policy_gradient": policy_gradient,
}


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
        measure: gives tables and budgets to take instead when the search begins, where they are not known before.
    """

    fixed: Tensor  # (M,), a row for every measure
    costs: Tensor  # (M, 2 E, O) float64
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
        measure: Callable[[], tuple[Mapping[str, Table], Mapping[str, float]]] | None = None,
    ) -> None:
        super().__init__()
        self.alphas, self.steps, self.measures = alphas, steps, list(tables)
        self.estimate, self.logarithmic = ESTIMATORS[estimator], logarithmic
        self.bounded = [measure in budgets for measure in tables]
        # eta = 0 without a budget is main.py, bit for bit
        self.priced, self.measure = [bounded or eta != 0.0 for bounded in self.bounded], measure
        # Buffers, since measured latencies would not be the same when a run resumes
        for name in ("fixed", "costs", "budgets"):
            self.register_buffer(name, None)
        self._take(tables, budgets)
        self.register_buffer("eta", torch.tensor([0.0 if bounded else eta for bounded in self.bounded]))
        self.register_buffer("step", torch.zeros(()))
        self.register_load_state_dict_pre_hook(_from_tables)

    def _take(self, tables: Mapping[str, Table], budgets: Mapping[str, float]) -> None:
        self.fixed = torch.tensor([float(tables[name].fixed) for name in self.measures], dtype=torch.float64)
        self.costs = torch.stack([tables[name].costs.double() for name in self.measures])
        self.budgets = torch.tensor([budgets.get(name, inf) for name in self.measures], dtype=torch.float64)

    def begin(self) -> None:
        """Measure what has to be measured."""
        if self.measure is not None:
            self._take(*self.measure())

    def table(self, index: int) -> Table:
        """Of a measure."""
        return Table(self.fixed[index], self.costs[index])

    def forward(self, logits: Tensor, targets: Tensor, z: Z) -> tuple[Tensor, Terms]:
        """See Objective."""
        loss, terms = super().forward(logits, targets, z)
        for index, priced in enumerate(self.priced):
            if priced:
                loss = loss + self._priced(index, self.estimate(self.table(index), self.alphas(), z))
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
    def after_epoch(self, optimizer: Optimizer) -> None:
        """Project alpha onto the architectures within the budgets, after the first RAMP of the run."""
        bounds = [(self.table(i), self.budgets[i].item()) for i, bounded in enumerate(self.bounded) if bounded]
        if self.step.item() >= RAMP * self.steps:
            project(self.alphas(), bounds, USE, optimizer)

    @torch.no_grad()
    def price(self, z: Z) -> float:
        """Of the child of a one-hot Z: the penalties of fixed eta; infinite beyond a budget."""
        total = 0.0
        for index, bounded in enumerate(self.bounded):
            table = self.table(index)
            cost = reparametrization(table, self.alphas(), z)
            if bounded and cost > self.budgets[index]:
                return inf
            if not bounded:
                total += self._priced(index, cost).item()
        return total

    def _priced(self, index: int, cost: Tensor) -> Tensor:
        """eta times the penalty of a cost, of a measure."""
        table = self.table(index)
        penalty = (cost - table.fixed) / table.uniform()
        return self.eta[index] * (torch.log2(1 + penalty) if self.logarithmic else penalty)

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
    counted, measures = cost.tables(opt.space, opt.nodes, Deployed.planned(info, opt)), opt.measures()
    unknown = {"latency_ms": Table(0.0, torch.zeros_like(counted["mac"].costs))} if "latency_ms" in measures else {}

    def measure() -> tuple[dict[str, Table], dict[str, float]]:
        tables = counted | {"latency_ms": _latencies(info, opt)}
        return tables, find_budgets(opt, tables)

    tables = counted | unknown
    return Constrained(
        network.alphas,
        {measure: tables[measure] for measure in measures},
        dict.fromkeys(opt.bounded(), inf) if unknown else find_budgets(opt, tables),
        opt.eta,
        opt.epochs * info.steps(opt.batch_size),
        opt.estimator,
        opt.penalty == "log",
        measure if unknown else None,
    )


def _latencies(info: DataInfo, opt: ConstraintOptions) -> Table:
    """Measured on this machine, or found in cache_dir; with a note where the sum over operations says too little."""
    found = latency.find(opt.space, opt.nodes, Deployed.planned(info, opt), opt.cache_dir)
    print(f"latency  {found.summary()}")
    if found.correlation < 0.7:
        print("note: that is a poor prediction; measure again on a quiet machine (remove latency-*.json in cache_dir)")
    return found.table(opt.space, opt.nodes, Deployed.planned(info, opt))


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
                "--child_init_channels, --child_layers and --child_stem change that"
            )
    if opt.level != "none":
        table = tables[opt.measure]
        budgets[opt.measure] = float(table.fixed + LEVELS[opt.level] * table.uniform())
    return budgets
