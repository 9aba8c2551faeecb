"""Data sets: images and labels in memory, stored splits, batches that are augmented as a whole.

A batch is one gather from the uint8 cache with a crop offset and a mirror flag per image.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import utils
from loading import records, splits
from loading.augmentation import Augmentation, augment
from loading.records import Stored
from loading.sets import LOADERS, DataInfo, ImageSet, load
from options import UserError
from options.default_option import DataOptions

_MOST = 500_000_000  # bytes of pixels of a split that its fingerprint is of
Batches = Iterator[tuple[Tensor, Tensor]]  # images (B, C, H, W) float32, labels (B,)


class Data:
    """A data set with its splits on a device's doorstep: info, and batches of any split.

    Args:
        opt: the options.
        split: as split.json or a checkpoint has it; made anew if None.
        train_on_valid: train on the validation split too.
        carry: another run's split, which these images take over as far as they can, see splits.fit_split.
        like: of the data that a network was trained on, whose mean, deviation and white are taken.
        pool: the images, if they are loaded already.
    Raises:
        UserError: for whatever is wrong with the folder, its images or its split.
    """

    def __init__(
        self,
        opt: DataOptions,
        split: Stored | Mapping[str, Any] | None = None,
        train_on_valid: bool = False,
        carry: Stored | None = None,
        like: DataInfo | None = None,
        pool: ImageSet | None = None,
    ) -> None:
        pool = pool or load(opt, like)
        self.notes = [*pool.notes]  # what there is to say about it
        if split is not None:
            old = split if isinstance(split, Stored) else records.of_record(split)
            old = self._names_now(old, pool, opt)
            stored, notes = splits.with_groups(old, opt, refuse=isinstance(split, Stored))
            self.notes += notes
        else:
            old = Stored({}) if carry is None else self._names_now(carry, pool, opt)
            stored, notes = splits.draw(old, pool.names, pool.labels, pool.classes, opt, pool.official_test)
            self.notes += notes
        self.split = stored.split
        self.pixels, self.labels, self.indices = pool.pixels, pool.labels, self._indices(pool, opt)
        named = {name for names in self.split.values() for name in names}
        left_out = [name for name in pool.names if name not in named]
        self.stored = stored._replace(left_out=left_out, pixels=self._fingerprints())
        changed = [part for part, names in old.split.items() if names == self.split[part] and self._differs(part, old)]
        if changed:
            self.notes.append(f"the {', '.join(changed)} images have other pixels than the split was made for")
        if left_out and split is not None:
            self.notes.append(f"{len(left_out):,} images here are not in the split, and left out")
        elif left_out:
            self.notes.append(f"{len(left_out):,} images are left out, as in the split or with their group")
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
        index |= {name: index[first] for name, first in pool.again.items()}  # earlier versions took both
        lost = [name for names in self.split.values() for name in names if name not in index]
        if lost:
            example = f"; names here are like {pool.names[0]}" if len(lost) > len(pool.names) // 2 else ""
            raise UserError(
                f"--dataset {opt.dataset}: {len(lost)} images of the split are gone, e.g. {lost[0]}{example}; "
                "use the data that was split"
            )
        return {name: torch.tensor([index[n] for n in names], dtype=torch.int64) for name, names in self.split.items()}

    def _fingerprints(self) -> dict[str, str]:
        """What the pixels of each split are: HxWxC and a digest, of some images where they are many."""
        found = {}
        for part, places in self.indices.items():
            digest = hashlib.blake2b(digest_size=12)
            every = max(1, len(places) * self.pixels[0].numel() // _MOST)
            for chosen in places[::every].split(256):
                digest.update(self.pixels[chosen].numpy().data)
            found[part] = f"{self._shape()} {digest.hexdigest()}"
        return found

    def _shape(self) -> str:
        channels, height, width = self.pixels.shape[1:]
        return f"{height}x{width}x{channels}"

    def _differs(self, part: str, old: Stored) -> bool:
        """Whether the images of a part had the same size in the split of before, but not these pixels."""
        before = old.pixels.get(part, "")
        return before.startswith(f"{self._shape()} ") and before != self.stored.pixels[part]

    def record(self, opt: DataOptions) -> dict[str, Any]:
        """What split.json and checkpoints say of the split."""
        return records.to_record(self.stored, opt)

    def _check_training(self, opt: DataOptions) -> None:
        """Refuse what nothing can be learned from."""
        if 0 in self.info.counts["train"]:
            name = self.info.classes[self.info.counts["train"].index(0)]
            raise UserError(f"--dataset {opt.dataset}: the split has no training image of the class {name!r}")
        if max(self.info.std) <= 1 / 255:
            white = f" once {self.info.white} is white" if self.info.white else ""
            raise UserError(f"--dataset {opt.dataset}: all training images are of one and the same colour{white}")
        height, width = self.info.image_size
        if opt.flip == "dihedral" and height != width:
            raise UserError(f"--flip dihedral turns images, which have to be square, not {width}x{height}; --flip both")
        if opt.cutout and opt.cutout_length**2 > height * width / 2:
            self.notes.append(f"--cutout_length {opt.cutout_length} blanks most of images of {width}x{height}")

    @classmethod
    def to_test(cls, opt: DataOptions, like: DataInfo, trained: Iterable[str]) -> "Data":
        """All images of --test_folder as the test split of a network, classes by their names; raises UserError.

        Args:
            like: of the data that it was trained on. trained: the names of its training images.
        """
        pool = load(opt, like, "--test_folder")
        alike = Counter(map(splits.same_name, like.classes))
        place = {splits.same_name(name): n for n, name in enumerate(like.classes) if alike[splits.same_name(name)] == 1}
        of = {
            name: {name: n for n, name in enumerate(like.classes)}.get(name, place.get(splits.same_name(name)))
            for name in pool.classes
        }
        unknown = [name for name in pool.classes if of[name] is None]
        if unknown:
            raise UserError(
                f"--test_folder {opt.dataset}: the weights know no class {unknown[0]!r}; "
                f"they know {', '.join(like.classes)}"
            )
        labels = torch.tensor([of[name] for name in pool.classes])[pool.labels]
        pool = replace(pool, labels=labels, classes=like.classes)
        data = cls(opt, {"train": [], "valid": [], "test": pool.names}, like=like, pool=pool)
        known = {*map(splits.same_name, trained)}
        seen = [name for name in pool.names if splits.same_name(name) in known]
        if seen:
            data.notes.append(
                f"{len(seen):,} of these {len(pool.names):,} images have the names of training images, "
                f"e.g. {seen[0]}: if they are the same, the figures flatter"
            )
        return data

    @staticmethod
    def _names_now(stored: Stored, pool: ImageSet, opt: DataOptions) -> Stored:
        """Earlier versions called the images of a named data set 0, 1, 2."""
        named = [name for names in stored.split.values() for name in names]
        ours = opt.dataset in LOADERS and stored.dataset in ("", opt.dataset)
        if not ours or not all(name.isdecimal() for name in named):
            return stored
        return stored._replace(split={p: [f"{opt.dataset}/{name}" for name in n] for p, n in stored.split.items()})

    def train_batches(
        self, batch_size: int, epoch: int, device: torch.device, first: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Batches:
        """The augmented batches of an epoch: (images (B, C, H, W) float32, labels (B,)) on the device.

        Args:
            first: the step (0..) to begin with; what comes is what would have come without it.
            part: (k, n) gives every n-th image of a batch from the k-th (0..) on.
        """
        order = self._draw(utils.generator("cpu", self._seed, "train", epoch))
        for step in range(first, self.info.steps(batch_size)):
            chosen = order[step * batch_size : (step + 1) * batch_size][part[0] :: part[1]]
            random = utils.generator("cpu", self._seed, "augmentation", epoch, step, *([part[0]] if part[0] else []))
            yield self._batch(chosen, device, self._augmentation, random)

    def plain_train_batches(
        self, batch_size: int, count: int, epoch: int, device: torch.device, part: tuple[int, int] = (0, 1)
    ) -> Batches:
        """At most `count` batches of training images, drawn as in training but not augmented, of equal sizes.

        part: (k, n) gives every n-th of them from the k-th (0..) on.
        """
        order = self._draw(utils.generator("cpu", self._seed, "plain", epoch))
        order = order[: min(count, max(1, len(order) // batch_size)) * batch_size]
        for chosen in order.split(batch_size)[part[0] :: part[1]]:
            yield self._batch(chosen, device)

    def batches(self, split: str, batch_size: int, device: torch.device, part: tuple[int, int] = (0, 1)) -> Batches:
        """Every image of a split once, in order, not augmented; part as in plain_train_batches."""
        for chosen in self.indices[split].split(batch_size)[part[0] :: part[1]]:
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
    utils.write_atomic(path, json.dumps(data.record(opt), indent=1))
