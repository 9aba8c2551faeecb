"""The child of alpha within budgets: what it costs, and the likeliest one that costs no more."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn
from torch.optim import Optimizer

from resources.cost import Table

Alphas = Sequence[nn.Parameter]  # normal, reduce: each (E, O)

_TOLERANCE = 1e-6  # by which a solution of scipy's milp may exceed a bound of 1


def rows(z: Sequence[Tensor]) -> Tensor:
    """Both cells' rows as a Table has them, (2 E, O); the mean over cells that drew their own."""
    return torch.cat([draw.flatten(0, -3).mean(0) if draw.dim() > 2 else draw for draw in z])


def child_cost(table: Table, alphas: Alphas) -> Tensor:
    """The cost of the child that alpha stands for: the argmax of every edge."""
    return _cost_of(table, rows(alphas).argmax(-1))


def _cost_of(table: Table, chosen: Tensor) -> Tensor:
    """Of the architecture with these operations, (2 E,)."""
    return table.fixed + table.costs.gather(-1, chosen[:, None].to(table.costs.device)).sum()


@torch.no_grad()
def project(
    alphas: Alphas,
    bounds: Sequence[tuple[Table, float]],
    least: float = 0.0,
    optimizer: Optimizer | None = None,
) -> None:
    """Change alpha as little as it takes for its child to be within all budgets: the likeliest one that is becomes it.

    argmax_x sum_ek x_ek log p_ek subject to sum_ek x_ek C_ek <= B - fixed is an integer programme, solved exactly. On
    every edge where it differs from the argmax the two logits are exchanged, and the moments of their gradients.

    Args:
        alphas: changed in place, and only if the child exceeds a budget.
        bounds: (table, budget) pairs, each within the table's range.
        least: the share of a single budget that the new child uses, if any architecture does.
        optimizer: of alpha; otherwise the gradients of before would soon undo the exchange.
    """
    if all(child_cost(table, alphas) <= budget for table, budget in bounds):
        return
    chosen = _likeliest(F.log_softmax(rows(alphas), -1).cpu().double(), bounds, least).to(alphas[0].device)
    for alpha, best in zip(alphas, chosen.split([len(alpha) for alpha in alphas]), strict=True):
        top, wanted = alpha.argmax(-1, keepdim=True), best[:, None]
        kept = optimizer.state.get(alpha, {}).values() if optimizer else ()
        for values in (alpha, *(value for value in kept if value.shape == alpha.shape)):
            high, low = values.gather(-1, top), values.gather(-1, wanted)
            values.scatter_(-1, top, low).scatter_(-1, wanted, high)
        high = alpha.gather(-1, wanted)
        tie = (alpha == high).sum(-1, keepdim=True) > 1  # some other is as high, and may be the first
        above = torch.maximum(torch.nextafter(high, high + 1), high + torch.finfo(alpha.dtype).tiny)  # no denormal
        alpha.scatter_(-1, wanted, torch.where(tie, above, high))


def _likeliest(log_p: Tensor, bounds: Sequence[tuple[Table, float]], least: float) -> Tensor:
    """The operations (2 E,) of the likeliest architecture within all bounds, for log_p (2 E, O); see project."""
    edges, ops = log_p.shape
    one_each = LinearConstraint(np.kron(np.eye(edges), np.ones(ops)), 1, 1)
    # The solver takes bounds within a tolerance; what it finds is counted, and it has to keep clear of them if need be.
    shares = [least, 0.0] if least and len(bounds) == 1 else [0.0]
    for share, most in [(share, 1 - below * _TOLERANCE) for share in shares for below in (0, 2, 100)]:
        rules = [one_each]
        for table, budget in bounds:
            costs = table.costs.cpu().double().flatten().numpy()[None] / budget
            fixed = float(table.fixed) / budget
            rules.append(LinearConstraint(costs, share - fixed if share else -np.inf, most - fixed))
        found = milp(
            -log_p.flatten().numpy(),
            constraints=rules,
            integrality=np.ones(edges * ops),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
        if found.x is not None:
            chosen = torch.from_numpy(found.x).view(edges, ops).argmax(-1)
            if all(_cost_of(table, chosen) <= budget for table, budget in bounds):
                return chosen
    cheapest = bounds[0][0].costs.argmin(-1).cpu()  # nothing but a budget of the very least is left
    if any(_cost_of(table, cheapest) > budget for table, budget in bounds):
        raise ValueError("no architecture is within all budgets")
    return cheapest
