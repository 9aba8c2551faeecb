"""The options of retrain.py. Defaults are the paper's values for CIFAR-10."""

import re
from dataclasses import dataclass
from typing import Literal

from jsonargparse.typing import NonNegativeFloat, PositiveFloat

from options import HalfOpenUnit, PositiveInt, UserError
from options.default_option import RunOptions


@dataclass(frozen=True)
class ChildOptions(RunOptions):
    """Training the network of a genotype from scratch, or from a supernet's weights."""

    name: str = "child"
    """Name of the experiment: a folder of experiments_dir. An existing one is kept."""
    genotype: str = "search"
    """An experiment, a genotype.json, a search's checkpoint, a file with a cell as DARTS prints it, a published name
    (SNAS_mild, DARTS_V2, ...), or random:SEED."""
    genotype_epoch: PositiveInt | None = None
    """With an experiment, the likeliest cell of that epoch's checkpoint instead of what the search took at the end;
    inspect_model.py --rule argmax shows it."""
    network: Literal["cells", "plain", "resnet"] = "cells"
    """Cells of --genotype; or, to compare with them, a plain CNN or a small residual network of --init_channels, on the
    split of --genotype's search, without auxiliary head and drop path."""
    match_params: PositiveInt | None = None
    """With random:SEED, draw until the child has this many parameters, give or take 5 %; with --network, choose its
    width."""
    match_flops: PositiveInt | None = None
    """With random:SEED and --match_params, and this many multiply-adds (of all passes of --tta), give or take 10 %."""
    space: Literal["snas", "nasnet", "amoebanet", "convs"] = "snas"
    """With random:SEED, the operation space drawn from."""
    use_valid: bool = True
    """Train on the training and the validation split; False keeps validation for a figure every epoch."""
    init_from: str | None = None
    """An experiment whose supernet gives the initial weights, where shapes agree, instead of random ones."""
    eval_only: bool = False
    """Evaluate on the test split and stop: the newest checkpoint of --name, or the weights of --init_from."""
    test_folder: str | None = None
    """With --eval_only, other labelled images to evaluate --name on: a folder with one subfolder per class."""

    init_channels: PositiveInt = 36
    """C, channels of the first cell's nodes."""
    layers: PositiveInt = 20
    """Number of cells; reduction cells at layers // 3 and 2 * layers // 3. At least 3."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """cifar keeps the size of the images, imagenet divides it by 8 before the first cell."""
    auxiliary: bool = True
    """Train with an auxiliary head at two thirds of the depth; needs features of 8 x 8 there (imagenet stem: 7 x 7)."""
    auxiliary_weight: NonNegativeFloat = 0.4
    """Weight of the auxiliary head's loss."""
    drop_path_prob: HalfOpenUnit = 0.2
    """Probability that a sample skips an operation, reached linearly in the last epoch."""
    cutout: bool = True
    """Blank a random square in every training image."""

    batch_size: PositiveInt = 96
    """Images a training step."""
    epochs: PositiveInt = 600
    """Passes over the training images."""
    schedule: Literal["cosine", "exponential", "onecycle"] = "cosine"
    """cosine falls to learning_rate_min; exponential multiplies by lr_decay every epoch; onecycle rises from a 25th of
    learning_rate to it in the first fifth of all steps, then falls to nothing."""
    nesterov: bool = False
    """Nesterov's momentum."""
    tta: bool = False
    """Test with the mean of the logits over what --flip makes of an image: 2 forms for horizontal, 4 for both, 8 for
    dihedral; an exported file does so too."""
    learning_rate_min: NonNegativeFloat = 0.0
    """At the end of the cosine."""
    lr_decay: PositiveFloat = 0.97
    """Of the exponential schedule."""
    label_smoothing: HalfOpenUnit = 0.0
    """Share of the target spread over all classes."""
    ema_decay: HalfOpenUnit = 0.0
    """Decay a step of an exponential moving average of the weights, which is then evaluated; 0 is without."""

    @property
    def test_flip(self) -> str:
        """Over whose forms of an image the logits of a test are averaged, see augmentation.symmetries."""
        return self.flip if self.tta else "none"

    def check(self) -> None:
        super().check()
        drawn = self.genotype.partition(":")
        if drawn[0] == "random" and drawn[1] and not re.fullmatch("[0-9]+", drawn[2]):
            raise UserError(f"--genotype {self.genotype}: the seed is a number, as in random:3")
        if self.stem == "imagenet" and self.init_channels < 2:
            raise UserError("--init_channels 1: the ImageNet stem begins with half of them, take at least 2")
        if self.nesterov and not self.momentum:
            raise UserError("--nesterov True needs a --momentum above 0")
        if self.test_folder is not None and not self.eval_only:
            raise UserError("--test_folder goes with --eval_only True")
        if self.match_params is not None and not self.genotype.startswith("random:") and self.network == "cells":
            raise UserError("--match_params goes with --genotype random:SEED, or --network plain or resnet")
        if self.match_flops is not None and (self.match_params is None or self.network != "cells"):
            raise UserError("--match_flops goes with --genotype random:SEED and --match_params")
        if self.network != "cells" and self.init_from is not None:
            raise UserError(f"--init_from gives weights of cells, --network {self.network} has none")
