"""Batch norm with the half of a separable convolution, or the pooling, before it: fused CPU kernels (kernels.cpp).

The layout trick, explained once. A supernet spends its time on (ReLU,) depthwise, pointwise, batch norm. As library
calls these read and write every intermediate tensor from and to memory, and two of their backward passes, the
depthwise weight gradient and batch norm in channels_last, run ten times slower than memory allows. Here one call does
all of a half, image by image, so that intermediates stay in the cache of a core; it adds Z_k BN(...) to the sum of the
node in place; and for the backward pass it keeps its input alone, which all edges that leave a state share, and
computes the two intermediates again, for less than reading them back would cost.

The source is compiled with the C++ compiler of the machine at the first use and kept in ~/.cache/snas. Where there is
none, on other devices, for other types than float32 and for export, callers use PyTorch's own operations: `usable`
says which. Results agree to float32 rounding and do not depend on the number of threads.
"""

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SOURCE = Path(__file__).with_name("kernels.cpp")
KERNELS = (1, 3, 5, 7)  # sides that are compiled
enabled = True  # set to False to use PyTorch's operations throughout
_loaded = False  # for compiled code, which cannot load them

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-Wl,--as-needed")


class _Shape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("batch", "height", "width", "channels")),
        *((name, ctypes.c_int32) for name in ("kind", "kernel", "stride", "dilation")),
        *((name, ctypes.c_int32) for name in ("training", "relu", "accumulate", "threads", "relu_first", "scalar")),
        ("momentum", ctypes.c_float),
        ("eps", ctypes.c_float),
    )


class Way(NamedTuple):
    """The way from the input of an operation to its batch norm: what stands before it."""

    kind: int = 0  # one of the below
    kernel: int = 1  # k
    stride: int = 1
    dilation: int = 1
    relu: bool = False  # before a convolution


NOTHING, CONV, MAX, MEAN = range(4)  # as in kernels.cpp


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be compiled."""
    global _loaded
    # The OpenMP that torch itself has loaded: a second one would fight with it for the cores
    openmp = [str(path) for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))]
    command = [os.environ.get("CXX", "c++"), *_FLAGS, str(SOURCE), *openmp]
    key = repr((SOURCE.read_bytes(), command, platform.machine(), _processor()))
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "snas"
    path = folder / f"kernels-{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}.so"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                made = Path(temporary) / path.name
                subprocess.run([*command, "-o", str(made)], check=True, capture_output=True)
                os.replace(made, path)
        _keep_memory()
        found = ctypes.CDLL(str(path))
        found.operation_forward.argtypes = [ctypes.c_void_p] * 11
        found.operation_backward.argtypes = [ctypes.c_void_p] * 13
        _loaded = True
        return found
    except (OSError, subprocess.CalledProcessError):
        return None


def _keep_memory() -> None:
    """Tell glibc to keep freed memory instead of giving it back: fetching it again costs a twentieth of a step."""
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # M_TRIM_THRESHOLD, ... of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((trim_threshold, 2**31 - 1), (top_pad, 2**26), (mmap_threshold, 2**30)):
            mallopt(parameter, value)


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith("flags"))
    except (OSError, StopIteration):
        return platform.processor()


def usable(x: Tensor) -> bool:
    """Whether the kernels can work on x (B, C, H, W): a plain float32 tensor of the CPU that is not being exported."""
    return (
        enabled
        and type(x) is Tensor
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.compiler.is_exporting()
        and not torch.is_autocast_enabled("cpu")
        and x.numel() > 0
        and (_loaded if torch.compiler.is_compiling() else library() is not None)
    )


def operation(
    x: Tensor,
    module: nn.BatchNorm2d,
    way: Way = Way(),
    weights: tuple[Tensor, Tensor] | None = None,
    scale: Tensor | None = None,
    total: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """BN(way(x)), max(BN(way(x)), 0), or total + scale * BN(way(x)), the latter in place.

    Args:
        x: (B, C, H, W).
        module: the statistics and, without a scale, the affine weights.
        way: what comes before the batch norm.
        weights: of a convolution: depthwise (C, 1, k, k) and pointwise (C, C, 1, 1).
        scale: a scalar.
        total: (B, C, ceil(H / stride), ceil(W / stride)).
        relu: cut off the result below zero.
    """
    assert way.kernel in KERNELS
    gamma, beta = (module.weight, module.bias) if scale is None else (scale, None)
    assert module.running_mean is not None and module.running_var is not None and module.momentum is not None
    assert module.num_batches_tracked is not None
    tensors = (x, *(weights or (None, None)), gamma, beta, total)
    state = (module.running_mean, module.running_var, module.num_batches_tracked)
    settings = [*way[:4], way.relu, module.training, relu]
    if torch.compiler.is_compiling():
        y, _, running = _traced(*tensors, *state[:2], settings, module.momentum, module.eps)
        if module.training:
            state[0].copy_(running[0].detach())
            state[1].copy_(running[1].detach())
            state[2].add_(1 if module.momentum else 0)
        return y
    return _Operation.apply(*tensors, state, settings, module.momentum, module.eps)


Optionals = Sequence[Tensor | None]


def _forward(
    inputs: Optionals, out: Tensor, accumulate: bool, state: Optionals, settings: list[int], momentum: float, eps: float
) -> tuple[_Shape, Tensor]:
    """Fill `out`; inputs are x, depthwise, pointwise, gamma and beta. Returns the shape and mean and 1 / std (2, C)."""
    assert out.is_contiguous(memory_format=torch.channels_last)
    shape = _shape(inputs, settings, accumulate, momentum, eps)
    if shape.training and out.numel() // shape.channels < 2:
        raise ValueError(f"batch norm needs more than one value a channel in training, got {tuple(out.shape)}")
    mean, var, _ = state
    assert mean is not None and var is not None
    statistics = torch.empty(2, shape.channels) if shape.training else torch.stack([mean, (var + eps).rsqrt()])
    _call("operation_forward", shape, *inputs, statistics, *state, out)
    return shape, statistics


def _shape(inputs: Optionals, settings: list[int], accumulate: bool, momentum: float, eps: float) -> _Shape:
    x, gamma = inputs[0], inputs[3]
    assert x is not None
    *way, relu_first, training, relu = settings
    batch, channels, height, width = x.shape
    scalar = gamma is not None and gamma.dim() == 0
    return _Shape(
        batch, height, width, channels, *way, training, relu, accumulate, torch.get_num_threads(), relu_first, scalar,
        momentum, eps,
    )  # fmt: skip


def _backward(shape: _Shape, inputs: Optionals, statistics: Tensor, grad: Tensor) -> Optionals:
    """The gradients of the inputs of _forward from that of its output."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    grads = [None if t is None else torch.empty_like(t) for t in inputs]
    _call("operation_backward", shape, *inputs, statistics, grad, *grads)
    return grads


def _laid_out(x: Tensor, depthwise: Tensor | None, pointwise: Tensor | None, *others: Tensor | None) -> Optionals:
    """Tensors as the kernels want them in memory."""
    weights = (None if w is None else w.contiguous() for w in (depthwise, pointwise))
    return (x.contiguous(memory_format=torch.channels_last), *weights, *others)


def _new_output(x: Tensor, stride: int) -> Tensor:
    batch, channels, height, width = x.shape
    size = (batch, channels, -(-height // stride), -(-width // stride))
    return torch.empty(size, memory_format=torch.channels_last, device=x.device)


class _Operation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        depthwise: Tensor | None,
        pointwise: Tensor | None,
        gamma: Tensor | None,  # (C,), or () for all channels
        beta: Tensor | None,
        total: Tensor | None,
        state: Optionals,  # running mean, running variance, number of batches
        settings: list[int],
        momentum: float,
        eps: float,
    ) -> Tensor:
        out = _new_output(x, settings[2]) if total is None else total
        inputs = _laid_out(x, depthwise, pointwise, gamma, beta)
        ctx.shape, statistics = _forward(inputs, out, total is not None, state, settings, momentum, eps)
        if total is not None:
            ctx.mark_dirty(total)
        ctx.save_for_backward(*inputs, statistics)
        ctx.total = total is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, statistics = ctx.saved_tensors
        return (*_backward(ctx.shape, inputs, statistics, grad), grad if ctx.total else None, None, None, None, None)


# The same under torch.compile: an operator that the compiler does not look into, and that changes none of its inputs.


@torch.library.custom_op("snas::operation", mutates_args=())
def _traced(
    x: Tensor,
    depthwise: Tensor | None,
    pointwise: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    total: Tensor | None,
    mean: Tensor,
    var: Tensor,
    settings: list[int],
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, mean and 1 / std (2, C), the running mean and variance afterwards (2, C)."""
    out = _new_output(x, settings[2])
    if total is not None:
        out.copy_(total)
    inputs = _laid_out(x, depthwise, pointwise, gamma, beta)
    running = torch.stack([mean, var])
    state = (running[0], running[1], torch.zeros((), dtype=torch.int64))
    _, statistics = _forward(inputs, out, total is not None, state, settings, momentum, eps)
    return out, statistics, running


@_traced.register_fake
def _(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _new_output(x, others[7][2]), x.new_empty(2, x.shape[1]), x.new_empty(2, x.shape[1])


@torch.library.custom_op("snas::operation_backward", mutates_args=())
def _traced_backward(
    x: Tensor,
    depthwise: Tensor | None,
    pointwise: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    statistics: Tensor,
    grad: Tensor,
    settings: list[int],
) -> list[Tensor]:
    """The gradients of those inputs that are tensors."""
    inputs = _laid_out(x, depthwise, pointwise, gamma, beta)
    shape = _shape(inputs, settings, False, 0.0, 0.0)  # the last two matter forward only
    return [g for g in _backward(shape, inputs, statistics, grad) if g is not None]


@_traced_backward.register_fake
def _(
    x: Tensor,
    depthwise: Tensor | None,
    pointwise: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    *others: Any,
) -> list[Tensor]:
    made = [torch.empty_like(x, memory_format=torch.channels_last)]
    return made + [torch.empty_like(t) for t in (depthwise, pointwise, gamma, beta) if t is not None]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.total, ctx.settings = inputs[5] is not None, inputs[8]


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    *inputs, statistics = ctx.saved_tensors
    made = iter(_traced_backward(*inputs, statistics, grad, ctx.settings))
    grads = [None if t is None else next(made) for t in inputs]
    return (*grads, grad if ctx.total else None, *[None] * 5)


_traced.register_autograd(_differentiate, setup_context=_setup)


def _call(name: str, shape: _Shape, *tensors: Tensor | None) -> None:
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    if getattr(library(), name)(ctypes.byref(shape), *pointers):
        raise MemoryError(f"{name}: no memory for a batch of {shape.batch} images")
