"""Data sets: images and labels in memory, stored splits, batches that are augmented as a whole.

A batch is one gather from the uint8 cache with a crop offset and a mirror flag per image.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import utils
from loading import images, splits
from loading.augmentation import Augmentation, augment
from loading.splits import Split, Stored
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
    white: dict[str, float] = field(default_factory=dict)  # values of white pixels, see kept.Decoded

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
    white: dict[str, float] = field(default_factory=dict)  # see kept.Decoded
    notes: list[str] = field(default_factory=list)  # what there is to say, such as what was left out


def _folder(opt: DataOptions, white: dict[str, float] | None = None) -> ImageSet:
    folder = images.scan(Path(opt.dataset), LOADERS)
    found = images.decode(folder, opt.image_size, opt.max_ram_gb, opt.cache_dir, white, opt.max_cache_gb)
    notes = [*found.notes, *([f"left out of {folder.root}: {folder.left_out}"] if folder.left_out else [])]
    labels = torch.tensor(folder.labels)
    return ImageSet(found.pixels, labels, folder.classes, folder.files, notes=notes, white=found.white)


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
    names = [f"{opt.dataset}/{index}" for index in range(len(labels))]
    return ImageSet(pixels.contiguous(), labels, list(parts[0].classes), names, len(parts[1]))


# what --dataset may be besides a folder
LOADERS: dict[str, Callable[[DataOptions], ImageSet]] = {
    "cifar10": partial(_torchvision, "CIFAR10"),
    "cifar100": partial(_torchvision, "CIFAR100"),
    "fashion_mnist": partial(_torchvision, "FashionMNIST"),
}


def load(opt: DataOptions, like: DataInfo | None = None) -> ImageSet:
    """The images of --dataset, a folder or a name of LOADERS; raises UserError.

    Args:
        like: of the images that a network was trained on: these have to have its size and channels.
    """
    loader = LOADERS.get(opt.dataset)
    found = loader(opt) if loader else _folder(opt, like.white if like else None)
    if like is None:
        return found
    if found.pixels.shape[1] == 1 and like.channels == 3:
        found = replace(found, pixels=found.pixels.expand(-1, 3, -1, -1))
    if list(found.pixels.shape[1:]) != [like.channels, *like.image_size]:
        shapes = [
            "x".join(map(str, (w, h, c))) for c, h, w in (found.pixels.shape[1:], (like.channels, *like.image_size))
        ]
        raise UserError(f"--dataset {opt.dataset} has images of {shapes[0]}, the weights are for {shapes[1]}")
    return found


class Data:
    """A data set with its splits on a device's doorstep: info, and batches of any split.

    Args:
        opt: the options.
        split: names of the images per split, as stored in split.json; made anew if None.
        train_on_valid: train on the validation split too.
        carry: another run's split, to be used if it is of this data; other data gets a split of its own.
        like: of the data that a network was trained on, whose mean, deviation and white are taken.
        pool: the images, if they are loaded already.
    Raises:
        UserError: for whatever is wrong with the folder, its images or its split.
    """

    def __init__(
        self,
        opt: DataOptions,
        split: Split | None = None,
        train_on_valid: bool = False,
        carry: Stored | None = None,
        like: DataInfo | None = None,
        pool: ImageSet | None = None,
    ) -> None:
        pool = pool or load(opt, like)
        self.notes = pool.notes  # what there is to say about it
        if split is not None:
            split = self._names_now(split, pool, opt)
        elif carry is not None:
            old = carry._replace(split=self._names_now(carry.split, pool, opt))
            split, notes = splits.fit_split(old, pool.names, pool.labels, pool.classes)
            self.notes += notes
        self.split = split or splits.make_split(pool.names, pool.labels, pool.classes, opt, pool.official_test)
        self.pixels, self.labels, self.indices = pool.pixels, pool.labels, self._indices(pool, opt)
        if train_on_valid:
            self.indices["train"] = torch.cat([self.indices["train"], self.indices["valid"]])
        mean, std = (like.mean, like.std) if like else _mean_and_std(pool.pixels, self.indices["train"])
        counts = {
            name: torch.bincount(pool.labels[part], minlength=len(pool.classes)).tolist()
            for name, part in self.indices.items()
        }
        size = list(pool.pixels.shape[2:])
        self.info = DataInfo(pool.classes, pool.pixels.shape[1], size, mean, std, counts, pool.white)
        self._balance, self._seed = opt.balance, opt.seed
        self._scales: dict[torch.device, tuple[Tensor, Tensor]] = {}
        fill = tuple(round(255 * value) for value in mean)  # the reference fills after normalisation
        self._augmentation = Augmentation(opt.crop_padding, opt.flip, opt.cutout_length if opt.cutout else 0, fill)
        if like is None:
            self._check_training(opt)

    def _indices(self, pool: ImageSet, opt: DataOptions) -> dict[str, Tensor]:
        """Where the images of each split are."""
        index = {name: i for i, name in enumerate(pool.names)}
        named = [name for names in self.split.values() for name in names]
        lost = [name for name in named if name not in index]
        if lost:
            raise UserError(
                f"--dataset {opt.dataset}: {len(lost)} images of the split are gone, e.g. {lost[0]}; "
                "use the data that was split"
            )
        if len(named) < len(index):
            self.notes.append(f"{len(index) - len(named):,} images here are not in the split, and left out")
        return {name: torch.tensor([index[n] for n in names], dtype=torch.int64) for name, names in self.split.items()}

    def _check_training(self, opt: DataOptions) -> None:
        """Refuse what nothing can be learned from."""
        totals = [sum(column) for column in zip(*self.info.counts.values(), strict=True)]
        if 0 in totals:
            name = self.info.classes[totals.index(0)]
            raise UserError(f"--dataset {opt.dataset}: the split has no image of {name!r}: it is of other classes")
        if max(self.info.std) <= 1 / 255:
            raise UserError(f"--dataset {opt.dataset}: all training images are of one and the same colour")
        height, width = self.info.image_size
        if opt.cutout and opt.cutout_length**2 > height * width / 2:
            self.notes.append(f"--cutout_length {opt.cutout_length} blanks most of images of {width}x{height}")

    @classmethod
    def to_test(cls, opt: DataOptions, like: DataInfo) -> "Data":
        """All images of --dataset as the test split of a network, classes by their names; raises UserError."""
        pool = load(opt, like)
        unknown = [name for name in pool.classes if name not in like.classes]
        if unknown:
            raise UserError(
                f"--test_folder {opt.dataset}: the weights know no class {unknown[0]!r}; "
                f"they know {', '.join(like.classes)}"
            )
        place = torch.tensor([like.classes.index(name) for name in pool.classes])
        split: Split = {"train": [], "valid": [], "test": pool.names}
        return cls(opt, split, like=like, pool=replace(pool, labels=place[pool.labels], classes=like.classes))

    @staticmethod
    def _names_now(split: Split, pool: ImageSet, opt: DataOptions) -> Split:
        """Earlier versions called the images of a named data set 0, 1, 2."""
        named = (name for names in split.values() for name in names)
        if opt.dataset not in LOADERS or not {*pool.names}.isdisjoint(named):
            return split
        return {part: [f"{opt.dataset}/{name}" for name in names] for part, names in split.items()}

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
