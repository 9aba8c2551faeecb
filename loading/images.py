"""A folder of images, one subfolder per class, decoded once into a uint8 tensor (N, C, H, W)."""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import utils
from loading import pixels
from options import UserError

_NEEDS_MORE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow knows but cannot read alone
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
_FORMAT = 1  # of the kept arrays; to be raised when decoding changes
_LONG = 3.0  # seconds of decoding that are worth keeping


class ImageFolder(NamedTuple):
    """What lies in a data folder: the class names and, in order, the files with their classes."""

    root: Path
    classes: list[str]
    files: list[str]  # relative to root, with forward slashes
    labels: list[int]
    left_out: str = ""  # in words


@cache
def formats() -> dict[str, tuple[str, ...]]:
    """The endings, in lower case, of the files that Pillow reads: each with its formats, the likeliest first.

    (All of them are registered here; in Pillow's order a folder of TIFFs took a seventh longer to decode.)
    """
    known = Image.registered_extensions()
    able = [kind for kind in Image.ID if kind not in _NEEDS_MORE]
    return {end: (kind, *(other for other in able if other != kind)) for end, kind in known.items() if kind in able}


def scan(root: Path, names: Iterable[str] = ()) -> ImageFolder:
    """List a folder with one subfolder of images per class, at any depth, linked folders too, hidden ones left out.

    Args:
        names: what might have been meant instead.

    Raises:
        UserError: no such folder, fewer than two classes, a class without an image, or splits in place of classes.
    """
    if not root.is_dir():
        raise UserError(
            f"--dataset {root}: no such folder; give a folder with one subfolder of images per class"
            + "".join(f", or {name}" for name in names)
        )
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))
    if folders and {path.name.lower() for path in folders} <= _SPLITS:
        raise UserError(
            f"--dataset {root}: its folders {', '.join(path.name for path in folders)} are splits, not classes; "
            "give a folder with one subfolder per class, and --split with a file of the lists train, valid and test"
        )
    files: list[str] = []
    labels: list[int] = []
    others: Counter[str] = Counter()
    for label, folder in enumerate(folders):
        found = sorted(_files(str(folder), f"{folder.name}/", others, (os.path.realpath(root),)))
        if not found:
            left = f" but {_in_words(others)}" if others else ""
            raise UserError(
                f"--dataset {root}: the class folder {folder.name!r} holds no images{left}; fill it or remove it"
            )
        files += found
        labels += [label] * len(found)
    if len(folders) < 2:
        raise UserError(
            f"--dataset {root}: {len(folders)} class folders with images found, at least 2 are needed; "
            "each subfolder is a class"
        )
    return ImageFolder(root, [folder.name for folder in folders], files, labels, _in_words(others))


def _in_words(others: Mapping[str, int]) -> str:
    """50 .jfif, 1 .db."""
    return ", ".join(f"{count:,} {what}" for what, count in sorted(others.items()))


def _files(folder: str, prefix: str, others: Counter[str], above: tuple[str, ...]) -> Iterator[str]:
    """The images in a folder and below, as prefix + relative path, hidden ones left out.

    Args:
        others: counts what is left out.
        above: the real folders around this one, into which no link may lead.
    """
    above = (*above, os.path.realpath(folder))
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            ending = os.path.splitext(entry.name)[1].lower()
            if entry.is_dir():
                if entry.is_symlink() and os.path.realpath(entry.path) in above:
                    others["link into itself"] += 1
                else:
                    yield from _files(entry.path, f"{prefix}{entry.name}/", others, above)
            elif not entry.is_file():
                others["broken link"] += 1
            elif ending in formats():
                yield prefix + entry.name
            else:
                others[ending or "file without an ending"] += 1


class _Read(NamedTuple):
    """An image as it was read."""

    size: tuple[int, int]  # H, W as shown, before resizing
    mode: str
    top: float  # largest value of an image with more than 8 bits, else 0
    pixels: np.ndarray[Any, Any] | None  # uint8 (H, W) or (H, W, 3), resized; None if not decoded yet


class Decoded(NamedTuple):
    """Every image of a folder, and the values of white pixels of integers (I) and floats (F) of more than 8 bits."""

    pixels: Tensor  # uint8 (N, C, H, W)
    white: dict[str, float]  # empty if no image has more than 8 bits


def decode(
    folder: ImageFolder,
    image_size: int | None,
    max_ram_gb: float,
    cache_dir: str | None = None,
    white: dict[str, float] | None = None,
) -> Decoded:
    """Every image of the folder, C = 1 if all are grey and 3 otherwise.

    Transparent pixels become black, palettes and CMYK become RGB, EXIF rotations are applied. Grey integers
    of more than 8 bits are scaled by the number of bits in use in the whole folder (12-bit pictures in 16-bit
    files do not turn black), floating-point pixels by the largest value of the folder. Of 16-bit colours the
    high byte is taken, as Pillow does.

    What took long to decode, or is larger than max_ram_gb, is kept in cache_dir as a .npy file of these very files
    (names, sizes, dates), which a later run maps into memory and starts at once.

    Args:
        image_size: side to resize (shorter side) and crop (centre) to; None keeps the size, if there is one.
        max_ram_gb: limit of the memory used.
        white: what is white in images that others have to be like.
    Raises:
        UserError: unreadable files, or several sizes and no image_size.
    """
    path = _kept(folder, image_size, cache_dir)
    known = _load(path, folder)
    if known is not None and white not in (None, known.white):  # kept for another white
        path = _kept(folder, image_size, cache_dir, white)
        known = _load(path, folder)
    if known is not None:
        return known
    start = time.perf_counter()
    images = _read_all(folder, image_size, max_ram_gb * 1e9, white)
    if white is None:
        white = _white(images)
    else:
        path = _kept(folder, image_size, cache_dir, white)
    channels = 1 if all(image.mode in pixels.GREY for image in images) else 3
    shape = (len(images), channels, *_one_size(folder, images, image_size))
    if np.prod(shape) > max_ram_gb * 1e9:
        utils.write_atomic(path.with_suffix(".white.json"), json.dumps(white))
        with utils.replacing(path) as temporary:
            mapped = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
            _reserve(temporary)
            _fill(mapped, images, folder, image_size, white)
            mapped.flush()
        return Decoded(_map(path), white)
    array = np.empty(shape, np.uint8)
    _fill(array, images, folder, image_size, white)
    if time.perf_counter() - start > _LONG:
        _keep(path, array, white)
    return Decoded(torch.from_numpy(array), white)


def _reserve(path: Path) -> None:
    """Take the space of a file that is mapped: a disk that is full later would end the process without a word."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _white(images: list[_Read]) -> dict[str, float]:
    """The values of white pixels in the whole folder."""
    wide = [image for image in images if image.mode in pixels.WIDE]
    floats = max((image.top for image in wide if image.mode == "F"), default=0.0)
    integers = max((image.top for image in wide if image.mode != "F"), default=0.0)
    return {"F": floats or 1.0, "I": max(255.0, 2.0 ** int(integers).bit_length() - 1)} if wide else {}


def _kept(folder: ImageFolder, image_size: int | None, cache_dir: str | None, *more: object) -> Path:
    """Where the pixels of these very files are kept."""
    stats = [os.stat(f"{folder.root}/{name}") for name in folder.files]
    dates = [(s.st_size, s.st_mtime_ns) for s in stats]
    return utils.cached(
        cache_dir, "{}.npy", _FORMAT, str(folder.root.resolve()), image_size, folder.files, dates, *more
    )


def _read_all(
    folder: ImageFolder, image_size: int | None, most: float, white: Mapping[str, float] | None
) -> list[_Read]:
    """Every image, the first ones with their pixels, `most` bytes of them in all."""
    images: list[_Read] = []
    kept = 0
    for image in _each(lambda name: _read(folder.root / name, image_size, white), folder, folder.files):
        if image is not None:
            kept += image.pixels.nbytes if image.pixels is not None else 0
            images.append(image if kept <= most else image._replace(pixels=None))
    return images


def _one_size(folder: ImageFolder, images: list[_Read], image_size: int | None) -> tuple[int, int]:
    if image_size:
        return image_size, image_size
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        small, large = min(sizes), max(sizes)
        raise UserError(
            f"--dataset {folder.root}: {len(sizes)} image sizes, from {small[1]}x{small[0]} to "
            f"{large[1]}x{large[0]}; give one side with --image_size, e.g. --image_size {min(small)}"
        )
    return sizes.pop()


def _load(path: Path, folder: ImageFolder) -> Decoded | None:
    """What was kept, if it was and it is known what was white."""
    if not path.exists():
        return None
    try:
        return Decoded(_map(path), json.loads(path.with_suffix(".white.json").read_text(encoding="utf-8")))
    except FileNotFoundError:  # of an earlier version: good if there is nothing to know
        with Image.open(folder.root / folder.files[0]) as first:
            return None if first.mode in pixels.WIDE else Decoded(_map(path), {})


def _map(path: Path) -> Tensor:
    # "c": copy on write, so that torch gets a writable array and the file stays as it is
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _keep(path: Path, array: pixels.Pixels, white: Mapping[str, float]) -> None:
    try:
        utils.write_atomic(path.with_suffix(".white.json"), json.dumps(white))
        with utils.replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, array)
    except OSError as error:
        print(f"warning: the decoded images cannot be kept in {path.parent}: {error.strerror}")
        return
    print(f"images   kept decoded in {path} ({array.nbytes / 1e6:,.0f} MB) for the next run")


def _fill(
    array: pixels.Pixels, images: list[_Read], folder: ImageFolder, image_size: int | None, white: Mapping[str, float]
) -> None:
    """Put every image into array (N, C, H, W); decode those that are not yet."""
    left = [name for name, image in zip(folder.files, images, strict=True) if image.pixels is None]
    later = _each(lambda name: _read(folder.root / name, image_size, white), folder, left)
    for index, early in enumerate(images):
        image = early if early.pixels is not None else next(later)
        if image is not None and image.pixels is not None:
            array[index] = image.pixels if image.pixels.ndim == 2 else image.pixels.transpose(2, 0, 1)
            images[index] = early._replace(pixels=None)  # not needed twice
    for _ in later:  # lets it name what has become unreadable meanwhile
        pass


def _each(read: Callable[[str], _Read], folder: ImageFolder, names: Sequence[str]) -> Iterator[_Read | None]:
    """read(name) of the files, in order, in threads, with a bar; None for bad ones, which are named at the end."""
    bad: list[str] = []

    def attempt(name: str) -> _Read | str:
        try:
            return read(name)
        except Exception as error:  # Pillow and its decoders raise a dozen types for what they cannot read
            return " ".join(str(error).split()) or type(error).__name__

    # Threads help where decoding is long; for small files they only pass Python's lock around.
    sample = names[:: max(1, len(names) // 50)]
    large = sum((folder.root / name).stat().st_size for name in sample) > 50_000 * len(sample)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        blocks = (names[first : first + 256] for first in range(0, len(names), 256))  # few are decoded ahead
        results = chain.from_iterable(pool.map(attempt, block) if large else map(attempt, block) for block in blocks)
        for name, result in zip(
            names, tqdm(results, "decoding", len(names), unit="img", leave=False, disable=None, delay=1), strict=True
        ):
            if isinstance(result, str):
                bad.append(name)
                tqdm.write(f"cannot be read: {name}: {result}")
            yield None if isinstance(result, str) else result
    if bad:
        some = ", ".join(bad[:5]) + (", ... (all of them are named above)" if len(bad) > 5 else "")
        raise UserError(
            f"--dataset {folder.root}: {len(bad)} of {len(folder.files)} images cannot be read: {some}; "
            "repair or remove them"
        )


def _read(path: Path, image_size: int | None, white: Mapping[str, float] | None = None) -> _Read:
    """One image, decoded if it has 8 bits a pixel or it is known what value is white."""
    with Image.open(path, formats=formats().get(path.suffix.lower())) as opened:
        image, mode = pixels.upright(opened), opened.mode
        (width, height), size = image.size, (image_size, image_size) if image_size else None
        if mode in pixels.WIDE and white is None:
            return _Read((height, width), mode, float(pixels.values_of(image).max()), None)
        kept = pixels.pixels_of(image, "L" if mode in pixels.GREY else "RGB", size, white or {})
        return _Read((height, width), mode, 0.0, kept)
