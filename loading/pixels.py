"""From an image file to pixels, in training and at use alike.

This file needs Pillow and numpy alone: `export_model.py` writes it beside the model, so that what is done to pixels in
training is done to those that the model is given.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

Pixels = np.ndarray[Any, Any]  # uint8 (H, W), or (H, W, 3)

WIDE = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")  # Pillow's modes of more than 8 bits a pixel, one channel
GREY = ("1", "L", "LA", "La", *WIDE)


def upright(opened: Image.Image) -> Image.Image:
    """The image as it is meant to be seen. (A TIFF's size is the turned one already; its load() turns the pixels.)"""
    return opened if opened.format == "TIFF" else ImageOps.exif_transpose(opened)


def values_of(image: Image.Image) -> Pixels:
    """The numbers of an image with more than 8 bits, (H, W) float64; what is no number counts as 0.

    Raises:
        ValueError: a pixel is infinite.
    """
    values = np.asarray(image, np.float64)
    if np.isinf(values).any():
        raise ValueError(f"{int(np.isinf(values).sum())} of its pixels are infinite")
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
            raise ValueError(
                "it has more than 8 bits a pixel, the images of training had not: what is white is unknown"
            )
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
    with Image.open(path) as opened:
        pixels = pixels_of(upright(opened), mode, size, white)
    return np.ascontiguousarray(pixels.reshape(1, *pixels.shape[:2], -1).transpose(0, 3, 1, 2))
