"""The options of cut_xview.py."""

from dataclasses import dataclass

from options import PositiveInt


@dataclass(frozen=True)
class CutOptions:
    """From xView's scenes and labels to a folder of chips."""

    labels: str = "xView_train.geojson"
    """xView's labels, a GeoJSON file."""
    scenes: str = "train_images"
    """The folder of xView's scenes, SCENE.tif."""
    out: str = "xview_chips"
    """A new folder for the chips, CLASS/SCENE_NUMBER.tif."""
    size: PositiveInt = 48
    """Side of a chip in pixels of the scene, 0.3 m each; its object is in the middle, or as near as it can be."""
