"""The images of a folder, decoded once into a uint8 tensor (N, C, H, W)."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import UnidentifiedImageError
from tqdm import tqdm

import utils
from loading import kept, pixels
from loading.folders import ImageFolder, formats
from loading.kept import Decoded
from options import UserError

_FORMAT = 2  # of the kept arrays; to be raised when decoding changes
_LONG = 3.0  # seconds of decoding that are worth keeping
_PAGED = {"GIF", "PNG", "TIFF", "WEBP"}  # formats of several pages or frames
_DARK = 4.0  # times the brightness of half of the images, from which on the brightest is told


Size = tuple[int, int]  # width, height


class _Values(NamedTuple):
    """What the numbers of an image with more than 8 bits are like."""

    top: float  # the largest
    below: bool  # whether some are negative
    lacking: bool  # whether some are no number


class _Read(NamedTuple):
    """An image as it was read."""

    size: tuple[int, int]  # H, W as shown, before resizing
    mode: str
    values: _Values | None  # of an image with more than 8 bits
    more: bool  # whether it has further pages or frames
    narrowed: bool  # whether Pillow gives only the high byte of 16
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
    notes = _odd_values(images, folder, white or {})
    if white is None:
        white = _white(images, folder)
    else:
        path = _kept(folder, size, cache_dir, white)
    channels = 1 if all(image.mode in pixels.GREY for image in images) else 3
    shape = (len(images), channels, *_one_size(folder, images, size))
    if np.prod(shape) > max_ram_gb * 1e9:
        try:
            found = kept.fill(path, shape, white, notes, lambda array: _fill(array, images, folder, size, white))
        except OSError as error:
            raise UserError(
                f"the decoded images take {np.prod(shape) / 1e9:.3g} GB, more than --max_ram_gb {max_ram_gb:g}, and "
                f"cannot be kept in {path.parent} ({error.strerror}); give another --cache_dir or more --max_ram_gb"
            ) from None
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


def _white(images: list[_Read], folder: ImageFolder) -> dict[str, float]:
    """The values of white pixels in the whole folder, of the kinds of numbers that there are."""
    tops: dict[str, float] = {}
    for image in images:
        if image.values:
            tops[_kind(image)] = max(tops.get(_kind(image), 0.0), image.values.top)
    if tops.get("F", 1.0) <= 0:
        raise UserError(
            f"{folder.option} {folder.root}: no floating-point pixel is above 0, which is black; add to the numbers"
        )
    return {kind: top if kind == "F" else max(255.0, 2.0 ** int(top).bit_length() - 1) for kind, top in tops.items()}


def _kind(image: _Read) -> str:
    return "F" if image.mode == "F" else "I"


def _odd_values(images: list[_Read], folder: ImageFolder, white: Mapping[str, float]) -> list[str]:
    """What there is to say about what becomes black, white, or dark, and what is not read at all.

    Args:
        white: what has to be white, whatever the numbers are; empty if these decide.
    """
    named = [*zip(images, folder.files, strict=True)]
    wide = [(_kind(image), image.values, name) for image, name in named if image.values]
    groups = {
        "have pixels below zero, which become black": [name for _, values, name in wide if values.below],
        "have pixels that are no numbers, which become black": [name for _, values, name in wide if values.lacking],
        "have pixels above what was white in training": [
            name for kind, values, name in wide if values.top > white.get(kind, math.inf)
        ],
        "have several pages or frames, of which the first is taken": [name for image, name in named if image.more],
        "have 16 bits a colour, of which the high 8 are taken": [name for image, name in named if image.narrowed],
    }
    notes = [
        f"{len(names):,} of {len(images):,} images {words}, e.g. {names[0]}" for words, names in groups.items() if names
    ]
    for kind in () if white else ("F", "I"):
        tops = sorted((values.top, name) for its, values, name in wide if its == kind)
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
    bad: dict[str, str] = {}

    def attempt(name: str) -> _Read | str:
        try:
            return read(name)
        except MemoryError:  # not the file's fault
            where = f"{folder.option} {folder.root}"
            raise UserError(f"{where}: out of memory at {name}; take less of --image_size or --max_ram_gb") from None
        except UnidentifiedImageError:
            return "no image, or damaged"
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
                bad[name] = result
                tqdm.write(f"cannot be read: {name}: {result}")
            yield None if isinstance(result, str) else result
    if bad:
        some = ", ".join([*bad][:5]) + (", ... (all of them are named above)" if len(bad) > 5 else "")
        raise UserError(
            f"{folder.option} {folder.root}: {len(bad)} of {len(folder.files)} images cannot be read: {some} "
            f"({next(iter(bad.values()))}); repair or remove them"
        )


def _read(path: Path, size: Size | None, white: Mapping[str, float] | None = None) -> _Read:
    """One image, decoded if it has 8 bits a pixel or it is known what value is white."""
    with pixels.opened(path, formats().get(path.suffix.lower())) as opened:
        mode, values = opened.mode, None
        more = opened.format in _PAGED and getattr(opened, "n_frames", 1) > 1
        narrowed = mode not in pixels.WIDE and ";16" in str(getattr(opened, "tile", ""))
        image = pixels.upright(opened)
        if mode in pixels.WIDE:
            numbers = pixels.values_of(image)
            lacking = bool(np.isnan(np.asarray(image)).any())
            values = _Values(float(numbers.max()), bool(numbers.min() < 0), lacking)
        ready = None
        if values is None or white is not None:
            ready = pixels.pixels_of(image, "L" if mode in pixels.GREY else "RGB", size, white or {})
        return _Read((image.size[1], image.size[0]), mode, values, more, narrowed, ready)
