"""Data sets: images and labels in memory, stored splits, batches that are augmented as a whole.

A batch is one gather from the uint8 cache with a crop offset and a mirror flag per image.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import images
import utils
from options import UserError
from options.default_option import RunOptions

NAMED = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion_mnist": "FashionMNIST"}
SPLITS = ("train", "valid", "test")
_FORMAT = 1  # of kept splits; to be raised when splitting changes
_MANY = 10_000  # images whose split is worth keeping


@dataclass(frozen=True)
class DataInfo:
    """What a network must know of the data: kept in the checkpoint."""

    classes: list[str]
    channels: int
    image_size: list[int]  # H, W
    mean: list[float]  # per channel, of the training split, pixels in 0..1
    std: list[float]
    counts: dict[str, list[int]]  # images per class of each split

    def to_dict(self) -> dict[str, Any]:
        """Plain containers; DataInfo(**d) is the way back."""
        return asdict(self)


@dataclass(frozen=True)
class Pool:
    """All images of a data set, before it is split."""

    pixels: Tensor  # uint8 (N, C, H, W)
    labels: Tensor  # int64 (N,)
    classes: list[str]
    names: list[str]  # unique names: relative paths, or numbers for named data sets
    official_test: int = 0  # the last ones, where the data set brings its own test set


@dataclass(frozen=True)
class Augmentation:
    """What happens to training images; the defaults change nothing."""

    crop_padding: int = 0  # pixels
    flip: str = "none"  # none, horizontal, both
    cutout: int = 0  # side in pixels


def load_pool(opt: RunOptions) -> Pool:
    """Read the data set of --dataset, a folder or a name; raises UserError."""
    if opt.dataset in NAMED:
        return _load_named(opt)
    folder = images.scan(Path(opt.dataset))
    pixels = images.decode(folder, opt.image_size, opt.max_ram_gb, Path(opt.cache_dir))
    return Pool(pixels, torch.tensor(folder.labels), folder.classes, folder.files)


def _load_named(opt: RunOptions) -> Pool:
    import torchvision.datasets  # a slow import that folders do without

    make = getattr(torchvision.datasets, NAMED[opt.dataset])
    try:
        parts = [make(opt.data_dir, train=train, download=opt.download) for train in (True, False)]
    except RuntimeError as error:
        if opt.download:
            raise UserError(f"--dataset {opt.dataset} cannot be downloaded to {opt.data_dir}: {error}") from None
        raise UserError(
            f"--dataset {opt.dataset} is not in --data_dir {opt.data_dir}; add --download True to fetch it"
        ) from None
    except OSError as error:
        raise UserError(
            f"--dataset {opt.dataset} cannot be downloaded ({error}); on a machine without internet put its files "
            f"into {opt.data_dir} as torchvision keeps them"
        ) from None
    pixels = torch.cat([torch.as_tensor(part.data) for part in parts])  # (N, H, W) or (N, H, W, 3)
    pixels = pixels[:, None] if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
    if opt.image_size and pixels.shape[2:] != (opt.image_size, opt.image_size):
        size = (opt.image_size, opt.image_size)
        blocks = [
            torch.nn.functional.interpolate(block, size, mode="bicubic", antialias=True) for block in pixels.split(4096)
        ]
        pixels = torch.cat(blocks)
    labels = torch.cat([torch.as_tensor(part.targets) for part in parts]).long()
    names = [str(index) for index in range(len(labels))]
    return Pool(pixels.contiguous(), labels, list(parts[0].classes), names, len(parts[1]))


def make_split(pool: Pool, opt: RunOptions) -> dict[str, list[str]]:
    """The names of the images of each split: stratified by class, seeded, groups kept whole.

    That of many images takes seconds and is kept in cache_dir, for the next run with the same names and options.

    Raises:
        UserError: too few images or groups for three splits, or a group_pattern that fits no name.
    """
    if len(pool.names) < _MANY:
        return _new_split(pool, opt)
    how = (opt.seed, opt.test_portion, opt.train_portion, opt.group_pattern, pool.official_test)
    key = repr((_FORMAT, how, pool.names, pool.labels.tolist()))
    path = Path(opt.cache_dir).expanduser() / f"{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}.json"
    if path.exists():
        stored: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))
        return stored
    split = _new_split(pool, opt)
    with suppress(OSError):  # it can be made again
        path.parent.mkdir(parents=True, exist_ok=True)
        utils.write_atomic(path, json.dumps(split))
    return split


def _new_split(pool: Pool, opt: RunOptions) -> dict[str, list[str]]:
    labels = pool.labels.numpy()
    everything = np.arange(len(labels))
    groups = _groups(pool.names, opt.group_pattern)
    if pool.official_test:
        rest, test = np.split(everything, [len(everything) - pool.official_test])
    elif opt.test_portion > 0:
        rest, test = _divide(everything, opt.test_portion, labels, groups, utils.fold(opt.seed, "test"))
    else:
        rest, test = everything, everything[:0]
    train, valid = _divide(rest, 1 - opt.train_portion, labels, groups, utils.fold(opt.seed, "valid"))
    missing = [pool.classes[c] for c in set(labels) - set(labels[train])]
    if missing:
        raise UserError(f"--train_portion {opt.train_portion} leaves no training image of the class {missing[0]!r}")
    return {
        name: [pool.names[i] for i in np.sort(part)] for name, part in zip(SPLITS, (train, valid, test), strict=True)
    }


def _groups(names: list[str], pattern: str | None) -> np.ndarray[Any, Any] | None:
    if pattern is None:
        return None
    matches = [re.search(pattern, Path(name).name) for name in names]
    keys: list[Any] = [match and match.group(1 if match.re.groups else 0) for match in matches]
    if None in keys:
        name = names[keys.index(None)]
        raise UserError(f"--group_pattern {pattern!r} is not found in {Path(name).name!r}; every file name needs it")
    return np.unique(keys, return_inverse=True)[1]


def _divide(
    indices: np.ndarray[Any, Any],
    portion: float,
    labels: np.ndarray[Any, Any],
    groups: np.ndarray[Any, Any] | None,
    seed: int,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(kept, taken): about `portion` of the indices taken, class by class."""
    from sklearn.model_selection import train_test_split  # a slow import

    seed %= 2**32
    try:
        if groups is None:
            kept, taken = train_test_split(indices, test_size=portion, stratify=labels[indices], random_state=seed)
            return kept, taken
        return _divide_groups(indices, portion, labels, groups, seed)
    except ValueError as error:
        smallest = min(Counter(labels[indices].tolist()).values())
        raise UserError(
            f"the images cannot be split: {error} The smallest class has {smallest}; "
            "add images, or change --test_portion, --train_portion or --group_pattern"
        ) from None


def _divide_groups(
    indices: np.ndarray[Any, Any], portion: float, labels: np.ndarray[Any, Any], groups: np.ndarray[Any, Any], seed: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Like _divide, groups whole: of many shuffled foldings, the folds that come closest to `portion` of each class."""
    from sklearn.model_selection import StratifiedGroupKFold

    # k of n folds, n as small as comes close to the portion, so that a fold holds many groups
    near = (Fraction(portion).limit_denominator(n) for n in range(2, 51))
    part = next((f for f in near if f and abs(f - portion) < 0.02), Fraction(1, 50))
    totals = np.bincount(labels[indices])
    best, best_gap = indices[:0], np.inf
    for attempt in range(4):
        folds = StratifiedGroupKFold(part.denominator, shuffle=True, random_state=(seed + attempt) % 2**32)
        parts = [held for _, held in folds.split(indices, labels[indices], groups[indices])]
        for first in range(len(parts)):
            taken = np.concatenate([parts[(first + i) % len(parts)] for i in range(part.numerator)])
            shares = np.bincount(labels[indices[taken]], minlength=len(totals)) / np.maximum(totals, 1)
            # Kullback-Leibler, summed over classes: a class without an image on one side costs most
            shares = shares[totals > 0].clip(0.001, 0.999)
            gap = -float((portion * np.log(shares) + (1 - portion) * np.log(1 - shares)).sum())
            if gap < best_gap:
                best, best_gap = taken, gap
    return np.delete(indices, best), indices[best]


class Data:
    """A data set with its splits on a device's doorstep: info, and batches of any split.

    Args:
        opt: the options.
        split: names of the images per split, as stored in split.json; made anew if None.
        train_on_valid: train on the validation split too.
    Raises:
        UserError: for whatever is wrong with the folder, its images or its split.
    """

    def __init__(
        self, opt: RunOptions, split: dict[str, list[str]] | None = None, train_on_valid: bool = False
    ) -> None:
        pool = load_pool(opt)
        self.split = split or make_split(pool, opt)
        index = {name: i for i, name in enumerate(pool.names)}
        lost = [name for names in self.split.values() for name in names if name not in index]
        if lost:
            raise UserError(
                f"--dataset {opt.dataset}: {len(lost)} images of the split are gone, e.g. {lost[0]}; "
                "use the data that was split"
            )
        self.indices = {
            name: torch.tensor([index[n] for n in names], dtype=torch.int64) for name, names in self.split.items()
        }
        if train_on_valid:
            self.indices["train"] = torch.cat([self.indices["train"], self.indices["valid"]])
        self.pixels, self.labels = pool.pixels, pool.labels
        mean, std = _measure(pool.pixels, self.indices["train"])
        counts = {
            name: torch.bincount(pool.labels[part], minlength=len(pool.classes)).tolist()
            for name, part in self.indices.items()
        }
        totals = [sum(column) for column in zip(*counts.values(), strict=True)]
        if 0 in totals:
            name = pool.classes[totals.index(0)]
            raise UserError(f"--dataset {opt.dataset}: the split has no image of {name!r}: it is of other classes")
        size = list(pool.pixels.shape[2:])
        self.info = DataInfo(pool.classes, pool.pixels.shape[1], size, mean, std, counts)
        self._balance, self._seed = opt.balance, opt.seed
        cutout = opt.cutout_length if opt.cutout else 0
        self._augmentation = Augmentation(opt.crop_padding, opt.flip, cutout)

    def steps(self, batch_size: int) -> int:
        """Training batches an epoch; a last incomplete one is left out, unless it is the only one."""
        return max(1, len(self.indices["train"]) // batch_size)

    def train_batches(self, batch_size: int, epoch: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """The augmented batches of an epoch: (images (B, C, H, W) float32, labels (B,)) on the device."""
        random = utils.generator("cpu", self._seed, "train", epoch)
        order = self._draw(random)
        for step in range(self.steps(batch_size)):
            chosen = order[step * batch_size : (step + 1) * batch_size]
            yield self._batch(chosen, device, self._augmentation, random)

    def plain_train_batches(
        self, batch_size: int, count: int, epoch: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """At most `count` batches of training images, drawn as in training but not augmented, of equal sizes."""
        order = self._draw(utils.generator("cpu", self._seed, "plain", epoch))
        order = order[: min(count, max(1, len(order) // batch_size)) * batch_size]
        for chosen in order.split(batch_size):
            yield self._batch(chosen, device)

    def batches(self, split: str, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image of a split once, in order, not augmented."""
        for chosen in self.indices[split].split(batch_size):
            yield self._batch(chosen, device)

    def _draw(self, random: torch.Generator) -> Tensor:
        """Training indices of one epoch, (N_train,)."""
        train = self.indices["train"]
        if not self._balance:
            return train[torch.randperm(len(train), generator=random)]
        labels = self.labels[train]
        weights = 1.0 / torch.bincount(labels, minlength=len(self.info.classes)).double()
        return train[torch.multinomial(weights[labels], len(train), replacement=True, generator=random)]

    def _batch(
        self,
        chosen: Tensor,
        device: torch.device,
        augmentation: Augmentation = Augmentation(),
        random: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        pixels = augment(self.pixels[chosen], augmentation, random)  # uint8, augmented where it is smallest
        pixels = pixels.to(device, non_blocking=True).float()
        mean = torch.tensor(self.info.mean, device=device).view(1, -1, 1, 1) * 255
        std = torch.tensor(self.info.std, device=device).view(1, -1, 1, 1) * 255
        return (pixels - mean) / std, self.labels[chosen].to(device, non_blocking=True)


def augment(pixels: Tensor, how: Augmentation, random: torch.Generator | None = None) -> Tensor:
    """Crop, mirror and blank every image of a batch on its own: uint8 (B, C, H, W) -> the same shape.

    Args:
        pixels: the images.
        how: crop_padding zeros are put around the image before a crop of its size; each image is mirrored
            with probability 1/2 (both: vertically too); a cutout square, clipped at the border, becomes zero.
        random: source of the draws.
    """
    batch, _, height, width = pixels.shape
    pad = how.crop_padding

    def draw(below: int) -> Tensor:
        return torch.randint(below, (batch, 1), generator=random)  # (B, 1)

    rows, columns = torch.arange(height)[None], torch.arange(width)[None]
    if how.flip == "both":
        rows = torch.where(draw(2) == 1, height - 1 - rows, rows)  # (B, H)
    if how.flip != "none":
        columns = torch.where(draw(2) == 1, width - 1 - columns, columns)  # (B, W)
    if pad:
        pixels = torch.nn.functional.pad(pixels, (pad, pad, pad, pad))
        rows, columns = rows + draw(2 * pad + 1), columns + draw(2 * pad + 1)
    if pad or how.flip != "none":
        rows, columns = rows.expand(batch, height), columns.expand(batch, width)
        image = torch.arange(batch)[:, None, None]
        # (B, H, W, C): channels come last through the gather, each pixel being one contiguous copy
        pixels = pixels.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if how.cutout:
        half = how.cutout // 2
        down = torch.arange(height)[None] - draw(height) + half  # (B, H), 0.. inside the square
        right = torch.arange(width)[None] - draw(width) + half
        inside = ((down >= 0) & (down < how.cutout))[:, :, None] & ((right >= 0) & (right < how.cutout))[:, None]
        pixels = pixels.masked_fill(inside[:, None], 0)
    return pixels


def _measure(pixels: Tensor, chosen: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of pixels in 0..1, exact, from histograms."""
    channels = pixels.shape[1]
    counts = torch.zeros(channels, 256, dtype=torch.float64)
    for indices in chosen.sort().values.split(1024):
        block = pixels[indices]  # (b, C, H, W)
        counts += torch.stack([torch.bincount(block[:, c].flatten(), minlength=256) for c in range(channels)])
    value = torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ value  # (C,)
    var = (share * (value - mean[:, None]) ** 2).sum(1)
    return mean.tolist(), var.sqrt().clamp_min(1 / 255).tolist()


def write_split(path: Path, data: Data, opt: RunOptions) -> None:
    """split.json: the names of the images of each split, and how they were drawn."""
    record = {"dataset": opt.dataset, "seed": opt.seed, "group_pattern": opt.group_pattern, **data.split}
    utils.write_atomic(path, json.dumps(record, indent=1))
