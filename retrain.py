"""Train the child of a genotype from scratch and test it once: python retrain.py --genotype EXPERIMENT."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import options
from options.child_option import ChildOptions

if TYPE_CHECKING:
    from child.testing import Tested


def main(argv: Sequence[str] | None = None) -> "Tested":
    """Parse the options, train and test the child; returns its folder, genotype and test figures."""
    opt = options.parse(ChildOptions, argv, "retrain.py", __doc__)
    from child import retraining  # after the options: torch takes seconds to import, and a typo should not

    return retraining.run_retrain(opt)


if __name__ == "__main__":
    options.entry(main)
