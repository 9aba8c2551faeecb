"""How time and memory of a search step grow with batch, cells, channels and side: slopes in log-log.

    python -m benchmarks.growth

A slope of 1 is proportional growth; the arithmetic grows with the square of the side and, in its pointwise
convolutions, with the square of the channels.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt

import options
from benchmarks import machine, search_step

SIZES = {
    "batch_size": [16, 32, 64, 128],
    "layers": [4, 8, 12, 20],
    "init_channels": [16, 32, 48, 64],
    "image_size": [16, 24, 32, 48],
}


@dataclass(frozen=True)
class GrowthOptions:
    """What is measured."""

    rounds: PositiveInt = 5
    """Steps of each size."""
    device: str = "auto"
    """As for main.py."""
    out: str = "docs"
    """Where performance.md and performance/ are."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; returns the content of the JSON file."""
    opt = options.parse(GrowthOptions, argv, "python -m benchmarks.growth", __doc__ or "")
    result: dict[str, Any] = {"machine": machine.describe("growth", argv)}
    rows = []
    for name, sizes in SIZES.items():
        base = search_step.StepOptions(device=opt.device, **_BASE)  # type: ignore[arg-type]
        settings = [dataclasses.replace(base, **{name: size}) for size in sizes]  # type: ignore[arg-type]
        workers = {getattr(setting, name): search_step.Worker(setting, "ours") for setting in settings}
        seconds: dict[int, list[float]] = {size: [] for size in workers}
        for _ in range(opt.rounds):
            for size, worker in workers.items():
                seconds[size].append(worker.step())
        alone = [worker.stop() for worker in workers.values()]
        medians = [statistics.median(times) for times in seconds.values()]
        work = [own["flops"] for own in alone]
        memory = [own["peak_bytes"] - own["before_bytes"] for own in alone]
        x = [size**2 for size in sizes] if name == "image_size" else sizes
        slopes = {"seconds": machine.slope(x, medians), "flops": machine.slope(x, work)}
        slopes |= {"memory": machine.slope(x, memory)}
        result[name] = {"sizes": sizes, "seconds": seconds, "flops": work, "memory": memory, "slopes": slopes}
        shown = "pixels" if name == "image_size" else name
        times = ", ".join(f"{t:.2f}" for t in medians)
        rows.append(
            [shown, ", ".join(map(str, x)), times, *(f"{slopes[k]:.2f}" for k in ("seconds", "flops", "memory"))]
        )
    start = ", ".join(f"{k} {v}" for k, v in _BASE.items())
    head = ["of", "sizes", "s a step", "slope of time", "slope of multiply-adds", "slope of memory"]
    text = f"From {start}; medians of n = {opt.rounds}, sizes in turns.\n\n{machine.table(head, rows)}"
    machine.publish("growth", result, text, Path(opt.out))
    return result


_BASE = {"batch_size": 32, "layers": 8, "init_channels": 16, "image_size": 32}


if __name__ == "__main__":
    options.entry(main)
