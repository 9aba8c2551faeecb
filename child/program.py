"""Classify images with an exported file: python child_onnx.py IMAGE ...; it has to lie beside the file.

`export_model.py` writes this, with loading/pixels.py in front, beside the file; it needs numpy, Pillow and onnxruntime
(or torch, for a .pt2), nothing of this repository.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from loading.pixels import Pixels, preprocess

MODEL = "child.onnx"


def load(model: str) -> tuple[Callable[[Pixels], Pixels], Mapping[str, str]]:
    """The file as images (B, C, H, W) -> logits (B, classes), and what it says of itself."""
    if model.endswith(".onnx"):
        import onnxruntime

        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {"images": images})[0], session.get_modelmeta().custom_metadata_map
    import torch

    extra = {"metadata.json": ""}
    module = torch.export.load(model, extra_files=extra).module()
    return lambda images: module(torch.from_numpy(images)).detach().numpy(), json.loads(extra["metadata.json"])


def classify(paths: Sequence[str], model: str = str(Path(__file__).with_name(MODEL))) -> list[tuple[str, float]]:
    """The likeliest class of each image file, and its probability."""
    run, meta = load(model)
    mode, size, white = meta["mode"], json.loads(meta["size"]), json.loads(meta["white"])
    found = []
    for path in paths:
        images = preprocess(path, mode, size, white)
        logits = run(images if meta["input"] == "uint8" else images.astype(np.float32) / 255)[0].astype(np.float64)
        shares = np.exp(logits - logits.max())
        found.append((json.loads(meta["classes"])[logits.argmax()], float(shares.max() / shares.sum())))
    return found


if __name__ == "__main__":
    for path, (name, share) in zip(sys.argv[1:], classify(sys.argv[1:]), strict=True):
        print(f"{path}: {name} ({100 * share:.1f} %)")
