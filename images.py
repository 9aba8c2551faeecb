"""A folder of images, one subfolder per class, decoded once into a uint8 tensor (N, C, H, W)."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from options import UserError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".pgm", ".ppm"}
_WIDE = {"I;16", "I;16B", "I;16L", "I", "F"}  # more than 8 bits a pixel, one channel
_GREY = {"1", "L", "LA", "La"} | _WIDE
_ORIENTATION = 0x0112  # EXIF tag

T = TypeVar("T")


class ImageFolder(NamedTuple):
    """What lies in a data folder: the class names and, in order, the files with their classes."""

    root: Path
    classes: list[str]
    files: list[str]  # relative to root, with forward slashes
    labels: list[int]


def scan(root: Path) -> ImageFolder:
    """List a folder with one subfolder of images per class, at any depth, hidden ones left out.

    Raises:
        UserError: no such folder, fewer than two classes, or a class without an image.
    """
    if not root.is_dir():
        raise UserError(
            f"--dataset {root}: no such folder; give a folder with one subfolder of images per class, "
            "or cifar10, cifar100, fashion_mnist"
        )
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))
    files: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        found = sorted(
            path.relative_to(root).as_posix()
            for path in folder.rglob("*")
            if path.suffix.lower() in EXTENSIONS and path.is_file() and not _hidden(path.relative_to(folder))
        )
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


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


class _Header(NamedTuple):
    size: tuple[int, int]  # H, W as shown
    mode: str
    top: float  # largest value of an image with more than 8 bits, else 0


def decode(folder: ImageFolder, image_size: int | None, max_ram_gb: float, cache_dir: Path) -> Tensor:
    """Every image of the folder as uint8 (N, C, H, W), C = 1 if all are grey and 3 otherwise.

    Transparent pixels become black, palettes and CMYK become RGB, EXIF rotations are applied. Grey integers
    of more than 8 bits are scaled by the number of bits in use in the whole folder (12-bit pictures in 16-bit
    files do not turn black), floating-point pixels by the largest value of the folder. Of 16-bit colours the
    high byte is taken, as Pillow does.

    Args:
        image_size: side to resize (shorter side) and crop (centre) to; None keeps the size, if there is one.
        max_ram_gb: larger results lie in a memory-mapped file of cache_dir, which later runs use again.
    Raises:
        UserError: unreadable files, or several sizes and no image_size.
    """
    headers = _each(_read_header, folder, "reading headers")
    sizes = {header.size for header in headers}
    if image_size is None and len(sizes) > 1:
        small, large = min(sizes), max(sizes)
        raise UserError(
            f"--dataset {folder.root}: {len(sizes)} image sizes, from {small[1]}x{small[0]} to "
            f"{large[1]}x{large[0]}; give one side with --image_size, e.g. --image_size {min(small)}"
        )
    height, width = (image_size, image_size) if image_size else next(iter(sizes))
    channels = 1 if all(header.mode in _GREY for header in headers) else 3
    floats = max((header.top for header in headers if header.mode == "F"), default=0.0)
    integers = max((header.top for header in headers if header.mode != "F"), default=0.0)
    white = {"F": floats or 1.0, "I": max(255.0, 2.0 ** int(integers).bit_length() - 1)}
    shape = (len(folder.files), channels, height, width)

    def read(path: Path) -> np.ndarray[Any, Any]:
        return _read_pixels(path, channels, (height, width), white)

    if np.prod(shape) <= max_ram_gb * 1e9:
        pixels = np.empty(shape, np.uint8)
        _fill(pixels, _lazily(read, folder, "decoding"))
        return torch.from_numpy(pixels)
    return torch.from_numpy(_mapped(folder, shape, read, cache_dir))


def _mapped(
    folder: ImageFolder, shape: tuple[int, ...], read: Callable[[Path], Any], cache_dir: Path
) -> np.ndarray[Any, Any]:
    """The .npy of these very files (names, sizes, dates), written first if it is not there."""
    stats = [(folder.root / name).stat() for name in folder.files]
    key = repr((str(folder.root.resolve()), shape, folder.files, [(s.st_size, s.st_mtime_ns) for s in stats]))
    path = cache_dir.expanduser() / f"{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        pixels = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
        try:
            _fill(pixels, _lazily(read, folder, "decoding"))
            pixels.flush()
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    # "c": copy on write, so that torch gets a writable array and the file stays as it is
    return np.load(path, mmap_mode="c")


def _fill(pixels: np.ndarray[Any, Any], images: Iterator[Any]) -> None:
    for index, image in enumerate(images):
        pixels[index] = image


def _lazily(read: Callable[[Path], T], folder: ImageFolder, what: str) -> Iterator[T]:
    """read(path) of every file, in order, in threads, with a bar; bad files are named together at the end."""
    bad: list[str] = []
    example: list[T] = []

    def attempt(name: str) -> T | Exception:
        try:
            return read(folder.root / name)
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return error

    # Threads help where decoding is long; for small files they only pass Python's lock around.
    sample = folder.files[:: max(1, len(folder.files) // 50)]
    large = sum((folder.root / name).stat().st_size for name in sample) > 50_000 * len(sample)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1) if large else 1) as pool:
        results: Iterable[T | Exception] = pool.map(attempt, folder.files)
        bar = tqdm(results, what, len(folder.files), unit="img", leave=False, disable=None, delay=1)
        for name, result in zip(folder.files, bar, strict=True):
            if isinstance(result, Exception):
                bad.append(name)
                if example:
                    yield example[0]  # keeps its place until all bad files are known
                continue
            example = example or [result]
            yield result
    if bad:
        names = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
        raise UserError(
            f"--dataset {folder.root}: {len(bad)} of {len(folder.files)} images cannot be read: {names}; "
            "repair or remove them"
        )


def _each(read: Callable[[Path], T], folder: ImageFolder, what: str) -> list[T]:
    return list(_lazily(read, folder, what))


def _read_header(path: Path) -> _Header:
    with Image.open(path) as image:
        width, height = image.size
        # A TIFF's size is the turned one already, and its load() turns the pixels; asking a PNG decodes it.
        asks = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
        if asks and image.getexif().get(_ORIENTATION, 1) >= 5:  # turned by 90 degrees
            width, height = height, width
        top = float(np.nan_to_num(np.asarray(image)).max()) if image.mode in _WIDE else 0.0
        return _Header((height, width), image.mode, top)


def _read_pixels(path: Path, channels: int, size: tuple[int, int], white: Mapping[str, float]) -> np.ndarray[Any, Any]:
    """One image as uint8 (C, H, W)."""
    with Image.open(path) as opened:
        image: Image.Image = opened if opened.format == "TIFF" else ImageOps.exif_transpose(opened)
        if image.mode in _WIDE:
            scale = 255 / white["F" if image.mode == "F" else "I"]
            values = np.nan_to_num(np.asarray(image, np.float64)) * scale
            image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
        if image.mode in ("RGBA", "LA", "La", "RGBa", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
        image = image.convert("L" if channels == 1 else "RGB")
        if image.size != size[::-1]:
            image = ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC)
        pixels = np.asarray(image)  # (H, W) or (H, W, 3)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
