"""An ONNX file in half precision or with bytes for weights and activations, by onnxruntime's own tools."""

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

Pixels = np.ndarray[Any, Any]


def to_half(path: Path) -> None:
    """Weights and arithmetic of an ONNX file in float16; what goes in and comes out is as before."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with warnings.catch_warnings():  # of weights that are nearly 0 in float16
        warnings.simplefilter("ignore")
        made = convert_float_to_float16(onnx.load(path), keep_io_types=True)
    onnx.save(made, path)


class _Reader:
    """Batches of images, one at a time, as onnxruntime's CalibrationDataReader gives them."""

    def __init__(self, images: Pixels) -> None:
        self.batches = iter(np.array_split(images, -(-len(images) // 32)))

    def get_next(self) -> dict[str, Pixels] | None:
        """The next, or None."""
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch}


def to_bytes(path: Path, images: Pixels) -> None:
    """Full convolutions and linear layers of an ONNX file in int8: weights by channel, activations by these images.

    Depthwise convolutions, pools and sums stay as they are: in bytes onnxruntime takes several times as long for them.

    Args:
        images: (N, C, H, W) of the training split, in the type that the file takes.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quantization.CalibrationDataReader.register(_Reader)
    props = {one.key: one.value for one in onnx.load(path).metadata_props}
    with TemporaryDirectory() as name:
        ready, made = Path(name) / "ready.onnx", Path(name) / "made.onnx"
        quant_pre_process(path, ready)
        grouped = [
            node.name
            for node in onnx.load(ready).graph.node
            if any(a.name == "group" and a.i > 1 for a in node.attribute)
        ]
        quantization.quantize_static(
            ready,
            made,
            _Reader(images),
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            nodes_to_exclude=grouped,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
        )
        proto = onnx.load(made)
    onnx.helper.set_model_props(proto, props)
    onnx.save(proto, path)
