"""Search an architecture within a budget: python main_constraint.py --dataset FOLDER --target_params 1.2e6.

The same search as main.py with a resource term in its objective. Budgets are for the child as it will be deployed.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import options
from options.constraint_option import ConstraintOptions

if TYPE_CHECKING:
    from search import Found


def main(argv: Sequence[str] | None = None) -> "Found":
    """Parse the options and run the constrained search; returns its folder, genotype and last metrics."""
    opt = options.parse(ConstraintOptions, argv, "main_constraint.py", __doc__)
    import search
    from resources import budget  # after the options: torch takes seconds to import, and a typo should not

    return search.run_search(opt, budget.make_objective)


if __name__ == "__main__":
    options.entry(main)
