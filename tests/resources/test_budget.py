import itertools

import pytest
import torch
from torch import Tensor, nn

from model_search import Network
from resources import budget, cost
from resources.budget import ESTIMATORS, Constrained
from resources.cost import Table
from sampling import Z, concrete_sample

DEPLOYED = cost.Deployed(4, 3, (8, 8), 3)


def small_table(edges: int = 2, ops: int = 3) -> Table:
    source = torch.Generator().manual_seed(0)
    return Table(10.0, torch.rand(2 * edges, ops, generator=source, dtype=torch.float64) * 9)


def small_alphas(edges: int = 2, ops: int = 3) -> list[nn.Parameter]:
    source = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(edges, ops, generator=source, dtype=torch.float64)) for _ in range(2)]


def enumerated(table: Table, alphas: list[nn.Parameter]) -> Tensor:
    """E[C] as the sum over all architectures of probability times cost."""
    rows = [*zip([p for a in alphas for p in a.softmax(-1)], table.costs, strict=True)]
    total = torch.zeros((), dtype=torch.float64)
    for choice in itertools.product(range(3), repeat=len(rows)):
        probability, price = torch.ones((), dtype=torch.float64), table.fixed
        for k, (p, c) in zip(choice, rows, strict=True):
            probability, price = probability * p[k], price + c[k]
        total = total + probability * price
    return total


def estimates(name: str, temperature: float, draws: int) -> Tensor:
    """Gradients of alpha_normal from independent draws (draws, E, O)."""
    table, alphas = small_table(), small_alphas()
    source, found = torch.Generator().manual_seed(2), []
    for _ in range(draws):
        z = Z(*(concrete_sample(a, temperature, source) for a in alphas))
        found.append(torch.autograd.grad(ESTIMATORS[name](table, alphas, z), alphas[0])[0])
    return torch.stack(found)


def test_the_expectation_and_its_gradient_are_those_of_the_enumeration() -> None:
    table, alphas = small_table(), small_alphas()
    z = Z(*(a.detach() for a in alphas))
    got, wanted = budget.expectation(table, alphas, z), enumerated(table, alphas)
    assert torch.allclose(got, wanted)
    for g, w in zip(torch.autograd.grad(got, alphas), torch.autograd.grad(wanted, alphas), strict=True):
        assert torch.allclose(g, w)
    assert torch.autograd.gradcheck(lambda a, b: budget.expectation(table, [a, b], z), alphas)


@pytest.mark.parametrize(("name", "temperature"), [("policy_gradient", 1.0), ("reparametrization", 0.1)])
def test_sampled_estimators_average_to_the_gradient_of_the_expectation(name: str, temperature: float) -> None:
    """The score function at any temperature; the relaxed one near its limit."""
    table, alphas = small_table(), small_alphas()
    wanted = torch.autograd.grad(enumerated(table, alphas), alphas[0])[0]
    got = estimates(name, temperature, 4000)
    error = got.std(0) / len(got) ** 0.5
    bias = 0.0 if name == "policy_gradient" else 0.06 * wanted.abs().max()
    assert ((got.mean(0) - wanted).abs() < 4 * error + bias).all()


def test_the_relaxed_estimator_is_biased_by_the_temperature_alone() -> None:
    table, alphas = small_table(), small_alphas()
    wanted = torch.autograd.grad(enumerated(table, alphas), alphas[0])[0]
    gaps = [(estimates("reparametrization", t, 3000).mean(0) - wanted).norm() for t in (3.0, 0.2)]
    assert gaps[1] < gaps[0] / 3


def test_the_baseline_lowers_the_variance_of_the_score_function() -> None:
    table = small_table()
    dear = Table(
        table.fixed, table.costs + torch.tensor([[100.0], [100.0], [0.0], [0.0]])
    )  # a constant changes no gradient, but its estimate
    alphas, source = small_alphas(), torch.Generator().manual_seed(3)
    for _ in range(20):
        z = Z(*(concrete_sample(a, 1.0, source) for a in alphas))
        grads = [torch.autograd.grad(budget.policy_gradient(t, alphas, z), alphas)[0] for t in (table, dear)]
        assert torch.allclose(*grads)


def test_policy_gradient_has_no_gradient_through_z_and_prices_its_choice() -> None:
    table, alphas = small_table(), small_alphas()
    z = Z(*(torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)))
    value = budget.policy_gradient(table, alphas, z)
    assert torch.autograd.grad(value, z, allow_unused=True, retain_graph=True) == (None, None)
    chosen = sum(
        c.gather(-1, part.argmax(-1, keepdim=True)).sum() for part, c in zip(z, table.costs.chunk(2), strict=True)
    )
    assert torch.allclose(value, table.fixed + chosen)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_cells_with_their_own_z_count_on_average(name: str) -> None:
    table, alphas = small_table(), small_alphas()
    source = torch.Generator().manual_seed(4)
    own = Z(*(concrete_sample(a, 0.5, source, cells=5) for a in alphas))
    values = [ESTIMATORS[name](table, alphas, Z(own.normal[i], own.reduce[i])) for i in range(5)]
    assert torch.allclose(ESTIMATORS[name](table, alphas, own), torch.stack(values).mean())


@pytest.mark.parametrize("measure", cost.Cost._fields)
@pytest.mark.parametrize("logarithmic", [False, True])
def test_an_average_architecture_has_a_penalty_of_one(measure: str, logarithmic: bool) -> None:
    alphas = [nn.Parameter(torch.zeros(14, 8)) for _ in range(2)]
    for deployed in (DEPLOYED, cost.Deployed(16, 8, (32, 32), 10)):
        tables = {measure: cost.tables("snas", 4, deployed)[measure]}
        plain, dear = (Constrained(lambda: alphas, tables, {}, eta, logarithmic=logarithmic) for eta in (0.0, 0.25))
        logits, targets = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
        z = Z(*(a.detach() for a in alphas))
        assert (dear(logits, targets, z)[0] - plain(logits, targets, z)[0]).item() == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_gradient_of_the_penalty_moves_alpha_away_from_what_is_dear(name: str) -> None:
    torch.manual_seed(0)
    network = Network(4, 3, 3)
    objective = Constrained(network.alphas, {"params": cost.tables("snas", 4, DEPLOYED)["params"]}, {}, 3.0, 1, name)
    before = child_and_expected(objective)[1]
    optimizer = torch.optim.SGD(network.alphas(), 3.0)
    for _ in range(60):
        optimizer.zero_grad()
        objective(torch.zeros(2, 3), torch.tensor([0, 1]), network.sample(0.5))[0].backward()
        optimizer.step()
    assert child_and_expected(objective)[1] < 0.5 * before
    share = network.alpha_normal.softmax(-1).mean(0)
    assert share[5] < share[4] < share[3]  # sep_conv_5x5, sep_conv_3x3, skip_connect


def child_and_expected(objective: Constrained) -> tuple[float, float]:
    row = objective.report()
    fixed = objective.fixed.item()
    return row["child_params"] - fixed, row["cost_params"] - fixed


def test_a_finite_difference_of_the_loss_agrees_with_its_gradient() -> None:
    alphas = [nn.Parameter(torch.randn(14, 8, dtype=torch.float64)) for _ in range(2)]
    table = cost.tables("snas", 4, DEPLOYED)["flops"]
    table = Table(table.fixed, table.costs.double())
    objective = Constrained(lambda: alphas, {"flops": table}, {}, 0.7, logarithmic=True)
    z, logits = Z(*(a.detach() for a in alphas)), torch.zeros(2, 3, dtype=torch.float64)

    def loss() -> Tensor:
        return objective(logits, torch.tensor([0, 1]), z)[0]

    gradient = torch.autograd.grad(loss(), alphas[1])[0]
    for e, o in ((0, 5), (7, 0), (13, 3)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                alphas[1][e, o] += sign * 1e-4
                values.append(loss().item())
                alphas[1][e, o] -= sign * 1e-4
        assert (values[0] - values[1]) / 2e-4 == pytest.approx(gradient[e, o].item(), rel=1e-3, abs=1e-9)
    assert gradient[0, 5] > 0 > gradient[7, 0]


def followed(budget_of_average: float, steps: int, shift: Tensor | None = None) -> tuple[Constrained, list[float]]:
    """eta after each of `steps` steps of a run of 10 in which alpha stays where it is."""
    torch.manual_seed(0)
    network = Network(4, 3, 3)
    if shift is not None:
        with torch.no_grad():
            network.alpha_normal += shift
            network.alpha_reduce += shift
    tables = {"params": cost.tables("snas", 4, DEPLOYED)["params"]}
    average = float(tables["params"].fixed + tables["params"].uniform())
    objective, etas = Constrained(network.alphas, tables, {"params": budget_of_average * average}, 0.0, 10), []
    for _ in range(steps):
        objective.after_step()
        etas.append(objective.report()["eta"])
    return objective, etas


def test_the_multiplier_starts_gently_and_rises_above_the_budget() -> None:
    """By hand: the budget falls from the average to half of it in 5 of 10 steps; eta follows E[C] or the child."""
    objective, etas = followed(0.5, 10)
    table, row = objective.table(0), objective.report()
    average, least = float(table.fixed + table.uniform()), min(row["cost_params"], row["child_params"])
    limits = [average * (1 - 0.5 * min(1, step / 5)) for step in range(1, 11)]
    wanted = [budget.GAIN * max(0, least - limit) / table.uniform().item() for limit in limits]
    assert etas == pytest.approx(wanted, rel=1e-3) and etas[0] < etas[-1] > 1


def test_the_multiplier_is_zero_below_the_budget_and_resumes_on_its_way() -> None:
    cheap = torch.tensor([0.0, 0, 0, 20, 0, 0, 0, 0])  # skip_connect
    assert followed(0.9, 6, cheap)[1] == [0.0] * 6
    whole, parts = followed(0.5, 5)[0], followed(0.5, 2)[0]
    again = followed(0.5, 0)[0]
    again.load_state_dict(parts.state_dict())
    for _ in range(3):
        again.after_step()
    assert torch.equal(again.eta, whole.eta) and again.eta > parts.eta


def test_checkpoints_of_earlier_versions_are_read() -> None:
    whole, again = followed(0.5, 5)[0], followed(0.5, 0)[0]
    normal, reduce = (part * 2 for part in whole.costs[0].chunk(2))
    tables = {"params": {"fixed": 7.0, "normal": normal, "reduce": reduce}}
    stored = {"tables": tables, "budgets": {"params": 5e3}}
    again.load_state_dict({"eta": whole.eta, "step": whole.step, "_extra_state": stored})
    assert torch.equal(again.costs, 2 * whole.costs) and again.fixed.item() == 7 and again.budgets.item() == 5e3
    assert torch.equal(again.eta, whole.eta)


def test_alpha_is_projected_in_the_second_half_only() -> None:
    objective, _ = followed(0.5, 4)
    alphas = objective.alphas()
    with torch.no_grad():
        for alpha in alphas:
            alpha[:, 5] += 9  # sep_conv_5x5
    before = [alpha.detach().clone() for alpha in alphas]
    optimizer = torch.optim.Adam(alphas)
    objective.after_epoch(optimizer)
    assert all(map(torch.equal, alphas, before))
    objective.after_step()
    objective.after_epoch(optimizer)
    row = objective.report()
    assert budget.USE * row["budget_params"] <= row["child_params"] <= row["budget_params"]
