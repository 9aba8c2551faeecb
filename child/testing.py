"""A trained network on the test images: what test.json says."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import utils
from child import source
from child.source import Trainable
from genotypes import Genotype
from loading.augmentation import symmetries
from loading.sets import DataInfo
from options.child_option import ChildOptions
from training import evaluation
from training.run import Run


class Tested(NamedTuple):
    """What retraining leaves: its folder, the genotype, the figures of test.json."""

    folder: Path
    genotype: Genotype | None
    figures: dict[str, Any]


def logits_of(run: Run[ChildOptions], network: Trainable, flip: str = "none") -> evaluation.Forward:
    """The network in eval mode, as images -> logits in the precision of the run: the mean over the forms of a flip."""
    network.eval()

    def forward(images: Tensor) -> Tensor:
        with run.autocast():
            forms = [network(form)[0].float() for form in symmetries(images, flip)]
        return torch.stack(forms).mean(0)

    return forward


def test_figures(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """What test.json says of predictions (N, classes).

    Accuracies in percent; ece is the expected calibration error over 15 bins, 0 to 1; confusion has a row per
    true class and a column per guess.
    """
    table = evaluation.confusion(logits, labels)
    found = zip(classes, table.sum(1).tolist(), evaluation.recalls(table).tolist(), strict=True)
    return {
        **evaluation.figures(logits, labels)._asdict(),
        "ece": evaluation.calibration_error(logits, labels),
        "per_class_acc": {name: 100 * recall if count else None for name, count, recall in found},
        "confusion": table.tolist(),
        "test_images": len(labels),
    }


def test(run: Run[ChildOptions], network: Trainable, genotype: Genotype | None, guesses: Path | None) -> dict[str, Any]:
    """The content of test.json: figures of the test split; params, flops and mac without the auxiliary head.

    Args:
        run: gives the images. network: with its weights. genotype: of its cells.
        guesses: a file for what was guessed of every image, see write_guesses; None for none.
    """
    opt, info = run.opt, run.data.info
    logits, labels = evaluation.predict(logits_of(run, network, opt.test_flip), run.batches("test"), run.world)
    if guesses is not None and run.world.first:
        write_guesses(guesses, run.data.split["test"], info.classes, logits, labels)
    return {
        **test_figures(logits, labels, info.classes),
        **tested_cost(opt, genotype, info),
        "network": opt.network,
        "seed": opt.seed,
        "weights": source.fingerprint(network),
        "train_images": len(run.data.indices["train"]),
        "genotype": genotype and genotype.to_dict(),
    }


def write_guesses(path: Path, names: Sequence[str], classes: Sequence[str], logits: Tensor, labels: Tensor) -> None:
    """A table of the images: name, class, guess, and the probability that was given to the guess."""
    probability, guess = logits.double().softmax(1).max(1)  # (N,)
    with utils.replacing(path) as new, new.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "class", "guess", "probability"])
        for name, label, best, share in zip(names, labels.tolist(), guess.tolist(), probability.tolist(), strict=True):
            table.writerow([name, classes[label], classes[best], f"{share:.4f}"])


def tested_cost(opt: ChildOptions, genotype: Genotype | None, info: DataInfo) -> dict[str, int]:
    """params, flops and mac of an image that is tested: all passes of --tta."""
    cost = source.price(opt, genotype, info)
    return {name: value if name == "params" else source.passes(opt) * value for name, value in cost.items()}


def in_words(result: Mapping[str, Any]) -> str:
    """test.json for people."""
    return (
        f"accuracy {result['acc']:.2f} %, balanced {result['balanced_acc']:.2f} %, loss {result['loss']:.3f}, "
        f"calibration error {result['ece']:.3f} on {result['test_images']:,} images; "
        f"{result['params']:,} parameters, {result['flops'] / 1e6:,.2f} Mflops"
    )
