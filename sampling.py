"""Z ~ Concrete(alpha, temperature), the entropy of p_alpha, temperature schedules.

One pure function per equation. SNAS = Xie et al. 2019 (arXiv 1812.09926); Concrete = Maddison et al.
2017 (arXiv 1611.00712); alpha are logits (E, O); the softmax runs over the ops, the last dimension.
"""

import math
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
