"""The supernet as a textbook writes it: one module per edge and op, NCHW, a multiply per op.

The oracle of the tests and the contender of the benchmarks. Built from torch.nn alone; shares no code with
operations.py, model_search.py or genotypes.py.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

OPS = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)


def bn(channels: int, affine: bool = False) -> nn.Module:
    """Batch norm as in the cells of a supernet; affine as in those of a child."""
    return nn.BatchNorm2d(channels, affine=affine)


def prepare(c_in: int, c: int, affine: bool = False) -> nn.Module:
    """What a cell does to its inputs."""
    return nn.Sequential(nn.ReLU(), nn.Conv2d(c_in, c, 1, bias=False), bn(c, affine))


def separable(c: int, k: int, stride: int, dilation: int, affine: bool) -> list[nn.Module]:
    """ReLU, depthwise, pointwise, batch norm."""
    pad = dilation * (k // 2)
    return [
        nn.ReLU(),
        nn.Conv2d(c, c, k, stride, pad, dilation, groups=c, bias=False),
        nn.Conv2d(c, c, 1, bias=False),
        bn(c, affine),
    ]


class Reduce(nn.Module):
    """Factorized reduction: the stride-2 identity."""

    def __init__(self, c_in: int, c_out: int, affine: bool = False) -> None:
        super().__init__()
        self.a = nn.Conv2d(c_in, c_out // 2, 1, 2, bias=False)
        self.b = nn.Conv2d(c_in, c_out - c_out // 2, 1, 2, bias=False)
        self.bn = bn(c_out, affine)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x)
        shifted = nn.functional.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))[:, :, 1:, 1:]
        return self.bn(torch.cat([self.a(x), self.b(shifted)], 1))


def op(name: str, c: int, stride: int, affine: bool = False) -> nn.Module:
    """A candidate operation of the space of the paper."""
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else Reduce(c, c, affine)
    return {
        "max_pool_3x3": lambda: nn.Sequential(nn.MaxPool2d(3, stride, 1), bn(c, affine)),
        "avg_pool_3x3": lambda: nn.Sequential(nn.AvgPool2d(3, stride, 1, count_include_pad=False), bn(c, affine)),
        "sep_conv_3x3": lambda: nn.Sequential(*separable(c, 3, stride, 1, affine), *separable(c, 3, 1, 1, affine)),
        "sep_conv_5x5": lambda: nn.Sequential(*separable(c, 5, stride, 1, affine), *separable(c, 5, 1, 1, affine)),
        "dil_conv_3x3": lambda: nn.Sequential(*separable(c, 3, stride, 2, affine)),
        "dil_conv_5x5": lambda: nn.Sequential(*separable(c, 5, stride, 2, affine)),
    }[name]()


class TextbookCell(nn.Module):
    """All operations on all 14 edges."""

    def __init__(self, c_pp: int, c_p: int, c: int, reduction: bool, reduction_prev: bool) -> None:
        super().__init__()
        self.reduction = reduction
        self.pre0 = Reduce(c_pp, c) if reduction_prev else prepare(c_pp, c)
        self.pre1 = prepare(c_p, c)
        self.edges = nn.ModuleList()
        for i in range(4):
            for j in range(2 + i):
                stride = 2 if reduction and j < 2 else 1
                self.edges.append(nn.ModuleList(op(name, c, stride) for name in OPS[1:]))

    def forward(self, s0: Tensor, s1: Tensor, z: Tensor) -> Tensor:
        states = [self.pre0(s0), self.pre1(s1)]
        e = 0
        for i in range(4):
            total: Tensor | int = 0
            for j in range(2 + i):
                ops: Iterable[nn.Module] = self.edges[e]  # type: ignore[assignment]
                for k, module in enumerate(ops):
                    total = total + z[e, k + 1] * module(states[j])
                e += 1
            states.append(total)
        return torch.cat(states[2:], 1)


class Textbook(nn.Module):
    """C, number of classes, number of cells; forward(images, Z of normal cells, Z of reduction cells)."""

    def __init__(self, c: int, classes: int, layers: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3 * c, 3, padding=1, bias=False), nn.BatchNorm2d(3 * c))
        c_pp, c_p, reduction_prev = 3 * c, 3 * c, False
        self.cells = nn.ModuleList()
        for layer in range(layers):
            reduction = layer in [layers // 3, 2 * layers // 3]
            c = 2 * c if reduction else c
            self.cells.append(TextbookCell(c_pp, c_p, c, reduction, reduction_prev))
            reduction_prev, c_pp, c_p = reduction, c_p, 4 * c
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(c_p, classes)

    def forward(self, x: Tensor, z_normal: Tensor, z_reduce: Tensor) -> Tensor:
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, z_reduce if cell.reduction else z_normal)
        return self.classifier(self.pool(s1).flatten(1))
