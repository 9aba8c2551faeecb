"""The noise of the three estimators of the gradient of an expected cost.

    python -m benchmarks.estimators

Bias and standard deviation over draws of Z, as the norm over all entries relative to the norm of the exact gradient,
where nothing is decided (alpha = 0) and where most is (alpha drawn from a normal distribution of deviation 2).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import nn

import options
from benchmarks import record
from benchmarks.record import Recorded
from resources import budget, cost
from sampling import Z, concrete_sample


@dataclass(frozen=True)
class EstimatorOptions(Recorded):
    """What is sampled."""

    draws: PositiveInt = 4000
    """Z drawn for each figure."""
    temperatures: list[PositiveFloat] = field(default_factory=lambda: [1.0, 0.3, 0.03])
    """Of the Concrete distribution."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and publish; returns the content of the JSON file."""
    opt = record.parse(EstimatorOptions, argv, "estimators", __doc__)
    table = cost.tables("snas", 4, cost.Deployed(16, 8, (32, 32), 10))["params"]
    rows = []
    for state, deviation in (("undecided", 0.0), ("decided", 2.0)):
        source = torch.Generator().manual_seed(0)
        alphas = [nn.Parameter(deviation * torch.randn(14, 8, generator=source)) for _ in range(2)]
        exact = _gradient(budget.expectation, table, alphas, Z(*(a.detach() for a in alphas)))
        for name, estimate in budget.ESTIMATORS.items():
            for temperature in opt.temperatures if name != "expectation" else opt.temperatures[:1]:
                drawn = []
                for _ in range(opt.draws):
                    z = Z(*(concrete_sample(alpha, temperature, source) for alpha in alphas))
                    drawn.append(_gradient(estimate, table, alphas, z))
                draws = torch.stack(drawn)
                bias, noise = draws.mean(0) - exact, draws.std(0)
                rows.append(
                    {
                        "alpha": state,
                        "estimator": name,
                        "temperature": None if name == "expectation" else temperature,
                        "bias": (bias.norm() / exact.norm()).item(),
                        "noise": (noise.norm() / exact.norm()).item(),
                    }
                )
    head = ["alpha", "estimator", "T", "bias", "standard deviation of one draw"]
    cells = [
        [r["alpha"], r["estimator"], r["temperature"] or "-", f"{r['bias']:.3f}", f"{r['noise']:.2f}"] for r in rows
    ]
    text = (
        "Of the gradient of E[params] of 8 cells, C = 16, relative to its norm; "
        f"n = {opt.draws} draws, so that a bias below {1.5 / opt.draws**0.5:.3f} times the deviation is none.\n\n"
        + record.table(head, cells)
    )
    return record.publish("estimators", opt, {"rows": rows}, text, topic="budget")


def _gradient(estimate: Any, table: cost.Table, alphas: list[nn.Parameter], z: Z) -> torch.Tensor:
    """Flat, of both alphas."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(estimate(table, alphas, z), alphas)])


if __name__ == "__main__":
    options.entry(main)
