"""Seconds from the start of main.py to its first training step, with decoded images in the cache and without.

    python -m benchmarks.first_step --dataset PATH/TO/CHIPS --copies 7

The folder is linked `copies` times into a temporary one, so that it has as many files as is wanted. "cold" has
neither decoded images nor a split in the cache, "warm" has both; the files themselves are in the
memory of the system either way.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt

import options
import utils
from benchmarks import record
from benchmarks.record import Rounds
from loading import folders

CODE = """
import sys, time
import main
from training import loop
real = loop.update
def update(*args, **kwargs):
    real(*args, **kwargs)
    print("FIRST", time.time(), flush=True)
    sys.stdout.flush()
    import os; os._exit(0)
loop.update = update
main.main(sys.argv[1:])
"""


@dataclass(frozen=True)
class FirstOptions(Rounds):
    """What is measured."""

    rounds: PositiveInt = 5
    """Starts of each kind, in turns."""
    dataset: str = "dataset"
    """A folder with one subfolder of images per class."""
    copies: PositiveInt = 1
    """How many times its files are linked."""
    preset: str = "options/presets/xview.yaml"
    """The recipe of main.py."""
    image_size: PositiveInt | None = None
    """Side in pixels, instead of the recipe's."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; returns the content of the JSON file."""
    opt = record.parse(FirstOptions, argv, "first_step", __doc__)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        files = _copy(Path(opt.dataset), root / "images", opt.copies)

        def cold() -> float:
            for path in (root / "cache").glob("*"):
                path.unlink()
            return _start(opt, root)

        contenders = {"cold": cold, "warm": lambda: _start(opt, root)}
        _start(opt, root)  # the kernels are compiled, the files are in memory
        seconds = utils.in_turns(contenders, opt.rounds)
    side = f" --image_size {opt.image_size}" if opt.image_size else ""
    rows = [[kind, record.spread(times, 1)] for kind, times in seconds.items()]
    text = (
        f"Seconds from the start of `main.py --config {opt.preset}{side}` to the end of its first training step on "
        f"{files:,} image files; n = {opt.rounds}, median (lowest to highest).\n\n"
        f"{record.table(['decoded images', 's'], rows)}"
    )
    return record.publish("first_step", opt, {"files": files, "seconds": seconds}, text)


def _copy(source: Path, target: Path, copies: int) -> int:
    """Real files: of links to the same image a search takes one."""
    folder = folders.scan(source)
    for name in folder.files:
        for copy in range(copies):
            path = target / name
            path = path.with_name(f"{path.stem}_{copy}{path.suffix}") if copy else path
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, path)
    return len(folder.files) * copies


def _start(opt: FirstOptions, root: Path) -> float:
    arguments = [f"--config={opt.preset}", f"--dataset={root / 'images'}", f"--experiments_dir={root / 'experiments'}"]
    arguments += [f"--image_size={opt.image_size}"] if opt.image_size else []
    arguments += [f"--cache_dir={root / 'cache'}", f"--visualizations_dir={root / 'visualizations'}"]
    arguments += [f"--name=start_{time.time_ns()}"]
    start = time.time()
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments], cwd=record.ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    end = next(float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("FIRST"))
    return end - start


if __name__ == "__main__":
    options.entry(main)
