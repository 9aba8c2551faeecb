"""The options of main_constraint.py: those of main.py, and a resource budget or weight."""

from dataclasses import dataclass
from typing import Literal

from jsonargparse.typing import NonNegativeFloat, PositiveFloat

from options import PositiveInt, UserError
from options.default_option import TrainOptions

LEVELS = {"mild": 0.8, "moderate": 0.55, "aggressive": 0.3}


@dataclass(frozen=True)
class DeployedOptions:
    """The child as it will be deployed, where it differs from that of the search."""

    child_init_channels: PositiveInt | None = None
    """C of the deployed child; default: that of the search."""
    child_layers: PositiveInt | None = None
    """Cells of the deployed child; default: those of the search."""
    child_image_size: PositiveInt | None = None
    """Side in pixels of the deployed child's images; default: that of the search."""
    child_stem: Literal["cifar", "imagenet"] | None = None
    """Stem of the deployed child, as in retrain.py: imagenet divides the size by 8 before the first cell.
    Default: cifar, that of the search."""

    def check(self) -> None:
        """Raise UserError where a value is not allowed."""
        if self.child_layers is not None and self.child_layers < 3:
            raise UserError(f"--child_layers {self.child_layers}: a network has at least 3 cells, two of which reduce")


@dataclass(frozen=True)
class ConstraintOptions(DeployedOptions, TrainOptions):
    """A search whose child has to stay within a budget, or in which resources have a price."""

    name: str = "constrained"
    """Name of the experiment: a folder of experiments_dir. An existing one is kept."""

    target_params: PositiveFloat | None = None
    """Budget: learnable parameters of the child as it will be deployed, e.g. 1.2e6."""
    target_flops: PositiveFloat | None = None
    """Budget: multiply-adds an image."""
    target_mac: PositiveFloat | None = None
    """Budget: elements read and written an image (memory access cost)."""
    target_latency_ms: PositiveFloat | None = None
    """Budget: milliseconds an image on this machine through onnxruntime, measured before the search and kept."""
    level: Literal["none", "mild", "moderate", "aggressive"] = "none"
    """Budget on --measure as a share of what the average architecture may cost: 80, 55 or 30 % above the fixed part."""
    measure: Literal["params", "flops", "mac", "latency_ms"] = "params"
    """What --level and --eta are about."""
    eta: NonNegativeFloat = 0.1
    """Without a budget, the fixed weight of the penalty; an average architecture has a penalty of 1. 0 is main.py."""
    penalty: Literal["linear", "log"] = "linear"
    """The penalty is the cost of the operations, or log2(1 + that), as a multiple of the average architecture's."""
    estimator: Literal["expectation", "reparametrization", "policy_gradient"] = "expectation"
    """How the gradient of the expected cost is had: in closed form, through Z, or by the score function."""

    def targets(self) -> dict[str, float]:
        """The budgets given as numbers, by measure."""
        given = {measure: getattr(self, f"target_{measure}") for measure in ("params", "flops", "mac", "latency_ms")}
        return {measure: value for measure, value in given.items() if value is not None}

    def bounded(self) -> list[str]:
        """The measures that have a budget."""
        return [*self.targets(), *([self.measure] if self.level != "none" else [])]

    def measures(self) -> list[str]:
        """The measures that have a budget, or the one that has a price."""
        return self.bounded() or [self.measure]

    def check(self) -> None:
        DeployedOptions.check(self)
        TrainOptions.check(self)
        if (self.sampler, self.estimator) in (
            ("softmax", "policy_gradient"),
            ("straight_through", "reparametrization"),
        ):
            raise UserError(
                f"--estimator {self.estimator} needs the draws of another --sampler than {self.sampler}; "
                "--estimator expectation goes with all"
            )
        if self.child_stem == "imagenet" and (self.child_init_channels or self.init_channels) < 2:
            raise UserError("--child_stem imagenet begins with half of the channels, take --child_init_channels 2")
        if self.level != "none" and self.measure in self.targets():
            raise UserError(
                f"--level {self.level} and --target_{self.measure} are two budgets for one measure; give one"
            )
