"""What the stages of benchmarks.evidence share: its options, images and splits, its runs and what they left."""

import gzip
import json
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
from jsonargparse.typing import PositiveFloat, PositiveInt

import main as plain_search
import options
import retrain
import utils
from benchmarks import runner
from benchmarks.record import Recorded
from options import UserError
from options.child_option import ChildOptions
from options.default_option import TrainOptions
from report import runs
from training.opening import finished

SEARCH, TRAIN = "options/presets/fashion.yaml", "options/presets/retrain_fashion.yaml"
VARIED = "options/presets/fashion_dsnas.yaml"  # by remedies and gap


@dataclass(frozen=True)
class EvidenceOptions(Recorded):
    """What is run."""

    stage: Literal["prepare", "recipe", "remedies", "compare", "gap", "ranking"] = "compare"
    """See above; a stage that is complete writes its part of docs/evidence.md."""
    source: str = "/usr/share/datasets/fashion-mnist"
    """With prepare, the folder of the data set's four files, as Debian's dataset-fashion-mnist has them."""
    images: PositiveInt = 5000
    """With prepare, images of each split that are trained on or validate, a fifth of them; up to 25,000."""
    test_images: PositiveInt = 10_000
    """With prepare, images to test on or to judge by; up to 10,000."""
    n: PositiveInt = 20
    """Searches of the comparison."""
    tries: PositiveInt = 3
    """Runs of each recipe and each remedy."""
    params: PositiveInt = 41_000
    """Of the networks that recipes are tried with, give or take 5 %."""
    minutes: PositiveFloat | None = None
    """No further run begins after so many minutes; the same command goes on."""
    part: str = "1/1"
    """K/N takes every N-th run from the K-th on: N processes share a stage."""
    others: list[str] = field(default_factory=list)
    """comparison.json files of the same comparison on other machines: their rounds are not run again."""
    search_options: list[str] = field(default_factory=list)
    """Further options of every search, e.g. '["--epochs=1"]', for a trial of the whole in minutes."""
    retrain_options: list[str] = field(default_factory=list)
    """Further options of every training."""
    experiments_dir: str = "experiments"
    """Where the runs go, as evidence_..."""
    visualizations_dir: str = "visualizations"
    """Where the pictures of found cells go."""
    data_dir: str = "data"
    """Where prepare puts the images and the splits."""


class Job(NamedTuple):
    """A run of a script."""

    script: ModuleType
    kind: type[Any]
    argv: list[str]
    leaves: str  # the file that only a finished run has


def prepare(opt: EvidenceOptions) -> None:
    """The files of Fashion-MNIST as torchvision reads them, and the splits study, tuning and few."""
    place = Path(opt.data_dir) / "FashionMNIST" / "raw"
    place.mkdir(parents=True, exist_ok=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        packed = Path(opt.source) / f"{name}-ubyte.gz"
        if not packed.is_file():
            raise UserError(f"--source {opt.source} has no {packed.name}; apt-get install dataset-fashion-mnist")
        with gzip.open(packed) as read, (place / f"{name}-ubyte").open("wb") as write:
            shutil.copyfileobj(read, write)
    labels = np.frombuffer((place / "train-labels-idx1-ubyte").read_bytes()[8:], dtype=np.uint8)
    judged = len(labels) // 6  # 10,000 training images to judge what is tuned by, the others for two pools of 25,000
    pool = (len(labels) - judged) // 2
    each = min(opt.images, pool) // 10  # of a class
    drawn: dict[str, dict[str, list[int]]] = {}
    for name, first, tested in (("study", 0, len(labels)), ("tuning", pool, 2 * pool)):
        test = range(tested, tested + min(opt.test_images, judged))
        drawn[name] = {"train": [], "valid": [], "test": [*test]}
        for label in range(10):
            places = [i for i in range(first, first + pool) if labels[i] == label]
            random.Random(f"{name} {label}").shuffle(places)
            _add(drawn[name], places, each)
    # as many as the bundled images, where --images is the default: 1,280 and 320 of those that are tuned on
    drawn["few"] = {"train": [], "valid": [], "test": drawn["tuning"]["test"]}
    for label in range(10):
        _add(drawn["few"], [i for i in sorted(drawn["tuning"]["train"]) if labels[i] == label], 8 * each // 25)
    for name, parts in drawn.items():
        split = {part: [f"fashion_mnist/{index}" for index in sorted(its)] for part, its in parts.items()}
        utils.write_atomic(split_file(opt, name), json.dumps(split))
        print(f"written  {split_file(opt, name)}")


def _add(drawn: dict[str, list[int]], places: Sequence[int], size: int) -> None:
    """The first of a class's images, so many, to a split: four fifths to train on, a fifth to validate."""
    drawn["train"] += places[: size - size // 5]
    drawn["valid"] += places[size - size // 5 : size]


def split_file(opt: EvidenceOptions, name: str) -> Path:
    """Of study, tuning or few."""
    return Path(opt.data_dir) / f"fashion_{name}.json"


def _common(opt: EvidenceOptions, split: str, name: str, seed: int) -> list[str]:
    argv = ["--dataset=fashion_mnist", f"--data_dir={opt.data_dir}", f"--split={split_file(opt, split)}"]
    argv += [f"--experiments_dir={opt.experiments_dir}", f"--visualizations_dir={opt.visualizations_dir}"]
    return [*argv, f"--name={folder(opt, name, seed).name}", f"--seed={seed}"]


def folder(opt: EvidenceOptions, name: str, seed: int) -> Path:
    """Where a run of the study leaves its files."""
    return Path(opt.experiments_dir) / f"evidence_{name}_{seed}"


def search(opt: EvidenceOptions, split: str, name: str, seed: int, more: Sequence[str]) -> Job:
    """A search with the preset that is varied and more options."""
    argv = [f"--config={VARIED}", *_common(opt, split, name, seed), *opt.search_options, *more]
    return Job(plain_search, TrainOptions, argv, "genotype.json")


def train(opt: EvidenceOptions, split: str, name: str, seed: int, more: Sequence[str]) -> Job:
    """A training with the recipe of the study and more options."""
    argv = [f"--config={TRAIN}", *_common(opt, split, name, seed), *opt.retrain_options, *more]
    return Job(retrain, ChildOptions, argv, "test.json")


def work(opt: EvidenceOptions, rounds: Sequence[Sequence[Job]]) -> bool:
    """Run what is missing of this part, a round after the other; whether all of every part is finished."""
    start = time.monotonic()
    number, parts = options.part(opt.part)
    complete = True
    for index, jobs in enumerate(rounds):
        for job in jobs:
            run = options.parse(job.kind, [*job.argv, "--resume=True"], "evidence", "")
            if finished(run, job.leaves):
                continue
            late = opt.minutes is not None and time.monotonic() - start > 60 * opt.minutes
            if late or index % parts != number - 1:
                complete = False
                break
            runner.run_once(job.script, job.kind, job.argv, job.leaves)
    return complete


def result(opt: EvidenceOptions, name: str, seed: int) -> dict[str, Any]:
    """What a training's test.json says, without its table of classes."""
    place = folder(opt, name, seed)
    found: dict[str, Any] = json.loads((place / "test.json").read_text(encoding="utf-8"))
    log = utils.read_metrics(place / "metrics.jsonl")
    kept = {key: found[key] for key in ("acc", "loss", "params", "flops", "seed", "genotype")}
    return kept | {"minutes": runs.minutes_of(place), "valid_acc": log[-1].get("valid_acc"), "epochs": len(log)}
