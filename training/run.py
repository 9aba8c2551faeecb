"""A run: its options, folder, data and device, what is kept of it, and what it says before it starts."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

import operations
import options
import utils
from loading.batches import Batches, Data
from options import UserError
from options.default_option import RunOptions
from training import checkpoint
from training.distributed import ALONE, World
from training.parts import Stateful, put_back
from training.stopping import Stop

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
    parts: Mapping[str, Stateful] = field(default_factory=dict)  # all that learns or counts, see restore
    metrics: dict[str, Any] = field(default_factory=dict)  # the row of the last finished epoch
    stop: Stop = field(default_factory=Stop)
    world: World = ALONE  # the processes that share it
    begin: Callable[[], None] = lambda: None  # writes what a run says of itself, once it is known to be possible

    @property
    def started(self) -> int:
        """The last finished epoch when this process began."""
        return int(self.loaded["epoch"]) if self.loaded is not None else 0

    def within(self, epoch: int) -> Mapping[str, Any]:
        """What the loaded checkpoint says of an epoch in which it was written, see save_within; else nothing."""
        inside = self.loaded.get("within") if self.loaded is not None and epoch == self.started + 1 else None
        return inside or {}

    def began(self, epoch: int) -> float:
        """When an epoch that begins or goes on now would have begun without interruption, by time.perf_counter."""
        return time.perf_counter() - float(self.within(epoch).get("seconds", 0.0))

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return self.data.info.steps(self.opt.batch_size)

    def train_batches(self, epoch: int, first: int = 0) -> Batches:
        """This process's share of the augmented training batches of an epoch, from the step `first` on."""
        return self.data.train_batches(self.opt.batch_size, epoch, self.device, first, self.world.part)

    def plain_train_batches(self, epoch: int) -> Batches:
        """This process's share of training images for the statistics of batch norms, on the device."""
        opt = self.opt
        sizes = opt.eval_batch_size, opt.calibration_batches
        return self.data.plain_train_batches(*sizes, epoch, self.device, self.world.part)

    def batches(self, split: str) -> Batches:
        """This process's share of the images of a split, on the device."""
        return self.data.batches(split, self.opt.eval_batch_size, self.device, self.world.part)

    def autocast(self) -> torch.autocast:
        """The precision of the run as a context."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.opt.precision == "bf16")

    def generator(self, *labels: str | int) -> torch.Generator:
        """Random numbers on the device for one purpose at one moment, e.g. run.generator("valid", epoch)."""
        return utils.generator(self.device, self.opt.seed, *labels)

    def last_good(self) -> Path | str:
        """The newest checkpoint, for messages."""
        return checkpoint.latest(self.folder, self.stem) or "none yet"

    def restore(self, parts: Mapping[str, Stateful]) -> None:
        """Take what learns or counts, by its name in checkpoints, and put the loaded one, if any, into it.

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
                try:
                    put_back(part, self.loaded["parts"][name])
                except ValueError:
                    raise UserError(
                        f"the checkpoint in {self.folder} does not fit this run: its {name} is another's"
                    ) from None
            self.metrics = dict(self.loaded["metrics"])
        self.parts = parts
        if self.world.first:
            self.begin()

    def save(self, epoch: int, metrics: Mapping[str, Any]) -> None:
        """Write the checkpoint of an epoch; drop the one before unless save_freq keeps it, and those within it."""
        inside, before = checkpoint.within(self.folder, self.stem).values(), self.epoch
        self.epoch, self.metrics = epoch, dict(metrics)
        if not self.world.first:
            return
        checkpoint.save(checkpoint.path_of(self.folder, self.stem, epoch), self._content())
        dropped = [checkpoint.path_of(self.folder, self.stem, before)] if before and before % self.opt.save_freq else []
        for path in (*inside, *dropped):
            path.unlink(missing_ok=True)

    def save_within(self, state: Mapping[str, Any]) -> None:
        """Write the checkpoint of a step of the epoch in progress; drop the one before.

        Args:
            state: steps of this epoch that are done, seconds it has taken, and what else it has to go on with.
        """
        if not self.world.first:
            return
        before = checkpoint.within(self.folder, self.stem)
        path = checkpoint.path_of(self.folder, self.stem, self.epoch + 1, state["steps"])
        checkpoint.save(path, {**self._content(), "within": dict(state)})
        for other in before.values():
            if other != path:
                other.unlink(missing_ok=True)

    def _content(self) -> dict[str, Any]:
        return {
            "stem": self.stem,
            "epoch": self.epoch,
            "options": options.to_dict(self.opt),
            "data": self.data.info.to_dict(),
            "split": self.data.record(self.opt),
            "metrics": self.metrics,
            "extra": self.extra,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }


def check_finite(run: Run[Any], name: str, value: float, epoch: int) -> None:
    """Stop the run where a figure is no number, before it is saved; raises UserError."""
    if not math.isfinite(value):
        raise no_number(run, f"{name} became {value} in epoch {epoch}")


def no_number(run: Run[Any], words: str) -> UserError:
    """What to say where the words say which figure is no number, and when."""
    return UserError(
        f"{words}; last good checkpoint: {run.last_good()}; try a lower --learning_rate or --precision fp32 under a "
        "new --name, or go on with --on_nonfinite skip where single batches are to blame"
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
    threads += f", {run.world.size} processes" if run.world.size > 1 else ""
    print(f"device   {run.device}{threads}, {opt.precision}{', compiled' if opt.compile else ''}")
    if run.device.type == "cpu" and opt.compile:
        print("warning: --compile True gains nothing on a CPU: the fused kernels are faster, leave it out")
    elif run.device.type == "cpu" and opt.precision == "fp32":
        print(f"kernels  {operations.kernels_in_words()}")
    print(f"data     {opt.dataset}: {width}x{height}x{info.channels}; {len(info.classes)} classes ({shown}); {sizes}")
    print(
        f"         {rarest:,} to {commonest:,} training images a class{', drawn equally often' if opt.balance else ''}"
    )
    stride = 32 if getattr(opt, "stem", "cifar") == "imagenet" else 4
    if min(height, width) < stride:
        print(
            f"note:    images of {width}x{height} are smaller than {stride}x{stride}, which the network halves "
            "to a point: give a larger --image_size"
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
