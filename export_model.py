"""Export a trained child to ONNX or torch.export, with a model card: python export_model.py --checkpoint NAME."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import options
from options.export_option import ExportOptions

if TYPE_CHECKING:
    from child.export import Exported

EXAMPLE = """\
python child_onnx.py photo1.png photo2.png
"""


def main(argv: Sequence[str] | None = None) -> "Exported":
    """Export, compare, time and describe a child; returns the paths and the card."""
    epilog = "To classify images with the file and the program beside it, without this repository:\n\n" + EXAMPLE
    opt = options.parse(ExportOptions, argv, "export_model.py", __doc__, epilog)
    from child import export  # after the options: torch takes seconds to import, and a typo should not

    return export.run_export(opt)


if __name__ == "__main__":
    options.entry(main)
