"""Export a trained child to ONNX or torch.export, with a model card: python export_model.py --checkpoint NAME."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import options
from options.export_option import ExportOptions

if TYPE_CHECKING:
    from child.export import Exported

EXAMPLE = """\
import json, sys, numpy, onnxruntime; from PIL import Image, ImageOps
model = onnxruntime.InferenceSession("child.onnx"); meta = model.get_modelmeta().custom_metadata_map
image = ImageOps.fit(Image.open(sys.argv[1]).convert(meta["mode"]), json.loads(meta["size"]))
pixels = numpy.asarray(image).reshape(1, image.height, image.width, -1).transpose(0, 3, 1, 2)
print(json.loads(meta["classes"])[model.run(None, {"images": pixels})[0].argmax()])
"""


def main(argv: Sequence[str] | None = None) -> "Exported":
    """Export, compare, time and describe a child; returns the paths and the card."""
    epilog = "To classify an image with the file alone:\n\n" + EXAMPLE
    opt = options.parse(ExportOptions, argv, "export_model.py", __doc__, epilog)
    from child import export  # after the options: torch takes seconds to import, and a typo should not

    return export.run_export(opt)


if __name__ == "__main__":
    options.entry(main)
