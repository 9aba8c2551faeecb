"""Make one page that classifies images in a browser, without a server, of an exported file and onnxruntime-web.

    npm install onnxruntime-web@1.30.0
    python export_model.py --checkpoint retrain_quick
    python examples/web/make_page.py experiments/retrain_quick/child.onnx page.html

The page holds the network and the runtime (20 MB): it can be opened from a disk, and nothing is sent anywhere.
"""

import argparse
import base64
import json
from pathlib import Path

import onnxruntime


def make_page(model: Path, runtime: Path) -> str:
    """The page of an exported file.

    Args:
        model: an .onnx file of export_model.py.
        runtime: the folder dist of the package onnxruntime-web.
    """
    meta = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"]).get_modelmeta()
    kept = meta.custom_metadata_map
    about = {"mode": kept["mode"], "input": kept["input"], "classes": json.loads(kept["classes"])}
    about["size"] = json.loads(kept["size"])
    files = {"WASM": runtime / "ort-wasm-simd-threaded.wasm", "RUNTIME": runtime / "ort.wasm.bundle.min.mjs"}
    parts = {name: base64.b64encode(path.read_bytes()).decode() for name, path in (files | {"MODEL": model}).items()}
    parts["ABOUT"] = json.dumps(about).replace("<", "\\u003c")
    parts["NAME"] = model.name.replace("&", "&amp;").replace("<", "&lt;")
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    for name, text in parts.items():
        page = page.replace(f"__{name}__", text)
    return page


def main() -> None:
    """Read the command line, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an .onnx file of export_model.py")
    parser.add_argument("page", type=Path, help="the page to write; nothing is overwritten")
    parser.add_argument("--runtime", type=Path, default=Path("node_modules/onnxruntime-web/dist"))
    given = parser.parse_args()
    for path in (given.model, given.runtime / "ort-wasm-simd-threaded.wasm", given.runtime / "ort.wasm.bundle.min.mjs"):
        if not path.is_file():
            parser.error(f"{path}: no such file; npm install onnxruntime-web@1.30.0 brings the runtime")
    if given.page.exists():
        parser.error(f"{given.page} exists; name another file")
    given.page.write_text(make_page(given.model, given.runtime), encoding="utf-8")
    print(f"written  {given.page}, {given.page.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
