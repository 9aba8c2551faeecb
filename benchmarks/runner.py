"""The one runner: contenders that take turns, in this process or each in its own; whole runs of scripts; limits."""

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import options
import utils
from benchmarks.record import ROOT
from options import O, UserError
from training.opening import finished


def synced(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, what the device still has to do included."""

    def whole() -> None:
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    return utils.timed(whole)


def compare(contenders: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every contender, one call each in turn, after one call each that does not count."""
    timers = {name: partial(synced, call, device) for name, call in contenders.items()}
    utils.in_turns(timers, 1)
    return utils.in_turns(timers, rounds)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second read and written by a copy that does not fit into the cache; the best of 10."""
    source = torch.ones(2**26, device=device)  # 256 MB
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / min(synced(lambda: target.copy_(source), device) for _ in range(10))


def matmul_rate(device: torch.device) -> float:
    """Multiply-adds a second of a float32 matrix product; the best of 10."""
    a = torch.randn(2048, 2048, device=device)
    return 2048**3 / min(synced(lambda: a @ a, device) for _ in range(10))


def run_once(script: ModuleType, kind: type[O], argv: Sequence[str], leaves: str) -> Path:
    """The folder of a run of a script: an earlier one of the same options, or one that is made or resumed now.

    Args:
        script: whose main is called. kind: its options. argv: its command line, with --name.
        leaves: the file that only a finished run has.
    """
    argv = [*argv, "--resume", "True"]
    opt: Any = options.parse(kind, argv, f"{script.__name__}.py", "")
    if not finished(opt, leaves):
        print(f"--- {opt.name}")
        script.main(argv)
    return Path(opt.experiments_dir) / opt.name


class Worker:
    """A contender in a process of its own, `python -m MODULE --OPTION=VALUE`: its memory and allocator are its alone.

    The process calls `serve`.
    """

    def __init__(self, module: str, arguments: Mapping[str, object]) -> None:
        command = [sys.executable, "-m", module, *(f"--{name}={value}" for name, value in arguments.items())]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()  # ready

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise UserError("a contender's process died, see above; with a smaller batch it may fit into memory")
        return line

    def _write(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text)
        self._process.stdin.flush()

    def step(self) -> float:
        """Seconds of a step."""
        self._write("step\n")
        return float(self._read())

    def stop(self) -> dict[str, Any]:
        """What `serve` measured besides."""
        with self._process:
            self._write("\n")
            result: dict[str, Any] = json.loads(self._read())
        return result


def serve(
    make: Callable[[], Callable[[], None]], more: Callable[[Callable[[], None]], dict[str, Any]], device: torch.device
) -> dict[str, Any]:
    """A Worker's process: for every line of input one step and its seconds, then what else there is to measure.

    Args:
        make: gives the step.
        more: what is measured at the end, of the step.
    Returns:
        peak_bytes, and before_bytes, without the contender; and `more`.
    """
    before = peak_memory(device)
    step = make()
    for _ in range(2):
        step()
    print("ready", flush=True)
    for _ in iter(sys.stdin.readline, "\n"):
        print(synced(step, device), flush=True)
    result = {"peak_bytes": peak_memory(device), "before_bytes": before, **more(step)}
    print(json.dumps(result), flush=True)
    return result


def peak_memory(device: torch.device) -> int:
    """The most memory that this process has had, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # getrusage counts what the parent had before it started this process
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
