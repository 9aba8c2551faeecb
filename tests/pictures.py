"""Folders of small images, and what is read of them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from loading import folders, images


def write_images(
    root: Path, classes: int = 3, per_class: int = 12, size: tuple[int, int] = (8, 8), mode: str = "RGB"
) -> Path:
    """A folder of classes that differ in brightness, with noise, file names GROUP_NUMBER.png (4 a group)."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        folder = root / f"class{label}"
        folder.mkdir(parents=True)
        for number in range(per_class):
            shape = size if mode == "L" else (*size, 3)
            pixels = rng.integers(0, 60, shape) + label * 180 // max(1, classes - 1)
            Image.fromarray(pixels.astype(np.uint8), mode).save(folder / f"{number // 4}_{number}.png")
    return root


def folder_of(root: Path, files: dict[str, Image.Image]) -> folders.ImageFolder:
    """A class for every image, by its file name."""
    for label, (name, image) in enumerate(files.items()):
        (root / f"c{label}").mkdir(parents=True, exist_ok=True)
        image.save(root / f"c{label}" / name)
    return folders.scan(root)


def decode(
    folder: folders.ImageFolder, size: int | None = None, ram: float = 1.0, cache: Path = Path("/nowhere")
) -> torch.Tensor:
    """The pixels, as a run has them."""
    return images.decode(folder, (size, size) if size else None, ram, str(cache)).pixels


def ramp(top: int, dtype: type = np.uint8) -> np.ndarray:
    """Sixteen values from 0 to `top`."""
    return np.linspace(0, top, 16).reshape(4, 4).astype(dtype)
