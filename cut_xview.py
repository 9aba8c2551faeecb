"""Cut chips of vehicles from the scenes of xView: python cut_xview.py --labels FILE --scenes FOLDER --out FOLDER."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import options
from options.cut_option import CutOptions

if TYPE_CHECKING:
    from loading.xview import Cut


def main(argv: Sequence[str] | None = None) -> "Cut":
    """Cut; returns what was cut and what was left out."""
    opt = options.parse(CutOptions, argv, "cut_xview.py", __doc__)
    from loading import xview

    return xview.cut(opt)


if __name__ == "__main__":
    options.entry(main)
