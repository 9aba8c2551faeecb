"""A folder of images, one subfolder per class, decoded once into a uint8 tensor (N, C, H, W)."""

import math
import os
import re
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
from tqdm import tqdm

import utils
from loading import kept, pixels
from loading.kept import Decoded
from options import UserError

_NEEDS_MORE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow knows but cannot read alone
_SPLITS = re.compile(r"(train|val|test|eval|dev|unlabell?ed)(ing|id|idation)?(?![a-z])")  # of a folder's name
_FORMAT = 2  # of the kept arrays; to be raised when decoding changes
_LONG = 3.0  # seconds of decoding that are worth keeping
_DARK = 4.0  # times the brightness of half of the images, from which on the brightest is told


Size = tuple[int, int]  # width, height


class ImageFolder(NamedTuple):
    """What lies in a data folder: the class names and, in order, the files with their classes."""

    root: Path
    classes: list[str]
    files: list[str]  # relative to root, with forward slashes
    labels: list[int]
    left_out: str = ""  # in words
    option: str = "--dataset"  # where it was asked for


@cache
def formats() -> dict[str, tuple[str, ...]]:
    """The endings, in lower case, of the files that Pillow reads: each with its formats, the likeliest first.

    (All of them are registered here; in Pillow's order a folder of TIFFs took a seventh longer to decode.)
    """
    known = Image.registered_extensions()
    able = [kind for kind in Image.ID if kind not in _NEEDS_MORE]
    return {end: (kind, *(other for other in able if other != kind)) for end, kind in known.items() if kind in able}


def scan(root: Path, names: Iterable[str] = (), option: str = "--dataset") -> ImageFolder:
    """List a folder with one subfolder of images per class, at any depth, linked folders too, hidden ones left out.

    Args:
        names: what might have been meant instead.
        option: where it was asked for; to be tested on, one class does.

    Raises:
        UserError: no such folder, fewer than two classes, a class without an image, or splits in place of classes.
    """
    if not root.is_dir():
        raise UserError(
            f"{option} {root}: no such folder; give a folder with one subfolder of images per class"
            + "".join(f", or {name}" for name in names)
        )
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))
    parts = {match[1] for path in folders if (match := _SPLITS.match(path.name.lower()))}
    if len(parts) > 1:
        raise UserError(
            f"{option} {root}: its folders {', '.join(path.name for path in folders)} are splits, not classes; "
            "give a folder with one subfolder per class, and --split with a file of the lists train, valid and test"
        )
    files: list[str] = []
    labels: list[int] = []
    others: Counter[str] = Counter()
    for label, folder in enumerate(folders):
        found = sorted(_files(str(folder), f"{folder.name}/", others, (os.path.realpath(root),)))
        if not found and option != "--dataset":
            others["empty class folder"] += 1
        elif not found:
            left = f" but {_in_words(others)}" if others else ""
            raise UserError(
                f"{option} {root}: the class folder {folder.name!r} holds no images{left}; fill it or remove it"
            )
        files += found
        labels += [label] * len(found)
    least = 2 if option == "--dataset" else 1
    if len(folders) < least or not files:
        raise UserError(
            f"{option} {root}: {len(folders) if files else 0} class folders with images found, at least {least} "
            "are needed; each subfolder is a class"
        )
    return ImageFolder(root, [folder.name for folder in folders], files, labels, _in_words(others), option)


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


class _Values(NamedTuple):
    """What the numbers of an image with more than 8 bits are like."""

    top: float  # the largest
    below: bool  # whether some are negative
    lacking: bool  # whether some are no number


class _Read(NamedTuple):
    """An image as it was read."""

    size: tuple[int, int]  # H, W as shown, before resizing
    mode: str
    values: _Values | None  # of an image with more than 8 bits, if it is not known what is white
    pixels: np.ndarray[Any, Any] | None  # uint8 (H, W) or (H, W, 3), resized; None if not decoded yet


def decode(
    folder: ImageFolder,
    size: Size | None,
    max_ram_gb: float,
    cache_dir: str | None = None,
    white: dict[str, float] | None = None,
    max_cache_gb: float = math.inf,
) -> Decoded:
    """Every image of the folder, C = 1 if all are grey and 3 otherwise.

    Transparent pixels become black, palettes and CMYK become RGB, EXIF rotations are applied. Grey integers
    of more than 8 bits are scaled by the number of bits in use in the whole folder (12-bit pictures in 16-bit
    files do not turn black), floating-point pixels by the largest value of the folder. Of 16-bit colours the
    high byte is taken, as Pillow does.

    What took long to decode, or is larger than max_ram_gb, is kept in cache_dir as a .npy file of these very files
    (names, sizes, dates), which a later run maps into memory and starts at once.

    Args:
        size: width and height to resize (shorter side) and crop (centre) to; None keeps the size, if there is one.
        max_ram_gb: limit of the memory used.
        white: what is white in images that others have to be like.
        max_cache_gb: limit of what is kept; files that were not used for longest go first.
    Raises:
        UserError: unreadable files, or several sizes and none to bring them to.
    """
    path = _kept(folder, size, cache_dir)
    known = kept.load(path)
    if known is not None and white not in (None, known.white):  # kept for another white
        path = _kept(folder, size, cache_dir, white)
        known = kept.load(path)
    if known is not None:
        return known
    start = time.perf_counter()
    images = _read_all(folder, size, max_ram_gb * 1e9, white)
    notes: list[str] = []
    if white is None:
        white, notes = _white(images), _odd_values(images, folder)
    else:
        path = _kept(folder, size, cache_dir, white)
    channels = 1 if all(image.mode in pixels.GREY for image in images) else 3
    shape = (len(images), channels, *_one_size(folder, images, size))
    if np.prod(shape) > max_ram_gb * 1e9:
        found = kept.fill(path, shape, white, notes, lambda array: _fill(array, images, folder, size, white))
        _trim(path, max_cache_gb)
        return found
    array = np.empty(shape, np.uint8)
    _fill(array, images, folder, size, white)
    found = Decoded(torch.from_numpy(array), white, notes)
    if time.perf_counter() - start > _LONG:
        try:
            kept.keep(path, *found)
        except OSError as error:
            print(f"warning: the decoded images cannot be kept in {path.parent}: {error.strerror}")
        else:
            print(f"images   kept decoded in {path} ({array.nbytes / 1e6:,.0f} MB) for the next run")
            _trim(path, max_cache_gb)
    return found


def _trim(path: Path, most: float) -> None:
    if removed := kept.trim(path, most * 1e9):
        print(f"images   {removed} older files of decoded images removed from {path.parent} (--max_cache_gb {most:g})")


def _white(images: list[_Read]) -> dict[str, float]:
    """The values of white pixels in the whole folder."""
    wide = [(image.mode, image.values.top) for image in images if image.values]
    floats = max((top for mode, top in wide if mode == "F"), default=0.0)
    integers = max((top for mode, top in wide if mode != "F"), default=0.0)
    return {"F": floats or 1.0, "I": max(255.0, 2.0 ** int(integers).bit_length() - 1)} if wide else {}


def _odd_values(images: list[_Read], folder: ImageFolder) -> list[str]:
    """What there is to say about numbers of more than 8 bits: those that become black, those that make others dark."""
    wide = [
        (image.mode == "F", image.values, name)
        for image, name in zip(images, folder.files, strict=True)
        if image.values
    ]
    notes = []
    for field, words in (("below", "below zero"), ("lacking", "that are no numbers")):
        names = [name for _, values, name in wide if getattr(values, field)]
        if names:
            notes.append(
                f"{len(names):,} of {len(images):,} images have pixels {words}, which become black, e.g. {names[0]}"
            )
    for kind in (True, False):
        tops = sorted((values.top, name) for floats, values, name in wide if floats is kind)
        if tops and tops[-1][0] > _DARK * max(1e-30, median := tops[len(tops) // 2][0]):
            notes.append(
                f"{tops[-1][1]} has pixels of {tops[-1][0]:.6g}, which set what is white, and half of the images stay "
                f"below {median:.6g}: they will be dark; remove it if it is wrong"
            )
    return notes


def _kept(folder: ImageFolder, size: Size | None, cache_dir: str | None, *more: object) -> Path:
    """Where the pixels of these very files are kept."""
    stats = [os.stat(f"{folder.root}/{name}") for name in folder.files]
    dates = [(s.st_size, s.st_mtime_ns) for s in stats]
    return utils.cached(cache_dir, "{}.npy", _FORMAT, str(folder.root.resolve()), size, folder.files, dates, *more)


def _read_all(folder: ImageFolder, size: Size | None, most: float, white: Mapping[str, float] | None) -> list[_Read]:
    """Every image, the first ones with their pixels, `most` bytes of them in all."""
    images: list[_Read] = []
    held = 0
    for image in _each(lambda name: _read(folder.root / name, size, white), folder, folder.files):
        if image is not None:
            held += image.pixels.nbytes if image.pixels is not None else 0
            images.append(image if held <= most else image._replace(pixels=None))
    return images


def _one_size(folder: ImageFolder, images: list[_Read], size: Size | None) -> tuple[int, int]:
    if size:
        return size[1], size[0]
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        small, large = min(sizes), max(sizes)
        raise UserError(
            f"{folder.option} {folder.root}: {len(sizes)} image sizes, from {small[1]}x{small[0]} to "
            f"{large[1]}x{large[0]}; give one side with --image_size, e.g. --image_size {min(small)}"
        )
    return sizes.pop()


def _fill(
    array: pixels.Pixels, images: list[_Read], folder: ImageFolder, size: Size | None, white: Mapping[str, float]
) -> None:
    """Put every image into array (N, C, H, W); decode those that are not yet."""
    left = [name for name, image in zip(folder.files, images, strict=True) if image.pixels is None]
    later = _each(lambda name: _read(folder.root / name, size, white), folder, left)
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
            f"{folder.option} {folder.root}: {len(bad)} of {len(folder.files)} images cannot be read: {some}; "
            "repair or remove them"
        )


def _read(path: Path, size: Size | None, white: Mapping[str, float] | None = None) -> _Read:
    """One image, decoded if it has 8 bits a pixel or it is known what value is white."""
    with Image.open(path, formats=formats().get(path.suffix.lower())) as opened:
        image, mode = pixels.upright(opened), opened.mode
        width, height = image.size
        if mode in pixels.WIDE and white is None:
            raw, values = np.asarray(image), pixels.values_of(image)
            about = _Values(float(values.max()), bool(values.min() < 0), bool(np.isnan(raw).any()))
            return _Read((height, width), mode, about, None)
        ready = pixels.pixels_of(image, "L" if mode in pixels.GREY else "RGB", size, white or {})
        return _Read((height, width), mode, None, ready)
