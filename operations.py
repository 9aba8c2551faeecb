"""The candidate operations of a cell, and drop path.

An operation maps a state to y = O_k(x), or adds Z_k O_k(x) to the sum of a node: op(state, scale, total). It says of
which `parts` it consists, and where the fused kernels work (fused.operation) they do all of it in one call. Elsewhere
it is `rest(first(x))`: `first` is the stage without parameters (ReLU, pooling, nothing), which depends on the state
alone and is computed once for all edges that leave the state; `rest` holds what learns, and folds the scale into its
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
from genotypes import find_op


class First(NamedTuple):
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
            return apply_parts(x, parts, scale, total)
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
        return add(total, y)


def fused(x: Tensor, parts: Sequence[Part]) -> bool:
    """Whether the kernels work on x and are faster than PyTorch's operations for such parts."""
    return bool(parts) and kernels.usable(x) and all(part.kind in choice.taken(_contest) for part in parts)


def apply_parts(
    x: Tensor, parts: Sequence[Part], scale: Tensor | None, total: Tensor | None, keep: Tensor | None = None
) -> Tensor:
    """total + keep * scale * parts(x) through the kernels; see Operation.forward."""
    return kernels.apply(x, [parts], None if scale is None else scale.reshape(1), (0,), total, keep)


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
    if torch.is_grad_enabled() and x.device.type == "cpu" and not torch.compiler.is_exporting():
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
        self._stages: dict[First, Tensor] = {}

    def stage(self, first: First) -> Tensor:
        """first(x), computed once."""
        if first not in self._stages:
            self._stages[first] = first(self.x)
        return self._stages[first]


class Operation(nn.Module):
    """Base of the operations; see the module's head."""

    def __init__(self, first: First) -> None:
        super().__init__()
        self.first = first

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
            scale: a scalar.
            total: of the output's shape.
            keep: a factor for each image, (B, 1, 1, 1); see drop_mask.
        """
        state = state if isinstance(state, State) else State(state)
        parts = self.parts()
        if fused(state.x, parts):
            return apply_parts(state.x, parts, scale, total, keep)
        y = state.stage(self.first)
        if keep is None:
            return self.rest(y, scale, total)
        return add(total, self.rest(y, scale, None) * keep)

    def rest(self, y: Tensor, scale: Tensor | None, total: Tensor | None) -> Tensor:
        """What follows the first stage, y = first(x)."""
        raise AssertionError("each operation has its own")


class Skip(Operation):
    """Identity."""

    def __init__(self) -> None:
        super().__init__(First("identity"))

    def parts(self) -> Sequence[Part]:
        return (Part(kernels.NOTHING),)

    def rest(self, y: Tensor, scale: Tensor | None, total: Tensor | None) -> Tensor:
        if scale is None:
            return y.clone() if total is None else total.add_(y)  # the sum of a node grows in place, a state must not
        return y * scale if total is None else total.addcmul_(y, scale)


class Pool(Operation):
    """Pooling with padding, then batch norm."""

    def __init__(self, kind: str, kernel: int, channels: int, stride: int, affine: bool) -> None:
        super().__init__(First(kind, kernel, stride))
        self.norm = Norm(channels, affine=affine)

    def parts(self) -> Sequence[Part]:
        kind, kernel, stride = self.first
        return (Part(kernels.MAX if kind == "max_pool" else kernels.MEAN, kernel, stride, norm=self.norm),)

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
        super().__init__(First("relu"))
        self.depthwise = Depthwise(channels, kernel, stride, dilation)
        self.pointwise = _pointwise(channels, channels)
        self.norm = Norm(channels, affine=affine)

    def parts(self) -> Sequence[Part]:
        conv = self.depthwise
        kernel = conv.weight.shape[2]
        weights = (conv.weight, self.pointwise.weight)
        return (Part(kernels.CONV, kernel, conv.stride, conv.dilation, True, *weights, self.norm),)

    def rest(self, y: Tensor, scale: Tensor | None, total: Tensor | None) -> Tensor:
        return self.norm(self.pointwise(self.depthwise(y)), scale, total)


class SepConv(Operation):
    """(ReLU, depthwise, pointwise, BN) twice; the stride is the first depthwise's."""

    def __init__(self, channels: int, kernel: int, stride: int, affine: bool) -> None:
        super().__init__(First("relu"))
        self.half1 = DilConv(channels, kernel, stride, affine, dilation=1)
        self.half2 = DilConv(channels, kernel, 1, affine, dilation=1)

    def parts(self) -> Sequence[Part]:
        return (*self.half1.parts(), *self.half2.parts())

    def rest(self, y: Tensor, scale: Tensor | None, total: Tensor | None) -> Tensor:
        return self.half2.rest(F.relu(self.half1.rest(y, None, None)), scale, total)


class Conv(Operation):
    """(ReLU, k x k convolution, BN); also the 1 x 1 that prepares a cell's inputs."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, affine: bool) -> None:
        super().__init__(First("relu"))
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
        self.norm = Norm(c_out, affine=affine)

    def parts(self) -> Sequence[Part]:
        if self.conv.kernel_size != (1, 1) or self.conv.stride != (1, 1):
            return ()
        return (Part(kernels.CONV, relu=True, pointwise=self.conv.weight, norm=self.norm),)

    def rest(self, y: Tensor, scale: Tensor | None, total: Tensor | None) -> Tensor:
        return self.norm(self.conv(y), scale, total)


class ConvPair(Operation):
    """(ReLU, 1 x k, k x 1 convolution, BN): the factorised k x k of NASNet and AmoebaNet."""

    def __init__(self, channels: int, kernel: int, stride: int, affine: bool) -> None:
        super().__init__(First("relu"))
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
        super().__init__(First("relu"))
        self.even = _pointwise(c_in, c_out // 2)
        self.odd = _pointwise(c_in, c_out - c_out // 2)
        self.norm = Norm(c_out, affine=affine)

    def parts(self) -> Sequence[Part]:
        weight = torch.cat([self.even.weight, self.odd.weight])  # (c_out, c_in, 1, 1)
        return (Part(kernels.HALVES, stride=2, relu=True, pointwise=weight, norm=self.norm),)

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
    kind, kernel = find_op(name)
    if kind in ("max_pool", "avg_pool"):
        return Pool(kind, kernel, channels, stride, affine)
    if kind == "skip":
        return Skip() if stride == 1 else FactorizedReduce(channels, channels, affine)
    if kind == "conv":
        return Conv(channels, channels, kernel, stride, affine)
    made = {"sep_conv": SepConv, "dil_conv": DilConv, "conv_pair": ConvPair}
    return made[kind](channels, kernel, stride, affine)


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
    """A forward and backward pass of each kind, with the kernels and without, on a typical state."""
    x = torch.randn(32, 16, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
    modules: dict[str, nn.Module] = {
        "norm": Norm(16, affine=False),
        "convolution": SepConv(16, 5, 1, affine=False),
        "max": Pool("max_pool", 3, 16, 1, affine=False),
        "mean": Pool("avg_pool", 3, 16, 1, affine=False),
        "reduction": FactorizedReduce(16, 16, affine=False),
    }

    def call(module: nn.Module, enabled: bool) -> Callable[[], None]:
        def run() -> None:
            with kernels.switched(enabled):
                torch.autograd.grad(module(x).sum(), [x, *module.parameters()])

        return run

    return {kind: (call(module, True), call(module, False)) for kind, module in modules.items()}
