"""The candidate operations of a cell, and drop path.

Every operation is `rest(first(x))`. `first` is its stage without parameters (ReLU, pooling, nothing):
it depends on the source state alone, so the supernet computes it once per state and stride and shares
it among all edges that leave the state. `rest(y, scale, total)` holds what learns; `scale` is the operation's
weight Z_k in the supernet, folded into the last batch norm instead of a pass of its own, and `total` the sum of
the node so far, to which the result is added in place.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels

FIRST: dict[str, Callable[[Tensor, int], Tensor]] = {
    "identity": lambda x, stride: x,
    "relu": lambda x, stride: F.relu(x),
    "max_pool_3x3": lambda x, stride: F.max_pool2d(x, 3, stride, 1),
    "max_pool_5x5": lambda x, stride: F.max_pool2d(x, 5, stride, 2),
    "max_pool_7x7": lambda x, stride: F.max_pool2d(x, 7, stride, 3),
    "avg_pool_3x3": lambda x, stride: F.avg_pool2d(x, 3, stride, 1, count_include_pad=False),
}


class Norm(nn.BatchNorm2d):
    """Batch norm whose output may be scaled, cut off below zero and added to a sum, all in a single pass."""

    def forward(
        self, x: Tensor, scale: Tensor | None = None, total: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        """BN(x), max(BN(x), 0), or BN(x) * scale + total, the latter in place."""
        if kernels.usable(x):
            return kernels.norm(x, self, scale, total, relu)
        if scale is None:
            y = super().forward(x)
            return F.relu(y, inplace=True) if relu else y
        assert not self.affine and self.momentum is not None and self.num_batches_tracked is not None
        if self.training:
            self.num_batches_tracked.add_(1)
        # repeat, not expand: batch norm's backward reads past a stride-0 weight (torch 2.14, CPU)
        gamma = scale.reshape(1).repeat(self.num_features)  # (C,)
        y = F.batch_norm(x, self.running_mean, self.running_var, gamma, None, self.training, self.momentum, self.eps)
        return add(total, y)


def add(total: Tensor | None, y: Tensor) -> Tensor:
    """total + y, in place: nothing else holds the sum of an edge or a node while it grows."""
    return y if total is None else total.add_(y)


def spatial_conv(x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    """A padded depthwise convolution (B, C, H, W) -> (B, C, ceil(H / stride), ceil(W / stride)).

    Always the function of the last line; where gradients are wanted, in forms whose backward is 2 to 10
    times faster on a CPU. A strided one is a subsampled plain one. A dilated one is a plain one on each of
    the 2 x 2 grids of pixels that never mix; with a stride of 2 only one of the four is needed.
    """
    channels, pad = weight.shape[0], dilation * (weight.shape[2] // 2)
    if torch.is_grad_enabled():
        if stride == dilation == 2:
            return F.conv2d(x[:, :, ::2, ::2], weight, None, 1, pad // 2, 1, channels)
        if stride == 2:
            return F.conv2d(x, weight, None, 1, pad, 1, channels)[:, :, ::2, ::2]
        if dilation == 2 and x.shape[2] % 2 == x.shape[3] % 2 == 0 and x.shape[2] >= 8:
            grids = F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)  # (B, 4C, H/2, W/2)
            y = F.conv2d(grids, weight.repeat_interleave(4, 0), None, 1, pad // 2, 1, 4 * channels)
            return F.pixel_shuffle(y, 2)
    return F.conv2d(x, weight, None, stride, pad, dilation, channels)


class Operation(nn.Module):
    """Base of the operations: forward is rest(first(x)); see the module's head."""

    def __init__(self, first: str, stride: int) -> None:
        super().__init__()
        self.first, self.stride = first, stride

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(FIRST[self.first](x, self.stride))

    def rest(self, y: Tensor, scale: Tensor | None = None, total: Tensor | None = None) -> Tensor:
        """What follows the first stage, y = first(x): its output; or output * scale + total, `total` changed in place.

        Args:
            scale: a scalar.
            total: of the output's shape, only together with a scale.
        """
        raise AssertionError("each operation has its own")


class Skip(Operation):
    """Identity."""

    def __init__(self) -> None:
        super().__init__("identity", 1)

    def rest(self, y: Tensor, scale: Tensor | None = None, total: Tensor | None = None) -> Tensor:
        if scale is None:
            return y
        return y * scale if total is None else total.addcmul_(y, scale)


class Pool(Operation):
    """Pooling with padding, then batch norm."""

    def __init__(self, first: str, channels: int, stride: int, affine: bool) -> None:
        super().__init__(first, stride)
        self.norm = Norm(channels, affine=affine)

    def rest(self, y: Tensor, scale: Tensor | None = None, total: Tensor | None = None) -> Tensor:
        return self.norm(y, scale, total)


class Depthwise(nn.Module):
    """The k x k depthwise half of a separable convolution: weight (C, 1, k, k)."""

    def __init__(self, channels: int, kernel: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.stride, self.dilation = stride, dilation
        self.weight = nn.Conv2d(channels, channels, kernel, groups=channels, bias=False).weight

    def forward(self, x: Tensor) -> Tensor:
        return spatial_conv(x, self.weight, self.stride, self.dilation)


def _pointwise(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 1, stride, bias=False)


class DilConv(Operation):
    """(ReLU, depthwise with dilation 2, pointwise, BN)."""

    def __init__(self, channels: int, kernel: int, stride: int, affine: bool, dilation: int = 2) -> None:
        super().__init__("relu", stride)
        self.depthwise = Depthwise(channels, kernel, stride, dilation)
        self.pointwise = _pointwise(channels, channels)
        self.norm = Norm(channels, affine=affine)

    def rest(self, y: Tensor, scale: Tensor | None = None, total: Tensor | None = None, relu: bool = False) -> Tensor:
        if kernels.usable(y):
            d = self.depthwise
            return kernels.half(
                y, d.weight, self.pointwise.weight, d.stride, d.dilation, self.norm, scale, total, relu
            )
        return self.norm(self.pointwise(self.depthwise(y)), scale, total, relu)


class SepConv(Operation):
    """(ReLU, depthwise, pointwise, BN) twice; the stride is the first depthwise's."""

    def __init__(self, channels: int, kernel: int, stride: int, affine: bool) -> None:
        super().__init__("relu", stride)
        self.half1 = DilConv(channels, kernel, stride, affine, dilation=1)
        self.half2 = DilConv(channels, kernel, 1, affine, dilation=1)

    def rest(self, y: Tensor, scale: Tensor | None = None, total: Tensor | None = None) -> Tensor:
        return self.half2.rest(self.half1.rest(y, relu=True), scale, total)


class Conv(Operation):
    """(ReLU, k x k convolution, BN); also the 1 x 1 that prepares a cell's inputs."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, affine: bool) -> None:
        super().__init__("relu", stride)
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
        self.norm = Norm(c_out, affine=affine)

    def rest(self, y: Tensor, scale: Tensor | None = None, total: Tensor | None = None) -> Tensor:
        return self.norm(self.conv(y), scale, total)


class ConvPair(Operation):
    """(ReLU, 1 x k, k x 1 convolution, BN): the factorised k x k of NASNet and AmoebaNet."""

    def __init__(self, channels: int, kernel: int, stride: int, affine: bool) -> None:
        super().__init__("relu", stride)
        pad = kernel // 2
        self.row = nn.Conv2d(channels, channels, (1, kernel), (1, stride), (0, pad), bias=False)
        self.column = nn.Conv2d(channels, channels, (kernel, 1), (stride, 1), (pad, 0), bias=False)
        self.norm = Norm(channels, affine=affine)

    def rest(self, y: Tensor, scale: Tensor | None = None, total: Tensor | None = None) -> Tensor:
        return self.norm(self.column(self.row(y)), scale, total)


class FactorizedReduce(Operation):
    """Stride-2 identity: ReLU, two 1 x 1 convolutions on the even and the odd pixels, concatenated, BN.

    Odd sizes are padded with a zero row or column, so that both halves give ceil(H / 2).
    """

    def __init__(self, c_in: int, c_out: int, affine: bool) -> None:
        super().__init__("relu", 2)
        self.even = _pointwise(c_in, c_out // 2)
        self.odd = _pointwise(c_in, c_out - c_out // 2)
        self.norm = Norm(c_out, affine=affine)

    def rest(self, y: Tensor, scale: Tensor | None = None, total: Tensor | None = None) -> Tensor:
        height, width = y.shape[2:]
        odd = F.pad(y, (0, width % 2, 0, height % 2))[:, :, 1::2, 1::2]
        return self.norm(torch.cat([self.even(y[:, :, ::2, ::2]), self.odd(odd)], 1), scale, total)


def make_op(name: str, channels: int, stride: int, affine: bool) -> Operation:
    """The module of an op of genotypes.SPACES (all but none), C channels in and out.

    Args:
        name: e.g. "sep_conv_3x3".
        channels: C.
        stride: 1 or 2.
        affine: whether its batch norms learn a scale and a shift (child) or not (supernet).
    """
    kind, _, shape = name.rpartition("_")
    kernel = int(shape[-1]) if shape[-1].isdigit() else 0
    if name in FIRST:
        return Pool(name, channels, stride, affine)
    if name == "skip_connect":
        return Skip() if stride == 1 else FactorizedReduce(channels, channels, affine)
    if kind == "sep_conv":
        return SepConv(channels, kernel, stride, affine)
    if kind == "dil_conv":
        return DilConv(channels, kernel, stride, affine)
    if kind == "conv":
        return Conv(channels, channels, kernel, stride, affine)
    if kind in ("conv_3x1", "conv_7x1"):
        return ConvPair(channels, kernel, stride, affine)
    raise ValueError(f"no operation is called {name!r}")


def drop_path(x: Tensor, probability: float) -> Tensor:
    """Zero whole samples of x (B, C, H, W) with the given probability and rescale the others by 1/(1 - p)."""
    if probability == 0.0:
        return x
    keep = 1.0 - probability
    mask = torch.empty(x.shape[0], 1, 1, 1, dtype=x.dtype, device=x.device).bernoulli_(keep)  # (B, 1, 1, 1)
    return x * (mask / keep)
