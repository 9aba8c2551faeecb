"""What every kind of training shares: the run and its folder, evaluation, the loop over epochs."""

import copy
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import cost
import data
import options
import utils
from operations import Norm
from options import UserError
from options.default_option import RunOptions

Batches = Iterable[tuple[Tensor, Tensor]]

# Options that may change when a run is resumed: what is computed stays the same function of the same images.
FREE = {"resume", "save_freq", "report_freq", "experiments_dir", "visualizations_dir", "download", "data_dir"} | {
    "dataset",  # the images may have moved: their names, number, size, mean and std are compared
    "device",
    "max_ram_gb",
    "cache_dir",
}
# What a start that never reached a checkpoint leaves behind; it may be written over.
_LEFTOVERS = ("options.yaml", "split.json", "metrics.jsonl", "events.out.tfevents.*", ".*.tmp")


class Stateful(Protocol):
    """Whatever a checkpoint has to bring back."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


@dataclass
class Run:
    """A run in progress: its options, folder, device, data, and where it stands."""

    opt: RunOptions
    stem: str  # checkpoints are STEM_epoch_N.pt
    folder: Path
    device: torch.device
    data: data.Data
    epoch: int = 0  # the last finished one
    loaded: Mapping[str, Any] | None = None  # the checkpoint it goes on from

    def restore(self, parts: Mapping[str, Stateful]) -> None:
        """Put the loaded checkpoint, if any, into everything that learns."""
        if self.loaded is not None:
            for name, part in parts.items():
                part.load_state_dict(self.loaded["parts"][name])

    def save(self, epoch: int, parts: Mapping[str, Stateful], metrics: Mapping[str, Any]) -> None:
        """Write the checkpoint of an epoch; drop the one before unless save_freq keeps it."""
        content = {
            "stem": self.stem,
            "epoch": epoch,
            "options": options.to_dict(self.opt),
            "data": self.data.info.to_dict(),
            "split": self.data.split,
            "metrics": dict(metrics),
            "parts": {name: part.state_dict() for name, part in parts.items()},
        }
        checkpoint.save(checkpoint.path_of(self.folder, self.stem, epoch), content)
        if self.epoch and self.epoch % self.opt.save_freq:
            checkpoint.path_of(self.folder, self.stem, self.epoch).unlink(missing_ok=True)
        self.epoch = epoch


def open_run(opt: RunOptions, stem: str) -> Run:
    """Check the name, read the data, create the folder or find the checkpoint to resume from.

    Raises:
        UserError: the experiment exists, its options differ, or the data cannot be used.
    """
    folder = Path(opt.experiments_dir) / opt.name
    done = checkpoint.epochs(folder, stem) if opt.resume else []
    if not done:
        _check_free(folder)
    device = utils.pick_device(opt.device)
    loaded = checkpoint.load(checkpoint.path_of(folder, stem, done[-1])) if done else None
    if loaded:
        _check_same_options(opt, loaded["options"], folder)
    run_data = data.Data(opt, loaded["split"] if loaded else None)
    if loaded and run_data.info.to_dict() != loaded["data"]:
        raise UserError(f"--dataset {opt.dataset} does not hold the images of the run in {folder}; use a new --name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--experiments_dir {opt.experiments_dir} cannot be written: {error.strerror}") from None
    options.save(opt, folder / "options.yaml", f"python {Path(sys.argv[0]).name} --config {folder}/options.yaml")
    data.write_split(folder / "split.json", run_data, opt)
    return Run(opt, stem, folder, device, run_data, loaded["epoch"] if loaded else 0, loaded)


def _check_free(folder: Path) -> None:
    """Refuse a folder that holds more than a start which never finished an epoch."""
    if any(path.exists() and not path.is_dir() for path in (folder, folder.parent)):
        raise UserError(f"{folder} cannot be made: a file is in the way; change --name or --experiments_dir")
    if not folder.exists():
        return
    kept = {p.name for p in folder.iterdir()} - {p.name for pattern in _LEFTOVERS for p in folder.glob(pattern)}
    metrics = folder / "metrics.jsonl"
    if kept or (metrics.exists() and metrics.stat().st_size):
        raise UserError(f"{folder} exists; give another --name, or --resume True if it has a checkpoint to go on from")


def _check_same_options(opt: RunOptions, stored: Mapping[str, Any], folder: Path) -> None:
    now = options.to_dict(opt)
    changed = [name for name in now if name not in FREE and now[name] != stored.get(name)]
    if changed:
        name = changed[0]
        raise UserError(
            f"--{name} is {now[name]} but the run in {folder} has {stored.get(name)}: a resumed run keeps its options; "
            f"use --config {folder}/options.yaml --resume True, or a new --name"
        )


def announce(run: Run, network: nn.Module, architecture: Any, seconds: float) -> None:
    """Say what is about to happen, before the first step.

    Args:
        network: called as network(images, architecture).
        architecture: tensors in a NamedTuple, of which the shapes matter.
        seconds: how long the run is expected to take.
    """
    opt, info = run.opt, run.data.info
    image = torch.empty(1, info.channels, *info.image_size, device="meta")
    meta = copy.deepcopy(network).to("meta")
    inputs = type(architecture)(*(t.detach().to("meta") for t in architecture))
    flops = cost.count_flops(meta, image, inputs)
    height, width = info.image_size
    sizes = ", ".join(f"{sum(counts):,} {name}" for name, counts in info.counts.items())
    rarest, commonest = min(info.counts["train"]), max(info.counts["train"])
    threads = f", {torch.get_num_threads()} threads" if run.device.type == "cpu" else ""
    print(f"device   {run.device}{threads}, {opt.precision}{', compiled' if opt.compile else ''}")
    print(f"data     {opt.dataset}: {width}x{height}, {info.channels} channels; {len(info.classes)} classes; {sizes}")
    print(
        f"         {rarest:,} to {commonest:,} training images a class{', drawn equally often' if opt.balance else ''}"
    )
    print(f"network  {cost.count_params(network):,} parameters, {flops / 1e6:,.1f} Mflops (multiply-adds) an image")
    print(
        f"run      {run.folder}: epochs {run.epoch + 1} to {opt.epochs}, {run.data.steps(opt.batch_size)} steps each, "
        f"about {_duration(seconds)} (a guess from a few steps)",
        flush=True,
    )
    for name, counts in info.counts.items():
        empty = [c for c, count in zip(info.classes, counts, strict=True) if not count]
        if empty and sum(counts):
            print(f"warning: the {name} split has no image of {', '.join(empty)}")


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 1:
        return "a minute"
    if minutes < 90:
        return f"{minutes:.0f} minutes"
    return f"{minutes / 60:.0f} hours" if minutes < 48 * 60 else f"{minutes / 60 / 24:.0f} days"


def autocast(run: Run) -> torch.autocast:
    """The precision of the run as a context."""
    return torch.autocast(run.device.type, torch.bfloat16, enabled=run.opt.precision == "bf16")


class Figures(NamedTuple):
    """What an evaluation gives: mean cross-entropy in nats, accuracies in percent."""

    loss: float
    acc: float
    balanced_acc: float  # mean over the classes present of the share found


@torch.no_grad()
def evaluate(run: Run, forward: Callable[[Tensor], Tensor], split: str) -> Figures:
    """Loss and accuracies of forward(images) -> logits over a whole split, not augmented."""
    from sklearn.metrics import accuracy_score, recall_score  # a slow import

    loss = torch.zeros((), dtype=_widest(run.device), device=run.device)
    predictions, targets = [], []
    for images, labels in run.data.batches(split, run.opt.eval_batch_size, run.device):
        with autocast(run):
            logits = forward(images)
        loss += F.cross_entropy(logits.float(), labels, reduction="sum")
        predictions.append(logits.argmax(1))
        targets.append(labels)
    guessed, true = torch.cat(predictions).cpu().numpy(), torch.cat(targets).cpu().numpy()
    present = sorted(set(true.tolist()))
    balanced = recall_score(true, guessed, labels=present, average="macro")
    return Figures(loss.item() / len(true), 100 * float(accuracy_score(true, guessed)), 100 * float(balanced))


@contextmanager
def calibrated(module: nn.Module, forward: Callable[[Tensor], Tensor], batches: Batches) -> Iterator[None]:
    """Inside, `module` is in eval mode with the batch-norm statistics of `forward`; afterwards it is as before.

    A supernet's running averages mix the statistics of every Z it met and suit none of them, least of all
    its child's. So they are estimated anew for the one function that is evaluated: the mean over training
    batches of each batch's mean and variance, without gradients, drop path or a trace in the training state.
    """
    norms = [m for m in module.modules() if isinstance(m, Norm)]
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    momenta = [norm.momentum for norm in norms]
    training = module.training
    module.eval()
    try:
        for norm in norms:
            norm.train()
        with torch.no_grad():
            for count, (images, _) in enumerate(batches, 1):
                for norm in norms:
                    norm.momentum = 1 / count  # running = mean of the batches so far
                forward(images)
        module.eval()
        yield
    finally:
        for norm, buffers, momentum in zip(norms, before, momenta, strict=True):
            norm.load_state_dict({**norm.state_dict(), **buffers})
            norm.momentum = momentum
        module.train(training)


def _widest(device: torch.device) -> torch.dtype:
    """The type to sum in: float64, which Apple's GPUs lack."""
    return torch.float32 if device.type == "mps" else torch.float64


class Mean:
    """Running mean of scalars that stay on their device; weighted by the number of images."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, values: Mapping[str, Tensor], count: int) -> None:
        """Add the means of `count` images."""
        for name, value in values.items():
            term = value.detach().to(_widest(value.device)) * count
            self._sums[name] = self._sums[name] + term if name in self._sums else term
        self._count += count

    def values(self) -> dict[str, float]:
        """The means so far; waits for the device."""
        return {name: total.item() / self._count for name, total in self._sums.items()}


def check_finite(run: Run, name: str, value: float, epoch: int) -> None:
    """Stop the run where a figure is no number, before it is saved; raises UserError."""
    if not math.isfinite(value):
        good = checkpoint.path_of(run.folder, run.stem, run.epoch) if run.epoch else "none yet"
        raise UserError(
            f"{name} became {value} in epoch {epoch}; last good checkpoint: {good}; "
            "try a lower --learning_rate or --precision fp32 under a new --name"
        )


def fit(
    run: Run,
    parts: Mapping[str, Stateful],
    one_epoch: Callable[[int], dict[str, Any]],
    summarise: Callable[[Mapping[str, Any]], str],
) -> dict[str, Any]:
    """The loop over epochs: train and evaluate, write the checkpoint, then the row, print a line.

    Args:
        run: where to go on from.
        parts: all that learns or counts, by the name it has in the checkpoint.
        one_epoch: epoch (1..epochs) -> its row of metrics.jsonl.
        summarise: a row -> one line for people.
    Returns:
        The last row.
    """
    row = dict(run.loaded["metrics"]) if run.loaded else {}
    log = utils.MetricLog(run.folder, run.epoch)
    try:
        if run.epoch > log.epoch:  # the run died between its checkpoint and its row
            log.add(row)
        for epoch in range(run.epoch + 1, run.opt.epochs + 1):
            torch.manual_seed(utils.fold(run.opt.seed, "epoch", epoch))  # drop path
            row = {"epoch": epoch, **one_epoch(epoch)}
            for name, value in row.items():
                check_finite(run, name, value, epoch)
            run.save(epoch, parts, row)
            log.add(row)
            tqdm.write(summarise(row))
    finally:
        log.close()
    return row
