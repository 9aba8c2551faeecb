"""From an image file to pixels, in training and at use alike.

This file needs Pillow and numpy alone: `export_model.py` writes it beside the model, so that what is done to pixels in
training is done to those that the model is given.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

Pixels = np.ndarray[Any, Any]  # uint8 (H, W), or (H, W, 3)

WIDE = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")  # Pillow's modes of more than 8 bits a pixel, one channel
GREY = ("1", "L", "LA", "La", *WIDE)


def upright(image: Image.Image) -> Image.Image:
    """The image as it is meant to be seen. (A TIFF's size is the turned one already; its load() turns the pixels.)"""
    return image if image.format == "TIFF" else ImageOps.exif_transpose(image)


@contextmanager
def opened(path: str | Path, formats: tuple[str, ...] | None = None) -> Iterator[Image.Image]:
    """The image of a file, not yet decoded. (Pillow maps a file that it opens by name, and a turned TIFF wrongly.)"""
    with open(path, "rb") as file, Image.open(file, formats=formats) as image:
        yield image


def values_of(image: Image.Image) -> Pixels:
    """The numbers of an image with more than 8 bits, (H, W) float64; what is no number counts as 0.

    Raises:
        ValueError: a pixel is infinite, or none is a number.
    """
    values = np.asarray(image, np.float64)
    if np.isinf(values).any():
        raise ValueError(f"{int(np.isinf(values).sum())} of its pixels are infinite")
    if np.isnan(values).all():
        raise ValueError("none of its pixels is a number")
    return np.nan_to_num(values)


def pixels_of(image: Image.Image, mode: str, size: tuple[int, int] | None, white: Mapping[str, float]) -> Pixels:
    """Bytes of an upright image.

    Transparent pixels become black; numbers of more than 8 bits are divided by what is white.

    Args:
        mode: L or RGB.
        size: width and height to resize and crop to (at the centre); None keeps the image's own.
        white: the value of a white pixel of integers (I) and of floats (F).
    Raises:
        ValueError: a pixel is infinite, or it is not known what is white.
    """
    if image.mode in WIDE:
        kind = "F" if image.mode == "F" else "I"
        if kind not in white:
            what = "floating-point numbers" if kind == "F" else "more than 8 bits a pixel"
            raise ValueError(f"it has {what}, the images of training had not: what is white is unknown")
        scaled = values_of(image) * (255 / white[kind])
        image = Image.fromarray(scaled.clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "La", "RGBa", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    image = image.convert(mode)
    if size and image.size != tuple(size):
        image = ImageOps.fit(image, (size[0], size[1]), Image.Resampling.BICUBIC)
    return np.asarray(image)


def preprocess(path: str | Path, mode: str, size: tuple[int, int], white: Mapping[str, float]) -> Pixels:
    """The bytes of an image file as a model takes them, (1, C, H, W); arguments as for `pixels_of`."""
    with opened(path) as image:
        if image.mode in WIDE and values_of(image).max() > white.get("F" if image.mode == "F" else "I", np.inf):
            warnings.warn(f"{path}: some pixels are above what was white in training", stacklevel=2)
        pixels = pixels_of(upright(image), mode, size, white)
    return np.ascontiguousarray(pixels.reshape(1, *pixels.shape[:2], -1).transpose(0, 3, 1, 2))
