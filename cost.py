"""What a network costs, by counting what is built: learnable parameters and multiply-adds."""

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from genotypes import Genotype, cell_plan
from operations import make_op


def count_params(module: nn.Module) -> int:
    """Learnable parameters, alpha left out: a supernet's alpha is no part of the network."""
    return sum(p.numel() for name, p in module.named_parameters() if not name.startswith("alpha_"))


def count_flops(module: nn.Module, *inputs: Any) -> int:
    """Multiply-adds of the convolutions and linear layers of one forward pass, one per multiply-add.

    Args:
        module: best on the meta device, where nothing is computed.
        inputs: the arguments of forward, for one image, detached.
    """
    training = module.training
    module.eval()
    # FlopCounterMode counts two per multiply-add; without gradients strided convolutions run as such
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    module.train(training)
    return counter.get_total_flops() // 2


@cache
def op_params(op: str, channels: int, stride: int) -> int:
    """Learnable parameters of one operation of a child, its affine batch norm included."""
    with torch.device("meta"):
        return count_params(make_op(op, channels, stride, affine=True))


def ops_params(genotype: Genotype, init_channels: int, layers: int) -> int:
    """Learnable parameters of all operations of a child: what tells apart the children of one concat and size."""
    total = 0
    for plan in cell_plan(init_channels, layers, 0):
        nodes = genotype.reduce if plan.reduction else genotype.normal
        for op, source in (pair for node in nodes for pair in node):
            total += op_params(op, plan.channels, 2 if plan.reduction and source < 2 else 1)
    return total
