"""What a network does on labelled images, and the batch-norm statistics that suit what is evaluated."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loading.batches import Batches
from operations import Norm, batch_norms
from training.distributed import ALONE, World

Forward = Callable[[Tensor], Tensor]  # images -> logits (B, classes)


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
def predict(forward: Forward, batches: Batches, world: World = ALONE) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) float32 and labels (N,) of all batches, on the CPU; of several processes each has a share."""
    pairs = world.join([(forward(images).float().cpu(), labels.cpu()) for images, labels in batches])
    logits, labels = zip(*pairs, strict=True)
    return torch.cat(logits), torch.cat(labels)


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Images of each true class (rows) by guessed class: (classes, classes) int64, from logits (N, classes)."""
    classes = logits.shape[1]
    return torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2).view(classes, classes)


def recalls(table: Tensor) -> Tensor:
    """The share of each class that was found, from a confusion: (classes,) float64; NaN for a class without images."""
    return table.diagonal().double() / table.sum(1)


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 3): sum over bins of n_b / N |accuracy_b - confidence_b|.

    The confidence of a guess is its probability; bins divide 0..1 evenly.
    """
    confidence, guess = logits.double().softmax(1).max(1)  # (N,)
    place = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)  # bins hold their upper ends
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, (guess == labels).double() - confidence)
    return gaps.abs().sum().item() / len(labels)


def figures(logits: Tensor, labels: Tensor) -> Figures:
    """Loss and accuracies of logits (N, classes) against labels (N,)."""
    table = confusion(logits, labels)
    loss = F.cross_entropy(logits.double(), labels).item()
    return Figures(loss, 100 * table.diagonal().sum().item() / len(labels), 100 * recalls(table).nanmean().item())


def evaluate(forward: Forward, batches: Batches, world: World = ALONE) -> Figures:
    """Loss and accuracies over all batches, see predict."""
    return figures(*predict(forward, batches, world))


@_evaluating()
def estimate_statistics(
    module: nn.Module, forward: Callable[[Tensor], Any], batches: Batches, world: World = ALONE
) -> None:
    """Set every batch norm of `module` to the mean and variance of what it sees in all batches together.

    The variance of all is the mean of the batches' variances plus the variance of their means. (Each batch is
    normalised by its own, as in training.)

    Args:
        module: left in eval mode; drop path and dropout do not act.
        forward: images -> anything, running the module.
        batches: of any sizes. world: of several processes each has a share of them.
    """
    module.eval()
    try:
        with batch_norms(module) as norms:
            for norm in norms:
                norm.train()
                norm.momentum = 1.0  # running = the batch's
            seen, so_far = 0, [(torch.zeros(()), torch.zeros(()))] * len(norms)
            for images, _ in batches:
                forward(images)
                seen, so_far = _merged(seen, so_far, len(images), [_statistics(norm) for norm in norms])
            if world.size > 1:
                parts = world.gather((seen, [(mean.cpu(), var.cpu()) for mean, var in so_far]))
                seen = 0
                for part in parts:
                    seen, so_far = _merged(seen, so_far, *part)
            for norm, (mean, var) in zip(norms, so_far, strict=True) if seen else ():
                norm.load_state_dict({"running_mean": mean, "running_var": var}, strict=False)
    finally:
        module.eval()


Statistics = list[tuple[Tensor, Tensor]]  # mean and variance (C,) of each norm


def _statistics(norm: Norm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None and norm.running_var is not None
    return norm.running_mean, norm.running_var


def _merged(seen: int, so_far: Statistics, count: int, more: Statistics) -> tuple[int, Statistics]:
    """Images and statistics with those of `count` more images."""
    if not count:
        return seen, so_far
    if not seen:  # copies, since the next batch overwrites the norms' own
        return count, [(mean.clone(), var.clone()) for mean, var in more]
    share, merged = count / (seen + count), []
    for (mean, var), (its_mean, its_var) in zip(so_far, more, strict=True):
        away = its_mean - mean
        merged.append((mean + share * away, var + share * (its_var - var) + share * (1 - share) * away**2))
    return seen + count, merged


@contextmanager
def calibrated(
    module: nn.Module, forward: Callable[[Tensor], Any], batches: Batches, world: World = ALONE
) -> Iterator[None]:
    """Inside, `module` is in eval mode with the batch-norm statistics of `forward`; afterwards it is as before.

    A supernet's running averages mix the statistics of every Z it met and suit none of them, least of all
    its child's. So they are estimated anew for the one function that is evaluated, on training images and
    without a trace in the training state.
    """
    with batch_norms(module) as norms:
        before = [{name: value.clone() for name, value in norm.state_dict().items()} for norm in norms]
        training = module.training
        try:
            estimate_statistics(module, forward, batches, world)
            yield
        finally:
            for norm, state in zip(norms, before, strict=True):
                norm.load_state_dict(state)
            module.train(training)
