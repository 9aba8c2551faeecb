"""How time and memory of a search step grow with batch, cells, channels and side: slopes in log-log.

    python -m benchmarks.growth

A slope of 1 is proportional growth; the arithmetic grows with the square of the side and, in its pointwise
convolutions, with the square of the channels.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jsonargparse.typing import PositiveInt

import options
import utils
from benchmarks import record, search_step
from benchmarks.record import Rounds

SIZES = {
    "batch_size": [16, 32, 64, 128],
    "layers": [4, 8, 12, 20],
    "init_channels": [16, 32, 48, 64],
    "image_size": [16, 24, 32, 48],
}


@dataclass(frozen=True)
class GrowthOptions(Rounds):
    """What is measured."""

    rounds: PositiveInt = 5
    """Steps of each size, in turns."""
    device: str = "auto"
    """As for main.py."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; returns the content of the JSON file."""
    opt = record.parse(GrowthOptions, argv, "growth", __doc__)
    figures: dict[str, Any] = {}
    rows = []
    for name, sizes in SIZES.items():
        base = search_step.StepOptions(device=opt.device, **_BASE)  # type: ignore[arg-type]
        workers = {
            size: search_step.start(dataclasses.replace(base, **{name: size}), "ours")  # type: ignore[arg-type]
            for size in sizes
        }
        seconds = utils.in_turns({size: worker.step for size, worker in workers.items()}, opt.rounds)
        alone = [worker.stop() for worker in workers.values()]
        measured = {
            "seconds": [statistics.median(times) for times in seconds.values()],
            "flops": [own["flops"] for own in alone],
            "memory": [own["peak_bytes"] - own["before_bytes"] for own in alone],
        }
        x = [size**2 for size in sizes] if name == "image_size" else sizes
        slopes = {what: record.slope(x, values) for what, values in measured.items()}
        figures[name] = {"sizes": sizes, **measured, "seconds": seconds, "slopes": slopes}
        shown = "pixels" if name == "image_size" else name
        times = ", ".join(f"{t:.2f}" for t in measured["seconds"])
        rows.append([shown, ", ".join(map(str, x)), times, *(f"{value:.2f}" for value in slopes.values())])
    start = ", ".join(f"{k} {v}" for k, v in _BASE.items())
    head = ["of", "sizes", "s a step", "slope of time", "slope of multiply-adds", "slope of memory"]
    text = f"From {start}; medians of n = {opt.rounds}, sizes in turns.\n\n{record.table(head, rows)}"
    return record.publish("growth", opt, figures, text)


_BASE = {"batch_size": 32, "layers": 8, "init_channels": 16, "image_size": 32}


if __name__ == "__main__":
    options.entry(main)
