"""Which kinds of parts the kernels do on this machine: those for which PyTorch's operations are not faster.

SNAS_KERNELS=on takes them without a measurement.
"""

import json
import os
import statistics
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

import torch

import utils
from fused import build
from fused import operation as kernels

NAMES = {
    kernels.NOTHING: "norm",
    kernels.CONV: "convolution",
    kernels.MAX: "max",
    kernels.MEAN: "mean",
    kernels.HALVES: "reduction",
}
Contest = Mapping[str, tuple[Callable[[], object], Callable[[], object]]]  # kind -> calls: fused, plain

_ROUNDS = 5
_EVEN = 0.9  # a ratio that noise makes of 1: rounding must not depend on it, so the kernels are taken
_taken: list[frozenset[int]] = []  # once it is known
_ratios: dict[str, float] = {}


def taken(contest: Callable[[], Contest]) -> frozenset[int]:
    """The kinds of parts that the kernels do; the contest is held where it is not known.

    Args:
        contest: gives two calls for every kind, with and without the kernels.
    """
    if not _taken:
        _taken.append(frozenset(NAMES))  # all while it is measured
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            _ratios.update(_speedups(contest))
        _taken[0] = frozenset(kind for kind, name in NAMES.items() if _ratios.get(name, 1.0) >= _EVEN)
    return _taken[0]


def passes(x: torch.Tensor, modules: Mapping[str, torch.nn.Module]) -> Contest:
    """A forward and backward pass on x of a module of each kind, with the kernels and without."""

    def call(module: torch.nn.Module, enabled: bool) -> Callable[[], None]:
        def run() -> None:
            with kernels.switched(enabled):
                torch.autograd.grad(module(x).sum(), [x, *module.parameters()])

        return run

    return {kind: (call(module, True), call(module, False)) for kind, module in modules.items()}


def in_words(contest: Callable[[], Contest]) -> str:
    """Which form of the operations runs on this machine's CPU in float32, and why."""
    library = build.library()
    if library is None:
        return f"PyTorch's own operations, which are slower: {build.missing}"
    kinds = taken(contest)
    ratios = ", ".join(f"{name} {ratio:.1f}" for name, ratio in _ratios.items())
    why = f"measured times faster than PyTorch's: {ratios}" if ratios else "SNAS_KERNELS=on"
    slow = ", ".join(name for kind, name in NAMES.items() if kind not in kinds)
    return f"fused, vectors of {library.vector_width()} floats{f', but not for {slow}' if slow else ''}; {why}"


def _speedups(contest: Callable[[], Contest]) -> dict[str, float]:
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
    path = build.path().with_suffix(f".{torch.get_num_threads()}.json")
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
    seconds = utils.in_turns({call: partial(utils.timed, call) for call in (fused, plain)}, 1 + _ROUNDS)
    return statistics.median(b / a for a, b in list(zip(seconds[fused], seconds[plain], strict=True))[1:])
