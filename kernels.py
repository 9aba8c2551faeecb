"""Batch norm, and a half of a separable convolution with it, as fused kernels for the CPU (kernels.cpp).

The layout trick, explained once. A supernet spends its time on (ReLU,) depthwise, pointwise, batch norm. As library
calls these read and write every intermediate tensor from and to memory, and two of their backward passes, the
depthwise weight gradient and batch norm in channels_last, run ten times slower than memory allows. Here one call does
all of a half, image by image, so that intermediates stay in the cache of a core; it adds Z_k BN(...) to the sum of the
node in place; and for the backward pass it keeps its input alone, which all edges that leave a state share, and
computes the two intermediates again, for less than reading them back would cost.

The source is compiled with the C++ compiler of the machine at the first use and kept in ~/.cache/snas. Where there is
none, on other devices, for other types than float32, under torch.compile and export, callers use PyTorch's own
operations: `usable` says which. Results agree to float32 rounding and do not depend on the number of threads.
"""

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SOURCE = Path(__file__).with_suffix(".cpp")
KERNELS = (3, 5, 7)  # sides of depthwise convolutions that are compiled
enabled = True  # set to False to use PyTorch's operations throughout

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-Wl,--as-needed")


class _Shape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("batch", "height", "width", "channels")),
        *((name, ctypes.c_int32) for name in ("kind", "kernel", "stride", "dilation")),
        *((name, ctypes.c_int32) for name in ("training", "relu", "accumulate", "threads", "relu_first")),
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
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError):
        return None


def _keep_memory() -> None:
    """Tell glibc to keep freed memory instead of giving it back: fetching it again costs a tenth of every step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((-1, 2**31 - 1), (-2, 2**26), (-3, 2**30)):  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_...
            mallopt(parameter, value)


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith("flags"))
    except (OSError, StopIteration):
        return platform.processor()


def usable(x: Tensor) -> bool:
    """Whether the kernels can work on x (B, C, H, W): a plain float32 tensor of the CPU, in eager mode."""
    return (
        enabled
        and type(x) is Tensor
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and x.numel() > 0
        and library() is not None
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
        weights: of a convolution: depthwise (C, 1, k, k) and pointwise (C, C, 1, 1), k of KERNELS.
        scale: a scalar.
        total: (B, C, ceil(H / stride), ceil(W / stride)).
        relu: cut off the result below zero.
    """
    if scale is not None:
        gamma, beta = scale, None
    else:
        gamma, beta = (module.weight, module.bias) if module.affine else (x.new_ones(()), None)
    return _Operation.apply(x, *(weights or (None, None)), gamma, beta, total, module, way, relu)


class _Operation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        depthwise: Tensor | None,
        pointwise: Tensor | None,
        gamma: Tensor,  # (C,), or one for all channels
        beta: Tensor | None,
        total: Tensor | None,
        module: nn.BatchNorm2d,
        way: Way,
        relu: bool,
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        batch, channels, height, width = x.shape
        size = (batch, channels, -(-height // way.stride), -(-width // way.stride))
        training = module.training
        if training and size[0] * size[2] * size[3] < 2:
            raise ValueError(f"batch norm needs more than one value a channel in training, got {tuple(x.shape)}")
        out = torch.empty(size, memory_format=torch.channels_last) if total is None else total
        assert out.shape == size and out.is_contiguous(memory_format=torch.channels_last)
        mean, var = module.running_mean, module.running_var
        assert mean is not None and var is not None and module.momentum is not None
        if training:
            statistics = x.new_empty(2, channels)
            assert module.num_batches_tracked is not None
            if module.momentum:
                module.num_batches_tracked.add_(1)
        else:
            statistics = torch.stack([mean, (var + module.eps).rsqrt()])
        shape = _Shape(
            batch, height, width, channels, *way[:4], training, relu, total is not None,
            torch.get_num_threads(), way.relu, module.momentum, module.eps,
        )  # fmt: skip
        wide = gamma.expand(channels).contiguous()
        weights = [None if w is None else w.contiguous() for w in (depthwise, pointwise)]
        _call("operation_forward", shape, x, *weights, wide, beta, *statistics, mean, var, out)
        if total is not None:
            ctx.mark_dirty(total)
        ctx.save_for_backward(x, *weights, wide, beta, statistics)
        ctx.shape, ctx.scalar, ctx.total = shape, gamma.numel() == 1 and channels > 1, total is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, depthwise, pointwise, gamma, beta, statistics = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x, grad_gamma, grad_beta = torch.empty_like(x), torch.empty_like(gamma), torch.empty_like(gamma)
        grad_depthwise, grad_pointwise = (None if w is None else torch.empty_like(w) for w in (depthwise, pointwise))
        made = (grad_x, grad_depthwise, grad_pointwise, grad_gamma, grad_beta)
        _call("operation_backward", ctx.shape, x, depthwise, pointwise, gamma, beta, *statistics, grad, *made)
        return (
            grad_x,
            grad_depthwise,
            grad_pointwise,
            grad_gamma.sum() if ctx.scalar else grad_gamma,
            grad_beta if beta is not None else None,
            grad if ctx.total else None,
            None,
            None,
            None,
        )


def _call(name: str, shape: _Shape, *tensors: Tensor | None) -> None:
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
    if getattr(library(), name)(ctypes.byref(shape), *pointers):
        raise MemoryError(f"{name}: no memory for a batch of {shape.batch} images")
