"""Compiling the kernels, keeping them, and finding out whether they are faster than PyTorch on this machine.

SNAS_KERNELS=off turns the kernels off, SNAS_KERNELS=on takes them without a measurement. SNAS_CXXFLAGS adds flags for
the compiler, CXX names another one ("ccache c++" works).
"""

import ctypes
import functools
import json
import os
import platform
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch

import utils

SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC", "-Wl,--as-needed")
_ROUNDS = 5  # of the calibration
missing = ""  # why there is no library

Contest = Mapping[str, tuple[Callable[[], object], Callable[[], object]]]  # kind -> calls: fused, plain


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there are none: `missing` says why."""
    global missing
    if os.environ.get("SNAS_KERNELS") == "off":
        missing = "SNAS_KERNELS=off"
        return None
    try:
        path = _path()
        if not path.exists():
            with utils.replacing(path) as made:
                _run([*_command(), str(SOURCE), "-o", str(made), *_openmp()])
        found = ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["it says nothing"]
        missing = f"{error.cmd[0]} failed: {next((line for line in lines if 'error' in line), lines[0])}"
        return None
    except OSError as error:
        missing = f"no C++ compiler works here (c++, or $CXX): {error}"
        return None
    for name in ("parts_forward", "parts_backward"):
        getattr(found, name).argtypes = [ctypes.c_void_p, ctypes.c_int64]
    found.kept_floats.argtypes, found.kept_floats.restype = [ctypes.c_void_p], ctypes.c_int64
    _keep_memory()
    return found


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _command() -> list[str]:
    """The compiler with its flags."""
    return [*_compiler(), *_FLAGS, *shlex.split(os.environ.get("SNAS_CXXFLAGS", ""))]


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++")) or ["c++"]


def _openmp() -> list[str]:
    """The OpenMP that torch itself has loaded: a second one would fight with it for the cores."""
    return [str(path) for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))]


@functools.cache
def _path() -> Path:
    """Where the library is kept: its name stands for the source, the command, the processor and the versions."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "snas"
    compiler = (_command(), _run([*_compiler(), "--version"]))
    machine = (platform.machine(), utils.cpuinfo("flags", "Features", "model name"))  # what -march=native depends on
    return utils.cached(folder, "kernels-{}.so", SOURCE.read_bytes(), *compiler, *machine, torch.__version__)


def _keep_memory() -> None:
    """Tell glibc to keep freed memory instead of giving it back: fetching it again costs a twentieth of a step."""
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # M_TRIM_THRESHOLD, ... of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # glibc before 2.35 refuses a threshold above 32 MB; any setting ends its own adjustment: then set none
    if mallopt is not None and mallopt(mmap_threshold, 2**30):
        mallopt(trim_threshold, -1)
        mallopt(top_pad, 2**26)


def speedups(contest: Callable[[], Contest]) -> dict[str, float]:
    """How many times faster than PyTorch's operations the kernels are here, by kind of operation.

    Measured at the first use on a machine, in about two seconds, and kept beside the library: what is chosen must not
    change from one start to the next, since rounding depends on it.

    Args:
        contest: gives two calls for every kind, with and without the kernels.
    Returns:
        Nothing with SNAS_KERNELS=on: then it is not asked.
    """
    if os.environ.get("SNAS_KERNELS") == "on":
        return {}
    path = _path().with_suffix(f".{torch.get_num_threads()}.json")
    try:
        return {str(kind): float(ratio) for kind, ratio in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        pass
    found = {kind: _ratio(fused, plain) for kind, (fused, plain) in contest().items()}
    with suppress(OSError):  # a full or read-only cache: measured again at the next start
        utils.write_atomic(path, json.dumps(found))
    return found


def _ratio(fused: Callable[[], object], plain: Callable[[], object]) -> float:
    """Median of the time of `plain` over that of `fused`, in turns after one call of each that does not count."""
    fused(), plain()
    ratios = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        fused()
        middle = time.perf_counter()
        plain()
        ratios.append((time.perf_counter() - middle) / (middle - start))
    return statistics.median(ratios)
