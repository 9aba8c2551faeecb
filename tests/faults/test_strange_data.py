"""Folders as people have them: every oddity is read and counted, told, or refused in one line."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pictures import write_images
from PIL import Image

import main
from options import UserError


def image(*shape: int) -> Image.Image:
    """Noise."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, shape or (8, 8, 3), dtype=np.uint8))


def bands(path: Path) -> None:
    """A TIFF of 8 x 8 pixels with five bands, as satellites have them."""
    data = bytes(8 * 8 * 5)
    tags = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 8, 277: 5, 278: 8, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    path.write_bytes(
        b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)
    )


def alone(folder: Path) -> None:
    """A class with one image."""
    (folder / "single").mkdir()
    image().save(folder / "single" / "a.png")


def resized(folder: Path) -> None:
    """Smaller than the network halves images."""
    for path in folder.rglob("*.png"):
        image(2, 2, 3).save(path)


def several(path: Path) -> None:
    """An animation, or pages."""
    image(8, 8).save(path, save_all=True, append_images=[Image.new("L", (8, 8), grey) for grey in (9, 99)])


# what is done to a folder -> what is said: of an error, or among the lines before the first step
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "zero bytes": (
        lambda d: (d / "class0" / "x.png").write_bytes(b""),
        r"class0/x.png \(no image, or damaged\); repair or remove",
    ),
    "text": (lambda d: (d / "class0" / "x.png").write_text("hello"), r"1 of 37 images cannot be read: class0/x.png"),
    "bands": (lambda d: bands(d / "class0" / "x.tif"), r"1 of 37 images cannot be read: class0/x.tif"),
    "an empty class": (lambda d: (d / "nothing").mkdir(), "'nothing' holds no images; fill it or remove it"),
    "a class of one": (alone, "the smallest class, 'single', has 1 images"),
}
READ: dict[str, tuple[Callable[[Path], object], str]] = {
    "another ending": (lambda d: image().save(d / "class0" / "x.png", "JPEG"), "8x8x3"),
    "an animation": (
        lambda d: several(d / "class0" / "x.gif"),
        "1 of 37 images have several pages or frames, of which the first",
    ),
    "pages": (
        lambda d: several(d / "class0" / "x.tif"),
        "1 of 37 images have several pages or frames, of which the first",
    ),
    "CMYK": (lambda d: image().convert("CMYK").save(d / "class0" / "x.jpg"), "8x8x3"),
    "a palette": (lambda d: image().convert("P").save(d / "class0" / "x.png"), "8x8x3"),
    "a loop of folders": (lambda d: (d / "class0" / "loop").symlink_to(d / "class0"), "1 linked folder met before"),
    "a loop of links": (lambda d: (d / "class0" / "x.png").symlink_to("x.png"), "1 broken link"),
    "small images": (resized, "images of 2x2 are smaller than 4x4, which the network halves to a point"),
}


def search(arguments: list[str], folder: Path) -> None:
    main.main([f"--dataset={folder}", *arguments[1:], "--epochs=1"])


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_in_one_line(name: str, arguments: list[str], tmp_path: Path) -> None:
    folder, (spoil, words) = write_images(tmp_path / "images"), REFUSED[name]
    spoil(folder)
    with pytest.raises(UserError, match=words) as error:
        search(arguments, folder)
    assert "\n" not in str(error.value) and "<" not in str(error.value)
    assert not (tmp_path / "experiments").exists()


@pytest.mark.parametrize("name", READ)
def test_what_can_be_used_is_read_and_told(
    name: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, (change, words) = write_images(tmp_path / "images"), READ[name]
    change(folder)
    search(arguments, folder)
    assert words in capsys.readouterr().out


def test_a_thousand_classes(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search([*arguments, "--batch_size=100"], write_images(tmp_path / "images", classes=1000, per_class=6, size=(4, 4)))
    assert "1000 classes" in capsys.readouterr().out
