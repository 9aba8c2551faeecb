"""A search step with the fused kernels against one without, at several widths and sizes, and on one thread.

python -m benchmarks.widths
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jsonargparse.typing import PositiveInt

import options
from benchmarks import record, runner, search_step
from benchmarks.record import Rounds


@dataclass(frozen=True)
class WidthOptions(Rounds):
    """What is compared."""

    cases: list[list[int]] = field(
        default_factory=lambda: [[4, 28], [8, 28], [16, 14], [16, 20], [16, 32], [16, 48], [20, 28], [36, 28]]
    )
    """Pairs of init_channels and image_size."""
    layers: PositiveInt = 3
    """Cells."""
    batch_size: PositiveInt = 64
    """Images."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; returns the content of the JSON file."""
    opt = record.parse(WidthOptions, argv, "widths", __doc__)
    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    cases: list[dict[str, Any]] = []
    for channels, size in opt.cases:
        step = search_step.StepOptions(
            init_channels=channels, layers=opt.layers, batch_size=opt.batch_size, image_size=size
        )
        ours, plain = (search_step.make_step(step, name, cpu) for name in ("ours", "plain"))

        def alone(ours: Any = ours) -> None:
            torch.set_num_threads(1)
            ours()
            torch.set_num_threads(threads)

        seconds = runner.compare({"plain": plain, "ours": ours, "one thread": alone}, opt.rounds, cpu)
        cases.append({"init_channels": channels, "image_size": size, "seconds": seconds})
    rows = [
        [
            f"{case['init_channels']}, {case['image_size']}x{case['image_size']}",
            record.spread(case["seconds"]["ours"], 3),
            record.spread(record.ratios(case["seconds"], "plain")["ours"]),
            record.spread(record.ratios(case["seconds"], "one thread")["ours"]),
        ]
        for case in cases
    ]
    head = ["C, image", "s a step", "times faster than plain", f"{threads} threads: times faster than one"]
    text = (
        f"One search step, {opt.layers} cells, batch {opt.batch_size}, float32; n = {opt.rounds} "
        f"steps each in turns, median (lowest to highest).\n\n{record.table(head, rows)}"
    )
    return record.publish("widths", opt, {"cases": cases}, text, record.on_this("widths"))


if __name__ == "__main__":
    options.entry(main)
