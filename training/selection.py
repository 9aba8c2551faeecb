"""Which child of p_alpha to keep: many are drawn, ranked on validation images with the supernet's weights, the best
trained on for a few epochs each.

Random search with shared weights (Li & Talwalkar 2019, arXiv 1902.07638, section 3.3), from p_alpha.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
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
from training.distributed import ALONE, World
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


def evaluate_z(
    network: Network, z: Z, autocast: torch.autocast, calibration: Batches, batches: Batches, world: World = ALONE
) -> Figures:
    """The supernet at one Z on some batches; batch-norm statistics are estimated for it on training images."""

    def forward(images: Tensor) -> Tensor:
        with autocast:
            return network(images, z)

    with evaluation.calibrated(network, forward, calibration, world):
        return evaluation.evaluate(forward, batches, world)


def select(run: Run[TrainOptions], network: Network, price: Callable[[Z], float]) -> list[Candidate]:
    """The children that were looked at, the one to keep first; those whose loss is no number are left out.

    Args:
        run: of a search that has ended; its options say how many.
        network: the supernet; stays as it is.
        price: what a one-hot Z costs beyond its loss, see Objective.price.
    """
    opt = run.opt
    drawn = [*draw(network, opt.select, run.generator("select"), price)]
    trained = min(opt.finalists, len(drawn))
    more = f", {trained} of them trained for {opt.finalist_epochs} epochs" if trained else ""
    print(f"select   {len(drawn)} children of p_alpha on validation images{more}", flush=True)

    def dear(genotype: Genotype, figures: Figures) -> float:
        return figures.loss + price(network.one_hot(genotype))

    mine = [*run.world.share(iter(drawn))]  # of several processes each looks at its share
    bar = tqdm(mine, "children", unit="child", leave=False, disable=None)
    every = run.world.join([Candidate(genotype, figures_of(run, network, genotype)) for genotype in bar])
    ranked = [candidate for candidate in every if math.isfinite(candidate.shared.loss)]
    ranked.sort(key=lambda candidate: dear(candidate.genotype, candidate.shared))
    finalists = []
    for number, candidate in run.world.share(enumerate(ranked[:trained])):
        with suppress(loop.NonFinite):  # it is left out
            figures = _trained(run, network, candidate.genotype, f"finalist {number + 1}/{trained}")
            if math.isfinite(figures.loss):
                finalists.append((dear(candidate.genotype, figures), number, candidate._replace(trained=figures)))
    best = sorted([one for its in run.world.gather(finalists) for one in its], key=lambda one: one[:2])
    return [candidate for _, _, candidate in best] + ranked[trained:]


def draw(network: Network, count: int, generator: torch.Generator, price: Callable[[Z], float]) -> Iterator[Genotype]:
    """The child (argmax) and others from p_alpha, all different: `count`, fewer where p_alpha hardly has more.

    Args:
        network: the supernet. count: how many are wanted.
        generator: source of the draws, on alpha's device.
        price: of a one-hot Z; one with an infinite price is not taken.
    """
    seen: set[Genotype] = set()
    found = 0
    for number in range(_DRAWS * count):
        z = network.one_hot(network.genotype()) if number == 0 else network.sample(1.0, generator, sampler="dsnas")
        genotype = derive(z.normal, z.reduce, network.space)
        if genotype not in seen and sees_images(genotype, len(network.cells)) and price(z.detach()) < math.inf:
            yield genotype
            found += 1
        seen.add(genotype)
        if found == count:
            return


def figures_of(run: Run[TrainOptions], network: Network, genotype: Genotype) -> Figures:
    """Of a child with the supernet's weights, on the validation split of the run; all of it in this process."""
    z, alone = network.one_hot(genotype), replace(run, world=ALONE)
    return evaluate_z(network, z, run.autocast(), alone.plain_train_batches(run.epoch), alone.batches("valid"))


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
            for images, targets in replace(run, world=ALONE).train_batches(opt.epochs + 1 + epoch):
                with run.autocast():
                    logits = own(images, z)
                loop.update(
                    plain(logits, targets, z)[0], [(optimizer, opt.grad_clip)], check=opt.on_nonfinite == "skip"
                )
                scheduler.step()
                bar.update()
    return figures_of(run, own, genotype)


def in_words(candidates: list[Candidate]) -> str:
    """What was taken, for people."""
    if not candidates:
        return "warning: none of them can be taken, so that the likeliest is; search longer, or take a larger budget"
    best = candidates[0]
    text = f"taken    one with a validation accuracy of {best.shared.acc:.2f} %"
    return text + (f", {best.trained.acc:.2f} % after its own training" if best.trained else "")
