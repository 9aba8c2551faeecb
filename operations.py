"""The candidate operations of a cell, and drop path.

An operation maps a state to y = O_k(x), or adds Z_k O_k(x) to the sum of a node: op(state, scale, total). It says of
which `parts` it consists, and where the fused kernels work (fused.operation) they do all of it in one call. Elsewhere
it is `own(shared(x))`: `shared` is the stage without parameters (ReLU, pooling, nothing), which depends on the state
alone and is computed once for all edges that leave the state; `own` is what learns, and folds the scale into its
last batch norm.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused import choice
from fused import operation as kernels
from fused.operation import Part
from fused.plain import spatial_conv, subsample
from genotypes import CellPlan, find_op


class Shared(NamedTuple):
    """The stage of an operation without parameters; strides are those of pooling."""

    kind: str  # identity, relu, max_pool or avg_pool
    kernel: int = 1
    stride: int = 1

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, ceil(H / stride), ceil(W / stride))."""
        pad = self.kernel // 2
        if self.kind == "max_pool":
            return F.max_pool2d(x, self.kernel, self.stride, pad)
        if self.kind == "avg_pool":
            return F.avg_pool2d(x, self.kernel, self.stride, pad, count_include_pad=False)
        return F.relu(x) if self.kind == "relu" else x


class Norm(nn.BatchNorm2d):
    """Batch norm whose output may be scaled and added to a sum, in a single pass."""

    def forward(self, x: Tensor, scale: Tensor | None = None, total: Tensor | None = None) -> Tensor:
        """BN(x), or total + scale * BN(x), the latter in place."""
        parts = (Part(kernels.NOTHING, norm=self),)
        if fused(x, parts):
            return kernels.apply_one(x, parts, scale, total)
        assert self.momentum is not None and self.num_batches_tracked is not None
        if self.training and self.momentum:
            self.num_batches_tracked.add_(1)
        gamma: Tensor | None = self.weight
        beta: Tensor | None = self.bias
        if scale is not None:
            # repeat, not expand: batch norm's backward reads past a stride-0 weight (torch 2.14, CPU)
            gamma = scale.reshape(1).repeat(self.num_features) if gamma is None else scale * gamma  # (C,)
            beta = None if beta is None else scale * beta
        y = F.batch_norm(x, self.running_mean, self.running_var, gamma, beta, self.training, self.momentum, self.eps)
        return y if total is None else total.add_(y)  # in place: nothing else holds a sum while it grows


def fused(x: Tensor, parts: Sequence[Part]) -> bool:
    """Whether the kernels work on x and are taken for such parts."""
    return bool(parts) and kernels.usable(x) and all(part.kind in choice.taken(_contest) for part in parts)


@contextmanager
def batch_norms(module: nn.Module) -> Iterator[list[Norm]]:
    """The batch norms of a module; what their momenta are changed to inside does not outlast it."""
    norms = [m for m in module.modules() if isinstance(m, Norm)]
    momenta = [norm.momentum for norm in norms]
    try:
        yield norms
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Inside, batch norms in training mode leave their running statistics as they are."""
    with batch_norms(module) as norms:
        for norm in norms:
            norm.momentum = 0.0
        yield


class State:
    """A state of a cell, x (B, C, H, W), with the stages without parameters that its edges share."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self._stages: dict[Shared, Tensor] = {}

    def through(self, stage: Shared) -> Tensor:
        """stage(x), computed once."""
        if stage not in self._stages:
            self._stages[stage] = stage(self.x)
        return self._stages[stage]


class Operation(nn.Module):
    """Base of the operations; see the module's head."""

    def __init__(self, shared: Shared) -> None:
        super().__init__()
        self.shared = shared

    def parts(self) -> Sequence[Part]:
        """What the fused kernels do for it; nothing if they cannot."""
        return ()

    def forward(
        self,
        state: State | Tensor,
        scale: Tensor | None = None,
        total: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """O(x), or total + keep * scale * O(x), `total` changed in place; what is missing counts as 0 or 1.

        Args:
            state: x, or the state that holds it; (B, C, H, W).
            scale: a scalar. total: of the output's shape.
            keep: a factor for each image, (B, 1, 1, 1); see drop_mask.
        """
        state = state if isinstance(state, State) else State(state)
        parts = self.parts()
        if fused(state.x, parts):
            return kernels.apply_one(state.x, parts, scale, total, keep)
        y = state.through(self.shared)
        if keep is None:
            return self.own(y, scale, total)
        y = self.own(y, scale, None) * keep
        return y if total is None else total.add_(y)

    def own(self, y: Tensor, scale: Tensor | None, total: Tensor | None) -> Tensor:
        """What follows the shared stage, y = shared(x)."""
        raise AssertionError("each operation has its own")


class Skip(Operation):
    """Identity."""

    def __init__(self) -> None:
        super().__init__(Shared("identity"))

    def parts(self) -> Sequence[Part]:
        return (Part(kernels.NOTHING),)

    def own(self, y: Tensor, scale: Tensor | None, total: Tensor | None) -> Tensor:
        if scale is None:
            return y.clone() if total is None else total.add_(y)  # the sum of a node grows in place, a state must not
        return y * scale if total is None else total.addcmul_(y, scale)


class Pool(Operation):
    """Pooling with padding, then batch norm."""

    def __init__(self, kind: str, kernel: int, channels: int, stride: int, affine: bool) -> None:
        super().__init__(Shared(kind, kernel, stride))
        self.norm = Norm(channels, affine=affine)

    def parts(self) -> Sequence[Part]:
        kind, kernel, stride = self.shared
        return (Part(kernels.MAX if kind == "max_pool" else kernels.MEAN, kernel, stride, norm=self.norm),)

    def own(self, y: Tensor, scale: Tensor | None, total: Tensor | None) -> Tensor:
        return self.norm(y, scale, total)


def _pointwise(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 1, bias=False)


class DepthwiseSeparable(Operation):
    """(ReLU, depthwise, pointwise, BN): with dilation 2 a dilated convolution, without one half of a SepConv."""

    def __init__(self, channels: int, kernel: int, stride: int, dilation: int, affine: bool) -> None:
        super().__init__(Shared("relu"))
        pad = dilation * (kernel // 2)
        self.depthwise = nn.Conv2d(channels, channels, kernel, stride, pad, dilation, channels, bias=False)
        self.pointwise = _pointwise(channels, channels)
        self.norm = Norm(channels, affine=affine)

    def parts(self) -> Sequence[Part]:
        conv = self.depthwise
        steps = (conv.weight.shape[2], conv.stride[0], conv.dilation[0])
        return (Part(kernels.CONV, *steps, True, conv.weight, self.pointwise.weight, self.norm),)

    def own(self, y: Tensor, scale: Tensor | None, total: Tensor | None) -> Tensor:
        conv = self.depthwise
        y = spatial_conv(y, conv.weight, conv.stride[0], conv.dilation[0], self.training)
        return self.norm(self.pointwise(y), scale, total)


class SepConv(Operation):
    """(ReLU, depthwise, pointwise, BN) twice; the stride is the first depthwise's."""

    def __init__(self, channels: int, kernel: int, stride: int, affine: bool) -> None:
        super().__init__(Shared("relu"))
        self.half1 = DepthwiseSeparable(channels, kernel, stride, 1, affine)
        self.half2 = DepthwiseSeparable(channels, kernel, 1, 1, affine)

    def parts(self) -> Sequence[Part]:
        return (*self.half1.parts(), *self.half2.parts())

    def own(self, y: Tensor, scale: Tensor | None, total: Tensor | None) -> Tensor:
        return self.half2.own(F.relu(self.half1.own(y, None, None)), scale, total)


class Conv(Operation):
    """(ReLU, k x k convolution, BN); also the 1 x 1 that prepares a cell's inputs."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, affine: bool) -> None:
        super().__init__(Shared("relu"))
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
        self.norm = Norm(c_out, affine=affine)

    def parts(self) -> Sequence[Part]:
        if self.conv.kernel_size != (1, 1) or self.conv.stride != (1, 1):
            return ()
        return (Part(kernels.CONV, relu=True, pointwise=self.conv.weight, norm=self.norm),)

    def own(self, y: Tensor, scale: Tensor | None, total: Tensor | None) -> Tensor:
        return self.norm(self.conv(y), scale, total)


class ConvPair(Operation):
    """(ReLU, 1 x k, k x 1 convolution, BN): the factorised k x k of NASNet and AmoebaNet."""

    def __init__(self, channels: int, kernel: int, stride: int, affine: bool) -> None:
        super().__init__(Shared("relu"))
        pad = kernel // 2
        self.row = nn.Conv2d(channels, channels, (1, kernel), (1, stride), (0, pad), bias=False)
        self.column = nn.Conv2d(channels, channels, (kernel, 1), (stride, 1), (pad, 0), bias=False)
        self.norm = Norm(channels, affine=affine)

    def own(self, y: Tensor, scale: Tensor | None, total: Tensor | None) -> Tensor:
        return self.norm(self.column(self.row(y)), scale, total)


class FactorizedReduce(Operation):
    """Stride-2 identity: ReLU, two 1 x 1 convolutions on the even and the odd pixels, concatenated, BN.

    Odd sizes are padded with a zero row or column, so that both halves give ceil(H / 2).
    """

    def __init__(self, c_in: int, c_out: int, affine: bool) -> None:
        super().__init__(Shared("relu"))
        self.even = _pointwise(c_in, c_out // 2)
        self.odd = _pointwise(c_in, c_out - c_out // 2)
        self.norm = Norm(c_out, affine=affine)

    def parts(self) -> Sequence[Part]:
        weight = torch.cat([self.even.weight, self.odd.weight])  # (c_out, c_in, 1, 1)
        return (Part(kernels.HALVES, stride=2, relu=True, pointwise=weight, norm=self.norm),)

    def own(self, y: Tensor, scale: Tensor | None, total: Tensor | None) -> Tensor:
        down, right = y.shape[2] % 2, y.shape[3] % 2
        padded = F.pad(y, (0, right, 0, down)) if down or right else y
        both = torch.cat([self.even(subsample(y)), self.odd(subsample(padded, 1))], 1)
        return self.norm(both, scale, total)


# kind -> its module for (channels, kernel, stride, affine)
KINDS: dict[str, Callable[[int, int, int, bool], Operation]] = {
    "skip": lambda c, k, stride, affine: Skip() if stride == 1 else FactorizedReduce(c, c, affine),
    "max_pool": lambda c, k, stride, affine: Pool("max_pool", k, c, stride, affine),
    "avg_pool": lambda c, k, stride, affine: Pool("avg_pool", k, c, stride, affine),
    "sep_conv": SepConv,
    "dil_conv": lambda c, k, stride, affine: DepthwiseSeparable(c, k, stride, 2, affine),
    "conv": lambda c, k, stride, affine: Conv(c, c, k, stride, affine),
    "conv_pair": ConvPair,
}


def make_op(name: str, channels: int, stride: int, affine: bool) -> Operation:
    """The module of an op of genotypes.OPS (all but none), C channels in and out, stride 1 or 2.

    affine: whether its batch norms learn a scale and a shift (child) or not (supernet).
    """
    kind, kernel = find_op(name)
    return KINDS[kind](channels, kernel, stride, affine)


def prepare(plan: CellPlan, affine: bool) -> tuple[Operation, Operation]:
    """What brings a cell's two inputs to its size and channels."""
    (before, last), c = plan.inputs, plan.channels
    first = FactorizedReduce(before, c, affine) if plan.after_reduction else Conv(before, c, 1, 1, affine)
    return first, Conv(last, c, 1, 1, affine)


def drop_probability(x: Tensor, probability: float) -> Tensor | None:
    """The probability of drop path where x is, a scalar: compiled code must not depend on its value; None for 0."""
    return x.new_full((), probability) if probability else None


def drop_mask(x: Tensor, probability: Tensor) -> Tensor:
    """What drop path multiplies the images of x (B, C, H, W) with: 0 with the given probability, else 1/(1 - p).

    Returns:
        (B, 1, 1, 1).
    """
    keep = (1 - probability).to(x.dtype)
    return torch.bernoulli(keep.expand(len(x), 1, 1, 1)) / keep


def kernels_in_words() -> str:
    """Which form of the operations runs on this machine's CPU in float32, and why."""
    return choice.in_words(_contest)


def _contest() -> choice.Contest:
    """A typical state, and a module of each kind of part."""
    x = torch.randn(32, 16, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
    modules: dict[str, nn.Module] = {
        "norm": Norm(16, affine=False),
        "convolution": SepConv(16, 5, 1, affine=False),
        "max": Pool("max_pool", 3, 16, 1, affine=False),
        "mean": Pool("avg_pool", 3, 16, 1, affine=False),
        "reduction": FactorizedReduce(16, 16, affine=False),
    }
    return choice.passes(x, modules)
