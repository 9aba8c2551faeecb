import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import nn

import utils
from model_search import Network
from resources import cost
from resources.cost import Table
from resources.projection import child_cost, project

DEPLOYED = cost.Deployed(4, 3, (8, 8), 3)


def small_table() -> Table:
    """Two edges a cell, three operations."""
    return Table(10.0, torch.rand(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 9)


def brute_force(table: Table, alphas: list[nn.Parameter], limit: float, least: float) -> list[int]:
    """The likeliest architecture within a limit that uses `least` of it, by looking at all."""
    log_p, costs = torch.cat([a.detach().log_softmax(-1) for a in alphas]), table.costs
    rows = range(len(log_p))

    def cost_of(choice: tuple[int, ...]) -> float:
        return table.fixed + float(sum(costs[e, k] for e, k in zip(rows, choice, strict=True)))

    fitting = [c for c in itertools.product(range(3), repeat=len(log_p)) if cost_of(c) <= limit]
    fitting = [c for c in fitting if cost_of(c) >= least * limit] or fitting
    return list(max(fitting, key=lambda c: float(sum(log_p[e, k] for e, k in zip(rows, c, strict=True)))))


@pytest.mark.parametrize("least", [0.0, 0.95, 0.9999])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.95])
def test_the_projection_makes_the_likeliest_architecture_within_the_budget_the_child(
    share: float, least: float
) -> None:
    table = small_table()
    for seed in range(5):
        source = torch.Generator().manual_seed(seed)
        alphas = [nn.Parameter(torch.randn(2, 3, generator=source, dtype=torch.float64)) for _ in range(2)]
        before = [a.detach().clone() for a in alphas]
        low, high = table.range()
        limit = low + share * (child_cost(table, alphas).item() - low)
        wanted = brute_force(table, alphas, limit, least)
        project(alphas, [(table, limit)] if least else [(table, limit), (table, high)], least)
        assert torch.cat([a.argmax(-1) for a in alphas]).tolist() == wanted
        assert child_cost(table, alphas) <= limit
        assert all(torch.equal(a.sort(-1).values, b.sort(-1).values) for a, b in zip(alphas, before, strict=True))
        after = [a.detach().clone() for a in alphas]
        project(alphas, [(table, limit)])  # within: nothing to do
        assert all(map(torch.equal, alphas, after))


@pytest.mark.parametrize("mode", [nullcontext, utils.no_denormals])
def test_the_projection_decides_a_tie(mode: Callable[[], AbstractContextManager[None]]) -> None:
    table = Table(0.0, torch.tensor([[5.0, 1.0], [0.0, 0.0]]))
    for height in (0.0, 1.0, -3.0, -1.2e-38):
        alphas = [nn.Parameter(torch.full((1, 2), height)) for _ in range(2)]
        with mode():  # as in a run
            project(alphas, [(table, 2.0)])
            assert child_cost(table, alphas) == 1


def test_the_projection_decides_a_tie_with_a_third_operation() -> None:
    table = Table(0.0, torch.tensor([[10.0, 9.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64))
    alphas = [nn.Parameter(torch.tensor([[0.3, 0.3, 0.1]])), nn.Parameter(torch.zeros(1, 3))]
    project(alphas, [(table, 5.0)])
    assert child_cost(table, alphas) == 1


def test_a_projection_keeps_all_budgets_of_the_real_space() -> None:
    torch.manual_seed(0)
    alphas = [nn.Parameter(torch.randn(14, 8)) for _ in range(2)]
    tables = cost.tables("snas", 4, cost.Deployed(16, 8, (32, 32), 10))
    bounds = [(t, t.fixed + share * t.uniform()) for t, share in zip(tables.values(), (0.5, 0.8, 0.6), strict=True)]
    project(alphas, bounds)
    assert all(child_cost(table, alphas) <= limit for table, limit in bounds)
    assert max(child_cost(table, alphas).item() / limit for table, limit in bounds) > 0.97  # and uses them
    project(alphas, [(t, t.fixed) for t in tables.values()])  # the least there is: no operations
    assert all(child_cost(t, alphas) == t.fixed for t in tables.values())


def test_the_child_cost_is_that_of_the_derived_genotype() -> None:
    torch.manual_seed(0)
    network = Network(4, 3, 3)
    for alpha in network.alphas():
        nn.init.normal_(alpha)
    how = {"init_channels": 4, "layers": 3, "image_size": 8, "num_classes": 3}
    wanted = cost.cost(network.genotype(), **how)
    for measure, table in cost.tables("snas", 4, DEPLOYED).items():
        assert child_cost(table, network.alphas()).item() == pytest.approx(wanted[measure], rel=1e-6)


def test_a_budget_is_kept_to_the_last_multiply_add() -> None:
    """The solver itself takes 10,000,001 for 10,000,000."""
    dear, near, cheap = 10_000_001.0, 9_000_000.0, 0.0
    table = Table(0.0, torch.tensor([[dear, near, cheap], [cheap, cheap, cheap]], dtype=torch.float64))
    alphas = [nn.Parameter(torch.tensor([[3.0, 2.0, 1.0]])), nn.Parameter(torch.zeros(1, 3))]
    project(alphas, [(table, 10_000_000.0)])
    assert child_cost(table, alphas).item() == near
    project(alphas, [(table, near)])
    assert child_cost(table, alphas).item() == near
    project(alphas, [(table, near - 1)])
    assert child_cost(table, alphas).item() == cheap


def test_entries_above_16_million_are_counted_exactly() -> None:
    how = {"init_channels": 64, "layers": 3, "image_size": 255, "num_classes": 10}
    network = Network(4, 10, 3)
    torch.manual_seed(0)
    for alpha in network.alphas():
        nn.init.normal_(alpha)
    for measure, table in cost.tables("snas", 4, cost.Deployed(64, 3, (255, 255), 10)).items():
        wanted = cost.cost(network.genotype(), **how)[measure]
        assert child_cost(table, network.alphas()).item() == wanted
        assert measure == "params" or float(torch.tensor(float(wanted))) != wanted  # float32 cannot say it


def test_the_moments_of_alpha_are_exchanged_with_its_logits() -> None:
    table = Table(0.0, torch.tensor([[5.0, 1.0, 9.0], [0.0, 0.0, 0.0]], dtype=torch.float64))
    alphas = [nn.Parameter(torch.tensor([[3.0, 2.0, 1.0]])), nn.Parameter(torch.zeros(1, 3))]
    optimizer = torch.optim.Adam(alphas, 0.1, (0.9, 0.999))
    for alpha in alphas:  # the dear one keeps rising, the cheap one falling
        alpha.grad = torch.tensor([[-1.0, 1.0, 0.5]])
    optimizer.step()
    before = {name: value.clone() for name, value in optimizer.state[alphas[0]].items()}
    project(alphas, [(table, 2.0)], optimizer=optimizer)
    after = optimizer.state[alphas[0]]
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(after[name], before[name][:, [1, 0, 2]])
    assert after["step"] == before["step"]
    for alpha in alphas:
        alpha.grad = torch.zeros(1, 3)
    gap = (alphas[0][0, 1] - alphas[0][0, 0]).item()
    optimizer.step()
    assert (alphas[0][0, 1] - alphas[0][0, 0]).item() > gap  # what was chosen is not undone
