"""A search step with the fused kernels against one without, at several widths and sizes, and on one thread.

python -m benchmarks.widths
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt

import options
from benchmarks import machine, search_step


@dataclass(frozen=True)
class WidthOptions:
    """What is compared."""

    cases: list[list[int]] = field(
        default_factory=lambda: [[4, 28], [8, 28], [16, 14], [16, 20], [16, 32], [16, 48], [20, 28], [36, 28]]
    )
    """Pairs of init_channels and image_size."""
    layers: PositiveInt = 3
    """Cells."""
    batch_size: PositiveInt = 64
    """Images."""
    rounds: PositiveInt = 10
    """Steps of each contender that count."""
    out: str = "docs"
    """Where performance.md and performance/ are."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; returns the content of the JSON file."""
    opt = options.parse(WidthOptions, argv, "python -m benchmarks.widths", __doc__ or "")
    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    cases = []
    for channels, size in opt.cases:
        step = search_step.StepOptions(
            init_channels=channels, layers=opt.layers, batch_size=opt.batch_size, image_size=size
        )
        ours, plain = (search_step.make_step(step, name, cpu) for name in ("ours", "plain"))

        def alone(ours: Any = ours) -> None:
            torch.set_num_threads(1)
            ours()
            torch.set_num_threads(threads)

        contenders = {"plain": plain, "ours": ours, "one thread": alone}
        seconds = machine.alternate(contenders, opt.rounds, cpu)
        cases.append({"init_channels": channels, "image_size": size, "seconds": seconds})
    result = {
        "machine": machine.describe("widths", argv),
        "setting": {"layers": opt.layers, "batch_size": opt.batch_size, "rounds": opt.rounds},
        "cases": cases,
    }
    machine.publish(machine.on_this("widths"), result, _text(result), Path(opt.out))
    return result


def _text(result: dict[str, Any]) -> str:
    rows = []
    for case in result["cases"]:
        seconds = case["seconds"]
        rows.append(
            [
                f"{case['init_channels']}, {case['image_size']}x{case['image_size']}",
                machine.spread(seconds["ours"], 3),
                machine.spread(machine.ratios(seconds, "plain")["ours"]),
                machine.spread(machine.ratios(seconds, "one thread")["ours"]),
            ]
        )
    setting, threads = result["setting"], result["machine"]["threads"]
    head = ["C, image", "s a step", "times faster than plain", f"{threads} threads: times faster than one"]
    return (
        f"One search step, {setting['layers']} cells, batch {setting['batch_size']}, float32; n = {setting['rounds']} "
        f"steps each in turns, median (lowest to highest).\n\n{machine.table(head, rows)}"
    )


if __name__ == "__main__":
    options.entry(main)
