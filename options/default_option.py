"""The options of main.py. Defaults are the paper's or the authors' values for CIFAR-10."""

import re
from dataclasses import dataclass
from typing import Literal

from jsonargparse.typing import NonNegativeFloat, OpenUnitInterval, PositiveFloat

from options import HalfOpenUnit, NonNegativeInt, PositiveInt, UserError, check_name


@dataclass(frozen=True)
class DataOptions:
    """Which images there are, how they are split, what happens to them in training."""

    dataset: str = "cifar10"
    """A folder with one subfolder of images per class, or cifar10, cifar100, fashion_mnist."""
    data_dir: str = "data"
    """Where the data sets called by name lie or are downloaded to."""
    download: bool = False
    """Download a data set called by name if it is missing."""
    image_size: PositiveInt | None = None
    """Side in pixels; images are resized (shorter side) and cropped at the centre. Default: the images' own size."""
    train_portion: OpenUnitInterval = 0.5
    """Part of the images outside the test set that are trained on; the rest validate."""
    test_portion: HalfOpenUnit = 0.2
    """Part of a folder's images kept for testing, never seen by the search. Named data sets bring their own."""
    split: str | None = None
    """A split.json to use, or new. Default: in retrain.py that of the search of --genotype, else a new one."""
    group_pattern: str | None = None
    """Regular expression found in the file name; images with the same match (first group) stay in one split."""
    balance: bool = False
    """Draw training images so that every class comes equally often (with replacement)."""
    crop_padding: NonNegativeInt = 4
    """Zero pixels around a training image before it is cropped at random to its size; 0 leaves it as it is."""
    flip: Literal["none", "horizontal", "both", "dihedral"] = "horizontal"
    """Random mirroring of training images; both suits images without an upright, such as overhead views, and dihedral
    adds quarter turns (square images)."""
    cutout: bool = False
    """Blank a random square in every training image."""
    cutout_length: PositiveInt = 16
    """Side in pixels of that square."""
    max_ram_gb: PositiveFloat = 4.0
    """Decoded images larger than this in all are kept in a file of cache_dir, mapped into memory."""
    cache_dir: str | None = None
    """Where decoded images are kept that are larger than that or took long to decode; later runs start from them.
    Default: the user's folder for caches, ~/.cache/snas on Linux."""
    max_cache_gb: PositiveFloat = 20.0
    """Of the decoded images kept there, those that were not used for longest are removed beyond this."""
    seed: NonNegativeInt = 0
    """Seed of every random number: weights, splits, batches, augmentation, Z."""

    def check(self) -> None:
        """Raise UserError where values do not go together."""
        if self.image_size is not None and self.image_size > 16_384:
            raise UserError(f"--image_size {self.image_size}: images have up to 16,384 pixels a side here")
        if self.group_pattern is not None:
            try:
                re.compile(self.group_pattern)
            except re.error as error:
                raise UserError(f"--group_pattern {self.group_pattern!r} is no regular expression: {error}") from None


@dataclass(frozen=True)
class RunOptions(DataOptions):
    """The run, its files, the machine, the training, as a search and a retraining have them."""

    name: str = "search"
    """Name of the experiment: a folder of experiments_dir. An existing one is kept."""
    experiments_dir: str = "experiments"
    """Where runs leave their files."""
    visualizations_dir: str = "visualizations"
    """Where pictures go."""
    resume: bool = False
    """Continue the experiment from its newest checkpoint, bit for bit; start it if there is none."""
    overwrite: bool = False
    """Begin anew in the folder of an earlier run of this script, whose files are lost once the data is read."""
    save_freq: PositiveInt = 10
    """Keep the checkpoint of every save_freq-th epoch; the newest one is always kept."""
    save_every_minutes: PositiveFloat = 10.0
    """Write a checkpoint within an epoch that takes longer, dropped when the epoch's own is written."""
    report_freq: PositiveInt = 10
    """Steps between two updates of the running figures on the progress bar."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """After a step whose loss or gradient is no number: end the run, or leave out a tenth of an epoch's steps, or 3."""

    device: str = "auto"
    """cpu, cuda, cuda:1, mps, ...; auto takes a GPU if there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32, or bf16 autocast."""
    compile: bool = False
    """Compile the cells with torch.compile: minutes at the start; for GPUs, a CPU is faster without."""
    batch_size: PositiveInt = 64
    """Images a training step."""
    eval_batch_size: PositiveInt = 256
    """Images a batch of evaluation."""
    epochs: PositiveInt = 150
    """Passes over the training images."""

    init_channels: PositiveInt = 16
    """C, channels of the first cell's nodes."""
    layers: PositiveInt = 8
    """Number of cells; reduction cells at layers // 3 and 2 * layers // 3. At least 3."""
    learning_rate: PositiveFloat = 0.025
    """Of SGD, at the start."""
    learning_rate_min: NonNegativeFloat = 0.001
    """Of SGD, at the end of the cosine."""
    momentum: HalfOpenUnit = 0.9
    """Of SGD."""
    weight_decay: NonNegativeFloat = 3e-4
    """Of SGD."""
    grad_clip: PositiveFloat = 5.0
    """Largest norm of the gradient of the weights."""
    calibration_batches: PositiveInt = 8
    """Training batches (of eval_batch_size) from which a supernet's weights get their batch-norm statistics."""

    def check(self) -> None:
        super().check()
        check_name(self.name)
        if self.overwrite and self.resume:
            raise UserError("--overwrite True begins anew, --resume True goes on; give one of them")
        if self.batch_size < 2:
            raise UserError("--batch_size 1: batch norm needs at least 2 images")
        if self.eval_batch_size < 2:
            raise UserError("--eval_batch_size 1: the statistics of batch norm need at least 2 images")
        if not 3 <= self.layers <= 1000:
            raise UserError(f"--layers {self.layers}: a network has 3 cells, two of which reduce, to 1,000")
        if self.learning_rate_min > self.learning_rate:
            raise UserError(
                f"--learning_rate_min {self.learning_rate_min} is above --learning_rate {self.learning_rate}"
            )


@dataclass(frozen=True)
class TrainOptions(RunOptions):
    """The search: its supernet, its sampling, the optimiser of alpha (Adam; theta's is SGD)."""

    space: Literal["snas", "nasnet", "amoebanet", "convs"] = "snas"
    """Operation space: the candidate operations of an edge. convs has full and separable convolutions."""
    nodes: PositiveInt = 4
    """Intermediate nodes of a cell."""
    drop_path_prob: HalfOpenUnit = 0.0
    """Probability that a sample skips an edge in training."""
    recompute: bool = False
    """Keep only the inputs of each cell for the backward pass and compute the rest again: less memory, slower."""

    sampler: Literal["concrete", "truncated", "straight_through", "dsnas", "softmax"] = "concrete"
    """How Z comes from alpha: concrete is SNAS's; truncated leaves out its small weights, so that their operations need
    not run; straight_through and dsnas draw one operation an edge and run that alone, a step in a fraction of the time;
    softmax is DARTS's mixture, without a draw."""
    warmup_epochs: NonNegativeInt = 0
    """Epochs at the start in which alpha stays as it is and theta alone learns, so that alpha meets trained weights."""
    select: NonNegativeInt = 0
    """When the epochs are over, rank so many children of p_alpha on the validation split with the supernet's weights,
    and take the best instead of the likeliest; 0 takes the likeliest."""
    finalists: NonNegativeInt = 4
    """With --select, the best of the ranking that are trained on, of which the best is taken."""
    finalist_epochs: PositiveInt = 3
    """Epochs of their training."""
    arch_learning_rate: PositiveFloat = 3e-4
    """Of alpha (Adam). 3e-4 is for the paper's 58,500 steps: a shorter run takes more, to 0.1, and says so."""
    arch_weight_decay: NonNegativeFloat = 1e-3
    """Of alpha."""
    arch_betas: tuple[HalfOpenUnit, HalfOpenUnit] = (0.5, 0.999)
    """Of Adam: --arch_betas=[0.5,0.999]."""
    arch_grad_clip: PositiveFloat = 10.0
    """Largest norm of alpha's gradient."""

    temp_schedule: Literal["linear", "exponential"] = "linear"
    """linear: initial_temp to min_temp, an epoch at a time; exponential: initial_temp * exp(-anneal_rate * step)."""
    initial_temp: PositiveFloat = 1.0
    """Temperature of the softmax at the start."""
    min_temp: PositiveFloat = 0.03
    """Floor of the temperature; linear ends there."""
    anneal_rate: NonNegativeFloat = 3e-5
    """Of the exponential schedule, per training step of the whole run."""
    resample_cell: bool = False
    """Draw a fresh Z for every cell instead of one per cell type."""

    def check(self) -> None:
        super().check()
        if self.compile and self.sampler in ("truncated", "straight_through", "dsnas"):
            raise UserError(f"--compile True compiles every draw of --sampler {self.sampler} anew; leave it out")
        if self.select == 1:
            raise UserError("--select 1 is the likeliest child alone; give 0, or how many to choose from")
        if self.warmup_epochs >= self.epochs:
            raise UserError(f"--warmup_epochs {self.warmup_epochs} leaves alpha none of the --epochs {self.epochs}")
        if self.nodes > 64:
            raise UserError(f"--nodes {self.nodes}: a cell has up to 64, the paper's 4")
        if self.min_temp > self.initial_temp:
            raise UserError(f"--min_temp {self.min_temp} is above --initial_temp {self.initial_temp}")
