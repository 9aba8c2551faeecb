"""A folder of images, one subfolder per class, decoded once into a uint8 tensor (N, C, H, W)."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

import utils
from options import UserError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".pgm", ".ppm"}
_WIDE = {"I;16", "I;16B", "I;16L", "I", "F"}  # more than 8 bits a pixel, one channel
_GREY = {"1", "L", "LA", "La"} | _WIDE
_FORMAT = 1  # of the kept arrays; to be raised when decoding changes
_LONG = 3.0  # seconds of decoding that are worth keeping


class ImageFolder(NamedTuple):
    """What lies in a data folder: the class names and, in order, the files with their classes."""

    root: Path
    classes: list[str]
    files: list[str]  # relative to root, with forward slashes
    labels: list[int]


def scan(root: Path, names: Iterable[str] = ()) -> ImageFolder:
    """List a folder with one subfolder of images per class, at any depth, hidden ones left out.

    Args:
        names: what might have been meant instead.

    Raises:
        UserError: no such folder, fewer than two classes, or a class without an image.
    """
    if not root.is_dir():
        raise UserError(
            f"--dataset {root}: no such folder; give a folder with one subfolder of images per class"
            + "".join(f", or {name}" for name in names)
        )
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))
    files: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        found = sorted(_files(str(folder), f"{folder.name}/"))
        if not found:
            raise UserError(f"--dataset {root}: the class folder {folder.name!r} holds no images; fill it or remove it")
        files += found
        labels += [label] * len(found)
    if len(folders) < 2:
        raise UserError(
            f"--dataset {root}: {len(folders)} class folders with images found, at least 2 are needed; "
            "each subfolder is a class"
        )
    return ImageFolder(root, [folder.name for folder in folders], files, labels)


def _files(folder: str, prefix: str) -> Iterator[str]:
    """The images in a folder and below, as prefix + relative path, hidden ones left out."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _files(entry.path, f"{prefix}{entry.name}/")
            elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS and entry.is_file():
                yield prefix + entry.name


class _Read(NamedTuple):
    """An image as it was read."""

    size: tuple[int, int]  # H, W as shown, before resizing
    mode: str
    top: float  # largest value of an image with more than 8 bits, else 0
    pixels: np.ndarray[Any, Any] | None  # uint8 (H, W) or (H, W, 3), resized; None if not decoded yet


def decode(folder: ImageFolder, image_size: int | None, max_ram_gb: float, cache_dir: str | None = None) -> Tensor:
    """Every image of the folder as uint8 (N, C, H, W), C = 1 if all are grey and 3 otherwise.

    Transparent pixels become black, palettes and CMYK become RGB, EXIF rotations are applied. Grey integers
    of more than 8 bits are scaled by the number of bits in use in the whole folder (12-bit pictures in 16-bit
    files do not turn black), floating-point pixels by the largest value of the folder. Of 16-bit colours the
    high byte is taken, as Pillow does.

    What took long to decode, or is larger than max_ram_gb, is kept in cache_dir as a .npy file of these very files
    (names, sizes, dates), which a later run maps into memory and starts at once.

    Args:
        image_size: side to resize (shorter side) and crop (centre) to; None keeps the size, if there is one.
        max_ram_gb: limit of the memory used.
    Raises:
        UserError: unreadable files, or several sizes and no image_size.
    """
    path = _kept(folder, image_size, cache_dir)
    if path.exists():
        return _load(path)
    start = time.perf_counter()
    images = _read_all(folder, image_size, max_ram_gb * 1e9)
    channels = 1 if all(image.mode in _GREY for image in images) else 3
    shape = (len(images), channels, *_one_size(folder, images, image_size))
    if np.prod(shape) > max_ram_gb * 1e9:
        with utils.replacing(path) as temporary:
            mapped = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
            _fill(mapped, images, folder, image_size)
            mapped.flush()
        return _load(path)
    pixels = np.empty(shape, np.uint8)
    _fill(pixels, images, folder, image_size)
    if time.perf_counter() - start > _LONG:
        _keep(path, pixels)
    return torch.from_numpy(pixels)


def _kept(folder: ImageFolder, image_size: int | None, cache_dir: str | None) -> Path:
    """Where the pixels of these very files are kept."""
    stats = [os.stat(f"{folder.root}/{name}") for name in folder.files]
    dates = [(s.st_size, s.st_mtime_ns) for s in stats]
    return utils.cached(cache_dir, "{}.npy", _FORMAT, str(folder.root.resolve()), image_size, folder.files, dates)


def _read_all(folder: ImageFolder, image_size: int | None, most: float) -> list[_Read]:
    """Every image, the first ones with their pixels, `most` bytes of them in all."""
    images: list[_Read] = []
    kept = 0
    for image in _each(lambda name: _read(folder.root / name, image_size), folder, folder.files):
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


def _load(path: Path) -> Tensor:
    # "c": copy on write, so that torch gets a writable array and the file stays as it is
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _keep(path: Path, pixels: np.ndarray[Any, Any]) -> None:
    try:
        with utils.replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, pixels)
    except OSError as error:
        print(f"warning: the decoded images cannot be kept in {path.parent}: {error.strerror}")
        return
    print(f"images   kept decoded in {path} ({pixels.nbytes / 1e6:,.0f} MB) for the next run")


def _fill(pixels: np.ndarray[Any, Any], images: list[_Read], folder: ImageFolder, image_size: int | None) -> None:
    """Put every image into pixels (N, C, H, W); decode those that are not yet."""
    floats = max((image.top for image in images if image.mode == "F"), default=0.0)
    integers = max((image.top for image in images if image.mode != "F"), default=0.0)
    white = {"F": floats or 1.0, "I": max(255.0, 2.0 ** int(integers).bit_length() - 1)}
    left = [name for name, image in zip(folder.files, images, strict=True) if image.pixels is None]
    later = _each(lambda name: _read(folder.root / name, image_size, white), folder, left)
    for index, early in enumerate(images):
        image = early if early.pixels is not None else next(later)
        if image is not None and image.pixels is not None:
            pixels[index] = image.pixels if image.pixels.ndim == 2 else image.pixels.transpose(2, 0, 1)
    for _ in later:  # lets it name what has become unreadable meanwhile
        pass


def _each(read: Callable[[str], _Read], folder: ImageFolder, names: Sequence[str]) -> Iterator[_Read | None]:
    """read(name) of the files, in order, in threads, with a bar; None for bad ones, which are named at the end."""
    bad: list[str] = []

    def attempt(name: str) -> _Read | None:
        try:
            return read(name)
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None

    # Threads help where decoding is long; for small files they only pass Python's lock around.
    sample = names[:: max(1, len(names) // 50)]
    large = sum((folder.root / name).stat().st_size for name in sample) > 50_000 * len(sample)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(attempt, names) if large else map(attempt, names)
        for name, result in zip(
            names, tqdm(results, "decoding", len(names), unit="img", leave=False, disable=None, delay=1), strict=True
        ):
            if result is None:
                bad.append(name)
            yield result
    if bad:
        some = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
        raise UserError(
            f"--dataset {folder.root}: {len(bad)} of {len(folder.files)} images cannot be read: {some}; "
            "repair or remove them"
        )


def _read(path: Path, image_size: int | None, white: Mapping[str, float] | None = None) -> _Read:
    """One image, decoded if it has 8 bits a pixel or it is known what value is white."""
    with Image.open(path) as opened:
        # A TIFF's size is the turned one already, and its load() turns the pixels.
        image: Image.Image = opened if opened.format == "TIFF" else ImageOps.exif_transpose(opened)
        width, height = image.size
        mode = opened.mode
        if mode in _WIDE:
            values = np.nan_to_num(np.asarray(image, np.float64))
            if white is None:
                return _Read((height, width), mode, float(values.max()), None)
            values *= 255 / white["F" if mode == "F" else "I"]
            image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
        if image.mode in ("RGBA", "LA", "La", "RGBa", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
        image = image.convert("L" if mode in _GREY else "RGB")
        if image_size and image.size != (image_size, image_size):
            image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
        return _Read((height, width), mode, 0.0, np.asarray(image))
