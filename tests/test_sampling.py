import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import RelaxedOneHotCategorical

import sampling


def concrete_log_density(log_z: Tensor, alpha: Tensor, temperature: float) -> Tensor:
    """log p(Z) of the Concrete density (Maddison et al. 2017, section 3.1), per edge.

    log p = log (O-1)! + (O-1) log t + sum_k [alpha_k - (t + 1) log Z_k] - O log sum_k exp(alpha_k - t log Z_k)
    """
    ops = alpha.shape[-1]
    constant = math.lgamma(ops) + (ops - 1) * math.log(temperature)
    linear = (alpha - (temperature + 1) * log_z).sum(-1)
    return constant + linear - ops * torch.logsumexp(alpha - temperature * log_z, -1)


@pytest.mark.parametrize("temperature", [2.0, 0.5, 0.03])
def test_sample_equals_gumbel_softmax_under_one_seed(temperature: float) -> None:
    alpha = torch.randn(14, 8, generator=torch.Generator().manual_seed(1))
    ours = sampling.concrete_sample(alpha, temperature, torch.Generator().manual_seed(7))
    torch.manual_seed(7)
    assert torch.equal(ours, F.gumbel_softmax(alpha, temperature))


def test_sample_frequencies_are_softmax_alpha() -> None:
    alpha = torch.tensor([[1.0, 0.0, -1.0]])
    z = sampling.concrete_sample(alpha, 0.5, torch.Generator().manual_seed(0), cells=40_000)
    assert z.shape == (40_000, 1, 3)
    share = F.one_hot(z.argmax(-1), 3).double().mean((0, 1))
    # 4.5 standard errors of a share of 40,000 draws
    assert torch.allclose(share, alpha.double().softmax(-1)[0], atol=4.5 * 0.5 / 200)


@pytest.mark.parametrize("temperature", [2.0, 0.7, 0.1])
def test_log_density_equals_torch_distributions(temperature: float) -> None:
    alpha = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    z = sampling.concrete_sample(alpha, temperature, torch.Generator().manual_seed(3))
    oracle = RelaxedOneHotCategorical(torch.tensor(temperature, dtype=torch.float64), logits=alpha, validate_args=False)
    got = concrete_log_density(z.log(), alpha, temperature)
    assert torch.allclose(got, oracle.log_prob(z), rtol=1e-9)


def test_log_density_integrates_to_one_on_two_ops() -> None:
    alpha, steps = torch.tensor([0.3, -0.4], dtype=torch.float64), 200_000
    first = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    z = torch.stack([first, 1 - first], -1)
    density = concrete_log_density(z.log(), alpha.expand_as(z), 0.7).exp()
    assert density.mean().item() == pytest.approx(1, abs=2e-3)  # the density over z_1 in (0, 1)


def test_sample_gradient_passes_gradcheck() -> None:
    alpha = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def draw(a: torch.Tensor) -> torch.Tensor:
        return sampling.concrete_sample(a, 0.7, torch.Generator().manual_seed(5))

    assert torch.autograd.gradcheck(draw, alpha)


def test_extreme_noise_gives_no_nan() -> None:
    z = sampling.concrete_sample(torch.zeros(1000, 1000), 0.01, torch.Generator().manual_seed(0))
    assert torch.isfinite(z).all()


def test_entropy_of_uniform_and_of_certain_alpha() -> None:
    assert sampling.entropy(torch.zeros(14, 8)).item() == pytest.approx(29.1122, abs=5e-5)
    certain = 1e4 * F.one_hot(torch.arange(14) % 8, 8).float()
    assert sampling.entropy(certain).item() == 0
    alpha = torch.randn(6, 5)
    oracle = torch.distributions.Categorical(logits=alpha).entropy().sum()
    assert sampling.entropy(alpha).item() == pytest.approx(oracle.item(), rel=1e-5)


def test_linear_schedule_is_the_authors() -> None:
    got = [sampling.linear_temperature(n, 150, 1.0, 0.03) for n in range(1, 151)]
    assert got == [pytest.approx((1 - (e + 1) / 150) * (1 - 0.03) + 0.03) for e in range(150)]
    assert got[-1] == pytest.approx(0.03)


def test_exponential_schedule_counts_steps_of_the_whole_run_and_has_a_floor() -> None:
    assert sampling.exponential_temperature(0, 2.5, 3e-5, 0.03) == 2.5
    assert sampling.exponential_temperature(10_000, 2.5, 3e-5, 0.03) == pytest.approx(2.5 * math.exp(-0.3))
    assert sampling.exponential_temperature(10**7, 2.5, 3e-5, 0.03) == 0.03


def test_the_margin_is_the_lead_of_the_likeliest() -> None:
    alpha = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).log()
    assert sampling.margin(alpha).item() == pytest.approx((0.2 + 0.7) / 2)
    assert sampling.margin(torch.zeros(14, 8)).item() == 0


@pytest.mark.parametrize("name", sampling.ONE_HOT)
def test_one_hot_samplers_draw_from_p_alpha_exactly_one_op_an_edge(name: str) -> None:
    alpha = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    z = sampling.SAMPLERS[name](alpha, 0.3, torch.Generator().manual_seed(0), 40_000)
    assert set(z.unique().tolist()) == {0.0, 1.0} and (z.sum(-1) == 1).all()
    # 4.5 standard errors of a share of 40,000 draws
    assert torch.allclose(z.detach().mean((0, 1)), alpha.detach().softmax(-1)[0], atol=4.5 * 0.5 / 200)


def test_straight_through_has_the_gradient_of_the_concrete_entry_that_was_drawn() -> None:
    alpha = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    soft = sampling.concrete_sample(alpha, 0.7, torch.Generator().manual_seed(2))
    hard = sampling.straight_through_sample(alpha, 0.7, torch.Generator().manual_seed(2))
    chosen = soft.argmax(-1, keepdim=True)
    assert torch.equal(hard.argmax(-1, keepdim=True), chosen)
    weight = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (ours,) = torch.autograd.grad((weight * hard).sum(), alpha)
    (expected,) = torch.autograd.grad((weight * soft).gather(-1, chosen).sum(), alpha)
    assert torch.allclose(ours, expected, rtol=1e-12)


def test_dsnas_averages_to_the_gradient_of_the_expectation_of_a_linear_loss() -> None:
    """For L = sum of c_k Z_k the estimator is REINFORCE's and has no bias: d/dalpha of sum of c_k p_k."""
    alpha = torch.tensor([[0.5, -0.2, 0.1], [1.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    costs = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]], dtype=torch.float64)
    (exact,) = torch.autograd.grad((alpha.softmax(-1) * costs).sum(), alpha)
    draws = 40_000
    z = sampling.dsnas_sample(alpha, 1.0, torch.Generator().manual_seed(4), draws)
    (mean,) = torch.autograd.grad((z * costs).sum() / draws, alpha)
    assert torch.allclose(mean, exact, atol=4.5 * 3 / draws**0.5)
    assert exact.abs().max() > 0.1  # the tolerance is below what is measured


def test_softmax_is_p_alpha_without_noise_or_temperature() -> None:
    alpha = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sampling.softmax_weights(alpha, 0.01), alpha.softmax(-1))
    assert torch.equal(sampling.softmax_weights(alpha, 1.0, None, 2)[1], alpha.softmax(-1))


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_truncated_leaves_out_small_weights_and_keeps_the_ratios_of_the_others(temperature: float) -> None:
    alpha = torch.randn(14, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    soft = sampling.concrete_sample(alpha, temperature, torch.Generator().manual_seed(2))
    ours = sampling.truncated_sample(alpha, temperature, torch.Generator().manual_seed(2))
    kept = soft >= sampling.LEAST
    assert ((ours > 0) == kept).all() and torch.allclose(ours.sum(-1), torch.ones(14))
    assert not kept.all() and kept.any(-1).all()
    top = soft.max(-1, keepdim=True).values, ours.max(-1, keepdim=True).values
    assert torch.allclose((ours / top[1])[kept], (soft / top[0])[kept])
    (gradient,) = torch.autograd.grad((ours * torch.arange(8.0)).sum(), alpha)
    assert torch.isfinite(gradient).all() and gradient[kept.sum(-1) > 1].any()
    wide = sampling.truncated_sample(torch.zeros(1, 100), 1.0, torch.Generator().manual_seed(0))
    assert wide.isfinite().all() and wide.sum().item() == pytest.approx(1)
