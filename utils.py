"""Seeds, devices, files, timing, and the numbers of a run: metrics.jsonl, mirrored in TensorBoard."""

import glob
import hashlib
import json
import operator
import os
import platform
import secrets
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import platformdirs
import torch

from options import UserError

Name = TypeVar("Name", bound=Hashable)
Module = TypeVar("Module", bound=torch.nn.Module)
_DAY = 86_400  # seconds


def fold(seed: int, *labels: str | int) -> int:
    """A seed below 2**63 for one purpose at one moment, e.g. fold(seed, "z", step).

    Randomness is folded, not carried: a resumed run draws what the uninterrupted one would have drawn.
    """
    digest = hashlib.blake2b(repr((seed, *labels)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(device: torch.device | str, seed: int, *labels: str | int) -> torch.Generator:
    """A generator on `device`, seeded with fold(seed, *labels)."""
    return torch.Generator(device).manual_seed(fold(seed, *labels))


@contextmanager
def no_denormals() -> Iterator[None]:
    """Numbers below 1e-38 are zero on this process's CPU meanwhile; threads begun before may not know.

    At low temperatures weights of a Concrete Z are so small, and with them what they weigh; processors compute with
    such numbers many times slower (docs/performance.md).
    """
    before = torch.tensor(1e-30).mul(1e-9).item() == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def pick_device(name: str) -> torch.device:
    """The device of --device; auto is cuda, then mps, then cpu.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    if "," in name:
        first = name.partition(",")[0]
        one = f"cuda:{first}" if first.isdecimal() else first
        raise UserError(f"--device {name}: a process uses one device; give one, such as {one}")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # which a meta device cannot give
    except (RuntimeError, AssertionError, ImportError):  # which of them depends on the kind of device
        raise UserError(f"--device {name} cannot be used here; try --device cpu") from None
    return device


def cpuinfo(*fields: str) -> list[str]:
    """The lines of /proc/cpuinfo with one of these fields, each once; none where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return sorted({line for line in lines if line.partition(":")[0].strip() in fields})


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The name of this machine's processor, as far as it can be known."""
    names = [line.partition(":")[2].strip() for line in cpuinfo("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def hardware(device: torch.device) -> str:
    """What this process runs on, for people."""
    threads = f"{processor()}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    return f"{name}, torch {torch.__version__}, commit {commit(12)}"


def commit(digits: int = 40) -> str:
    """That of this repository, with -dirty if files differ from it; unknown without git."""
    how = ["describe", "--always", "--dirty", "--exclude=*", f"--abbrev={digits}"]
    command = ["git", "-C", str(Path(__file__).parent), *how]
    done = subprocess.run(command, capture_output=True, text=True) if shutil.which("git") else None
    return (done and done.stdout.strip()) or "unknown"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file with a name of its own that takes the place of `path` at the end, or is gone if something was raised.

    So a reader, a crash or another process never meets half of it. The folder is made if it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError):  # it is gone by now, or another's
            if time.time() - left.stat().st_mtime > _DAY:  # of a process that was killed
                left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(3)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def clear(folder: Path, pattern: str) -> None:
    """Remove the files and folders of a pattern."""
    for path in folder.glob(pattern):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    """Write a text file through `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # names may be in no encoding


def writable(folder: Path, option: str) -> None:
    """Make the folder if it is missing, and try to write into it; raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--{option} {folder} cannot be written: {error.strerror}") from None


def claim(folder: Path, owner: Path, option: str) -> None:
    """Make a folder for what is made of a run, if it is writable and not that of another run that exists.

    Raises:
        UserError: it is, or cannot be written; names the option.
    """
    if folder.resolve() == owner.resolve():
        raise UserError(f"--{option}: {folder} is for the run's own files; give another --{option}")
    writable(folder, option)
    mark, own = folder / ".of", owner.resolve()
    text = mark.read_text(encoding="utf-8", errors="backslashreplace") if mark.is_file() else ""
    before = (folder / text).resolve() if text else own
    if before != own and before.exists():
        raise UserError(f"--{option}: {folder} has the pictures of {before}; give another --{option}")
    write_atomic(mark, os.path.relpath(own, folder.resolve()))  # both may be copied elsewhere


def cache_folder(given: str | Path | None = None) -> Path:
    """--cache_dir, or the user's folder for caches."""
    path = Path(os.path.expanduser(given)) if given else platformdirs.user_cache_path("snas")
    return Path(tempfile.gettempdir()) / "snas" if path.parts[0] == "~" else path  # nobody knows where home is


def cached(folder: str | Path | None, name: str, *what: object) -> Path:
    """The file of a cache that stands for `what`, of which repr says everything: `name` with its key for {}."""
    return cache_folder(folder) / name.format(hashlib.blake2b(repr(what).encode(), digest_size=12).hexdigest())


def timed(call: Callable[[], object], count: int = 1) -> float:
    """Seconds of a call, the mean of `count` in a row.

    (torch.utils.benchmark.Timer calls twice before it measures, which doubles the time of a benchmark in turns.)
    """
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def in_turns(contenders: Mapping[Name, Callable[[], float]], rounds: int) -> dict[Name, list[float]]:
    """What every contender gives, seconds, called once a round after one another: noise meets them alike."""
    seconds: dict[Name, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            seconds[name].append(contender())
    return seconds


def rebuilt(make: Callable[[], Module], state: Mapping[str, torch.Tensor], layers: int) -> Module:
    """A network with weights from a file, made once it is known to be of their sizes, so that none takes more memory.

    Args:
        make: makes it. state: its state_dict. layers: cells that it is to have; 0 if it has none.
    Raises:
        UserError: it has other weights.
    """
    cells = {name.split(".")[1] for name in state if name.startswith("cells.")}
    if len(cells) == layers:
        with torch.device("meta"):
            shapes = {name: value.shape for name, value in make().state_dict().items()}
        if shapes == {name: value.shape for name, value in state.items()}:
            network = make()
            network.load_state_dict(state)
            return network
    raise UserError("the weights of the checkpoint are not those of a network of its options")


class MetricLog:
    """metrics.jsonl, one row an epoch, and the same rows as TensorBoard events.

    Args:
        folder: the run directory; None writes nothing, as in the other processes of a run.
        epoch: rows after this epoch are dropped; afterwards `self.epoch` is that of the last row, 0 if none.
    """

    def __init__(self, folder: Path | None, epoch: int = 0) -> None:
        self._writer: Any = None
        self.path, self.epoch = folder and folder / "metrics.jsonl", epoch
        if self.path is not None:
            self.epoch = keep_rows(self.path, epoch)

    def add(self, row: dict[str, Any]) -> None:
        """Append one epoch's row; numbers become scalars of TensorBoard under the same names."""
        if self.path is None:
            return
        add_row(self.path, row)
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # a slow import, left until the first epoch is done

            self._writer = SummaryWriter(str(self.path.parent), purge_step=row["epoch"])
        for name, value in row.items():
            if isinstance(value, int | float) and name != "epoch":
                self._writer.add_scalar(name, value, row["epoch"])
        self._writer.flush()

    def picture(self, name: str, pixels: Any, epoch: int) -> None:
        """Show an image of an epoch, (H, W) in 0..1, in TensorBoard."""
        if self._writer is not None:
            self._writer.add_image(name, pixels, epoch, dataformats="HW")

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


def add_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row to a file of one JSON object an epoch."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def keep_rows(path: Path, epoch: int) -> int:
    """Drop the rows after an epoch, and lines that are none; returns the epoch of the last row, 0 if none."""
    if not path.exists():
        return 0
    rows = [row for row in read_metrics(path) if row["epoch"] <= epoch]
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows[-1]["epoch"] if rows else 0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of one JSON object an epoch; a broken line, as of a crash, is left out with a warning."""
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = {"epoch": 0, **json.loads(line)}
            row["epoch"] = operator.index(row["epoch"])
            rows.append(row)
        except (ValueError, TypeError):
            warnings.warn(f"{path}: an unfinished line is left out", stacklevel=2)
    return rows
