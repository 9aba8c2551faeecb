"""Data sets: what --dataset names, all its images and labels in memory."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loading import folders, images
from options import UserError
from options.default_option import DataOptions


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

    def check(self) -> None:
        """Raise UserError where it is of no data, as in a file that another program has written."""

        def all_of(kind: type, values: Any, count: int) -> bool:
            return isinstance(values, list) and len(values) == count and all(type(one) is kind for one in values)

        classes = len(self.classes) if isinstance(self.classes, list) else 0
        sizes = type(self.channels) is int and 0 < self.channels <= 1024 and all_of(int, self.image_size, 2)
        good = (
            classes > 0 and all_of(str, self.classes, classes) and sizes and all(0 < n < 2**15 for n in self.image_size)
        )
        good = good and all(all_of(float, values, self.channels) for values in (self.mean, self.std))
        good = good and isinstance(self.counts, dict) and self.counts.keys() == {"train", "valid", "test"}
        good = good and all(all_of(int, counts, classes) for counts in self.counts.values())
        if not good or not isinstance(self.white, dict) or not all(map(math.isfinite, self.mean + self.std)):
            raise UserError("what it says of its data is of another kind")

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
    again: Mapping[str, str] = field(default_factory=dict)  # names left out, of files that another name stands for


def _folder(opt: DataOptions, like: DataInfo | None = None, option: str = "--dataset") -> ImageSet:
    folder = folders.scan(Path(opt.dataset), LOADERS, option)
    testing = like is not None and option != "--dataset"  # what is trained on has the size that it had
    height, width = like.image_size if testing and like else (opt.image_size, opt.image_size)
    size = (width, height) if width and height else None
    white = like.white if like else None
    found = images.decode(folder, size, opt.max_ram_gb, opt.cache_dir, white, opt.max_cache_gb)
    notes = [*found.notes, *([f"left out of {folder.root}: {folder.left_out}"] if folder.left_out else [])]
    labels = torch.tensor(folder.labels)
    return ImageSet(found.pixels, labels, folder.classes, folder.files, 0, found.white, notes, folder.again)


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


def load(opt: DataOptions, like: DataInfo | None = None, option: str = "--dataset") -> ImageSet:
    """The images of --dataset, a folder or a name of LOADERS; raises UserError.

    Args:
        like: of the images that a network was trained on: these have to have its size and channels.
        option: where they were asked for; those of --test_folder are brought to the size.
    """
    loader = LOADERS.get(opt.dataset) if option == "--dataset" else None
    found = loader(opt) if loader else _folder(opt, like, option)
    if like is None:
        return found
    if found.pixels.shape[1] == 1 and like.channels == 3:
        found = replace(found, pixels=found.pixels.expand(-1, 3, -1, -1))
    if list(found.pixels.shape[1:]) != [like.channels, *like.image_size]:
        shapes = [
            "x".join(map(str, (w, h, c))) for c, h, w in (found.pixels.shape[1:], (like.channels, *like.image_size))
        ]
        raise UserError(f"{option} {opt.dataset} has images of {shapes[0]}, the weights are for {shapes[1]}")
    return found
