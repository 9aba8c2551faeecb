import os
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import decode, folder_of, ramp, write_images
from PIL import Image

from loading import folders, images
from options import UserError


def test_large_folders_are_mapped_and_the_file_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folders.scan(write_images(tmp_path / "d"))
    in_memory = decode(folder)
    mapped = decode(folder, ram=1e-9, cache=tmp_path / "cache")
    assert torch.equal(mapped, in_memory)
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == [".json", ".npy"]
    monkeypatch.setattr(images, "_read", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(decode(folder, ram=1e-9, cache=tmp_path / "cache"), in_memory)
    monkeypatch.undo()
    next((tmp_path / "cache").glob("*.json")).write_text("{")  # damaged
    assert torch.equal(decode(folder, ram=1e-9, cache=tmp_path / "cache"), in_memory)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(folder.root / folder.files[0])  # a changed image is not served from before
    assert decode(folder, ram=1e-9, cache=tmp_path / "cache")[0, :, 0, 0].tolist() == [1, 2, 3]


def test_what_took_long_is_kept_and_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folders.scan(write_images(tmp_path / "d"))
    monkeypatch.setattr(images, "_LONG", 1e9)
    fresh = decode(folder, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(images, "_LONG", 0.0)
    assert torch.equal(decode(folder, cache=tmp_path / "cache"), fresh)
    assert "kept decoded in" in capsys.readouterr().out
    monkeypatch.setattr(images, "_read", lambda *_: pytest.fail("decoded again"))
    again = decode(folder, cache=tmp_path / "cache")
    assert torch.equal(again, fresh)
    again[0] = 0  # the file is not changed by what is done with the images
    assert torch.equal(decode(folder, cache=tmp_path / "cache"), fresh)


def test_a_cache_that_cannot_be_written_is_said_and_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(images, "_LONG", 0.0)
    (tmp_path / "cache").write_text("a file is in the way")
    assert decode(folders.scan(write_images(tmp_path / "d")), cache=tmp_path / "cache").shape == (36, 3, 8, 8)
    assert "cannot be kept in" in capsys.readouterr().out


def test_the_white_level_is_kept_with_the_pixels(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path / "d", {"a.png": Image.fromarray(ramp(4000, np.uint16)), "b.tif": Image.fromarray(ramp(9))}
    )
    first = images.decode(folder, None, 1e-9, str(tmp_path / "cache"))
    again = images.decode(folder, None, 1e-9, str(tmp_path / "cache"))
    assert first.white == again.white == {"I": 4095.0} and torch.equal(first.pixels, again.pixels)
    next((tmp_path / "cache").glob("*.json")).unlink()  # what was white is read again
    assert images.decode(folder, None, 1e-9, str(tmp_path / "cache")).white == first.white
    given = images.decode(folder, None, 1.0, None, {"F": 1.0, "I": 8190.0})
    assert given.white["I"] == 8190 and given.pixels[0].max() == 125  # 255 * 4000 / 8190


def test_more_bits_than_in_training_are_refused_and_what_was_kept_is_used(tmp_path: Path) -> None:
    """A network of 8-bit images cannot know what is white in others; for the same images nothing is decoded again."""
    wide = folder_of(
        tmp_path / "wide", {"a.png": Image.fromarray(ramp(4000, np.uint16)), "b.png": Image.fromarray(ramp(9))}
    )
    with pytest.raises(UserError, match=r"1 of 2 images cannot be read: c0/a\.png"):
        images.decode(wide, None, 1.0, None, {})
    kept = images.decode(wide, None, 1e-9, str(tmp_path / "cache"))
    again = images.decode(wide, None, 1e-9, str(tmp_path / "cache"), kept.white)
    other = images.decode(wide, None, 1e-9, str(tmp_path / "cache"), {"F": 1.0, "I": 8190.0})
    assert torch.equal(again.pixels, kept.pixels) and not torch.equal(other.pixels, kept.pixels)
    assert len([*(tmp_path / "cache").glob("*.npy")]) == 2
    assert torch.equal(images.decode(wide, None, 1e-9, str(tmp_path / "cache")).pixels, kept.pixels)


def test_what_is_kept_has_a_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, sets = tmp_path / "cache", [folders.scan(write_images(tmp_path / f"d{n}")) for n in range(3)]
    for folder in sets:
        images.decode(folder, None, 1e-9, str(cache))
    (cache / "mine.npy").write_bytes(b"a file of the user's")
    files = sorted(cache.glob("?" * 24 + ".npy"), key=lambda path: path.stat().st_mtime_ns)
    for age, path in enumerate(reversed(files)):
        os.utime(path, (1e9 - age, 1e9 - age))
    again = images.decode(sets[0], None, 1e-9, str(cache))  # used, so it stays
    most = 2.5 * files[0].stat().st_size / 1e9
    newest = images.decode(folders.scan(write_images(tmp_path / "d3")), None, 1e-9, str(cache), None, most)
    assert "2 older files of decoded images removed" in capsys.readouterr().out
    left = {path.name for path in cache.glob("*.npy")}
    assert len(left) == 3 and files[0].name in left and "mine.npy" in left
    assert len([*cache.glob("*.json")]) == 2 and again.pixels.shape == newest.pixels.shape


def test_what_is_kept_and_damaged_is_decoded_again(tmp_path: Path) -> None:
    folder, cache = folders.scan(write_images(tmp_path / "d")), tmp_path / "cache"
    fresh = decode(folder, ram=1e-9, cache=cache).clone()  # not mapped
    for content in (b"", b"torn", next(cache.glob("*.npy")).read_bytes()[:-9]):
        next(cache.glob("*.npy")).write_bytes(content)
        assert torch.equal(decode(folder, ram=1e-9, cache=cache), fresh)


def test_a_cache_that_is_needed_and_refused_names_the_options(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file is in the way")
    with pytest.raises(
        UserError, match=r"more than --max_ram_gb 1e-09, and cannot be kept in .*give another --cache_dir"
    ):
        decode(folders.scan(write_images(tmp_path / "d")), ram=1e-9, cache=tmp_path / "cache")
