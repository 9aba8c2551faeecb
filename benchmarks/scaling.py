"""An epoch of main.py under torchrun on several processes of one thread each, against one such process.

    python -m benchmarks.scaling

The processes share every step's images; a step has the same number of images for one process as for several.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt

import options
import utils
from benchmarks import record
from benchmarks.record import ROOT, Rounds
from options import UserError


@dataclass(frozen=True)
class ScalingOptions(Rounds):
    """What is measured."""

    rounds: PositiveInt = 3
    """Runs of each, in turns, of which the last epoch counts."""
    processes: PositiveInt = 2
    """Processes that share the work."""
    dataset: str = "dataset"
    """A folder with one subfolder of images per class."""
    search_options: list[str] = field(
        default_factory=lambda: ["--init_channels=16", "--layers=8", "--batch_size=64", "--epochs=1"]
    )
    """Options of main.py."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; returns the content of the JSON file."""
    opt = record.parse(ScalingOptions, argv, "scaling", __doc__)
    rows: dict[str, list[dict[str, Any]]] = {"1": [], str(opt.processes): []}
    with tempfile.TemporaryDirectory() as temporary:
        _run(opt, 1, Path(temporary), "first")  # the kernels are compiled, the images decoded
        for number in range(opt.rounds):
            for count, found in rows.items():
                found.append(_run(opt, int(count), Path(temporary), f"{count}_{number}"))
    table = []
    for count, found in rows.items():
        figures = {
            "rate": ([row["images_per_second"] for row in found], [row["images_per_second"] for row in rows["1"]]),
            "epoch": ([row["epoch_seconds"] for row in rows["1"]], [row["epoch_seconds"] for row in found]),
        }
        times = [f"{statistics.median(a / b for a, b in zip(*pair, strict=True)):.2f}" for pair in figures.values()]
        seconds = [row["epoch_seconds"] for row in found]
        table.append([count, record.spread(figures["rate"][0], 1), times[0], record.spread(seconds, 1), times[1]])
    head = ["processes", "images a second in training", "times one", "seconds an epoch, evaluation included"]
    text = (
        f"`torchrun --nproc_per_node=N main.py --dataset {opt.dataset} {' '.join(opt.search_options)}`, one thread a "
        f"process; n = {opt.rounds} runs in turns, median (lowest to highest).\n\n"
        f"{record.table([*head, 'times faster than one'], table)}"
    )
    return record.publish("scaling", opt, {"epochs": rows}, text)


def _run(opt: ScalingOptions, count: int, place: Path, name: str) -> dict[str, Any]:
    """The last row of a search."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", "main.py"]
    places = [f"--{kind}_dir={place / kind}" for kind in ("experiments", "visualizations")]
    command = [*launch, f"--dataset={Path(opt.dataset).resolve()}", *places, f"--name={name}", *opt.search_options]
    if not hasattr(os, "sched_setaffinity"):
        raise UserError("this benchmark gives every process a core, which Linux alone can")
    one, cores = {**os.environ, "OMP_NUM_THREADS": "1"}, sorted(os.sched_getaffinity(0))[:count]
    alone = partial(os.sched_setaffinity, 0, cores)  # a core for each: more than one gives a process no more threads
    done = subprocess.run(command, cwd=ROOT, env=one, capture_output=True, text=True, preexec_fn=alone)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise UserError(f"main.py failed: {next((line for line in said if 'error: ' in line), said[-1])}")
    row: dict[str, Any] = utils.read_metrics(place / "experiments" / name / "metrics.jsonl")[-1]
    return row


if __name__ == "__main__":
    options.entry(main)
