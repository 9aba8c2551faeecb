"""What a network costs, by counting one that is built."""

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


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
