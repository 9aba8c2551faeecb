"""Chips of land vehicles from the scenes of xView (Lam et al. 2018, arXiv 1802.07856).

Its labels are a GeoJSON file: of each object `image_id` (SCENE.tif), `type_id` and `bounds_imcoords`, the corners
"left,top,right,bottom" in pixels of the scene. The numbers of the classes are those of xView's xview_class_labels.txt.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

import utils
from options import UserError
from options.cut_option import CutOptions

CLASSES = {  # land vehicles; a folder's name has no slash
    17: "Passenger Vehicle",
    18: "Small Car",
    19: "Bus",
    20: "Pickup Truck",
    21: "Utility Truck",
    23: "Truck",
    24: "Cargo Truck",
    25: "Truck with Box",
    26: "Truck Tractor",
    29: "Truck with Liquid",
}


class Labelled(NamedTuple):
    """An object of a scene."""

    number: int  # of the scene's objects, from 0 on, in the order of the file
    kind: str
    middle: tuple[float, float]  # x, y in pixels


class Cut(NamedTuple):
    """What was cut."""

    chips: Counter[str]  # of each class
    left_out: Counter[str]  # why


def cut(opt: CutOptions) -> Cut:
    """Write a chip of every land vehicle; print what was left out.

    Raises:
        UserError: labels or scenes are not there or none, or the folder for the chips exists.
    """
    out, scenes = Path(opt.out), Path(opt.scenes)
    if out.exists():
        raise UserError(f"--out {out} exists; name a new folder")
    if not scenes.is_dir():
        raise UserError(f"--scenes {scenes}: no such folder; give that of xView's SCENE.tif files")
    done = Cut(Counter(), Counter())
    objects = read_labels(Path(opt.labels), done.left_out)
    if not objects:
        raise UserError(
            f"--labels {opt.labels} names no land vehicle of xView ({sum(done.left_out.values())} unreadable)"
        )
    if not any((scenes / name).is_file() for name in objects):
        raise UserError(f"--scenes {scenes} has none of the {len(objects)} scenes of --labels, such as {min(objects)}")
    stems = Counter(Path(name).stem for name in objects)
    twice = [stem for stem, count in stems.items() if count > 1]
    if twice:
        raise UserError(f"--labels {opt.labels}: two scenes are called {twice[0]}, whose chips would have one name")
    utils.writable(out.parent, "out")
    with TemporaryDirectory(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent) as aside:
        for name in tqdm(sorted(objects), "scenes", disable=None):
            _cut_scene(scenes / name, objects[name], Path(aside) / "chips", opt.size, done)
        if not done.chips:
            raise UserError(f"no chip was cut: {', '.join(f'{n:,} {why}' for why, n in done.left_out.most_common())}")
        (Path(aside) / "chips").replace(out)
    for kind, count in sorted(done.chips.items()):
        print(f"{count:7,d} {kind}")
    for why, count in done.left_out.most_common():
        print(f"note: {count:,} left out: {why}")
    print(
        f"written  {out}: {sum(done.chips.values()):,} chips; search with --group_pattern '^(\\d+)_', scenes stay whole"
    )
    return done


def read_labels(path: Path, left_out: Counter[str]) -> dict[str, list[Labelled]]:
    """The land vehicles of each scene; counts what is no proper label. Raises UserError where the file is none."""
    try:
        features = json.loads(path.read_text(encoding="utf-8"))["features"]
        if not isinstance(features, list):
            raise TypeError
    except FileNotFoundError:
        raise UserError(f"--labels {path}: no such file; give xView's xView_train.geojson") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"--labels {path} is no GeoJSON with features, as xView's labels are") from None
    return _by_scene(features, left_out)


def _by_scene(features: Iterable[Any], left_out: Counter[str]) -> dict[str, list[Labelled]]:
    found: dict[str, list[Labelled]] = defaultdict(list)
    seen: Counter[str] = Counter()
    for feature in features:
        try:
            about: Mapping[str, Any] = feature["properties"]
            scene, kind = str(about["image_id"]), CLASSES.get(int(about["type_id"]))
            left, top, right, bottom = map(float, str(about["bounds_imcoords"]).split(","))
            if Path(scene).name != scene or not all(map(math.isfinite, (left, top, right, bottom))):
                raise ValueError
        except (ValueError, KeyError, TypeError, OverflowError):
            left_out["labels that cannot be read"] += 1
            continue
        if kind:
            found[scene].append(Labelled(seen[scene], kind, ((left + right) / 2, (top + bottom) / 2)))
        seen[scene] += 1
    return dict(found)


def _cut_scene(path: Path, objects: Iterable[Labelled], out: Path, size: int, done: Cut) -> None:
    objects = [*objects]
    try:
        with Image.open(path) as opened:
            scene = opened.convert("RGB")
    except FileNotFoundError:
        done.left_out[f"objects of scenes that are not in {path.parent}"] += len(objects)
        return
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        done.left_out["objects of scenes that cannot be read"] += len(objects)
        return
    width, height = scene.size
    if min(width, height) < size:
        done.left_out[f"objects of scenes below {size}x{size}"] += len(objects)
        return
    for one in objects:
        x, y = one.middle
        if not (0 <= x < width and 0 <= y < height):
            done.left_out["objects outside their scene"] += 1
            continue
        left, top = (min(max(round(at - size / 2), 0), end - size) for at, end in ((x, width), (y, height)))
        place = out / one.kind / f"{path.stem}_{one.number}.tif"
        place.parent.mkdir(parents=True, exist_ok=True)
        scene.crop((left, top, left + size, top + size)).save(place)
        done.chips[one.kind] += 1
