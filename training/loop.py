"""What every kind of training shares: the update, an epoch, the loop over epochs."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import utils
from training.run import Run, check_finite, duration

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

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self.count = 0  # of images

    def add(self, values: Mapping[str, Tensor], count: int) -> None:
        """Add the means of `count` images."""
        for name, value in values.items():
            term = value.detach().to(_widest(value.device)) * count
            self._sums[name] = self._sums[name] + term if name in self._sums else term
        self.count += count

    def values(self) -> dict[str, float]:
        """The means so far; waits for the device."""
        return {name: total.item() / self.count for name, total in self._sums.items()}

    def state(self) -> dict[str, Any]:
        """The sums and the count, for a checkpoint."""
        return {"sums": dict(self._sums), "count": self.count}

    def go_on(self, state: Mapping[str, Any], device: torch.device) -> None:
        """From a state."""
        self._sums, self.count = {name: total.to(device) for name, total in state["sums"].items()}, state["count"]


def update(loss: Tensor, optimizers: Iterable[tuple[torch.optim.Optimizer, float]]) -> None:
    """One backward pass, then for every (optimizer, limit): clip the norm of its gradient, step."""
    optimizers = list(optimizers)
    for optimizer, _ in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer, limit in optimizers:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], limit)
        optimizer.step()


class _Guess:
    """Says about how long a run of `epochs` of `steps` each will take, after the first one and 4 more, if there are."""

    def __init__(self, epochs: int, steps: float, last: int) -> None:
        self._all, self._last, self._start = epochs * steps, min(4, last), time.perf_counter()

    def after(self, index: int, loss: Tensor) -> None:
        """Called after every step of the first epoch."""
        if index in (0, self._last):
            loss.item()  # waits for the device
            count, now = max(1, self._last), time.perf_counter()
            if index == self._last:
                seconds = (now - self._start) / count * self._all
                tqdm.write(f"time     about {duration(seconds)} (guessed from {count} steps)")
            self._start = now  # the first of several warms up


def train_epoch(
    run: Run[Any],
    epoch: int,
    step: Callable[[int, Tensor, Tensor], Step],
    head: Mapping[str, Any],
    evaluated: float = 0.0,
) -> dict[str, Any]:
    """Every training batch of an epoch through `step`, with a bar; a guess of the run's duration after a few.

    Goes on within the epoch where the loaded checkpoint was written in it, writes one every --save_every_minutes and
    when the process is told to stop.

    Args:
        step: (number of the step in the whole run from 0, images, targets) -> logits, loss, further scalars.
        head: what the row of the epoch begins with, as it was before the epoch's first step.
        evaluated: images an epoch that are only run forward, a third of a step each; for the guess.
    Returns:
        The head, train_loss, train_acc, the further scalars (means over images), images_per_second.
    Raises:
        Interrupted: the process was told to stop, and the checkpoint is written.
    """
    steps, mean, start, inside = run.steps, Mean(), run.began(epoch), run.within(epoch)
    first, head = inside.get("steps", 0), inside.get("head", head)
    if inside:
        mean.go_on(inside["mean"], run.device)
    saved = time.perf_counter()
    guess = _Guess(run.opt.epochs - run.epoch, steps + 0.35 * evaluated / run.opt.batch_size, steps - first - 1)
    batches, title = run.train_batches(epoch, first), f"epoch {epoch}/{run.opt.epochs}"
    with tqdm(batches, title, steps, unit="step", leave=False, disable=None, initial=first) as bar:
        for index, (images, targets) in enumerate(bar, first):
            number = (epoch - 1) * steps + index
            torch.manual_seed(utils.fold(run.opt.seed, "step", number))  # drop path
            logits, loss, terms = step(number, images, targets)
            accuracy = 100 * (logits.argmax(1) == targets).float().mean()
            mean.add({"train_loss": loss, "train_acc": accuracy, **terms}, len(targets))
            due = time.perf_counter() - saved > 60 * run.opt.save_every_minutes
            if (index + 1) % run.opt.report_freq == 0 or index + 1 == steps or due or run.stop.told:
                now = mean.values()
                check_finite(run, "train_loss", now["train_loss"], epoch)
                bar.set_postfix(loss=f"{now['train_loss']:.3f}", acc=f"{now['train_acc']:.1f}")
            if due or run.stop.told:
                saved = time.perf_counter()
                run.save_within(
                    {"steps": index + 1, "seconds": saved - start, "head": dict(head), "mean": mean.state()}
                )
            run.stop.check()
            if epoch == run.started + 1:
                guess.after(index - first, loss)
    return {**head, **mean.values(), "images_per_second": mean.count / (time.perf_counter() - start)}


def fit(
    run: Run[Any],
    one_epoch: Callable[[int], dict[str, Any]],
    summarise: Callable[[Mapping[str, Any]], str],
) -> dict[str, Any]:
    """The loop over epochs: train and evaluate, write the checkpoint, then the row, print a line.

    Args:
        run: where to go on from, with its parts.
        one_epoch: epoch (1..epochs) -> its row of metrics.jsonl.
        summarise: a row -> one line for people.
    Returns:
        The last row.
    Raises:
        Interrupted: the process was told to stop, and all that it did is kept.
    """
    log = utils.MetricLog(run.folder, run.epoch)
    try:
        if run.epoch > log.epoch:  # the run died between its checkpoint and its row
            log.add(run.metrics)
        for epoch in range(run.epoch + 1, run.opt.epochs + 1):
            with run.stop.watched():
                row = {"epoch": epoch, **one_epoch(epoch)}
                for name, value in row.items():
                    check_finite(run, name, value, epoch)
                run.save(epoch, row)
                log.add(row)
            tqdm.write(summarise(row))
            run.stop.check()
    finally:
        log.close()
    return run.metrics
