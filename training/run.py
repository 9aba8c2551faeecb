"""An experiment: its folder, options, data and device, what is kept of it, and what it says before it starts."""

import math
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
import yaml
from filelock import FileLock, Timeout

import operations
import options
import utils
from loading.batches import Batches, Data, write_split
from loading.records import Given
from options import UserError
from options.default_option import RunOptions
from training import checkpoint

# Options that may change when a run is resumed: what is computed stays the same function of the same images.
FREE = {
    "name",  # the folder may have been renamed
    "resume",
    "eval_only",
    "test_folder",
    "save_freq",
    "report_freq",
    "experiments_dir",
    "visualizations_dir",
    "download",
    "data_dir",
    "dataset",  # the images may have moved: names, counts, size, mean and std are compared, other pixels told
    "device",
    "recompute",
    "max_ram_gb",
    "cache_dir",
    "max_cache_gb",
}
# What a start that never reached a checkpoint leaves behind; it may be written over.
_LEFTOVERS = ("options.yaml", "split.json", "metrics.jsonl", "events.out.tfevents.*", ".*.tmp", ".lock", ".writer")


class Stateful(Protocol):
    """Whatever a checkpoint has to bring back."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


Options = TypeVar("Options", bound=RunOptions)


@dataclass
class Run(Generic[Options]):
    """A run in progress: its options, folder, device, data, and where it stands."""

    opt: Options
    stem: str  # checkpoints are STEM_epoch_N.pt
    folder: Path
    device: torch.device
    data: Data
    epoch: int = 0  # the last finished one
    loaded: Mapping[str, Any] | None = None  # the checkpoint it goes on from
    extra: dict[str, Any] = field(default_factory=dict)  # plain containers to keep in the checkpoints

    @property
    def started(self) -> int:
        """The last finished epoch when this process began."""
        return int(self.loaded["epoch"]) if self.loaded is not None else 0

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return self.data.info.steps(self.opt.batch_size)

    def train_batches(self, epoch: int) -> Batches:
        """The augmented training batches of an epoch, on the device."""
        return self.data.train_batches(self.opt.batch_size, epoch, self.device)

    def plain_train_batches(self, epoch: int) -> Batches:
        """Training images for the statistics of batch norms, on the device."""
        opt = self.opt
        return self.data.plain_train_batches(opt.eval_batch_size, opt.calibration_batches, epoch, self.device)

    def batches(self, split: str) -> Batches:
        """All images of a split, on the device."""
        return self.data.batches(split, self.opt.eval_batch_size, self.device)

    def autocast(self) -> torch.autocast:
        """The precision of the run as a context."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.opt.precision == "bf16")

    def generator(self, *labels: str | int) -> torch.Generator:
        """Random numbers on the device for one purpose at one moment, e.g. run.generator("z", step)."""
        return utils.generator(self.device, self.opt.seed, *labels)

    def last_good(self) -> Path | str:
        """The newest checkpoint, for messages."""
        return checkpoint.path_of(self.folder, self.stem, self.epoch) if self.epoch else "none yet"

    def restore(self, parts: Mapping[str, Stateful]) -> None:
        """Put the loaded checkpoint, if any, into everything that learns.

        Raises:
            UserError: it has other parts: main.py would forget the budget of main_constraint.py.
        """
        if self.loaded is not None:
            other = self.loaded["parts"].keys() ^ parts.keys()
            if other:
                raise UserError(
                    f"the run in {self.folder} is of another script (its {min(other)} says so); "
                    f"its own is named in {self.folder}/options.yaml"
                )
            for name, part in parts.items():
                part.load_state_dict(self.loaded["parts"][name])

    def save(self, epoch: int, parts: Mapping[str, Stateful], metrics: Mapping[str, Any]) -> None:
        """Write the checkpoint of an epoch; drop the one before unless save_freq keeps it."""
        content = {
            "stem": self.stem,
            "epoch": epoch,
            "options": options.to_dict(self.opt),
            "data": self.data.info.to_dict(),
            "split": self.data.record(self.opt),
            "metrics": dict(metrics),
            "extra": self.extra,
            "parts": {name: part.state_dict() for name, part in parts.items()},
        }
        checkpoint.save(checkpoint.path_of(self.folder, self.stem, epoch), content)
        if self.epoch and self.epoch % self.opt.save_freq:
            checkpoint.path_of(self.folder, self.stem, self.epoch).unlink(missing_ok=True)
        self.epoch = epoch


@contextmanager
def one_writer(folder: Path, instead: str) -> Iterator[None]:
    """Holds a folder for this process. The lock ends with the process, however that ends.

    Args:
        instead: what to try where another process holds it, in words.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    holder, lock = folder / ".writer", FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        who = holder.read_text(encoding="utf-8") if holder.exists() else "another process"
        raise UserError(f"{folder} is being written by {who}; wait for it, or {instead}") from None
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None
    try:
        with suppress(OSError):  # a full disk: only the name is lacking then
            holder.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


@contextmanager
def open_run(
    opt: Options, stem: str, given: Callable[[], Given] = Given, train_on_valid: bool = False
) -> Iterator[Run[Options]]:
    """Check the name, read the data, hold the folder, create it or find the checkpoint to resume from.

    Args:
        opt: the options.
        stem: checkpoints are STEM_epoch_N.pt.
        given: gives the split of a run that begins; the others have that of their checkpoint.
        train_on_valid: train on the validation split too.
    Raises:
        UserError: the experiment exists or another process writes it, its options differ, or the data cannot be used.
    """
    folder = Path(opt.experiments_dir) / opt.name
    newest = checkpoint.newest(folder, stem) if opt.resume else None
    if newest is None:
        _check_free(folder, opt.resume)
    device = utils.pick_device(opt.device)
    loaded = checkpoint.load(newest) if newest else None
    if loaded:
        check_same_options(opt, loaded["options"], folder)
    if loaded:
        data = Data(opt, loaded["split"], train_on_valid)
        if not _same_data(data.info.to_dict(), loaded["data"]):
            raise UserError(
                f"--dataset {opt.dataset} does not hold the images of the run in {folder}; use a new --name"
            )
    else:
        split, carry = given()
        data = Data(opt, split, train_on_valid, carry)
    with one_writer(folder, "give another --name"):
        if newest is None:
            _check_free(folder, opt.resume)  # again: reading the data took its time
        if (checkpoint.newest(folder, stem) if opt.resume else None) != newest:
            raise UserError(f"{folder} was written while the data was read; start again")
        utils.clear(folder, ".*.tmp")  # of a process that was killed while it wrote
        command = shlex.join(["python", Path(sys.argv[0]).name, "--config", str(folder / "options.yaml")])
        options.save(opt, folder / "options.yaml", command)
        write_split(folder / "split.json", data, opt)
        run = Run(opt, stem, folder, device, data, loaded["epoch"] if loaded else 0, loaded)
        try:
            yield run
        except KeyboardInterrupt as interrupt:
            interrupt.add_note("finished epochs are kept: add --resume True to go on")
            raise
        except BrokenPipeError:  # who read what is printed has gone
            raise
        except OSError as error:
            raise UserError(f"{options.in_words(error)}; last good checkpoint: {run.last_good()}") from None
        except (MemoryError, RuntimeError) as error:
            if not options.out_of_memory(error):
                raise
            less = "--batch_size, --eval_batch_size, --init_channels or --layers"
            raise UserError(
                f"out of memory; take less of {less}{' or --recompute True' if hasattr(opt, 'recompute') else ''}; "
                f"last good checkpoint: {run.last_good()}"
            ) from None


def _same_data(now: Mapping[str, Any], then: Mapping[str, Any]) -> bool:
    """Whether both are of the same images; the last digit of mean and deviation may differ between machines."""
    white = now["white"] | {kind: value for kind, value in then.get("white", {}).items() if kind in now["white"]}
    both = [dict(info) for info in (now, {**then, "white": white})]  # earlier runs have none, or of all kinds
    numbers = [[*info.pop("mean"), *info.pop("std")] for info in both]
    return both[0] == both[1] and all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(*numbers, strict=True))


def _check_free(folder: Path, resume: bool) -> None:
    """Refuse a folder that holds more than a start which never finished an epoch."""
    if any(path.exists() and not path.is_dir() for path in (folder, folder.parent)):
        raise UserError(f"{folder} cannot be made: a file is in the way; change --name or --experiments_dir")
    if not folder.exists():
        return
    kept = {p.name for p in folder.iterdir()} - {p.name for pattern in _LEFTOVERS for p in folder.glob(pattern)}
    metrics = folder / "metrics.jsonl"
    if kept or (metrics.exists() and metrics.stat().st_size):
        other = "it has no checkpoint of this script to go on from" if resume else "or --resume True to go on"
        raise UserError(f"{folder} exists; give another --name, {other}")


def check_same_options(opt: RunOptions, stored: Mapping[str, Any], folder: Path, advice: str = "") -> None:
    """Refuse options that differ from those of the run in the folder, but for FREE ones; raises UserError."""
    again = f"--config {folder}/options.yaml --name {folder.name} --resume True"
    advice = advice or f"a resumed run keeps its options; use {again}, or a new --name"
    now = options.to_dict(opt)
    earlier = options.to_dict(type(opt)()) | dict(stored)  # what is newer than the run had its default
    changed = [name for name in now if name not in FREE and now[name] != earlier[name]]
    if changed:
        name = changed[0]
        raise UserError(f"--{name} is {now[name]} but the run in {folder} has {earlier[name]}: {advice}")


def finished(opt: RunOptions, leaves: str) -> bool:
    """Whether a run of these options lies in its folder and has ended; raises UserError if it is of others.

    Args:
        opt: the options. leaves: the file that only a finished run has.
    """
    folder = Path(opt.experiments_dir) / opt.name
    if not (folder / leaves).exists():
        return False
    try:
        stored = dict(yaml.safe_load((folder / "options.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        raise UserError(f"{folder}/options.yaml does not say what the run was; use a new --name") from None
    check_same_options(opt, stored, folder)
    if Path(stored["dataset"]).resolve() != Path(opt.dataset).resolve():
        raise UserError(f"the run in {folder} is of the images in {stored['dataset']}; use a new --name")
    return True


def check_finite(run: Run[Any], name: str, value: float, epoch: int) -> None:
    """Stop the run where a figure is no number, before it is saved; raises UserError."""
    if not math.isfinite(value):
        raise UserError(
            f"{name} became {value} in epoch {epoch}; last good checkpoint: {run.last_good()}; "
            "try a lower --learning_rate or --precision fp32 under a new --name"
        )


def announce(run: Run[Any], costs: Mapping[str, int]) -> None:
    """Say what is about to happen, before the first step.

    Args:
        run: what is trained.
        costs: params and flops of the network.
    """
    opt, info = run.opt, run.data.info
    height, width = info.image_size
    sizes = ", ".join(f"{sum(counts):,} {name}" for name, counts in info.counts.items())
    rarest, commonest = min(info.counts["train"]), max(info.counts["train"])
    shown = ", ".join(info.classes[:3]) + (", ..." if len(info.classes) > 3 else "")
    threads = f", {torch.get_num_threads()} threads" if run.device.type == "cpu" else ""
    print(f"device   {run.device}{threads}, {opt.precision}{', compiled' if opt.compile else ''}")
    if run.device.type == "cpu" and opt.compile:
        print("warning: --compile True gains nothing on a CPU: the fused kernels are faster, leave it out")
    elif run.device.type == "cpu" and opt.precision == "fp32":
        print(f"kernels  {operations.kernels_in_words()}")
    print(f"data     {opt.dataset}: {width}x{height}x{info.channels}; {len(info.classes)} classes ({shown}); {sizes}")
    print(
        f"         {rarest:,} to {commonest:,} training images a class{', drawn equally often' if opt.balance else ''}"
    )
    for note in run.data.notes:
        print(f"note:    {note}")
    print(f"network  {costs['params']:,} parameters, {costs['flops'] / 1e6:,.1f} Mflops (multiply-adds) an image")
    left = f"epochs {run.epoch + 1} to {opt.epochs}, {run.steps} steps each"
    print(f"run      {run.folder}: {left if run.epoch < opt.epochs else 'all epochs are done'}", flush=True)
    for name, counts in info.counts.items():
        empty = [c for c, count in zip(info.classes, counts, strict=True) if not count]
        if empty and sum(counts):
            print(f"warning: the {name} split has no image of {', '.join(empty)}")


def duration(seconds: float) -> str:
    """For people."""
    minutes = seconds / 60
    if minutes < 1:
        return "a minute"
    if minutes < 90:
        return f"{minutes:.0f} minutes"
    return f"{minutes / 60:.0f} hours" if minutes < 48 * 60 else f"{minutes / 60 / 24:.0f} days"
