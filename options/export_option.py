"""The options of export_model.py."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from options import NonNegativeInt, PositiveInt, UserError


@dataclass(frozen=True)
class ExportOptions:
    """Which child, and as what."""

    checkpoint: str = "child"
    """A child's checkpoint (child_epoch_N.pt), or an experiment of retrain.py, whose newest is taken."""
    format: Literal["onnx", "pt2"] = "onnx"
    """onnx, or pt2 (torch.export)."""
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    """With onnx: fp16, or int8 with ranges measured on training images. The files are smaller, child_fp16.onnx and
    child_int8.onnx; what accuracy is lost and what time gained is measured and said."""
    input: Literal["uint8", "float"] = "uint8"
    """Images the model takes: uint8 0..255, or float32 0..1, of shape (B, C, H, W); normalisation is inside."""
    out: str | None = None
    """The file to write. Default: child.onnx, child.pt2 beside the checkpoint. Nothing is overwritten."""
    calibration_images: PositiveInt = 512
    """With int8, training images by which the ranges are measured; fewer if there are fewer."""
    licence: str | None = None
    """Terms of the exported file, for its card, e.g. 'CC BY-NC-SA 4.0, as its data'."""
    check_images: NonNegativeInt = 256
    """Test images on which the reloaded file is compared with the model; fewer if there are fewer."""
    dataset: str | None = None
    """Where the data set lies now. Default: where it lay in training; without it random images are compared."""
    experiments_dir: str = "experiments"
    """Where runs lie."""
    data_dir: str = "data"
    """Where data sets called by name lie."""

    def check(self) -> None:
        """Raise UserError where values do not go together."""
        if self.format != "onnx" and self.precision != "fp32":
            raise UserError(f"--precision {self.precision} is of --format onnx")
        if self.out is not None and Path(self.out).suffix != f".{self.format}":
            raise UserError(f"--out {self.out} does not end in .{self.format}, by which the file is known")
