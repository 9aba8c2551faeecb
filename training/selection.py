"""Which child of p_alpha to keep: many are drawn, ranked on validation images with the supernet's weights, the best
trained on for a few epochs each.

Random search with shared weights (Li & Talwalkar 2019, arXiv 1902.07638, section 3.3), from p_alpha.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

import utils
from genotypes import Genotype, derive
from loading.batches import Batches
from model import sees_images
from model_search import Network
from objective import Objective
from options.default_option import TrainOptions
from sampling import Z
from training import evaluation, loop
from training.evaluation import Figures
from training.run import Run

_DRAWS = 20  # for every child that is wanted


class Candidate(NamedTuple):
    """A child, and its figures on the validation split."""

    genotype: Genotype
    shared: Figures  # with the supernet's weights
    trained: Figures | None = None  # after a training of its own, from these weights

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for selection.json."""
        return {
            "genotype": self.genotype.to_dict(),
            "shared": self.shared._asdict(),
            "trained": self.trained and self.trained._asdict(),
        }


def evaluate_z(network: Network, z: Z, autocast: torch.autocast, calibration: Batches, batches: Batches) -> Figures:
    """The supernet at one Z on some batches; batch-norm statistics are estimated for it on training images."""

    def forward(images: Tensor) -> Tensor:
        with autocast:
            return network(images, z)

    with evaluation.calibrated(network, forward, calibration):
        return evaluation.evaluate(forward, batches)


def select(run: Run[TrainOptions], network: Network, admits: Callable[[Z], bool]) -> list[Candidate]:
    """The children that were looked at, the one to keep first.

    Args:
        run: of a search that has ended; its options say how many.
        network: the supernet; stays as it is.
        admits: whether a one-hot Z may be the result.
    """
    opt = run.opt
    drawn = [*draw(network, opt.select, run.generator("select"), admits)]
    ranked = []
    for genotype in tqdm(drawn, "children", unit="child", leave=False, disable=None):
        ranked.append(Candidate(genotype, figures_of(run, network, genotype)))
    ranked.sort(key=lambda candidate: candidate.shared.loss)
    finalists = []
    for number, candidate in enumerate(ranked[: opt.finalists]):
        title = f"finalist {number + 1}/{min(opt.finalists, len(ranked))}"
        finalists.append(candidate._replace(trained=_trained(run, network, candidate.genotype, title)))
    finalists.sort(key=lambda candidate: candidate.trained.loss if candidate.trained else 0.0)
    return finalists + ranked[len(finalists) :]


def draw(network: Network, count: int, generator: torch.Generator, admits: Callable[[Z], bool]) -> Iterator[Genotype]:
    """The child (argmax) and others from p_alpha, all different: `count`, fewer where p_alpha hardly has more.

    Args:
        network: the supernet. count: how many are wanted.
        generator: source of the draws, on alpha's device.
        admits: whether a one-hot Z may be the result.
    """
    seen: set[Genotype] = set()
    found = 0
    for number in range(_DRAWS * count):
        z = network.one_hot(network.genotype()) if number == 0 else network.sample(1.0, generator, sampler="dsnas")
        genotype = derive(z.normal, z.reduce, network.space)
        if genotype not in seen and sees_images(genotype, len(network.cells)) and admits(z.detach()):
            yield genotype
            found += 1
        seen.add(genotype)
        if found == count:
            return


def figures_of(run: Run[TrainOptions], network: Network, genotype: Genotype) -> Figures:
    """Of a child with the supernet's weights, on the validation split of the run."""
    z = network.one_hot(genotype)
    return evaluate_z(network, z, run.autocast(), run.plain_train_batches(run.epoch), run.batches("valid"))


def _trained(run: Run[TrainOptions], network: Network, genotype: Genotype, title: str) -> Figures:
    """Of a child with the supernet's weights that is trained on for --finalist_epochs."""
    opt, own, plain = run.opt, copy.deepcopy(network).train(), Objective()
    z = own.one_hot(genotype)
    optimizer = torch.optim.SGD(own.thetas(), opt.learning_rate, opt.momentum, weight_decay=opt.weight_decay)
    total = opt.finalist_epochs * run.steps
    scheduler = CosineAnnealingLR(optimizer, total)
    torch.manual_seed(utils.fold(opt.seed, "finalist"))  # drop path
    with tqdm(total=total, desc=title, unit="step", leave=False, disable=None) as bar:
        for epoch in range(opt.finalist_epochs):
            for images, targets in run.train_batches(opt.epochs + 1 + epoch):
                with run.autocast():
                    logits = own(images, z)
                loop.update(plain(logits, targets, z)[0], [(optimizer, opt.grad_clip)])
                scheduler.step()
                bar.update()
    return figures_of(run, own, genotype)


def in_words(candidates: list[Candidate]) -> str:
    """What was looked at, for people."""
    best, trained = candidates[0], [c for c in candidates if c.trained]
    text = (
        f"select   {len(candidates)} children of p_alpha, validation accuracy {best.shared.acc:.2f} % of the one taken"
    )
    if best.trained:
        text += f", {best.trained.acc:.2f} % after its own training ({len(trained)} were trained)"
    return text
