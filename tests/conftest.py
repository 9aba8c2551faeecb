"""Tiny data sets and helpers that several tests use."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main

os.environ.setdefault("SNAS_KERNELS", "on")  # what is tested does not depend on a measurement
CHIPS = Path(__file__).parents[2] / "shared" / "data" / "xview_chips"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it gives


@pytest.fixture(scope="session")
def chips() -> Path:
    """The real xView chips, where they lie beside the checkout."""
    if not CHIPS.is_dir():
        pytest.skip(f"the xView chips are not at {CHIPS}: they are not part of the project")
    return CHIPS


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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 classes of 12 RGB images of 8 x 8 pixels."""
    return write_images(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def arguments(tiny: Path, tmp_path: Path) -> list[str]:
    """The command line of a search that takes seconds."""
    return [
        f"--dataset={tiny}", f"--experiments_dir={tmp_path}/experiments", f"--visualizations_dir={tmp_path}/visualizations",
        "--name=run", "--epochs=2", "--layers=3", "--init_channels=4", "--nodes=1", "--batch_size=4", "--crop_padding=1",
        "--device=cpu", "--arch_learning_rate=0.01",
    ]  # fmt: skip


@pytest.fixture
def searched(arguments: list[str]) -> list[str]:
    """A finished search called run, and the command line of a short retraining of its child."""
    main.main(arguments)
    return [*arguments[:3], "--genotype=run", "--name=again", "--epochs=3", "--layers=3", "--init_channels=4",
            "--batch_size=4", "--auxiliary=False", "--crop_padding=1", "--cutout_length=2", "--device=cpu"]  # fmt: skip
