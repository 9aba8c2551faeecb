"""The SNAS step and the search around it.

Xie et al. 2019 (arXiv 1812.09926): minimise E_{Z ~ p_alpha}[L_theta(Z)] over theta and alpha at once.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import genotypes
import options
import sampling
import utils
import visualize
from loading import records
from loading.sets import DataInfo
from model import sees_images
from model_search import Network
from objective import Objective
from options.default_option import TrainOptions
from resources import cost
from sampling import Z
from training import distributed, loop, selection
from training.distributed import ALONE, World
from training.opening import open_run
from training.parts import Stateful
from training.run import Run, announce
from training.selection import evaluate_z

# (network, info, opt) -> the objective; the loop knows none by name
MakeObjective = Callable[[Network, DataInfo, TrainOptions], Objective]


@dataclass
class Learner:
    """What a search trains and what trains it."""

    network: Network
    objective: Objective
    theta_optimizer: torch.optim.SGD
    alpha_optimizer: torch.optim.Adam
    scheduler: torch.optim.lr_scheduler.CosineAnnealingLR
    grad_clip: float  # largest norm of theta's gradient
    arch_grad_clip: float  # of alpha's
    checked: bool = False  # also on a GPU: whether loss and gradients are numbers, before they are stepped
    world: World = ALONE  # the processes whose gradients are averaged
    buffers: Sequence[Tensor] = ()  # and what else

    def parts(self) -> dict[str, Stateful]:
        """All of it that has a state, by name, for the checkpoint."""
        parts: dict[str, Stateful] = {"network": self.network, "objective": self.objective}
        parts |= {"theta_optimizer": self.theta_optimizer, "alpha_optimizer": self.alpha_optimizer}
        return {name: part for name, part in (parts | {"scheduler": self.scheduler}).items() if part.state_dict()}


ALPHAS = "alphas.jsonl"  # the logits (E, O) of both cells after every epoch
_END = ".end"  # of the file of TensorBoard that is written last
_SQUARE = 16  # pixels of a probability in TensorBoard
_PAPER = 58_500  # steps of the paper's search: 150 epochs of 25,000 images by 64
_HIGHEST = 0.1  # learning rate of alpha that a short run is given


def alpha_rate(opt: TrainOptions, steps: int) -> float:
    """The learning rate of alpha in a run of so many steps.

    Adam moves a logit by about its rate in a step. The paper's 3e-4 decides nothing in fewer steps than its own, so
    that it grows with what is lacking; any other rate is taken as it is.
    """
    usual = TrainOptions.arch_learning_rate
    if opt.arch_learning_rate != usual or steps >= _PAPER:
        return opt.arch_learning_rate
    return min(_HIGHEST, usual * _PAPER / steps)


def make_learner(opt: TrainOptions, info: DataInfo, make_objective: MakeObjective) -> Learner:
    """The supernet, its objective, SGD for theta and Adam for alpha, seeded; on the CPU."""
    torch.manual_seed(utils.fold(opt.seed, "init"))
    network = Network.of(options.to_dict(opt), info.to_dict())
    drawn = opt.sampler in sampling.SPARSE  # weights that wait for their first gradient are beyond the fused form
    theta = torch.optim.SGD(
        network.thetas(), opt.learning_rate, opt.momentum, weight_decay=opt.weight_decay, fused=not drawn
    )
    rate = alpha_rate(opt, opt.epochs * info.steps(opt.batch_size))
    alpha = torch.optim.Adam(network.alphas(), rate, opt.arch_betas, weight_decay=opt.arch_weight_decay, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(theta, opt.epochs, opt.learning_rate_min)
    objective = make_objective(network, info, opt)
    checked = opt.on_nonfinite == "skip"
    return Learner(network, objective, theta, alpha, scheduler, opt.grad_clip, opt.arch_grad_clip, checked)


def search_step(learner: Learner, images: Tensor, targets: Tensor, z: Z, autocast: torch.autocast) -> loop.Step:
    """The SNAS step: one Z, one forward, one backward; theta and alpha are updated together.

    Args:
        images: (B, C, H, W). targets: (B,).
        z: a sample of p_alpha, differentiable in alpha; one that is not leaves alpha as it is.
        autocast: the precision.
    Returns:
        logits (B, classes), loss, the objective's terms.
    """
    with autocast:
        logits = learner.network(images, z)
    loss, terms = learner.objective(logits, targets, z)
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [(learner.theta_optimizer, learner.grad_clip)]
    if z.normal.requires_grad:
        optimizers.append((learner.alpha_optimizer, learner.arch_grad_clip))
    loss = loop.update(loss, optimizers, learner.checked, learner.world, learner.buffers)
    learner.objective.after_step()
    return logits, loss, terms


def temperature(opt: TrainOptions, epoch: int, step: int) -> float:
    """The softmax temperature in an epoch (1..epochs) at a step of the whole run (0..)."""
    if opt.temp_schedule == "linear":
        return sampling.linear_temperature(epoch, opt.epochs, opt.initial_temp, opt.min_temp)
    return sampling.exponential_temperature(step, opt.initial_temp, opt.anneal_rate, opt.min_temp)


_DECIDED = 0.1  # the lead of the likeliest operation below which a cell is chance


class Found(NamedTuple):
    """What a search leaves: its folder, the derived genotype, the last epoch's row of metrics, pictures."""

    folder: Path
    genotype: genotypes.Genotype
    metrics: dict[str, Any]
    pictures: list[Path]


def run_search(opt: TrainOptions, make_objective: MakeObjective) -> Found:
    """Search an architecture: resume or start, train every epoch, derive, write genotype.json, draw it.

    Args:
        opt: the options.
        make_objective: (network, info, opt) -> the objective to minimise.
    Raises:
        UserError: options, data or experiment cannot be used, or the loss became infinite.
    """
    place = Path(opt.visualizations_dir) / opt.name
    utils.claim(place, Path(opt.experiments_dir) / opt.name, "visualizations_dir")
    with open_run(opt, "weights", lambda: records.Given(records.given_split(opt))) as run:
        learner = make_learner(opt, run.data.info, make_objective)
        if run.loaded is None:
            if run.world.first:
                learner.objective.begin()
            if run.world.size > 1:  # what was measured is the same for all
                learner.objective.load_state_dict(run.world.of_first(learner.objective.state_dict()))
        learner.network.to(run.device)
        learner.objective.to(run.device, torch.float32 if run.device.type == "mps" else None)  # Apple's lack float64
        run.restore(learner.parts())
        learner.world = run.world
        learner.buffers = distributed.buffers_of([learner.network]) if run.world.size > 1 else ()
        whole = cost.Deployed.of(run.data.info, opt.init_channels, opt.layers, affine=False)
        announce(run, cost.supernet_cost(opt.space, opt.nodes, whole))
        rate = learner.alpha_optimizer.param_groups[0]["lr"]  # a run of before may go on with another
        if rate != opt.arch_learning_rate:
            print(f"note:    alpha's learning rate is {rate:.2g}: {opt.arch_learning_rate:g} is for {_PAPER:,} steps")
        if opt.compile:
            loop.compile_cells(learner.network.cells)
        if run.world.first:
            utils.keep_rows(run.folder / ALPHAS, run.epoch)
        row = loop.fit(
            run,
            lambda epoch: _one_epoch(run, learner, epoch),
            lambda row: summarise(row, learner.objective),
            lambda log, epoch: _illustrate(log, epoch, learner.network.alphas()),
        )
        genotype = _chosen(run, learner) if opt.select else learner.network.genotype()
        pictures = _leave(run, genotype, learner.network.alphas(), place) if run.world.first else []
        return Found(run.folder, genotype, row, pictures)


def _leave(run: Run[TrainOptions], genotype: genotypes.Genotype, alphas: Sequence[Tensor], place: Path) -> list[Path]:
    """Write genotype.json, draw the cells, say what there is to doubt; returns the pictures."""
    utils.write_atomic(run.folder / "genotype.json", genotype.to_json() + "\n")
    print(f"genotype {run.folder / 'genotype.json'}")
    pictures = []
    try:
        pictures = visualize.draw_genotype(genotype, place, f"_epoch_{run.epoch}", alphas)
    except OSError as error:  # the search itself has ended well
        print(f"note: the cells are not drawn: {options.in_words(error)}")
    for warning in doubts(genotype, run.opt.layers, run.opt.select > 0, *(sampling.margin(a).item() for a in alphas)):
        print(warning)
    if not [*run.folder.glob(f"events.*{_END}")]:
        try:
            _to_tensorboard(run, pictures)
        except (OSError, ValueError) as error:
            print(f"note: TensorBoard lacks the cells: {error}")
    if pictures:
        print(f"pictures {', '.join(str(path) for path in pictures)}")
    return pictures


def _to_tensorboard(run: Run[TrainOptions], pictures: Sequence[Path]) -> None:
    """The cells, and the options with the last figures to compare runs by."""
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    given = options.to_dict(run.opt)
    plain = {name: value if isinstance(value, int | float) else _shown(value) for name, value in given.items()}
    last = {f"last/{name}": value for name, value in run.metrics.items() if name.endswith("_acc")}
    with SummaryWriter(str(run.folder), filename_suffix=_END) as writer:
        for path in pictures:
            if path.suffix == ".png":
                with Image.open(path) as image:
                    writer.add_image(
                        path.stem.partition("_")[0], np.asarray(image.convert("RGB")), run.epoch, dataformats="HWC"
                    )
        writer.add_hparams(plain, last, run_name=".")


def _shown(value: Any) -> str:
    """As a text that every program can read."""
    return str(value).encode("utf-8", "backslashreplace").decode()


def _illustrate(log: utils.MetricLog, epoch: int, alphas: Sequence[Tensor]) -> None:
    """p(op | edge) of both cells as pictures: a row of squares for each edge, a column for each operation."""
    for kind, alpha in zip(("normal", "reduce"), alphas, strict=True):
        squares = alpha.detach().float().softmax(-1).cpu()[:, None, :, None].expand(-1, _SQUARE, -1, _SQUARE)
        log.picture(f"p_{kind}", squares.reshape(_SQUARE * alpha.shape[0], -1).numpy(), epoch)


def _chosen(run: Run[TrainOptions], learner: Learner) -> genotypes.Genotype:
    """The child that --select takes; selection.json says what was looked at."""
    path, opt = run.folder / "selection.json", run.opt
    if run.started == opt.epochs and path.exists():
        with suppress(OSError, ValueError):  # not yet there, or damaged: then it is chosen again
            return genotypes.Genotype.from_json((run.folder / "genotype.json").read_text(encoding="utf-8"))
    start = time.perf_counter()
    candidates = selection.select(run, learner.network, learner.objective.price)
    seconds = time.perf_counter() - start
    record = {"seconds": seconds, "children": [candidate.to_dict() for candidate in candidates]}
    if run.world.first:
        utils.write_atomic(path, json.dumps(record, indent=1) + "\n")
    print(selection.in_words(candidates))
    return candidates[0].genotype if candidates else learner.network.genotype()


def _one_epoch(run: Run[TrainOptions], learner: Learner, epoch: int) -> dict[str, Any]:
    start = run.began(epoch)
    row = _train_epoch(run, learner, epoch)
    if epoch > run.opt.warmup_epochs:
        learner.objective.after_epoch(learner.alpha_optimizer)
    row |= _evaluate_epoch(run, learner, epoch, row["temperature"])
    if run.world.first:
        normal, reduce = ([[round(v, 5) for v in edge] for edge in a.tolist()] for a in learner.network.alphas())
        utils.add_row(run.folder / ALPHAS, {"epoch": epoch, "normal": normal, "reduce": reduce})
    return row | learner.objective.report() | {"epoch_seconds": time.perf_counter() - start}


def _train_epoch(run: Run[TrainOptions], learner: Learner, epoch: int) -> dict[str, Any]:
    opt = run.opt
    network = learner.network.train()

    def step(number: int, images: Tensor, targets: Tensor) -> loop.Step:
        source = run.generator("z", number, *run.world.label)
        z = network.sample(temperature(opt, epoch, number), source, opt.resample_cell, opt.sampler)
        if epoch <= opt.warmup_epochs:
            z = z.detach()
        return search_step(learner, images, targets, z, run.autocast())

    last = epoch * run.steps - 1
    head = {"temperature": temperature(opt, epoch, last), "learning_rate": learner.scheduler.get_last_lr()[0]}
    train, valid = len(run.data.indices["train"]), len(run.data.indices["valid"])
    calibrating = min(train, opt.calibration_batches * opt.eval_batch_size)
    forward = 1.2 * (calibrating + valid)  # the child's is a small part of it
    if opt.select:  # a share of what follows the last epoch, each image of a child trained as dear as three forward
        after = opt.select * (calibrating + valid) + 3 * min(opt.select, opt.finalists) * opt.finalist_epochs * train
        forward += (1.0 if opt.sampler in sampling.ONE_HOT else 0.2) * after / opt.epochs
    row = loop.train_epoch(run, epoch, step, head, forward)
    learner.scheduler.step()
    return row


@torch.no_grad()
def _evaluate_epoch(run: Run[TrainOptions], learner: Learner, epoch: int, temperature: float) -> dict[str, Any]:
    """A fresh Z and the argmax child on the validation split, each with its own batch-norm statistics."""
    opt = run.opt
    network = learner.network
    child = network.one_hot(network.genotype())
    fresh = network.sample(temperature, run.generator("valid", epoch), opt.resample_cell, opt.sampler)
    row: dict[str, Any] = {}
    for prefix, z in (("valid", fresh), ("child_valid", child)):
        images = run.plain_train_batches(epoch), run.batches("valid")
        figures = evaluate_z(network, z, run.autocast(), *images, run.world)
        row |= {f"{prefix}_{name}": value for name, value in figures._asdict().items()}
    row["child_free_share"] = genotypes.free_share(network.genotype())
    row["entropy_normal"], row["entropy_reduce"] = (sampling.entropy(alpha).item() for alpha in network.alphas())
    row["margin_normal"], row["margin_reduce"] = (sampling.margin(alpha).item() for alpha in network.alphas())
    return row


def doubts(
    genotype: genotypes.Genotype, layers: int, chosen: bool, margin_normal: float, margin_reduce: float
) -> list[str]:
    """Warnings, if there is a reason, that a search's genotype is of no use.

    Args:
        genotype: of the child. layers: cells of the search.
        chosen: by --select among many, so that alpha alone has not decided.
        margin_normal, margin_reduce: of alpha, see sampling.margin.
    """
    least, found = min(margin_normal, margin_reduce), []
    if not sees_images(genotype, layers):
        found.append(
            "warning: the cell lets nothing of an image through: all paths are cut by none; "
            "take a larger budget, a lower --eta, or search longer"
        )
    if least < _DECIDED and not chosen:
        found.append(
            f"warning: the search has not decided: in one of the cells the likeliest operation of an edge leads the "
            f"second by {100 * least:.1f} % on average, so that the genotype is little more than chance; "
            "search longer (--epochs), raise --arch_learning_rate, or take the best of many (--select)"
        )
    return found


def summarise(row: Mapping[str, Any], objective: Objective) -> str:
    """One epoch for people."""
    more = objective.summary(row)
    return (
        f"epoch {row['epoch']:3d}  loss {row['train_loss']:.3f}  train {row['train_acc']:5.2f} %  "
        f"valid {row['valid_acc']:5.2f} %  child {row['child_valid_acc']:5.2f} % "
        f"(balanced {row['child_valid_balanced_acc']:5.2f} %)  "
        f"entropy {row['entropy_normal']:.2f} + {row['entropy_reduce']:.2f}  free {row['child_free_share']:3.0f} %  "
        f"T {row['temperature']:.3f}  "
        f"{row['images_per_second']:.0f} img/s  {row['epoch_seconds']:.0f} s" + (f"\n           {more}" if more else "")
    )
