"""Compiling the kernels and keeping them.

SNAS_KERNELS=off turns the kernels off. SNAS_CXXFLAGS adds flags for the compiler, CXX names another one ("ccache c++"
works).
"""

import ctypes
import functools
import os
import platform
import shlex
import subprocess
from pathlib import Path

import torch
from filelock import FileLock

import utils

SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC", "-Wl,--as-needed")
missing = ""  # why there is no library


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there are none: `missing` says why."""
    global missing
    if os.environ.get("SNAS_KERNELS") == "off":
        missing = "SNAS_KERNELS=off"
        return None
    try:
        file = path()
        if not file.exists():
            _compile(file)
        try:
            found = ctypes.CDLL(str(file))
        except OSError:  # damaged
            file.unlink(missing_ok=True)
            _compile(file)
            found = ctypes.CDLL(str(file))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["it says nothing"]
        missing = f"{error.cmd[0]} failed: {next((line for line in lines if 'error' in line), lines[0])}"
        return None
    except ValueError as error:
        missing = f"CXX or SNAS_CXXFLAGS is no command: {error}"
        return None
    except OSError as error:
        compiler = error.filename == _compiler()[0]
        what = "no C++ compiler works here (c++, or $CXX)" if compiler else "the compiled kernels cannot be kept"
        missing = f"{what}: {error}"
        return None
    for name in ("parts_forward", "parts_backward"):
        getattr(found, name).argtypes = [ctypes.c_void_p, ctypes.c_int64]
    found.kept_floats.argtypes, found.kept_floats.restype = [ctypes.c_void_p], ctypes.c_int64
    _keep_memory()
    return found


def _compile(file: Path) -> None:
    """Make the library, once for several processes that want it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        if not file.exists():
            with utils.replacing(file) as made:
                _run([*_command(), str(SOURCE), "-o", str(made), *_openmp()])


def _sources() -> list[bytes]:
    return [file.read_bytes() for file in sorted(SOURCE.parent.iterdir()) if file.suffix in (".cpp", ".h")]


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
def path() -> Path:
    """Where the library is kept: its name stands for the source, the command, the processor and the versions."""
    compiler = (_command(), _run([*_compiler(), "--version"]))
    machine = (platform.machine(), utils.cpuinfo("flags", "Features", "model name"))  # what -march=native depends on
    return utils.cached(None, "kernels-{}.so", *_sources(), *compiler, *machine, torch.__version__)


def _keep_memory() -> None:
    """Tell glibc to keep freed memory instead of giving it back: fetching it again costs a twentieth of a step."""
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # M_TRIM_THRESHOLD, ... of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # glibc before 2.35 refuses a threshold above 32 MB; any setting ends its own adjustment: then set none
    if mallopt is not None and mallopt(mmap_threshold, 2**30):
        mallopt(trim_threshold, -1)
        mallopt(top_pad, 2**26)
