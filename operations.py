"""The candidate operations of a cell, and drop path.

An operation maps a state to y = O_k(x), or adds Z_k O_k(x) to the sum of a node: op(state, scale, total). Where the
fused kernels work (kernels.usable) they do all of it in one pass. Elsewhere it is `rest(first(x))`: `first` is the
stage without parameters (ReLU, pooling, nothing), which depends on the state alone and is computed once for all edges
that leave the state; `rest` holds what learns, and folds the scale into its last batch norm.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused import operation as kernels

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
        """BN(x), max(BN(x), 0), or total + scale * BN(x), the latter in place."""
        if kernels.usable(x):
            return kernels.operation(x, self, scale=scale, total=total, relu=relu)
        assert self.momentum is not None and self.num_batches_tracked is not None
        if self.training and self.momentum:
            self.num_batches_tracked.add_(1)
        # repeat, not expand: batch norm's backward reads past a stride-0 weight (torch 2.14, CPU)
        gamma = self.weight if scale is None else scale.reshape(1).repeat(self.num_features)  # (C,)
        y = F.batch_norm(
            x, self.running_mean, self.running_var, gamma, self.bias, self.training, self.momentum, self.eps
        )
        return add(total, F.relu(y, inplace=True) if relu else y)


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Inside, batch norms in training mode leave their running statistics as they are."""
    norms = [m for m in module.modules() if isinstance(m, Norm)]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def add(total: Tensor | None, y: Tensor) -> Tensor:
    """total + y, in place: nothing else holds the sum of an edge or a node while it grows."""
    return y if total is None else total.add_(y)


def subsample(x: Tensor, start: int = 0) -> Tensor:
    """Every other pixel: x[:, :, start::2, start::2], sliced so that the gradient keeps the layout of channels_last."""
    return x.permute(0, 2, 3, 1)[:, start::2, start::2].permute(0, 3, 1, 2)


def spatial_conv(x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    """A padded depthwise convolution (B, C, H, W) -> (B, C, ceil(H / stride), ceil(W / stride)).

    Always the function of the last line, which exported files have; where gradients are wanted, in forms whose
    backward is 2 to 10 times faster on a CPU. A strided one is a subsampled plain one. A dilated one is a plain one
    on each of the 2 x 2 grids of pixels that never mix; with a stride of 2 only one of the four is needed.
    """
    channels, pad = weight.shape[0], dilation * (weight.shape[2] // 2)
    if torch.is_grad_enabled() and not torch.compiler.is_exporting():
        if stride == dilation == 2:
            return F.conv2d(subsample(x), weight, None, 1, pad // 2, 1, channels)
        if stride == 2:
            return subsample(F.conv2d(x, weight, None, 1, pad, 1, channels))
        if dilation == 2 and x.shape[2] % 2 == x.shape[3] % 2 == 0 and x.shape[2] >= 8:
            grids = F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)  # (B, 4C, H/2, W/2)
            y = F.conv2d(grids, weight.repeat_interleave(4, 0), None, 1, pad // 2, 1, 4 * channels)
            return F.pixel_shuffle(y, 2)
    return F.conv2d(x, weight, None, stride, pad, dilation, channels)


class State:
    """A state of a cell, x (B, C, H, W), with the parameter-free first stages that its edges share."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self._stages: dict[tuple[str, int], Tensor] = {}

    def stage(self, first: str, stride: int) -> Tensor:
        """FIRST[first] of x, computed once per kind and stride."""
        # Strides belong to pooling; what comes before a strided convolution does not depend on them.
        key = (first, stride if "pool" in first else 1)
        if key not in self._stages:
            self._stages[key] = FIRST[first](self.x, stride)
        return self._stages[key]


def _as_state(state: State | Tensor) -> State:
    return state if isinstance(state, State) else State(state)


class Operation(nn.Module):
    """Base of the operations; see the module's head."""

    def __init__(self, first: str, stride: int) -> None:
        super().__init__()
        self.first, self.stride = first, stride

    def forward(self, state: State | Tensor, scale: Tensor | None = None, total: Tensor | None = None) -> Tensor:
        """O(x); or total + scale * O(x), `total` changed in place.

        Args:
            state: x, or the state that holds it; (B, C, H, W).
            scale: a scalar.
            total: of the output's shape, only together with a scale.
        """
        return self.rest(_as_state(state).stage(self.first, self.stride), scale, total)

    def rest(self, y: Tensor, scale: Tensor | None, total: Tensor | None) -> Tensor:
        """What follows the first stage, y = first(x)."""
        raise AssertionError("each operation has its own")


class Skip(Operation):
    """Identity."""

    def __init__(self) -> None:
        super().__init__("identity", 1)

    def rest(self, y: Tensor, scale: Tensor | None, total: Tensor | None) -> Tensor:
        if scale is None:
            return y
        return y * scale if total is None else total.addcmul_(y, scale)


class Pool(Operation):
    """Pooling with padding, then batch norm."""

    def __init__(self, first: str, channels: int, stride: int, affine: bool) -> None:
        super().__init__(first, stride)
        self.norm = Norm(channels, affine=affine)
        kind = kernels.MAX if first.startswith("max") else kernels.MEAN
        self.way = kernels.Way(kind, int(first[-1]), stride)

    def forward(self, state: State | Tensor, scale: Tensor | None = None, total: Tensor | None = None) -> Tensor:
        state = _as_state(state)
        if kernels.usable(state.x):
            return kernels.operation(state.x, self.norm, self.way, None, scale, total)
        return super().forward(state, scale, total)

    def rest(self, y: Tensor, scale: Tensor | None, total: Tensor | None) -> Tensor:
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
        self.way = kernels.Way(kernels.CONV, kernel, stride, dilation, relu=True)

    def forward(
        self, state: State | Tensor, scale: Tensor | None = None, total: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        """See Operation.forward; relu: cut off the result below zero."""
        state = _as_state(state)
        if kernels.usable(state.x):
            weights = (self.depthwise.weight, self.pointwise.weight)
            return kernels.operation(state.x, self.norm, self.way, weights, scale, total, relu)
        d = self.depthwise(state.stage(self.first, self.stride))
        return self.norm(self.pointwise(d), scale, total, relu)


class SepConv(Operation):
    """(ReLU, depthwise, pointwise, BN) twice; the stride is the first depthwise's."""

    def __init__(self, channels: int, kernel: int, stride: int, affine: bool) -> None:
        super().__init__("relu", stride)
        self.half1 = DilConv(channels, kernel, stride, affine, dilation=1)
        self.half2 = DilConv(channels, kernel, 1, affine, dilation=1)

    def forward(self, state: State | Tensor, scale: Tensor | None = None, total: Tensor | None = None) -> Tensor:
        return self.half2(self.half1(state), scale, total)


class Conv(Operation):
    """(ReLU, k x k convolution, BN); also the 1 x 1 that prepares a cell's inputs."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, affine: bool) -> None:
        super().__init__("relu", stride)
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
        self.norm = Norm(c_out, affine=affine)

    def rest(self, y: Tensor, scale: Tensor | None, total: Tensor | None) -> Tensor:
        return self.norm(self.conv(y), scale, total)


class ConvPair(Operation):
    """(ReLU, 1 x k, k x 1 convolution, BN): the factorised k x k of NASNet and AmoebaNet."""

    def __init__(self, channels: int, kernel: int, stride: int, affine: bool) -> None:
        super().__init__("relu", stride)
        pad = kernel // 2
        self.row = nn.Conv2d(channels, channels, (1, kernel), (1, stride), (0, pad), bias=False)
        self.column = nn.Conv2d(channels, channels, (kernel, 1), (stride, 1), (pad, 0), bias=False)
        self.norm = Norm(channels, affine=affine)

    def rest(self, y: Tensor, scale: Tensor | None, total: Tensor | None) -> Tensor:
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

    def rest(self, y: Tensor, scale: Tensor | None, total: Tensor | None) -> Tensor:
        height, width = y.shape[2:]
        padded = F.pad(y, (0, width % 2, 0, height % 2)) if height % 2 or width % 2 else y
        both = torch.cat([self.even(subsample(y)), self.odd(subsample(padded, 1))], 1)
        return self.norm(both, scale, total)


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
