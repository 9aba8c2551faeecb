"""Retraining: a child trained from scratch or from a supernet's weights, and tested once."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import options
import utils
from child import source, testing
from child.source import Trainable
from child.testing import Tested
from genotypes import Genotype
from loading import records, splits
from loading.batches import Data
from loading.records import Given, Stored
from loading.sets import DataInfo
from model import ChildNetwork, sees_images
from options import UserError
from options.child_option import ChildOptions
from training import checkpoint, distributed, evaluation, loop
from training.opening import check_same_options, open_run
from training.parts import Stateful
from training.run import Run, announce


@dataclass
class ChildLearner:
    """What is trained and what trains it."""

    network: Trainable
    optimizer: torch.optim.SGD
    scheduler: LRScheduler
    average: AveragedModel | None  # exponential moving average of the weights

    def parts(self) -> dict[str, Stateful]:
        """All of it, by name, for the checkpoint."""
        return {name: part for name, part in vars(self).items() if part is not None}

    def evaluated(self) -> Trainable:
        """The network whose figures count: the average, if there is one."""
        return cast(Trainable, self.average.module) if self.average is not None else self.network


def make_learner(opt: ChildOptions, network: Trainable, steps: int) -> ChildLearner:
    """The child with SGD, its schedule and, with --ema_decay, the average of its weights.

    Args:
        opt: the recipe. network: the child. steps: of an epoch.
    """
    how = {"momentum": opt.momentum, "weight_decay": opt.weight_decay, "nesterov": opt.nesterov}
    optimizer = torch.optim.SGD(network.parameters(), opt.learning_rate, **how, fused=True)
    scheduler: LRScheduler
    if opt.schedule == "onecycle":
        total = opt.epochs * steps
        if total < 6:
            raise UserError(
                f"--schedule onecycle needs 6 steps or more to rise and fall, --epochs {opt.epochs} are {total}"
            )
        scheduler = OneCycleLR(optimizer, opt.learning_rate, total, pct_start=0.2, cycle_momentum=False)
    elif opt.schedule == "cosine":
        scheduler = CosineAnnealingLR(optimizer, opt.epochs, opt.learning_rate_min)
    else:
        scheduler = ExponentialLR(optimizer, opt.lr_decay)
    average = None
    if opt.ema_decay:
        average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(opt.ema_decay), use_buffers=True)
    return ChildLearner(network, optimizer, scheduler, average)


def run_retrain(opt: ChildOptions) -> Tested:
    """Train the child of a genotype, or what it is compared with; test it once and write test.json. --eval_only: test.

    Raises:
        UserError: options, data, genotype or experiment cannot be used, or a figure became infinite.
    """
    if opt.eval_only:
        return _evaluate_only(opt)
    known: dict[str, Stored | None] = {}

    def given() -> Given:
        known.update(source.searches(opt))
        return _given(opt, known)

    with open_run(opt, "child", given, opt.use_valid) as run:
        _check_test_images(run, known)
        genotype = _architecture(run)
        run.extra["genotype"] = genotype and genotype.to_dict()
        learner = make_learner(opt, _initial(run, opt, genotype), run.steps)
        if learner.average is not None:
            learner.average.to(run.device)
        run.restore(learner.parts())
        buffers = distributed.buffers_of([learner.network]) if run.world.size > 1 else []
        announce(run, source.price(opt, genotype, run.data.info))
        if opt.compile:
            loop.compile_cells(learner.network.cells)
        loop.fit(run, lambda epoch: _one_epoch(run, learner, epoch, buffers), summarise)
        result = testing.test(run, learner.evaluated(), genotype, run.folder / "guesses.csv")
        if genotype is not None and run.world.first:
            utils.write_atomic(run.folder / "genotype.json", genotype.to_json() + "\n")
        if run.world.first:
            utils.write_atomic(run.folder / "test.json", json.dumps(result, indent=1) + "\n")
        print(f"test     {testing.in_words(result)}\n         {run.folder / 'test.json'}")
        return Tested(run.folder, genotype, result)


def _architecture(run: Run[ChildOptions]) -> Genotype | None:
    """The genotype of the cells: that of the run so far, or the one that the options name; None without cells."""
    if run.opt.network != "cells":
        return None
    if run.loaded is not None:
        return Genotype.from_dict(run.loaded["extra"]["genotype"])
    genotype = source.find_genotype(run.opt, run.data.info)
    if not sees_images(genotype, run.opt.layers):
        raise UserError(f"--genotype {run.opt.genotype}: the cell lets nothing of an image through to the classifier")
    return genotype


def _given(opt: ChildOptions, known: Mapping[str, Stored | None]) -> Given:
    """The split of --split; else that of the first search known, to be taken over as far as it is of these images.

    Args:
        known: the splits of searches, by name; None where it is not known.
    Raises:
        UserError: no such file.
    """
    split = records.given_split(opt)
    found = next((stored for stored in known.values() if stored is not None), None)
    for name, stored in known.items():
        if stored is None:
            print(f"note:    no split of the search of {name} is here: it may have seen the test images")
    return Given(split) if split or opt.split == "new" else Given(None, found)


def _seen(names: Sequence[str], stored: Stored) -> int:
    """How many of these images a search trained or validated on."""
    known = {splits.same_name(name) for part in ("train", "valid") for name in stored.split[part]}
    return sum(splits.same_name(name) in known for name in names)


def _check_test_images(run: Run[ChildOptions], known: Mapping[str, Stored | None]) -> None:
    """That there are some, and that no search has seen them: told, and refused with its weights or a split of FILE."""
    tested = run.data.split["test"]
    if not tested:
        raise UserError("the split has no test images; give --split new and a --test_portion above 0")
    for name, stored in known.items():
        seen = _seen(tested, stored) if stored is not None else 0
        words = f"{seen:,} of the {len(tested):,} test images were trained or validated on by the search of {name}"
        if seen and name == run.opt.init_from:
            raise UserError(f"{words}, whose weights are taken; leave out --init_from, or use its split and its images")
        if seen and run.opt.split not in (None, "new"):
            raise UserError(f"{words}; leave out --split, or use searches of this split")
        if seen:
            print(f"note:    {words}")


def _check_classes(opt: ChildOptions, data: Data, content: Mapping[str, Any]) -> None:
    if data.info.classes != content["data"]["classes"]:
        raise UserError(f"--dataset {opt.dataset} is of other classes than the weights")


def _initial(run: Run[ChildOptions], opt: ChildOptions, genotype: Genotype | None) -> Trainable:
    """The network before training: random, or with the weights of --init_from and statistics that suit them."""
    network = source.make_network(opt, genotype, run.data.info)
    if opt.init_from is not None and run.loaded is None and genotype is not None:
        assert isinstance(network, ChildNetwork)
        missing = source.inherit(opt, network, genotype)
        if opt.eval_only and missing:
            raise UserError(
                f"--eval_only True: {len(missing)} weights do not come from {opt.init_from}, e.g. {missing[0]}; "
                "give the search's own --init_channels and --layers"
            )
        network.to(run.device)
        evaluation.estimate_statistics(network, network, run.plain_train_batches(0), run.world)
    return network.to(run.device)


def _one_epoch(run: Run[ChildOptions], learner: ChildLearner, epoch: int, buffers: Sequence[Tensor]) -> dict[str, Any]:
    opt = run.opt
    network, start = learner.network.train(), run.began(epoch)
    network.drop_path_prob = opt.drop_path_prob * (epoch - 1) / max(1, opt.epochs - 1)

    def step(number: int, images: Tensor, targets: Tensor) -> loop.Step:
        logits, loss = _loss(run, network, images, targets)
        how = [(learner.optimizer, opt.grad_clip)]
        loss = loop.update(loss, how, opt.on_nonfinite == "skip", run.world, buffers)
        if opt.schedule == "onecycle":
            learner.scheduler.step()
        if learner.average is not None:
            learner.average.update_parameters(network)
        return logits, loss, {}

    head = {"learning_rate": learner.scheduler.get_last_lr()[0], "drop_path_prob": network.drop_path_prob}
    row = loop.train_epoch(run, epoch, step, head, 0 if opt.use_valid else len(run.data.indices["valid"]))
    if opt.schedule != "onecycle":
        learner.scheduler.step()
    if not opt.use_valid:
        figures = evaluation.evaluate(testing.logits_of(run, learner.evaluated()), run.batches("valid"), run.world)
        row |= {f"valid_{name}": value for name, value in figures._asdict().items()}
    return row | {"epoch_seconds": time.perf_counter() - start}


def _loss(run: Run[ChildOptions], network: Trainable, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and cross-entropy plus that of the auxiliary head times its weight."""
    opt = run.opt
    with run.autocast():
        logits, side = network(images)
    loss = F.cross_entropy(logits.float(), targets, label_smoothing=opt.label_smoothing)
    if side is not None:
        loss = loss + opt.auxiliary_weight * F.cross_entropy(side.float(), targets, label_smoothing=opt.label_smoothing)
    return logits, loss


def summarise(row: Mapping[str, Any]) -> str:
    """One epoch for people."""
    valid = ""
    if "valid_acc" in row:
        valid = f"valid {row['valid_acc']:5.2f} % (balanced {row['valid_balanced_acc']:5.2f} %)  "
    return (
        f"epoch {row['epoch']:3d}  loss {row['train_loss']:.3f}  train {row['train_acc']:5.2f} %  {valid}"
        f"lr {row['learning_rate']:.4f}  {row['images_per_second']:.0f} img/s  {row['epoch_seconds']:.0f} s"
    )


def _evaluate_only(opt: ChildOptions) -> Tested:
    """Test the newest checkpoint of --name, or the child with the supernet's weights of --init_from; writes nothing."""
    if distributed.count() > 1:
        raise UserError("--eval_only True is for one process; leave torchrun out")
    device = utils.pick_device(opt.device)
    folder = Path(opt.experiments_dir) / opt.name
    newest = checkpoint.newest(folder, "child")
    content = checkpoint.load(newest) if newest else None
    known: dict[str, Stored | None] = {}
    data: Data | None = None
    if opt.init_from is not None and (content is None or content["options"]["init_from"] != opt.init_from):
        known, content = source.searches(opt), source.supernet_checkpoint(opt)
        of, epochs = f"the supernet of {opt.init_from}", content["options"]["epochs"]
        data = Data(opt, _given(opt, known).split or content["split"], like=DataInfo(**content["data"]))
        _check_classes(opt, data, content)
        genotype: Genotype | None = source.find_genotype(opt, data.info)
        network = _initial(Run(opt, "child", folder, device, data), opt, genotype)
    elif content is None:
        raise UserError(f"--eval_only True: no child checkpoint in {folder}; give --name or --init_from")
    else:
        of, opt = str(newest), _as_trained(opt, content["options"])
        epochs = opt.epochs
        network, genotype = source.load_child(content)
    like = DataInfo(**content["data"])
    if opt.test_folder is not None:
        trained = [name for part in ("train", "valid") for name in content["split"][part]]
        data = Data.to_test(replace(opt, dataset=opt.test_folder), like, trained)
    elif data is None:
        data = Data(opt, content["split"], opt.use_valid, like=like)
        _check_classes(opt, data, content)
    run = Run(opt, "child", folder, device, data)
    for note in data.notes:
        print(f"note:    {note}")
    _check_test_images(run, known if opt.test_folder is None else {})
    result = testing.test(run, network.to(device), genotype, None)
    print(f"weights  {of}, epoch {content['epoch']} of {epochs}")
    print(f"test     {testing.in_words(result)}")
    return Tested(folder, genotype, result)


def _as_trained(opt: ChildOptions, stored: Mapping[str, Any]) -> ChildOptions:
    """The options of a checkpoint, with those that are given of where things lie and what they run on.

    Raises:
        UserError: an option is given that the training had otherwise.
    """
    trained = options.restore(ChildOptions, stored)
    merged = replace(trained, **{name: getattr(opt, name) for name in options.given(opt)})
    same = replace(merged, eval_batch_size=trained.eval_batch_size)
    folder = Path(opt.experiments_dir) / opt.name
    check_same_options(same, stored, folder, "leave it out, an evaluation takes it from the checkpoint")
    return merged
