"""Folders of small images."""

from pathlib import Path

import numpy as np
from PIL import Image


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
