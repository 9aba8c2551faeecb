"""The options of compare.py."""

from dataclasses import dataclass, field
from pathlib import Path

from jsonargparse.typing import PositiveFloat

from options import PositiveInt, UserError, check_name, part

CONTENDERS = ("found", "random", "peer", "plain", "resnet", "long")
# options of which every run has its own, or all have the same
OWN = {
    *("name", "seed", "split", "dataset", "experiments_dir", "visualizations_dir", "resume", "config", "eval_only"),
    *("test_folder", "genotype", "genotype_epoch", "network", "match_params", "match_flops", "init_from"),
}


@dataclass(frozen=True)
class CompareOptions:
    """What is compared, on which images, for how long."""

    dataset: str = "dataset"
    """A folder with one subfolder of images per class, or cifar10, cifar100, fashion_mnist."""
    name: str = "compare"
    """Runs are called NAME_search_N, NAME_found_N, ...; the folder NAME of experiments_dir has the result."""
    n: PositiveInt = 3
    """Independent searches, and trainings of every contender; finished ones are not repeated."""
    minutes: PositiveFloat | None = None
    """No further training begins after so many minutes; what is finished is compared, and the next call goes on."""
    contenders: list[str] = field(default_factory=lambda: [name for name in CONTENDERS if name != "peer"])
    """Of these: the found cell, a random one, a plain CNN, a small ResNet, all for the same epochs, and long, a plain
    CNN trained for as many minutes as the found cell; all with about its parameters. And peer, a random cell with about
    its multiply-adds too."""
    split: str | None = None
    """A split.json for all runs; without it, that of the first search."""
    part: str = "1/1"
    """K/N runs every N-th seed from the K-th on: N processes with a --split share the work of one comparison."""
    others: list[str] = field(default_factory=list)
    """comparison.json files of the same comparison, with its recipes and --split, on other machines: their whole
    rounds (a search and its contenders) count, and are not run here."""
    search_config: str = "options/presets/quick.yaml"
    """The recipe of every search."""
    retrain_config: str = "options/presets/retrain_quick.yaml"
    """The recipe of every training, the same for all contenders."""
    search_options: list[str] = field(default_factory=list)
    """Further options of main.py: --search_options='["--image_size=28"]'."""
    retrain_options: list[str] = field(default_factory=list)
    """Further options of retrain.py, for all contenders."""
    experiments_dir: str = "experiments"
    """Where runs lie."""
    visualizations_dir: str = "visualizations"
    """Where pictures of the found cells go."""

    def seeds(self) -> range:
        """Those that this process runs."""
        first, every = part(self.part)
        return range(first - 1, self.n, every)

    def check(self) -> None:
        """Raise UserError where a value is not allowed."""
        check_name(self.name)
        number, parts = part(self.part)
        if number > self.n:
            raise UserError(f"--part {self.part} has none of the {self.n} seeds of --n")
        if self.split is not None and not Path(self.split).is_file():
            raise UserError(f"--split {self.split}: no such file; give a split.json, or nothing for the first search's")
        if self.others and self.split is None:
            raise UserError("--others needs the --split that was used there too")
        if parts > 1 and self.split is None:
            raise UserError(f"--part {self.part} needs a --split, or every part would draw its own")
        for given in (*self.search_options, *self.retrain_options):
            if given.removeprefix("--").partition("=")[0] in OWN:
                raise UserError(f"{given} is not for a recipe: compare.py sets it for every run")
        for option in ("search_config", "retrain_config"):
            if not Path(getattr(self, option)).is_file():
                raise UserError(
                    f"--{option} {getattr(self, option)}: no such file; the presets are in options/presets/"
                )
        if "long" in self.contenders and "plain" not in self.contenders:
            raise UserError("--contenders: long is plain for longer, and goes with it")
        unknown = [name for name in self.contenders if name not in CONTENDERS]
        twice = len({*self.contenders}) < len(self.contenders)
        if unknown or twice or "found" not in self.contenders or len(self.contenders) < 2:
            raise UserError(f"--contenders {self.contenders}: found and at least one of {', '.join(CONTENDERS[1:])}")
