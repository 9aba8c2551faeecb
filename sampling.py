"""Z ~ Concrete(alpha, temperature), the entropy of p_alpha, temperature schedules.

One pure function per equation. SNAS = Xie et al. 2019 (arXiv 1812.09926); Concrete = Maddison et al.
2017 (arXiv 1611.00712); alpha are logits (E, O); the softmax runs over the ops, the last dimension.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Z(NamedTuple):
    """The architecture weights of one forward pass, one (E, O) matrix a cell type, rows on the simplex.

    With a leading dimension (cells of that type, E, O) every cell has its own.
    """

    normal: Tensor
    reduce: Tensor

    def detach(self) -> "Z":
        """The same weights, through which alpha learns nothing."""
        return type(self)(self.normal.detach(), self.reduce.detach())


class Drawn(Z):
    """A Z of which the operations with a weight of exactly zero do not run, so that their weights have no gradient."""

    __slots__ = ()


def concrete_sample(
    alpha: Tensor, temperature: float, generator: torch.Generator | None = None, cells: int | None = None
) -> Tensor:
    """Z_k = exp((alpha_k + G_k) / t) / sum_l exp((alpha_l + G_l) / t), G ~ Gumbel(0, 1) i.i.d.

    Args:
        alpha: logits (E, O); the sample is differentiable in them.
        temperature: t > 0.
        generator: source of the noise, on alpha's device.
        cells: draw that many independent Z instead of one.
    Returns:
        (E, O), or (cells, E, O).
    """
    shape = alpha.shape if cells is None else (cells, *alpha.shape)
    exponential = torch.empty(shape, dtype=alpha.dtype, device=alpha.device).exponential_(generator=generator)
    gumbel = -exponential.clamp_min(torch.finfo(alpha.dtype).tiny).log()
    return F.softmax((alpha + gumbel) / temperature, dim=-1)


def straight_through_sample(
    alpha: Tensor, temperature: float, generator: torch.Generator | None = None, cells: int | None = None
) -> Tensor:
    """The one-hot Z next to a Concrete one, with the gradient of that one's entry for the drawn op (GDAS, Dong & Yang).

    Z = hard, dZ_k / dalpha = d concrete_k / dalpha for the drawn op k (arXiv 1910.04465, section 3.2); the others do
    not run. Arguments and shape are those of concrete_sample.
    """
    soft = concrete_sample(alpha, temperature, generator, cells)
    return _one_hot(soft) * (1 + (soft - soft.detach()))


def dsnas_sample(
    alpha: Tensor, temperature: float, generator: torch.Generator | None = None, cells: int | None = None
) -> Tensor:
    """A one-hot Z ~ p_alpha whose gradient is DSNAS's (Hu et al. 2020, arXiv 2002.09128, eq. 10): dL/dZ_k grad log p_k.

    k is the drawn op; the others do not run. The temperature has no part in it; arguments and shape are those of
    concrete_sample.
    """
    log_p = F.log_softmax(alpha, dim=-1)
    return _one_hot(concrete_sample(alpha, temperature, generator, cells)) * (1 + (log_p - log_p.detach()))


LEAST = 0.05  # weights below this are left out by truncated_sample


def truncated_sample(
    alpha: Tensor, temperature: float, generator: torch.Generator | None = None, cells: int | None = None
) -> Tensor:
    """A Concrete Z without its small weights, the others scaled to a sum of 1; what is left out does not run.

    Arguments and shape are those of concrete_sample.
    """
    soft = concrete_sample(alpha, temperature, generator, cells)
    kept = soft * (soft >= min(LEAST, 1 / alpha.shape[-1]))
    return kept / kept.sum(-1, keepdim=True)


def softmax_weights(
    alpha: Tensor, temperature: float, generator: torch.Generator | None = None, cells: int | None = None
) -> Tensor:
    """p_alpha itself, as DARTS has it (Liu et al. 2019, eq. 2): no noise, no temperature; shape as concrete_sample."""
    weights = F.softmax(alpha, dim=-1)
    return weights if cells is None else weights.expand(cells, *weights.shape)


def _one_hot(weights: Tensor) -> Tensor:
    return F.one_hot(weights.argmax(-1), weights.shape[-1]).to(weights.dtype)


# name of --sampler -> its function
SAMPLERS: Mapping[str, Callable[[Tensor, float, torch.Generator | None, int | None], Tensor]] = {
    "concrete": concrete_sample,
    "straight_through": straight_through_sample,
    "dsnas": dsnas_sample,
    "truncated": truncated_sample,
    "softmax": softmax_weights,
}
ONE_HOT = ("straight_through", "dsnas")
SPARSE = (*ONE_HOT, "truncated")  # give a Drawn


def entropy(alpha: Tensor) -> Tensor:
    """H(p_alpha) = - sum over edges and ops of p log p, in nats: 14 ln 8 = 29.11 for uniform alpha (14, 8)."""
    log_p = F.log_softmax(alpha, dim=-1)
    return -(log_p.exp() * log_p).sum()


def margin(alpha: Tensor) -> Tensor:
    """By how much the likeliest op leads: the mean over edges of its probability less that of the second; 0 to 1."""
    best, second = F.softmax(alpha, dim=-1).topk(2, dim=-1).values.unbind(-1)  # (E,) each
    return (best - second).mean()


def linear_temperature(epoch: int, epochs: int, initial: float, floor: float) -> float:
    """T_n = (1 - n / E) (T_0 - T_min) + T_min in epoch n = 1..E: the authors' schedule, T_min in the last epoch."""
    return (1 - epoch / epochs) * (initial - floor) + floor


def exponential_temperature(step: int, initial: float, rate: float, floor: float) -> float:
    """T = max(T_0 exp(-rate * step), T_min); `step` counts from 0 over the whole run."""
    return max(initial * math.exp(-rate * step), floor)
