"""Resource constraints: estimators of an architecture's expected cost, and the objective that meets a budget.

SNAS (Xie et al. 2019, section 2.4) adds eta E_Z[C(Z)] to the loss. C is linear in Z and a sum over edges, so that its
gradient in alpha is had in three ways, all with credit per edge.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cost import Table
from sampling import Z

Alphas = list[nn.Parameter]


def expectation(table: Table, alphas: Alphas, z: Z) -> Tensor:
    """E[C] = fixed + sum_ek softmax(alpha_e)_k C_ek: the exact value, without noise; Z plays no part."""
    parts = zip(alphas, (table.normal, table.reduce), strict=True)
    return table.fixed + torch.stack([(F.softmax(alpha, -1) * costs).sum() for alpha, costs in parts]).sum()


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


class Constrained(nn.Module):
    """Cross-entropy + sum over measures of eta_m times a penalty: an objective of search.run_search.

    The penalty is (C - fixed) / U, U the same of the uniform architecture: 1 means as dear as the average of all
    operations, in every measure and for every size of network; or log2(1 + that), which is 1 there too.

    Without budgets eta is fixed. With a budget B, eta is a multiplier that follows the excess: after every step,
    eta <- max(0, eta + rate * (max(E[C], C(child)) / B - 1)). It rises while the expectation or the child
    is above the budget and falls while both are below.

    Args:
        alphas: gives [alpha_normal, alpha_reduce].
        tables: what the architectures cost, per measure that matters, deployed as they will be.
        budgets: the largest cost allowed, per measure; those without one have the fixed eta.
        eta: the fixed weight; multipliers start at 0.
        rate: of the multiplier, per step and relative excess.
        estimator: a name of ESTIMATORS.
        logarithmic: the penalty's form.
    """

    eta: Tensor

    def __init__(
        self,
        alphas: Callable[[], Alphas],
        tables: Mapping[str, Table],
        budgets: Mapping[str, float],
        eta: float,
        rate: float,
        estimator: str = "expectation",
        logarithmic: bool = False,
    ) -> None:
        super().__init__()
        self.alphas, self.budgets, self.rate = alphas, dict(budgets), rate
        self.estimate, self.logarithmic = ESTIMATORS[estimator], logarithmic
        self._tables, self._uniform = dict(tables), {measure: table.uniform() for measure, table in tables.items()}
        self._free = eta == 0.0
        self.register_buffer("eta", torch.tensor([0.0 if measure in budgets else eta for measure in tables]))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Constrained":
        super()._apply(fn, recurse)
        self._tables = {m: Table(t.fixed, fn(t.normal), fn(t.reduce)) for m, t in self._tables.items()}
        return self

    def forward(self, logits: Tensor, targets: Tensor, z: Z) -> tuple[Tensor, dict[str, Tensor]]:
        """See search.Objective."""
        loss = F.cross_entropy(logits.float(), targets)
        for index, (measure, table) in enumerate(self._tables.items()):
            if measure not in self.budgets and self._free:
                continue  # eta = 0 is main.py, bit for bit
            penalty = (self.estimate(table, self.alphas(), z) - table.fixed) / self._uniform[measure]
            if self.logarithmic:
                penalty = torch.log2(1 + penalty)
            loss = loss + self.eta[index].clone() * penalty  # a copy: eta changes before the backward pass
            if measure in self.budgets and torch.is_grad_enabled():
                self._adapt(index, measure, table, z)
        return loss, {}

    @torch.no_grad()
    def _adapt(self, index: int, measure: str, table: Table, z: Z) -> None:
        alphas = self.alphas()
        worst = torch.maximum(expectation(table, alphas, z), child_cost(table, alphas))
        self.eta[index] = (self.eta[index] + self.rate * (worst / self.budgets[measure] - 1)).clamp_min(0)

    @torch.no_grad()
    def report(self) -> dict[str, Any]:
        """The columns of metrics.jsonl: expected cost, the child's, the budget, eta, per measure."""
        row: dict[str, Any] = {}
        alphas = self.alphas()
        nothing = Z(alphas[0], alphas[1])
        for index, (measure, table) in enumerate(self._tables.items()):
            row[f"cost_{measure}"] = expectation(table, alphas, nothing).item()
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
            text = f"{measure} {child:,.0f} (expected {row[f'cost_{measure}']:,.0f}"
            if measure in self.budgets:
                text += f"; {100 * (child / self.budgets[measure] - 1):+.1f} % of the budget"
            parts.append(f"{text}), eta {eta:.3f}")
        return "  ".join(parts)
