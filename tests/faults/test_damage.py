"""A damaged checkpoint is refused with the name of what is damaged and of another that is whole; never loaded."""

import os
import random
import re
import zipfile
from pathlib import Path

import pytest
import torch

import inspect_model
import main
from options import UserError
from training import checkpoint

CASES = 5000 if os.environ.get("SNAS_FAULTS") == "long" else 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A search of two epochs, both of which are kept."""
    place = tmp_path_factory.mktemp("damage")
    given = [f"--dataset={tiny}", "--layers=3", "--init_channels=4", "--nodes=1", "--batch_size=4", "--crop_padding=1"]
    given += [f"--{kind}_dir={place / kind}" for kind in ("experiments", "visualizations")]
    return main.main([*given, "--name=run", "--epochs=2", "--save_freq=1", "--device=cpu"]).folder


def test_flipped_bits_anywhere_and_cuts_are_refused(folder: Path, tmp_path: Path) -> None:
    path, source = folder / "weights_epoch_2.pt", random.Random(0)
    whole, other = path.read_bytes(), tmp_path / "weights_epoch_2.pt"
    for case in range(CASES):
        damaged = bytearray(whole)
        if case % 4 == 3:
            damaged = damaged[: source.randrange(len(whole))]
        else:
            for _ in range(source.randint(1, 4)):
                damaged[source.randrange(len(whole))] ^= 1 << source.randrange(8)
        if damaged == whole:
            continue
        other.write_bytes(damaged)
        with pytest.raises(UserError, match=r"is damaged|not a checkpoint") as error:
            checkpoint.read(other)
        assert "\n" not in str(error.value)
    other.write_bytes(whole)
    checkpoint.read(other)


@pytest.mark.parametrize("name", ["parts.network.alpha_normal", "parts.network.classifier.weight"])
def test_what_is_damaged_is_named_and_the_last_good_epoch(folder: Path, name: str) -> None:
    path = folder / "weights_epoch_2.pt"
    whole, value = path.read_bytes(), checkpoint.read(path)
    for key in name.split(".", 2):
        value = value[key]
    assert isinstance(value, torch.Tensor)
    place = whole.index(value.contiguous().numpy().tobytes())
    path.write_bytes(whole[: place + 3] + bytes([whole[place + 3] ^ 1]) + whole[place + 4 :])
    try:
        advice = f"{re.escape(name)} is not what was written; .*weights_epoch_1.pt is whole"
        with pytest.raises(UserError, match=advice):
            checkpoint.read(path)
        with pytest.raises(UserError, match=advice):
            inspect_model.main(["--experiment=run", f"--experiments_dir={folder.parent}", "--visualize=False"])
    finally:
        path.write_bytes(whole)


def test_one_that_claims_more_than_it_has_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "weights_epoch_1.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data/0", bytes(10**8))
    assert path.stat().st_size < 10**6
    with pytest.raises(UserError, match="larger than the file"):
        checkpoint.read(path)
    with path.open("r+b") as file:
        checkpoint._seal(file)  # by somebody who means it
    with pytest.raises(UserError, match="larger than the file"):
        checkpoint.read(path)


def test_one_of_before_has_the_checksums_of_its_archive(tmp_path: Path) -> None:
    path = tmp_path / "weights_epoch_1.pt"
    torch.save({"format": 1, "tensor": torch.ones(1000)}, path)
    assert torch.equal(checkpoint.read(path)["tensor"], torch.ones(1000))
    content = bytearray(path.read_bytes())
    content[content.index(b"\0\0\x80\x3f" * 9) + 6] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="tensor is not what was written"):
        checkpoint.read(path)
    torch.save({"format": checkpoint.FORMAT}, path)
    with pytest.raises(UserError, match="its digest is missing"):
        checkpoint.read(path)
