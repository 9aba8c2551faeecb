"""Chips are cut where xView's labels say, and from nowhere else."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cut_xview
from loading import xview


def feature(scene: str, kind: int, bounds: str) -> dict[str, Any]:
    return {"type": "Feature", "properties": {"image_id": scene, "type_id": kind, "bounds_imcoords": bounds}}


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """A scene of 100 x 80 whose pixels say where they are: (x, y, 7); labels of it."""
    x, y = np.meshgrid(np.arange(100), np.arange(80))
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    Image.fromarray(np.stack([x, y, np.full_like(x, 7)], -1).astype(np.uint8)).save(scenes / "12.tif")
    (scenes / "13.tif").write_bytes(b"broken")
    Image.new("RGB", (10, 10)).save(scenes / "14.tif")
    features = [
        feature("12.tif", 19, "40,30,60,50"),
        feature("12.tif", 73, "40,30,60,50"),  # a building
        feature("12.tif", 25, "0,0,6,4"),
        feature("12.tif", 19, "98,78,99,79"),
        feature("12.tif", 18, "-40,0,-20,10"),
        feature("12.tif", 18, "1,2,3"),
        feature("../12.tif", 18, "1,2,3,4"),
        feature("13.tif", 18, "1,2,3,4"),
        feature("14.tif", 18, "1,2,3,4"),
        feature("15.tif", 18, "1,2,3,4"),
        {"type": "Feature"},
    ]
    (tmp_path / "labels.json").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return [f"--labels={tmp_path}/labels.json", f"--scenes={scenes}", f"--out={tmp_path}/chips", "--size=16"]


def test_chips_have_their_object_in_the_middle(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = cut_xview.main(given)
    chips = tmp_path / "chips"
    assert {str(path.relative_to(chips)) for path in chips.rglob("*.tif")} == {
        "Bus/12_0.tif",
        "Truck with Box/12_2.tif",
        "Bus/12_3.tif",
    }
    for name, corner in {"Bus/12_0.tif": (42, 32), "Truck with Box/12_2.tif": (0, 0), "Bus/12_3.tif": (84, 64)}.items():
        with Image.open(chips / name) as image:
            assert image.size == (16, 16) and image.getpixel((0, 0)) == (*corner, 7)
            assert image.getpixel((15, 15)) == (corner[0] + 15, corner[1] + 15, 7)
    assert done.chips == {"Bus": 2, "Truck with Box": 1} and sum(done.left_out.values()) == 7
    said = capsys.readouterr().out
    assert "objects outside their scene" in said and "3 left out: labels that cannot be read" in said


def test_it_overwrites_nothing_and_says_what_is_missing(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {f"--out={tmp_path}": "exists", "--labels=nowhere": "no such file", "--scenes=nowhere": "no such folder"}
    cases[f"--labels={tmp_path}/scenes/13.tif"] = "is no GeoJSON"
    cases[f"--scenes={tmp_path}"] = "has none of the"
    for wrong, words in cases.items():
        with pytest.raises(xview.UserError, match=words):
            cut_xview.main([*given, wrong])
    empty = tmp_path / "empty.json"
    for features, words in (([], "names no land vehicle"), ([feature("14.tif", 18, "1,2,3,4")], "no chip was cut")):
        empty.write_text(json.dumps({"features": features}))
        with pytest.raises(xview.UserError, match=words):
            cut_xview.main([*given, f"--labels={empty}"])
    empty.write_text(json.dumps({"features": [feature(name, 18, "1,2,3,4") for name in ("12.tif", "12.png")]}))
    with pytest.raises(xview.UserError, match="two scenes are called 12"):
        cut_xview.main([*given, f"--labels={empty}"])
    assert not (tmp_path / "chips").exists() and not [*tmp_path.glob(".chips*")]
