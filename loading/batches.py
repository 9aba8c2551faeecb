"""Data sets: images and labels in memory, stored splits, batches that are augmented as a whole.

A batch is one gather from the uint8 cache with a crop offset and a mirror flag per image.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import utils
from loading import images, splits
from options import UserError
from options.default_option import DataOptions

Batches = Iterator[tuple[Tensor, Tensor]]  # images (B, C, H, W) float32, labels (B,)


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

    def steps(self, batch_size: int) -> int:
        """Training batches an epoch; a last incomplete one is left out, unless it is the only one."""
        return max(1, sum(self.counts["train"]) // batch_size)


@dataclass(frozen=True)
class ImageSet:
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


def _folder(opt: DataOptions) -> ImageSet:
    folder = images.scan(Path(opt.dataset), LOADERS)
    pixels = images.decode(folder, opt.image_size, opt.max_ram_gb, opt.cache_dir)
    return ImageSet(pixels, torch.tensor(folder.labels), folder.classes, folder.files)


def _torchvision(kind: str, opt: DataOptions) -> ImageSet:
    """A data set of torchvision that is made with train=True and with train=False."""
    import torchvision.datasets  # a slow import that folders do without

    make = getattr(torchvision.datasets, kind)
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
    return ImageSet(pixels.contiguous(), labels, list(parts[0].classes), names, len(parts[1]))


# what --dataset may be besides a folder
LOADERS: dict[str, Callable[[DataOptions], ImageSet]] = {
    "cifar10": partial(_torchvision, "CIFAR10"),
    "cifar100": partial(_torchvision, "CIFAR100"),
    "fashion_mnist": partial(_torchvision, "FashionMNIST"),
}


def load(opt: DataOptions) -> ImageSet:
    """The images of --dataset, a folder or a name of LOADERS; raises UserError."""
    return LOADERS.get(opt.dataset, _folder)(opt)


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
        self, opt: DataOptions, split: dict[str, list[str]] | None = None, train_on_valid: bool = False
    ) -> None:
        pool = load(opt)
        self.split = split or splits.make_split(pool.names, pool.labels, pool.classes, opt, pool.official_test)
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
        mean, std = _mean_and_std(pool.pixels, self.indices["train"])
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
        self._scales: dict[torch.device, tuple[Tensor, Tensor]] = {}
        cutout = opt.cutout_length if opt.cutout else 0
        self._augmentation = Augmentation(opt.crop_padding, opt.flip, cutout)

    def train_batches(self, batch_size: int, epoch: int, device: torch.device) -> Batches:
        """The augmented batches of an epoch: (images (B, C, H, W) float32, labels (B,)) on the device."""
        random = utils.generator("cpu", self._seed, "train", epoch)
        order = self._draw(random)
        for step in range(self.info.steps(batch_size)):
            chosen = order[step * batch_size : (step + 1) * batch_size]
            yield self._batch(chosen, device, self._augmentation, random)

    def plain_train_batches(self, batch_size: int, count: int, epoch: int, device: torch.device) -> Batches:
        """At most `count` batches of training images, drawn as in training but not augmented, of equal sizes."""
        order = self._draw(utils.generator("cpu", self._seed, "plain", epoch))
        order = order[: min(count, max(1, len(order) // batch_size)) * batch_size]
        for chosen in order.split(batch_size):
            yield self._batch(chosen, device)

    def batches(self, split: str, batch_size: int, device: torch.device) -> Batches:
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
        mean, std = self._scale(device)
        return (_sent(pixels, device).float() - mean) / std, _sent(self.labels[chosen], device)

    def _scale(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of pixels in 0..255, each (1, C, 1, 1), sent to the device once."""
        if device not in self._scales:
            both = torch.tensor([self.info.mean, self.info.std]).mul(255)[:, None, :, None, None]
            self._scales[device] = both[0].to(device), both[1].to(device)
        return self._scales[device]


def _sent(batch: Tensor, device: torch.device) -> Tensor:
    """A batch on its way to the device: from pinned memory to a GPU, so that nobody waits for the copy."""
    return (batch.pin_memory() if device.type == "cuda" else batch).to(device, non_blocking=True)


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


def _mean_and_std(pixels: Tensor, chosen: Tensor) -> tuple[list[float], list[float]]:
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


def write_split(path: Path, data: Data, opt: DataOptions) -> None:
    """split.json: the names of the images of each split, and how they were drawn."""
    record = {"dataset": opt.dataset, "seed": opt.seed, "group_pattern": opt.group_pattern, **data.split}
    utils.write_atomic(path, json.dumps(record, indent=1))
