"""Operations of a cell as fused CPU kernels (kernels.cpp): the call, its checks, its gradient.

The layout trick, explained once. A supernet spends its time on (ReLU,) depthwise, pointwise, batch norm. As library
calls these read and write every intermediate tensor from and to memory, and two of their backward passes, the
depthwise weight gradient and batch norm in channels_last, run ten times slower than memory allows. Here one call does
all operations of an edge, a part at a time (a separable convolution has two), image by image, so that intermediates
stay in the cache of a core; it adds Z_k BN(...) to the sum of the node, and the gradients of the operations to that of
their common input, in place. For the backward pass a mixed edge keeps the inputs of its parts alone, which all edges
that leave a state share, and computes the two intermediates again. An operation that stands alone, as in a child, keeps
the output of its convolutions too: that costs a mixed edge too much, which has six.

Where the kernels do not work (`usable`) callers use PyTorch's own operations. Results agree to float32 rounding and do
not depend on the number of threads.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fused import build

KERNELS = (1, 3, 5, 7)  # sides that are compiled
enabled = True  # set to False to use PyTorch's operations throughout

NOTHING, CONV, MAX, MEAN, HALVES = range(5)  # as in part.h


class Part(NamedTuple):
    """A way from an input to a batch norm, and the batch norm."""

    kind: int  # one of the above
    kernel: int = 1  # k
    stride: int = 1
    dilation: int = 1
    relu: bool = False  # before a convolution
    depthwise: Tensor | None = None  # (D, 1, k, k)
    pointwise: Tensor | None = None  # (C, D, 1, 1), of a convolution
    norm: nn.BatchNorm2d | None = None  # without one the part is the identity


Operation = Sequence[Part]  # one part after the other
Shape = tuple[int, ...]  # B, channels, H, W


class _Part(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "inputs", "channels")),
        *((name, ctypes.c_int64) for name in ("kind", "kernel", "stride", "dilation", "relu")),
        *((name, ctypes.c_int64) for name in ("training", "accumulate", "threads")),
        ("momentum", ctypes.c_double),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("x", "depthwise", "pointwise", "gamma", "beta", "scale", "keep")),
        *((name, ctypes.c_void_p) for name in ("running_mean", "running_var", "tracked", "statistics", "out")),
        *((name, ctypes.c_void_p) for name in ("kept", "normal")),
        *((name, ctypes.c_void_p) for name in ("grad", "grad_x", "grad_depthwise", "grad_pointwise")),
        *((name, ctypes.c_void_p) for name in ("grad_gamma", "grad_beta", "grad_scale")),
    )


@contextmanager
def switched(on: bool) -> Iterator[None]:
    """Inside, the kernels are enabled or not."""
    global enabled
    before, enabled = enabled, on
    try:
        yield
    finally:
        enabled = before


def usable(x: Tensor) -> bool:
    """Whether the kernels can work on x (B, C, H, W): a plain float32 tensor of the CPU, in eager mode."""
    return (
        enabled
        and type(x) is Tensor
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and not torch.is_autocast_enabled("cpu")
        and x.numel() > 0
        and build.library() is not None
    )


def apply(
    x: Tensor,
    operations: Sequence[Operation],
    scales: Tensor | None = None,
    places: Sequence[int] = (),
    total: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """total + keep * sum_k scales[places[k]] * operations[k](x), in place; without a total a new tensor.

    Args:
        x: (B, D, H, W).
        operations: at least one; all give (B, C, ceil(H / stride), ceil(W / stride)).
        scales: (O,); 1 if None.
        places: where the scale of each operation is.
        total: the sum so far, of the result's shape, channels_last.
        keep: a factor for each image, (B, 1, 1, 1).
    Raises:
        ValueError: shapes, memory layouts or kernel sizes do not go together, or there is one value a channel.
        TypeError: a tensor is not float32 or not on the CPU.
    """
    parts = [part for operation in operations for part in operation]
    tensors = [t for p in parts for t in (p.depthwise, p.pointwise, *_affine(p.norm))]
    return _Apply.apply(x, scales, total, keep, tuple(operations), tuple(places), *tensors)


def apply_one(
    x: Tensor, operation: Operation, scale: Tensor | None, total: Tensor | None, keep: Tensor | None = None
) -> Tensor:
    """total + keep * scale * operation(x), for a single one with a scalar as its scale; see `apply`."""
    return apply(x, [operation], None if scale is None else scale.reshape(1), (0,), total, keep)


def _affine(norm: nn.BatchNorm2d | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if norm is None else (norm.weight, norm.bias)


def _check(name: str, t: Tensor | None, shape: tuple[int, ...], images: bool = False) -> None:
    """Nothing that the kernels would misread leaves Python."""
    if t is None:
        return
    if t.dtype != torch.float32 or t.device.type != "cpu":
        raise TypeError(f"{name} is {t.dtype} on {t.device}, the kernels need torch.float32 on the CPU")
    if t.shape != shape:
        raise ValueError(f"{name} has the shape {tuple(t.shape)}, not {shape}")
    if not t.is_contiguous(memory_format=torch.channels_last if images else torch.contiguous_format):
        raise ValueError(f"{name} is not {'channels_last' if images else 'contiguous'} in memory")


def _check_part(shape: Shape, part: Part) -> Shape:
    """Weights and statistics of a part that is given `shape`; returns its output's."""
    batch, inputs, height, width = shape
    if part.kernel not in KERNELS or part.stride not in (1, 2) or part.kernel + part.dilation not in range(2, 9):
        raise ValueError(f"no kernel for {part.kernel}x{part.kernel}, stride {part.stride}, dilation {part.dilation}")
    steps, deep = (part.kernel, part.stride, part.dilation), part.depthwise is not None
    known = {
        NOTHING: steps == (1, 1, 1) and not part.relu,
        CONV: part.kernel > 1 if deep else steps == (1, 1, 1),
        HALVES: steps == (1, 2, 1) and not deep,
        MAX: part.kernel > 1 == part.dilation,
        MEAN: part.kernel > 1 == part.dilation,
    }
    if not known.get(part.kind) or (part.pointwise is not None) != (part.kind in (CONV, HALVES)):
        raise ValueError(f"no such part: {part}")
    channels = inputs if part.pointwise is None else part.pointwise.shape[0]
    _check("the depthwise weight", part.depthwise, (inputs, 1, part.kernel, part.kernel))
    _check("the pointwise weight", part.pointwise, (channels, inputs, 1, 1))
    shape = (batch, channels, -(-height // part.stride), -(-width // part.stride))
    norm = part.norm
    if norm is not None:
        for name in ("weight", "bias", "running_mean", "running_var"):
            _check(f"batch norm's {name}", getattr(norm, name), (channels,))
        count = norm.num_batches_tracked
        if norm.running_mean is None or norm.running_var is None or norm.momentum is None or count is None:
            raise ValueError("batch norm has to track its statistics with a momentum")
        if count.dtype != torch.int64 or count.device.type != "cpu" or count.dim():
            raise TypeError(f"batch norm's counter is {count.dtype} on {count.device}, of shape {tuple(count.shape)}")
        if norm.training and batch * shape[2] * shape[3] < 2:
            raise ValueError(f"batch norm needs more than one value a channel in training, got {shape}")
    return shape


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scales: Tensor | None,  # (O,)
        total: Tensor | None,
        keep: Tensor | None,
        operations: Sequence[Operation],
        places: Sequence[int],
        *tensors: Tensor | None,  # depthwise, pointwise, gamma and beta of every part
    ) -> Tensor:
        if not operations or not all(operations):
            raise ValueError("there is no operation, or one without parts")
        x = x.contiguous(memory_format=torch.channels_last)
        _check("the input", x, tuple(x.shape), images=True)
        _check("keep", keep, (len(x), 1, 1, 1))
        if scales is not None:
            _check("Z", scales, (scales.numel(),))
            if len(places) != len(operations) or not all(0 <= place < len(scales) for place in places):
                raise ValueError(f"{len(operations)} operations have the places {places} in Z of {len(scales)}")
        shapes = [list(accumulate(operation, _check_part, initial=tuple(x.shape))) for operation in operations]
        out = torch.empty(shapes[0][-1], memory_format=torch.channels_last) if total is None else total
        if total is not None and _overlap(total, x):
            raise ValueError("the sum and the input share their memory")
        statistics = torch.empty(sum(map(len, operations)), 2, max(s[1] for every in shapes for s in every))
        table: list[_Part] = []
        states: list[Tensor] = []  # the input of every part
        kept: list[Tensor] = []  # p of every convolution, where an operation stands alone
        for number, (operation, sizes) in enumerate(zip(operations, shapes, strict=True)):
            _check("the sum", out, sizes[-1], images=True)
            target = x
            for index, (part, size) in enumerate(zip(operation, sizes[1:], strict=True)):
                last, norm, at = index + 1 == len(operation), part.norm, 4 * len(table)
                states.append(target)
                target = out if last else torch.empty(size, memory_format=torch.channels_last)
                row = _Part(
                    *(len(x), *sizes[index][2:], sizes[index][1], size[1]), *part[:5],
                    norm is not None and norm.training, last and (total is not None or number > 0),
                    torch.get_num_threads(),
                )  # fmt: skip
                if norm is not None:
                    row.momentum, row.eps, row.tracked = norm.momentum, norm.eps, _at(norm.num_batches_tracked)
                    row.running_mean, row.running_var = _at(norm.running_mean), _at(norm.running_var)
                if last:
                    row.keep, row.scale = _at(keep), _at(scales, places[number] if places else 0)
                row.x, row.out, row.statistics = _at(states[-1]), _at(target), _at(statistics[len(table)])
                row.depthwise, row.pointwise, row.gamma, row.beta = map(_at, tensors[at : at + 4])
                if scales is None and part.pointwise is not None:
                    kept.append(torch.empty(_kept_floats(row)))
                    row.kept = _at(kept[-1])
                table.append(row)
        _call("parts_forward", table)
        if total is not None:
            ctx.mark_dirty(total)
        ctx.table, ctx.lengths, ctx.places, ctx.given = table, [*map(len, operations)], places, total is not None
        ctx.save_for_backward(scales, keep, statistics, *states, *tensors, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scales, keep, statistics, *rest = ctx.saved_tensors  # other memory than forward's where it is computed again
        count = len(ctx.table)
        states, tensors, projected = rest[:count], rest[count : 5 * count], iter(rest[5 * count :])
        kept = [next(projected) if row.kept else None for row in ctx.table]
        grad = grad.contiguous(memory_format=torch.channels_last)
        _check("the gradient", grad, tuple(grad.shape), images=True)
        grads = [None if t is None else torch.empty_like(t) for t in tensors]
        grad_x = torch.empty_like(states[0])
        grad_scales = None if scales is None else torch.zeros_like(scales)
        inner: list[Tensor] = []  # gradients between the parts of an operation
        table: list[_Part] = []
        first = 0
        for number, length in enumerate(ctx.lengths):
            upstream = grad
            for index in reversed(range(first, first + length)):
                row, at = ctx.table[index], 4 * index
                row.accumulate = index == first > 0
                if index + 1 == first + length:
                    place = ctx.places[number] if ctx.places else 0
                    row.keep, row.scale, row.grad_scale = _at(keep), _at(scales, place), _at(grad_scales, place)
                inner.append(grad_x if index == first else torch.empty_like(states[index]))
                row.x, row.statistics = _at(states[index]), _at(statistics[index])
                row.kept = _at(kept[index])
                if row.kind == CONV and index + 1 < first + length and not row.gamma and not row.kept:
                    row.normal = _at(states[index + 1])
                row.grad, row.grad_x = _at(upstream), _at(inner[-1])
                row.depthwise, row.pointwise, row.gamma, row.beta = map(_at, tensors[at : at + 4])
                row.grad_depthwise, row.grad_pointwise, row.grad_gamma, row.grad_beta = map(_at, grads[at : at + 4])
                table.append(row)
                upstream = inner[-1]
            first += length
        _call("parts_backward", table)
        return (grad_x, grad_scales, grad if ctx.given else None, None, None, None, *grads)


def _kept_floats(row: _Part) -> int:
    """The size of what backward wants of a part's convolution."""
    library = build.library()
    assert library is not None
    return int(library.kept_floats(ctypes.byref(row)))


def _at(t: Tensor | None, index: int = 0) -> int | None:
    return None if t is None else t.data_ptr() + 4 * index


def _overlap(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() < b.data_ptr() + 4 * b.numel() and b.data_ptr() < a.data_ptr() + 4 * a.numel()


def _call(name: str, table: Sequence[_Part]) -> None:
    """Run a function of the library over the parts."""
    rows = (_Part * len(table))(*table)
    if getattr(build.library(), name)(ctypes.byref(rows), len(table)):
        raise MemoryError(f"{name}: no memory for a batch of {table[0].batch} images")
