"""Search an architecture on a folder of images: python main.py --dataset FOLDER --name NAME."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import options
from options.default_option import TrainOptions

if TYPE_CHECKING:
    from search import Found


def main(argv: Sequence[str] | None = None) -> "Found":
    """Parse the options and run the plain search; returns its folder, genotype and last metrics."""
    opt = options.parse(TrainOptions, argv, "main.py", __doc__)
    import search  # after the options: torch takes seconds to import, and a typo should not
    from objective import Objective

    return search.run_search(opt, lambda network, info, opt: Objective())


if __name__ == "__main__":
    options.entry(main)
