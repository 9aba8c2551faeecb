"""What every kind of training shares: the update, an epoch, the loop over epochs."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import utils
from options import UserError
from training.distributed import ALONE, World
from training.run import Run, check_finite, duration, no_number

Step = tuple[Tensor, Tensor, Mapping[str, Tensor]]  # logits (B, classes), loss, further scalars


def compile_cells(cells: Iterable[nn.Module]) -> None:
    """Compile every cell on its own; one that the compiler gives up on raises instead of running slowly.

    All cells share the code of their class, of which the compiler keeps 8 forms unless told otherwise; a network has
    as many as it has cells, in training and once more where gradients are off.
    """
    cells = list(cells)
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 4 * len(cells))
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * len(cells))
    config.fail_on_recompile_limit_hit = True
    for cell in cells:
        cell.compile()


def _widest(device: torch.device) -> torch.dtype:
    """The type to sum in: float64, which Apple's GPUs lack."""
    return torch.float32 if device.type == "mps" else torch.float64


class Mean:
    """Running mean of scalars that stay on their device; weighted by the number of images."""

    def __init__(self, world: World = ALONE) -> None:
        self._world = world
        self._sums: dict[str, Tensor] = {}
        self.count = 0  # of images, in this process

    def add(self, values: Mapping[str, Tensor], count: int) -> None:
        """Add the means of `count` images."""
        for name, value in values.items():
            term = value.detach().to(_widest(value.device)) * count
            self._sums[name] = self._sums[name] + term if name in self._sums else term
        self.count += count

    def values(self) -> tuple[dict[str, float], int]:
        """The means so far and of how many images, over all processes; waits for them and for the device."""
        *sums, count = self._world.sum(torch.tensor(self._own(), dtype=torch.float64)).tolist()
        return {name: total / count for name, total in zip(self._sums, sums, strict=True)}, int(count)

    def _own(self) -> list[float]:
        return [*(total.item() for total in self._sums.values()), float(self.count)]

    def state(self) -> dict[str, Any]:
        """The sums and the count of every process, for a checkpoint."""
        return {"names": [*self._sums], "sums": self._world.gather(self._own())}

    def go_on(self, state: Mapping[str, Any], device: torch.device) -> None:
        """From a state; that of another number of processes is the first one's."""
        rows, world = state["sums"], self._world
        if len(rows) != world.size:
            rows = [[sum(column) for column in zip(*rows, strict=True)]] + [[0.0] * len(rows[0])] * (world.size - 1)
        *sums, count = rows[world.rank]
        tensors = torch.tensor(sums, dtype=_widest(device), device=device).unbind()
        self._sums = dict(zip(state["names"], tensors, strict=True))
        self.count = int(count)


class NonFinite(ArithmeticError):
    """A loss or a gradient is no number; nothing was stepped."""


def update(
    loss: Tensor,
    optimizers: Iterable[tuple[torch.optim.Optimizer, float]],
    check: bool = False,
    world: World = ALONE,
    buffers: Sequence[Tensor] = (),
) -> Tensor:
    """One backward pass, then for every (optimizer, limit): clip the norm of its gradient, step.

    Args:
        check: raise NonFinite where it applies on a GPU too, which waits for the GPU.
        world: of several processes, whose gradients are averaged. buffers: what is averaged with them.
    Returns:
        The loss of this process (); where nobody has checked, no number if a gradient is none: the figures show it.
    Raises:
        NonFinite: a loss or gradient is no number; nothing was stepped.
    """
    optimizers = list(optimizers)
    for optimizer, _ in optimizers:
        optimizer.zero_grad()
    loss.backward()
    mean = world.average(loss, [p for one, _ in optimizers for p in one.param_groups[0]["params"]], buffers)
    norms = [nn.utils.clip_grad_norm_(one.param_groups[0]["params"], limit) for one, limit in optimizers]
    checked = check or loss.device.type == "cpu"
    if checked:
        for name, value in [("loss", mean), *(("norm of the gradient", norm) for norm in norms)]:
            if not torch.isfinite(value):
                raise NonFinite(f"the {name} became {value.item()}")
    for optimizer, _ in optimizers:
        optimizer.step()
    return loss.detach() if checked else loss.detach() + sum(0 * norm for norm in norms)


class _Tolerance:
    """What becomes of steps whose loss or gradient is no number: the run ends, or with --on_nonfinite skip it goes on.

    A skipped step leaves nothing, in batch-norm statistics neither; beyond a tenth of an epoch's steps the run ends.
    """

    def __init__(self, run: Run[Any], where: str, skipped: int) -> None:
        self._run, self._where, self.skipped = run, where, skipped
        self.skips = run.opt.on_nonfinite == "skip"
        modules = [part for part in run.parts.values() if isinstance(part, nn.Module)] if self.skips else []
        self._buffers = [buffer for module in modules for buffer in module.buffers()]
        self._kept = [buffer.clone() for buffer in self._buffers]

    def keep(self) -> None:
        """Called before every step."""
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)

    def skip(self, error: NonFinite, number: int) -> None:
        """Called after one that failed, `number` from 0; raises UserError."""
        words = f"{error} in step {number + 1} ({self._where})"
        self.skipped += 1
        if not self.skips:
            raise no_number(self._run, words)
        if self.skipped > max(3, self._run.steps // 10) or self.skipped == self._run.steps:
            raise no_number(self._run, f"{words}, as in {self.skipped - 1} other steps of this epoch")
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept)
        tqdm.write(f"note:    {words}; the batch is skipped")


class _Guess:
    """Says about how long a run of `epochs` of `steps` each will take, after the first one and 4 more, if there are."""

    def __init__(self, epochs: int, steps: float, last: int) -> None:
        self._all, self._last, self._start = epochs * steps, min(4, last), time.perf_counter()

    def after(self, index: int, device: torch.device) -> None:
        """Called after every step of the first epoch."""
        if index in (0, self._last):
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            count, now = max(1, self._last), time.perf_counter()
            if index == self._last:
                seconds = (now - self._start) / count * self._all
                tqdm.write(f"time     about {duration(seconds)} (guessed from {count} steps)")
            self._start = now  # the first of several warms up


def _fits(inside: Mapping[str, Any], head: Mapping[str, Any], steps: int) -> bool:
    """Whether what a checkpoint says of an epoch in progress is of one with this head and so many steps."""
    names, taken = inside["mean"]["names"], inside["steps"] - inside["skipped"]
    images = sum(row[-1] for row in inside["mean"]["sums"])
    alike = inside["head"].keys() == head.keys() and all(
        type(inside["head"][name]) is type(head[name]) for name in head
    )
    return alike and 0 <= taken <= steps and (not taken or ({"train_loss", "train_acc"} <= {*names} and images > 0))


_AGREE = 10  # steps after which several processes ask each other whether to stop


class _Epoch:
    """Where an epoch stands: begun, or gone on with where the loaded checkpoint was written within it."""

    def __init__(self, run: Run[Any], epoch: int, head: Mapping[str, Any]) -> None:
        inside = run.within(epoch)
        if inside and not _fits(inside, head, run.steps):
            raise UserError(f"the checkpoint in {run.folder} does not fit this run: its epoch is another's")
        self._run, self._epoch, self._start, self._saved = run, epoch, run.began(epoch), time.perf_counter()
        self.first, self.mean, self._head = inside.get("steps", 0), Mean(run.world), dict(inside.get("head", head))
        if inside:
            self.mean.go_on(inside["mean"], run.device)
        degrees = self._head.get("temperature")
        where = f"epoch {epoch}" + (f", temperature {degrees:.3g}" if degrees is not None else "")
        self.tolerance = _Tolerance(run, where, inside.get("skipped", 0))

    def take(self, step: Callable[[int, Tensor, Tensor], Step], index: int, images: Tensor, targets: Tensor) -> None:
        """One step of the epoch, 0.., whose random numbers are its own."""
        number = (self._epoch - 1) * self._run.steps + index
        torch.manual_seed(utils.fold(self._run.opt.seed, "step", number, *self._run.world.label))  # drop path
        self.tolerance.keep()
        try:
            logits, loss, terms = step(number, images, targets)
            accuracy = 100 * (logits.argmax(1) == targets).float().mean()
            self.mean.add({"train_loss": loss, "train_acc": accuracy, **terms}, len(targets))
        except NonFinite as error:
            self.tolerance.skip(error, number)

    def due(self, steps: int) -> bool:
        """Whether a checkpoint has to be written after so many; several processes agree, now and then."""
        run = self._run
        late = time.perf_counter() - self._saved > 60 * run.opt.save_every_minutes
        if run.world.size > 1:
            if steps % _AGREE and steps < run.steps:
                return False
            heard = run.world.gather((run.stop.number or 0, late))
            run.stop.learn(max(number for number, _ in heard))
            late = any(late for _, late in heard)
        return late or run.stop.told

    def figures(self) -> dict[str, float]:
        """The running ones; raises UserError where they are no numbers."""
        now, _ = self.mean.values()
        for name, value in now.items():
            check_finite(self._run, name, value, self._epoch)
        return now

    def save(self, steps: int) -> None:
        """Write the checkpoint after so many steps of the epoch; all processes wait for it."""
        self._saved = time.perf_counter()
        state = {"steps": steps, "seconds": self._saved - self._start, "head": self._head, "mean": self.mean.state()}
        self._run.save_within({**state, "skipped": self.tolerance.skipped})
        self._run.world.gather(None)

    def row(self) -> dict[str, Any]:
        """What metrics.jsonl says of its training."""
        more = {"skipped_steps": self.tolerance.skipped} if self.tolerance.skips else {}
        means, images = self.mean.values()
        return {**self._head, **means, **more, "images_per_second": images / (time.perf_counter() - self._start)}


def train_epoch(
    run: Run[Any],
    epoch: int,
    step: Callable[[int, Tensor, Tensor], Step],
    head: Mapping[str, Any],
    evaluated: float = 0.0,
) -> dict[str, Any]:
    """Every training batch of an epoch through `step`, with a bar; a guess of the run's duration after a few.

    Goes on within the epoch where the loaded checkpoint was written in it; writes one every --save_every_minutes and
    when the process is told to stop.

    Args:
        step: (number of the step in the whole run from 0, images, targets) -> logits, loss, further scalars.
        head: what the row of the epoch begins with, as it was before the epoch's first step.
        evaluated: images an epoch that are only run forward, a third of a step each; for the guess.
    Returns:
        The head, train_loss, train_acc, the further scalars (means over images), images_per_second.
    Raises:
        Interrupted: the process was told to stop, and the checkpoint is written.
        UserError: a figure is no number.
    """
    now, steps = _Epoch(run, epoch, head), run.steps
    guess = _Guess(run.opt.epochs - run.epoch, steps + 0.35 * evaluated / run.opt.batch_size, steps - now.first - 1)
    batches, title = run.train_batches(epoch, now.first), f"epoch {epoch}/{run.opt.epochs}"
    with tqdm(batches, title, steps, unit="step", leave=False, disable=None, initial=now.first) as bar:
        for index, (images, targets) in enumerate(bar, now.first):
            now.take(step, index, images, targets)
            due = now.due(index + 1)
            if index + 1 > now.tolerance.skipped and (
                due or (index + 1) % run.opt.report_freq == 0 or index + 1 == steps
            ):
                figures = now.figures()
                bar.set_postfix(loss=f"{figures['train_loss']:.3f}", acc=f"{figures['train_acc']:.1f}")
            if due:
                now.save(index + 1)
                run.stop.check()
            if epoch == run.started + 1:
                guess.after(index - now.first, run.device)
    return now.row()


def fit(
    run: Run[Any],
    one_epoch: Callable[[int], dict[str, Any]],
    summarise: Callable[[Mapping[str, Any]], str],
    illustrate: Callable[[utils.MetricLog, int], None] = lambda log, epoch: None,
) -> dict[str, Any]:
    """The loop over epochs: train and evaluate, write the checkpoint, then the row, print a line.

    Args:
        run: where to go on from, with its parts.
        one_epoch: epoch (1..epochs) -> its row of metrics.jsonl.
        summarise: a row -> one line for people.
        illustrate: adds pictures of an epoch to its log.
    Returns:
        The last row.
    Raises:
        Interrupted: the process was told to stop, and all that it did is kept.
    """
    log = utils.MetricLog(run.folder if run.world.first else None, run.epoch)
    try:
        if run.epoch > log.epoch:  # the run died between its checkpoint and its row
            log.add(run.metrics)
        with run.stop.watched():
            for epoch in range(run.epoch + 1, run.opt.epochs + 1):
                row = {"epoch": epoch, **one_epoch(epoch)}
                for name, value in row.items():
                    check_finite(run, name, value, epoch)
                run.save(epoch, row)
                log.add(row)
                illustrate(log, epoch)
                tqdm.write(summarise(row))
                run.stop.learn(max(run.world.gather(run.stop.number or 0)))
                run.stop.check()
    finally:
        log.close()
    return run.metrics
