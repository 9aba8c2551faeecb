"""Tiny data sets and helpers that several tests use."""

import os
from pathlib import Path

import pytest
import torch
from pictures import write_images

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


@pytest.fixture
def moments() -> int:
    """Of a script in the tests of faults at which its process is killed; many with SNAS_FAULTS=long."""
    return 25 if os.environ.get("SNAS_FAULTS") == "long" else 2
