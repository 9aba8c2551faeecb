"""What every kind of training shares: evaluation, batch-norm statistics, the update, the loops."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import utils
from operations import Norm
from training.run import Run, Stateful, check_finite, duration

Batches = Iterable[tuple[Tensor, Tensor]]
Step = tuple[Tensor, Tensor, Mapping[str, Tensor]]  # logits (B, classes), loss, further scalars


def autocast(run: Run[Any]) -> torch.autocast:
    """The precision of the run as a context."""
    return torch.autocast(run.device.type, torch.bfloat16, enabled=run.opt.precision == "bf16")


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


class Figures(NamedTuple):
    """What an evaluation gives: mean cross-entropy in nats, accuracies in percent."""

    loss: float
    acc: float
    balanced_acc: float  # mean over the classes present of the share found


@contextmanager
def _evaluating() -> Iterator[None]:
    """No gradients; and nothing compiled: compilation is for training, and each Z would be compiled anew."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield


@_evaluating()
def predict(run: Run[Any], forward: Callable[[Tensor], Tensor], split: str) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) float32 and labels (N,) of a whole split, not augmented, on the CPU."""
    logits, labels = [], []
    for images, targets in run.data.batches(split, run.opt.eval_batch_size, run.device):
        with autocast(run):
            logits.append(forward(images).float().cpu())
        labels.append(targets.cpu())
    return torch.cat(logits), torch.cat(labels)


def figures(logits: Tensor, labels: Tensor) -> Figures:
    """Loss and accuracies of logits (N, classes) against labels (N,)."""
    from sklearn.metrics import accuracy_score, recall_score  # a slow import

    guessed, true = logits.argmax(1).numpy(), labels.numpy()
    balanced = recall_score(true, guessed, labels=sorted(set(true.tolist())), average="macro")
    loss = F.cross_entropy(logits.double(), labels).item()
    return Figures(loss, 100 * float(accuracy_score(true, guessed)), 100 * float(balanced))


def evaluate(run: Run[Any], forward: Callable[[Tensor], Tensor], split: str) -> Figures:
    """Loss and accuracies of forward(images) -> logits over a whole split, not augmented."""
    return figures(*predict(run, forward, split))


@_evaluating()
def estimate_statistics(module: nn.Module, forward: Callable[[Tensor], Any], batches: Batches) -> None:
    """Set every batch norm of `module` to the mean over batches of each batch's mean and variance.

    Args:
        module: left in eval mode; drop path and dropout do not act.
        forward: images -> anything, running the module.
        batches: of equal sizes.
    """
    norms = [m for m in module.modules() if isinstance(m, Norm)]
    momenta = [norm.momentum for norm in norms]
    module.eval()
    try:
        for norm in norms:
            norm.train()
        for count, (images, _) in enumerate(batches, 1):
            for norm in norms:
                norm.momentum = 1 / count  # running = mean of the batches so far
            forward(images)
    finally:
        module.eval()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


@contextmanager
def calibrated(module: nn.Module, forward: Callable[[Tensor], Any], batches: Batches) -> Iterator[None]:
    """Inside, `module` is in eval mode with the batch-norm statistics of `forward`; afterwards it is as before.

    A supernet's running averages mix the statistics of every Z it met and suit none of them, least of all
    its child's. So they are estimated anew for the one function that is evaluated, on training images and
    without a trace in the training state.
    """
    norms = [m for m in module.modules() if isinstance(m, Norm)]
    before = [{name: value.clone() for name, value in norm.state_dict().items()} for norm in norms]
    training = module.training
    try:
        estimate_statistics(module, forward, batches)
        yield
    finally:
        for norm, state in zip(norms, before, strict=True):
            norm.load_state_dict(state)
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


def update(loss: Tensor, optimizers: Iterable[tuple[torch.optim.Optimizer, float]]) -> None:
    """One backward pass, then for every (optimizer, limit): clip the norm of its gradient, step."""
    optimizers = list(optimizers)
    for optimizer, _ in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer, limit in optimizers:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], limit)
        optimizer.step()


_GUESS_AFTER = 4  # steps


def train_epoch(
    run: Run[Any], epoch: int, step: Callable[[int, Tensor, Tensor], Step], evaluated: float = 0.0
) -> dict[str, Any]:
    """Every training batch of an epoch through `step`, with a bar; a guess of the run's duration after a few.

    Args:
        step: (number of the step in the whole run from 0, images, targets) -> logits, loss, further scalars.
        evaluated: images an epoch that are only run forward, a third of a step each; for the guess.
    Returns:
        train_loss, train_acc, the further scalars (means over images), images_per_second.
    """
    steps = run.data.steps(run.opt.batch_size)
    mean, seen, start, first = Mean(), 0, time.perf_counter(), 0.0
    batches = run.data.train_batches(run.opt.batch_size, epoch, run.device)
    with tqdm(batches, f"epoch {epoch}/{run.opt.epochs}", steps, unit="step", leave=False, disable=None) as bar:
        for index, (images, targets) in enumerate(bar):
            logits, loss, terms = step((epoch - 1) * steps + index, images, targets)
            accuracy = 100 * (logits.argmax(1) == targets).float().mean()
            mean.add({"train_loss": loss, "train_acc": accuracy, **terms}, len(targets))
            seen += len(targets)
            if (index + 1) % run.opt.report_freq == 0 or index + 1 == steps:
                now = mean.values()
                check_finite(run, "train_loss", now["train_loss"], epoch)
                bar.set_postfix(loss=f"{now['train_loss']:.3f}", acc=f"{now['train_acc']:.1f}")
            if epoch == run.started + 1 and index in (0, min(_GUESS_AFTER, steps - 1)):
                loss.item()  # waits for the device
                now_at = time.perf_counter()
                if index or steps == 1:
                    each = (now_at - first) / index if index else now_at - start  # the first one of several warms up
                    rest = (run.opt.epochs - run.epoch) * each * (steps + 0.35 * evaluated / run.opt.batch_size)
                    tqdm.write(f"time     about {duration(rest)} (guessed from {max(1, index)} steps)")
                first = now_at
    return {**mean.values(), "images_per_second": seen / (time.perf_counter() - start)}


def fit(
    run: Run[Any],
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
