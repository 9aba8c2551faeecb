import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import decode, folder_of, ramp, write_images
from PIL import Image

from loading import folders, images, pixels
from options import UserError


def deep_png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a colour, which Pillow reads but does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_grey_colour_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    grey = Image.fromarray(ramp(255))
    clear = Image.new("RGBA", (4, 4), (200, 100, 50, 0))
    got = decode(folder_of(tmp_path, {"a.png": grey, "b.png": clear, "c.webp": Image.new("RGB", (4, 4), (9, 9, 9))}))
    assert got.shape == (3, 3, 4, 4) and got.dtype == torch.uint8
    assert all(torch.equal(got[0, c], torch.from_numpy(ramp(255))) for c in range(3))
    assert got[1].max() == 0  # what cannot be seen is black


def test_all_grey_gives_one_channel(tmp_path: Path) -> None:
    got = decode(folder_of(tmp_path, {"a.png": Image.fromarray(ramp(255)), "b.jpg": Image.new("L", (4, 4), 7)}))
    assert got.shape == (2, 1, 4, 4) and (got[1] - 7.0).abs().max() <= 1


def test_palette_and_cmyk_images_are_read_as_colours(tmp_path: Path) -> None:
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    got = decode(folder_of(tmp_path, {"a.gif": red.convert("P"), "b.tif": red.convert("CMYK")}))
    assert (got.float() - torch.tensor([255.0, 0, 0]).view(1, 3, 1, 1)).abs().max() <= 2


@pytest.mark.parametrize(("top", "white"), [(65535, 65535), (4095, 4095), (3000, 4095), (200, 255)])
def test_sixteen_bits_are_scaled_by_the_bits_in_use(tmp_path: Path, top: int, white: int) -> None:
    first, second = ramp(top, np.uint16), ramp(top // 2, np.uint16)
    got = decode(folder_of(tmp_path, {"a.png": Image.fromarray(first), "b.tif": Image.fromarray(second)}))
    wanted = np.stack([first, second]) * (255 / white)
    assert np.abs(got[:, 0].numpy() - wanted).max() <= 0.51


@pytest.mark.parametrize("top", [0.5, 1.0, 4096.0])
def test_floating_point_images_are_scaled_by_the_largest_value(tmp_path: Path, top: float) -> None:
    pixels = np.linspace(0, top, 16).reshape(4, 4).astype(np.float32)
    pixels[0, 0] = np.nan  # no data
    got = decode(folder_of(tmp_path, {"a.tif": Image.fromarray(pixels), "b.tif": Image.fromarray(pixels / 2)}))
    assert got[0, 0, 0, 0] == 0
    assert got[0].max() == 255 and got[1].max() in (127, 128)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_exif_rotation_is_applied(tmp_path: Path, ending: str) -> None:
    image, exif = Image.new("RGB", (6, 4)), Image.Exif()
    image.paste((255, 255, 255), (0, 0, 6, 1))  # the first row is white
    exif[0x0112] = 6  # to be shown turned clockwise: the first row becomes the last column
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / f"1.{ending}", exif=exif, quality=100)
    folder_of(tmp_path, {"2.png": Image.new("RGB", (4, 6))})
    got = decode(folders.scan(tmp_path))
    assert got.shape == (2, 3, 6, 4)
    assert got[0, :, :, 3].min() > 200
    assert got[0, :, :, :2].max() < 50


def test_rectangular_images_keep_their_size_and_mixed_ones_need_a_size(tmp_path: Path) -> None:
    files = {"a.png": Image.new("L", (9, 5)), "b.png": Image.new("L", (9, 5))}
    assert decode(folder_of(tmp_path / "x", files)).shape == (2, 1, 5, 9)
    folder = folder_of(tmp_path / "y", files | {"c.png": Image.new("L", (4, 4), 9)})
    with pytest.raises(UserError, match=r"from 4x4 to 9x5; .*--image_size 4"):
        decode(folder)
    got = decode(folder, size=3)
    assert got.shape == (3, 1, 3, 3) and (got[2] == 9).all()


def test_every_unreadable_file_is_named(tmp_path: Path) -> None:
    write_images(tmp_path / "d")
    whole = (tmp_path / "d" / "class0" / "0_0.png").read_bytes()
    (tmp_path / "d" / "class0" / "0_0.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "d" / "class1" / "0_1.png").write_text("not an image")
    (tmp_path / "d" / "class2" / "0_1.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"of 36 images cannot be read: .*class1/0_1.png.*class2/0_1.png"):
        decode(folders.scan(tmp_path / "d"))


def test_scan_names_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        folders.scan(tmp_path / "nowhere")
    with pytest.raises(UserError, match="0 class folders"):
        folders.scan(tmp_path)
    write_images(tmp_path / "d", classes=1)
    with pytest.raises(UserError, match="1 class folders"):
        folders.scan(tmp_path / "d")
    (tmp_path / "d" / "empty").mkdir()
    with pytest.raises(UserError, match="'empty' holds no images"):
        folders.scan(tmp_path / "d")


def test_scan_skips_hidden_folders_and_other_files(tmp_path: Path) -> None:
    root = write_images(tmp_path / "d", classes=2, per_class=2)
    (root / ".git").mkdir()
    (root / "__pycache__").mkdir()
    (root / "README.md").touch()
    (root / "class0" / "notes.txt").touch()
    (root / "class0" / ".ipynb_checkpoints").mkdir()
    Image.new("RGB", (8, 8)).save(root / "class0" / ".ipynb_checkpoints" / "0_0-checkpoint.png")
    (root / "class0" / "deep").mkdir()
    Image.new("RGB", (8, 8)).save(root / "class0" / "deep" / "z.JPG", "JPEG")
    folder = folders.scan(root)
    assert folder.classes == ["class0", "class1"]
    assert folder.files == ["class0/0_0.png", "class0/0_1.png", "class0/deep/z.JPG", "class1/0_0.png", "class1/0_1.png"]
    assert folder.labels == [0, 0, 0, 1, 1]


def test_what_is_left_out_is_counted_and_links_are_followed(tmp_path: Path) -> None:
    root = write_images(tmp_path / "d", classes=2, per_class=4)
    (root / "class0" / "notes.txt").write_text("")
    (root / "class0" / "Thumbs.db").write_bytes(b"")
    (root / "class1" / "clip.mp4").write_bytes(b"")
    (root / "class1" / ".DS_Store").write_bytes(b"")
    (root / "class1" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "class1" / "round").symlink_to(root)
    more = write_images(tmp_path / "more", classes=1, per_class=4)
    (root / "class0" / "more").symlink_to(more / "class0")
    shutil.copy(root / "class0" / "0_0.png", root / "class0" / "photo.PNG")
    Image.open(root / "class0" / "0_0.png").save(root / "class0" / "photo.jfif", "JPEG")
    folder = folders.scan(root)
    assert folder.labels.count(0) == 4 + 4 + 2 and folder.labels.count(1) == 4
    assert "class0/more/0_0.png" in folder.files and "class0/photo.jfif" in folder.files
    assert folder.left_out == "1 .db, 1 .mp4, 1 .txt, 1 broken link, 1 linked folder met before"


def test_folders_of_splits_are_no_classes(tmp_path: Path) -> None:
    for part in ("train", "val", "Test"):
        write_images(tmp_path / "d" / part)
    with pytest.raises(UserError, match="Test, train, val are splits, not classes; give"):
        folders.scan(tmp_path / "d")


def test_a_class_of_other_files_names_them(tmp_path: Path) -> None:
    root = write_images(tmp_path / "d", classes=2)
    (root / "clips").mkdir()
    (root / "clips" / "a.mp4").write_bytes(b"")
    with pytest.raises(UserError, match=r"'clips' holds no images but 1 \.mp4"):
        folders.scan(root)


def test_an_infinite_pixel_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = ramp(9, np.float32), ramp(9, np.float32)
    bad[0, 0] = np.inf
    with pytest.raises(UserError, match=r"1 of 2 images cannot be read: c1/b\.tif"):
        decode(folder_of(tmp_path, {"a.tif": Image.fromarray(good), "b.tif": Image.fromarray(bad)}))
    assert "c1/b.tif: 1 of its pixels are infinite" in "".join(capsys.readouterr())


def test_values_that_become_black_or_make_others_dark_are_told(tmp_path: Path) -> None:
    counts = {f"{n}.tif": Image.fromarray(ramp(400 + n, np.float32)) for n in range(6)}
    assert images.decode(folder_of(tmp_path / "good", counts), None, 1.0).notes == []
    odd = [ramp(400, np.float32) for _ in range(3)]
    odd[0][0, 0], odd[1][0, 0], odd[2][0, 0] = 9e6, -3.0, np.nan
    folder = folder_of(tmp_path / "odd", counts | {f"z{n}.tif": Image.fromarray(a) for n, a in enumerate(odd)})
    names = [next(name for name in folder.files if f"z{n}" in name) for n in range(3)]
    dark = f"{names[0]} has pixels of 9e+06, which set what is white, and half of the images stay below 40"
    for _ in range(2):  # decoded, and as it was kept
        notes = images.decode(folder, None, 1e-9, str(tmp_path / "cache")).notes
        assert notes[0] == f"1 of 9 images have pixels below zero, which become black, e.g. {names[1]}"
        assert notes[1] == f"1 of 9 images have pixels that are no numbers, which become black, e.g. {names[2]}"
        assert len(notes) == 3 and notes[2].startswith(dark)
    hot = ramp(4000, np.uint16)
    hot[0, 0] = 65535  # among 12 bits
    wide = {f"{n}.png": Image.fromarray(ramp(4000, np.uint16)) for n in range(5)} | {"hot.png": Image.fromarray(hot)}
    assert "hot.png has pixels of 65535" in images.decode(folder_of(tmp_path / "hot", wide), None, 1.0).notes[0]


@pytest.mark.parametrize("orientation", [3, 5, 6, 8])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_turned_tiff_is_turned_once(orientation: int, dtype: type, tmp_path: Path) -> None:
    """Pillow maps uncompressed ones that are opened by name, and confuses their sides."""
    meant = np.arange(12, dtype=dtype).reshape(3, 4) * 20
    turned = {3: np.rot90(meant, 2), 5: meant.T, 6: np.rot90(meant, 1), 8: np.rot90(meant, -1)}[orientation]
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        Image.fromarray(np.ascontiguousarray(turned)).save(tmp_path / label / "x.tif", tiffinfo={274: orientation})
    found = images.decode(folders.scan(tmp_path), None, 1.0)
    assert found.pixels[0, 0].tolist() == meant.tolist()
    assert pixels.preprocess(tmp_path / "a" / "x.tif", "L", (4, 3), found.white)[0, 0].tolist() == meant.tolist()


def test_white_is_known_of_kinds_that_were_there_alone(tmp_path: Path) -> None:
    counts = folder_of(tmp_path / "counts", {f"{n}.png": Image.fromarray(ramp(4000, np.uint16)) for n in range(2)})
    floats = folder_of(tmp_path / "floats", {f"{n}.tif": Image.fromarray(ramp(4000, np.float32)) for n in range(2)})
    white = images.decode(counts, None, 1.0).white
    assert white == {"I": 4095.0} and images.decode(floats, None, 1.0).white == {"F": 4000.0}
    with pytest.raises(
        UserError, match="floating-point numbers, the images of training had not: what is white is unknown"
    ):
        images.decode(floats, None, 1.0, None, white)
    brighter = folder_of(tmp_path / "bright", {f"{n}.png": Image.fromarray(ramp(16000, np.uint16)) for n in range(2)})
    notes = images.decode(brighter, None, 1.0, None, white).notes
    assert notes == ["2 of 2 images have pixels above what was white in training, e.g. c0/0.png"]
    with pytest.warns(UserWarning, match="above what was white in training"):
        pixels.preprocess(brighter.root / "c0" / "0.png", "L", (4, 4), white)


def test_numbers_that_say_nothing_are_refused(tmp_path: Path) -> None:
    none, some = np.full((4, 4), np.nan, np.float32), ramp(9, np.float32)
    with pytest.raises(UserError, match=r"c0/a.tif .none of its pixels is a number"):
        decode(folder_of(tmp_path / "none", {"a.tif": Image.fromarray(none), "b.tif": Image.fromarray(some)}))
    below = {f"{n}.tif": Image.fromarray(-some - 1) for n in range(2)}
    with pytest.raises(UserError, match="no floating-point pixel is above 0"):
        decode(folder_of(tmp_path / "below", below))


def test_what_pillow_leaves_of_a_file_is_told(tmp_path: Path) -> None:
    pages = [Image.new("L", (4, 4), value) for value in (50, 90)]
    folder = folder_of(tmp_path, {"a.png": Image.new("L", (4, 4), 7), "b.png": Image.new("L", (4, 4), 9)})
    pages[0].save(tmp_path / "c0" / "many.tif", save_all=True, append_images=pages[1:])
    (tmp_path / "c1" / "deep.png").write_bytes(deep_png(np.full((4, 4, 3), 1000, np.uint16)))
    notes = images.decode(folders.scan(folder.root), None, 1.0).notes
    assert notes == [
        "1 of 4 images have several pages or frames, of which the first is taken, e.g. c0/many.tif",
        "1 of 4 images have 16 bits a colour, of which the high 8 are taken, e.g. c1/deep.png",
    ]


def test_memory_that_is_refused_is_not_the_fault_of_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(images, "_read", refuse)
    with pytest.raises(UserError, match=r"out of memory at class0/0_0.png; take less of --image_size"):
        decode(folders.scan(write_images(tmp_path / "d")))
