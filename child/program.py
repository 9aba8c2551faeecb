"""Classify images with an exported file: python child_onnx.py IMAGE ...; it has to lie beside the file.

`export_model.py` writes this, with loading/pixels.py in front, beside the file; it needs numpy, Pillow and onnxruntime
(or torch, for a .pt2), nothing of this repository.
"""

import json
import sys
import warnings
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
    return lambda images: module(torch.tensor(images)).detach().numpy(), json.loads(extra["metadata.json"])


def classifier(model: str = str(Path(__file__).with_name(MODEL))) -> Callable[[str], tuple[str, float]]:
    """An image file -> its likeliest class, and the probability."""
    run, meta = load(model)
    mode, size, white = meta["mode"], json.loads(meta["size"]), json.loads(meta["white"])

    def guess(path: str) -> tuple[str, float]:
        images = preprocess(path, mode, size, white)
        logits = run(images if meta["input"] == "uint8" else images.astype(np.float32) / 255)[0].astype(np.float64)
        shares = np.exp(logits - logits.max())
        return json.loads(meta["classes"])[logits.argmax()], float(shares.max() / shares.sum())

    return guess


def classify(paths: Sequence[str], model: str = str(Path(__file__).with_name(MODEL))) -> list[tuple[str, float]]:
    """The likeliest class of each image file, and its probability."""
    return [*map(classifier(model), paths)]


def main(paths: Sequence[str]) -> int:
    """A line for each image; gives the exit code: 2 if there is none, or one of them cannot be classified."""
    for stream in (sys.stdout, sys.stderr):  # a name that the console cannot show ends nothing
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    if not paths or paths[0] in ("-h", "--help"):
        print(f"usage: python {Path(__file__).name} IMAGE ...", file=sys.stdout if paths else sys.stderr)
        return 0 if paths else 2
    code = 0
    try:
        guess = classifier()
    except Exception as error:  # what a runtime raises for a file that it cannot read
        print(f"error: {MODEL} beside this program cannot be used: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for path in paths:
        try:
            name, share = guess(path)
            print(f"{path}: {name} ({100 * share:.1f} %)")
        except Exception as error:  # Pillow raises a dozen types for what it cannot read
            print(f"error: {path}: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
            code = 2
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
