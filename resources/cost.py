"""What a network costs, in closed form: parameters, multiply-adds, memory access.

    params   learnable parameters, affine batch norms included
    flops    multiply-adds of convolutions and linear layers, one per multiply-add, one image, forward
    mac      memory access cost: elements that convolutions, linear layers and pools read and write, weights included,
             one image, forward; batch norm, ReLU and sums counted as part of them (Ma et al. 2018, arXiv 1807.11164)

Tests hold the formulas against counting a network that is built.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor, nn

from genotypes import SPACES, CellPlan, Genotype, cell_plan, edge_list, find_op
from loading.sets import DataInfo
from options.constraint_option import ConstraintOptions

Size = tuple[int, int]  # H, W
Pairs = Sequence[tuple[str, int]]  # (op, source state)


class Cost(NamedTuple):
    """Of an operation or a network; costs are added."""

    params: int = 0
    flops: int = 0
    mac: int = 0

    def __add__(self, other: tuple[int, ...]) -> "Cost":  # type: ignore[override]
        return Cost(*map(sum, zip(self, other, strict=True)))


def shrink(size: Size, stride: int | Size) -> Size:
    """The size of a padded convolution's or pool's output: rounded up."""
    down, across = (stride, stride) if isinstance(stride, int) else stride
    return ceil(size[0] / down), ceil(size[1] / across)


def _conv(
    size: Size, c_in: int, c_out: int, kernel: Size = (1, 1), stride: int | Size = 1, depthwise: bool = False
) -> Cost:
    """A padded convolution without bias on an input of this size."""
    weights = c_out * kernel[0] * kernel[1] * (1 if depthwise else c_in)
    height, width = shrink(size, stride)
    pixels = height * width
    return Cost(weights, weights * pixels, c_in * size[0] * size[1] + c_out * pixels + weights)


def _norm(channels: int) -> Cost:
    return Cost(params=2 * channels)


def _reduce(size: Size, c_in: int, c_out: int) -> Cost:
    """FactorizedReduce, its batch norm left out: two 1 x 1 convolutions of stride 2."""
    return _conv(size, c_in, c_out // 2, stride=2) + _conv(size, c_in, c_out - c_out // 2, stride=2)


def _half(size: Size, channels: int, kernel: int, stride: int) -> Cost:
    """Depthwise and pointwise."""
    pointwise = _conv(shrink(size, stride), channels, channels)
    return _conv(size, channels, channels, (kernel, kernel), stride, depthwise=True) + pointwise


def _pool(channels: int, size: Size, kernel: int, stride: int) -> Cost:
    height, width = shrink(size, stride)
    return Cost(mac=channels * (size[0] * size[1] + height * width))


def _separable(channels: int, size: Size, kernel: int, stride: int) -> Cost:
    return _half(size, channels, kernel, stride) + _half(shrink(size, stride), channels, kernel, 1)


def _pair(channels: int, size: Size, kernel: int, stride: int) -> Cost:
    """1 x k, then k x 1."""
    between = shrink(size, (1, stride))
    row = _conv(size, channels, channels, (1, kernel), (1, stride))
    return row + _conv(between, channels, channels, (kernel, 1), (stride, 1))


# kind -> its cost for (channels, size of its input, kernel, stride) without batch norms, and the number of these
KINDS: dict[str, tuple[Callable[[int, Size, int, int], Cost], int]] = {
    "none": (lambda c, size, k, stride: Cost(), 0),
    "skip": (lambda c, size, k, stride: _reduce(size, c, c), 1),  # with stride 1 it has neither
    "max_pool": (_pool, 1),
    "avg_pool": (_pool, 1),
    "sep_conv": (_separable, 2),
    "dil_conv": (lambda c, size, k, stride: _half(size, c, k, stride), 1),
    "conv": (lambda c, size, k, stride: _conv(size, c, c, (k, k), stride), 1),
    "conv_pair": (_pair, 1),
}


@cache
def op_cost(op: str, channels: int, size: Size, stride: int, affine: bool = True) -> Cost:
    """An operation of genotypes.OPS, C channels in and out.

    Args:
        op: e.g. "sep_conv_3x3", or "none".
        channels: C. size: H, W of its input. stride: 1 or 2.
        affine: whether its batch norms learn a scale and a shift, as in a child.
    """
    kind, kernel = find_op(op)
    if kind == "skip" and stride == 1:
        return Cost(mac=2 * channels * size[0] * size[1])
    price, norms = KINDS[kind]
    total = price(channels, size, kernel, stride)
    return total + Cost(params=2 * channels * norms) if affine else total


class Place(NamedTuple):
    """An operation somewhere in a network."""

    op: str
    channels: int
    size: Size  # of its input
    stride: int


@dataclass(frozen=True)
class Deployed:
    """The network that a genotype is going to be: what its cost depends on besides the genotype."""

    init_channels: int
    layers: int
    image_size: Size
    num_classes: int
    in_channels: int = 3
    stem: str = "cifar"
    affine: bool = True

    @classmethod
    def of(
        cls, info: DataInfo, init_channels: int, layers: int, stem: str = "cifar", affine: bool = True
    ) -> "Deployed":
        """For images as the data has them."""
        height, width = info.image_size
        return cls(init_channels, layers, (height, width), len(info.classes), info.channels, stem, affine)

    @classmethod
    def planned(cls, info: DataInfo, opt: ConstraintOptions) -> "Deployed":
        """The child of a search as it will be deployed."""
        channels, layers = opt.child_init_channels or opt.init_channels, opt.child_layers or opt.layers
        child, size = cls.of(info, channels, layers, opt.child_stem or "cifar"), opt.child_image_size
        return replace(child, image_size=(size, size)) if size else child

    def price(self, genotype: Genotype) -> dict[str, int]:
        """params, flops and mac of the network of a genotype, without auxiliary head."""
        return self.total(*pairs(genotype))._asdict()

    def places(self, concat: tuple[int, int]) -> list[tuple[CellPlan, Size, Size]]:
        """Each cell with the sizes of c_{k-2} and c_{k-1}."""
        before = last = self.image_size
        channels = 3 * self.init_channels
        if self.stem == "imagenet":
            before, channels = shrink(shrink(last, 2), 2), self.init_channels
            last = shrink(before, 2)
        found = []
        for plan in cell_plan(self.init_channels, self.layers, channels, concat, self.stem == "imagenet"):
            found.append((plan, before, last))
            before, last = last, shrink(last, 2) if plan.reduction else last
        return found

    def fixed(self, concat: tuple[int, int]) -> Cost:
        """Stem, the preparation of every cell's inputs, classifier: what no architecture avoids."""
        places = self.places(concat)
        total = self._stem()
        for plan, before, last in places:
            c, (c_before, c_last) = plan.channels, plan.inputs
            total += _reduce(before, c_before, c) if plan.after_reduction else _conv(before, c_before, c)
            total += _conv(last, c_last, c)
            total += _norm(c) + _norm(c) if self.affine else Cost()
        features, classes = places[-1][0].output, self.num_classes
        weights = features * classes
        return total + Cost(weights + classes, weights, features + classes + weights)

    def _stem(self) -> Cost:
        size, c, images = self.image_size, self.init_channels, self.in_channels
        if self.stem == "cifar":
            return _conv(size, images, 3 * c, (3, 3)) + _norm(3 * c)
        half, quarter = shrink(size, 2), shrink(shrink(size, 2), 2)
        total = _conv(size, images, c // 2, (3, 3), 2) + _conv(half, c // 2, c, (3, 3), 2)
        total += _conv(quarter, c, c, (3, 3), 2)
        return total + _norm(c // 2) + _norm(c) + _norm(c)

    def walk(self, concat: tuple[int, int], normal: Pairs, reduce: Pairs) -> Iterator[tuple[Place, bool, int]]:
        """Every operation of the network: its place, whether in a reduction cell, its index in that cell's pairs."""
        for plan, _, last in self.places(concat):
            for index, (op, source) in enumerate(reduce if plan.reduction else normal):
                size = shrink(last, 2) if plan.reduction and source >= 2 else last
                yield Place(op, plan.channels, size, plan.stride(source)), plan.reduction, index

    def total(self, concat: tuple[int, int], normal: Pairs, reduce: Pairs) -> Cost:
        """The whole network, given the (op, source) pairs of both cells."""
        total = self.fixed(concat)
        for place, _, _ in self.walk(concat, normal, reduce):
            total += op_cost(*place, self.affine)
        return total


def pairs(genotype: Genotype) -> tuple[tuple[int, int], Pairs, Pairs]:
    """What Deployed wants to know of a genotype: nodes in the outputs, (op, source) pairs of both cells."""
    normal, reduce = ([pair for node in nodes for pair in node] for nodes in (genotype.normal, genotype.reduce))
    return (len(genotype.normal_concat), len(genotype.reduce_concat)), normal, reduce


def every_pair(space: str, nodes: int) -> tuple[tuple[int, int], Pairs, Pairs]:
    """The same of a supernet: all operations of every edge, in the order of alpha's entries."""
    every = [(op, source) for _, source in edge_list(nodes) for op in SPACES[space]]
    return (nodes, nodes), every, every


def cost(
    genotype: Genotype,
    *,
    init_channels: int,
    layers: int,
    image_size: int | Size,
    num_classes: int,
    in_channels: int = 3,
    stem: str = "cifar",
    affine: bool = True,
) -> dict[str, int]:
    """params, flops and mac of the network of a genotype, without auxiliary head; arguments as model.ChildNetwork's.

    Args:
        image_size: side, or (H, W).
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    return Deployed(init_channels, layers, size, num_classes, in_channels, stem, affine).price(genotype)


@torch.no_grad()
def count(network: nn.Module, in_channels: int, size: Size) -> dict[str, int]:
    """params, flops and mac of any network of convolutions, linear layers and pools, counted as one image passes."""
    total = Cost(params=sum(p.numel() for p in network.parameters()))

    def passed(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        weights = getattr(module, "weight", torch.empty(0)).numel()
        pixels = output[0].numel() // output.shape[1] if output.dim() == 4 else 1
        total += Cost(0, weights * pixels, inputs[0][0].numel() + output[0].numel() + weights)

    kinds = (nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.AvgPool2d)
    hooks = [module.register_forward_hook(passed) for module in network.modules() if isinstance(module, kinds)]
    training = network.training
    try:
        network.eval()(torch.zeros(1, in_channels, *size, device=next(network.parameters()).device))
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    return total._asdict()


def supernet_cost(space: str, nodes: int, deployed: Deployed) -> dict[str, int]:
    """params (without alpha), flops and mac of a supernet, all operations of every edge; its norms are not affine."""
    return deployed.total(*every_pair(space, nodes))._asdict()


@dataclass(frozen=True)
class Table:
    """The cost of every choice in one measure: that of an architecture Z is fixed + sum Z * costs."""

    fixed: float | Tensor
    costs: Tensor  # (2 E, O) float64: each edge of the normal cells, over all of them, then of the reduction cells

    def range(self) -> tuple[float, float]:
        """The cheapest and the dearest architecture."""
        return float(self.fixed + self.costs.amin(-1).sum()), float(self.fixed + self.costs.amax(-1).sum())

    def uniform(self) -> Tensor:
        """What all operations cost on average, without the fixed part; a scalar."""
        return self.costs.mean(-1).sum()


def table(space: str, nodes: int, deployed: Deployed, fixed: float, price: Callable[[Place], float]) -> Table:
    """A Table of any measure that adds up over operations.

    Args:
        fixed: what every architecture costs.
        price: what an operation costs at a place.
    """
    concat, every, _ = every_pair(space, nodes)
    costs = torch.zeros(2, len(every), dtype=torch.float64)
    for place, reduction, index in deployed.walk(concat, every, every):
        costs[int(reduction), index] += price(place)
    return Table(fixed, costs.view(-1, len(SPACES[space])))


def tables(space: str, nodes: int, deployed: Deployed) -> dict[str, Table]:
    """A Table per measure for the architectures of a space, deployed as given."""
    fixed = deployed.fixed((nodes, nodes))

    def of(index: int) -> Table:
        return table(space, nodes, deployed, fixed[index], lambda place: op_cost(*place, deployed.affine)[index])

    return {measure: of(index) for index, measure in enumerate(Cost._fields)}


def show(value: float) -> str:
    """A cost for people: counts in full, small numbers with three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
