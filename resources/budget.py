"""Resource constraints: estimators of an architecture's expected cost, and the objective that meets a budget.

SNAS (Xie et al. 2019, section 2.4) adds eta E_Z[C(Z)] to the loss. C is linear in Z and a sum over edges, so that its
gradient in alpha is had in three ways, all with credit per edge.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from resources import cost
from resources.cost import Table
from sampling import Z

Alphas = list[nn.Parameter]

GAIN = 4.0  # eta for an excess as large as what the average architecture costs
USE = 0.95  # of a budget, where a child that exceeds it has to change
RAMP = 0.5  # part of the run in which the budget falls to its value


def expected(table: Table, alphas: Alphas) -> Tensor:
    """E[C] = fixed + sum_ek softmax(alpha_e)_k C_ek."""
    parts = zip(alphas, (table.normal, table.reduce), strict=True)
    return table.fixed + torch.stack([(F.softmax(alpha, -1) * costs).sum() for alpha, costs in parts]).sum()


def expectation(table: Table, alphas: Alphas, z: Z) -> Tensor:
    """E[C] itself: exact, without noise; Z plays no part."""
    return expected(table, alphas)


def reparametrization(table: Table, alphas: Alphas, z: Z) -> Tensor:
    """C(Z) = fixed + sum_ek Z_ek C_ek through the very Z that the network ran.

    Its gradient is that of E[C] under the Concrete distribution, which tends to the exact one as T falls to 0.
    """
    parts = zip(z, (table.normal, table.reduce), strict=True)
    return table.fixed + torch.stack([_mean(draw * costs) for draw, costs in parts]).sum()


def policy_gradient(table: Table, alphas: Alphas, z: Z) -> Tensor:
    """C of the one-hot choice next to Z; its gradient is the score function's, unbiased at every temperature.

    argmax_k Z_ek is distributed as softmax(alpha_e) (the Gumbel-max trick), so that
    sum_e (C_e(k) - b_e) grad log softmax(alpha_e)_k is an unbiased estimate, with the baseline b_e = E[C_e].
    """
    total = torch.zeros((), device=alphas[0].device)
    for draw, alpha, costs in zip(z, alphas, (table.normal, table.reduce), strict=True):
        chosen = F.one_hot(draw.detach().argmax(-1), alpha.shape[-1]).to(alpha.dtype)  # ([cells,] E, O)
        log_p = F.log_softmax(alpha, -1)  # (E, O)
        value = (chosen * costs).sum(-1, keepdim=True)  # ([cells,] E, 1)
        baseline = (log_p.detach().exp() * costs).sum(-1, keepdim=True)  # (E, 1)
        score = (value - baseline) * chosen * log_p
        total = total + _mean(chosen * costs) + _mean(score) - _mean(score).detach()
    return table.fixed + total


def _mean(values: Tensor) -> Tensor:
    """The sum over edges and operations, the mean over cells that drew their own."""
    return values.sum((-2, -1)).mean()


ESTIMATORS: Mapping[str, Callable[[Table, Alphas, Z], Tensor]] = {
    "expectation": expectation,
    "reparametrization": reparametrization,
    "policy_gradient": policy_gradient,
}


def child_cost(table: Table, alphas: Alphas) -> Tensor:
    """The cost of the child that alpha stands for: the argmax of every edge."""
    parts = zip(alphas, (table.normal, table.reduce), strict=True)
    return table.fixed + torch.stack([costs.gather(-1, a.argmax(-1, keepdim=True)).sum() for a, costs in parts]).sum()


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
    log_p = torch.cat([F.log_softmax(alpha, -1) for alpha in alphas]).cpu().double()  # (2 E, O)
    edges, ops = log_p.shape
    one_each = LinearConstraint(np.kron(np.eye(edges), np.ones(ops)), 1, 1)
    for share in (least, 0.0) if least and len(bounds) == 1 else (0.0,):
        rules = [one_each]
        for table, budget in bounds:
            costs = torch.cat([table.normal, table.reduce]).cpu().double().flatten().numpy()[None] / budget
            fixed = table.fixed / budget
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


class Constrained(nn.Module):
    """Cross-entropy + sum over measures of eta_m times a penalty: an objective of search.run_search.

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

    eta: Tensor
    step: Tensor

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
        self.alphas, self.budgets, self.steps = alphas, dict(budgets), steps
        self.estimate, self.logarithmic = ESTIMATORS[estimator], logarithmic
        self._free = eta == 0.0
        self._set_tables(tables)
        self.register_buffer("eta", torch.tensor([0.0 if measure in budgets else eta for measure in tables]))
        self.register_buffer("step", torch.zeros(()))

    def _set_tables(self, tables: Mapping[str, Table]) -> None:
        self._tables, self._uniform = dict(tables), {measure: table.uniform() for measure, table in tables.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Constrained":
        super()._apply(fn, recurse)
        self._tables = {m: Table(t.fixed, fn(t.normal), fn(t.reduce)) for m, t in self._tables.items()}
        return self

    def get_extra_state(self) -> dict[str, Any]:
        """Tables and budgets: measured latencies would not be the same when a run resumes."""
        tables = {m: {"fixed": t.fixed, "normal": t.normal, "reduce": t.reduce} for m, t in self._tables.items()}
        return {"tables": tables, "budgets": dict(self.budgets)}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take those of the checkpoint."""
        device, self.budgets = self.eta.device, dict(state["budgets"])
        self._set_tables(
            {m: Table(t["fixed"], t["normal"].to(device), t["reduce"].to(device)) for m, t in state["tables"].items()}
        )

    def forward(self, logits: Tensor, targets: Tensor, z: Z) -> tuple[Tensor, dict[str, Tensor]]:
        """See search.Objective."""
        loss = F.cross_entropy(logits.float(), targets)
        for index, (measure, table) in enumerate(self._tables.items()):
            if measure not in self.budgets and self._free:
                continue  # eta = 0 is main.py, bit for bit
            penalty = (self.estimate(table, self.alphas(), z) - table.fixed) / self._uniform[measure]
            if self.logarithmic:
                penalty = torch.log2(1 + penalty)
            loss = loss + self.eta[index] * penalty
        return loss, {}

    @torch.no_grad()
    def after_step(self) -> None:
        """Set the multipliers; nothing waits for the device."""
        self.step += 1
        alphas = self.alphas()
        for index, (measure, table) in enumerate(self._tables.items()):
            if measure not in self.budgets:
                continue
            budget = self.budgets[measure]
            start = max(budget, table.fixed + self._uniform[measure])
            limit = start + (budget - start) * (self.step / (RAMP * self.steps)).clamp_max(1)
            least = torch.minimum(expected(table, alphas), child_cost(table, alphas))
            self.eta[index] = (GAIN * (least - limit) / self._uniform[measure]).clamp_min(0)

    @torch.no_grad()
    def after_epoch(self) -> None:
        """Project alpha onto the architectures within the budgets, after the first RAMP of the run."""
        bounds = [(self._tables[measure], budget) for measure, budget in self.budgets.items()]
        if self.step.item() >= RAMP * self.steps:
            project(self.alphas(), bounds, USE)

    @torch.no_grad()
    def report(self) -> dict[str, Any]:
        """The columns of metrics.jsonl: expected cost, the child's, the budget, eta, per measure."""
        row: dict[str, Any] = {}
        alphas = self.alphas()
        for index, (measure, table) in enumerate(self._tables.items()):
            row[f"cost_{measure}"] = expected(table, alphas).item()
            row[f"child_{measure}"] = child_cost(table, alphas).item()
            if measure in self.budgets:
                row[f"budget_{measure}"] = self.budgets[measure]
            row[f"eta_{measure}"] = self.eta[index].item()
        return row | {"eta": self.eta.sum().item()}

    def summary(self, row: Mapping[str, Any]) -> str:
        """How far from the budget, for the line of an epoch."""
        parts = []
        for measure in self._tables:
            child, eta = row[f"child_{measure}"], row[f"eta_{measure}"]
            text = f"{measure} {cost.show(child)} (expected {cost.show(row[f'cost_{measure}'])}"
            if measure in self.budgets:
                text += f"; {100 * (child / self.budgets[measure] - 1):+.1f} % of the budget"
            parts.append(f"{text}), eta {eta:.3f}")
        return "  ".join(parts)
