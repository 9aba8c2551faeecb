"""Images a second that reach the training step, against torchvision's ImageFolder with transforms image by image.

    python -m benchmarks.input_pipeline
    python -m benchmarks.input_pipeline --dataset PATH/TO/IMAGES --image_size 32

Both give the same: random crops with padding, mirrored at random, normalised float batches in random order. An epoch
of each in turn; decoding beforehand is counted apart, as it happens once.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt

import options
from benchmarks import record, runner
from benchmarks.record import Rounds
from loading.batches import Data
from options.default_option import DataOptions


@dataclass(frozen=True)
class PipelineOptions(Rounds):
    """What is compared."""

    dataset: str = "dataset"
    """A folder with one subfolder of images per class."""
    image_size: PositiveInt = 32
    """Side in pixels."""
    batch_size: PositiveInt = 64
    """Images."""
    workers: NonNegativeInt = 2
    """Processes of the contender's DataLoader; it is measured without any too."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; returns the content of the JSON file."""
    opt = record.parse(PipelineOptions, argv, "input_pipeline", __doc__)
    run = DataOptions(
        dataset=opt.dataset, image_size=opt.image_size, train_portion=0.9, test_portion=0.0, max_ram_gb=64
    )
    start = time.perf_counter()
    data = Data(run)
    decoding = time.perf_counter() - start
    images = data.info.steps(opt.batch_size) * opt.batch_size
    device = torch.device("cpu")

    def ours() -> None:
        for _ in data.train_batches(opt.batch_size, 0, device):
            pass

    contenders: dict[str, Callable[[], None]] = {"ImageFolder": _image_folder(opt, data, 0)}
    if opt.workers:
        contenders[f"ImageFolder, {opt.workers} workers"] = _image_folder(opt, data, opt.workers)
    seconds = runner.compare(contenders | {"ours": ours}, opt.rounds, device)
    figures = {"images": images, "channels": data.info.channels, "decoding": decoding, "seconds": seconds}
    return record.publish("input_pipeline", opt, figures, _text(opt, **figures))


def _image_folder(opt: PipelineOptions, data: Data, workers: int) -> Callable[[], None]:
    """An epoch over the same training images."""
    from torch.utils.data import DataLoader, Subset
    from torchvision import datasets, transforms

    steps = [
        *([transforms.Grayscale()] if data.info.channels == 1 else []),  # as ours: ImageFolder makes three
        transforms.Resize(opt.image_size),
        transforms.CenterCrop(opt.image_size),
        transforms.RandomCrop(opt.image_size, padding=4),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(data.info.mean, data.info.std),
    ]
    folder = datasets.ImageFolder(opt.dataset, transforms.Compose(steps))
    chosen = Subset(folder, data.indices["train"].tolist())
    loader = DataLoader(chosen, opt.batch_size, shuffle=True, num_workers=workers, drop_last=True)

    def epoch() -> None:
        for _ in loader:
            pass

    return epoch


def _text(opt: PipelineOptions, images: int, channels: int, decoding: float, seconds: dict[str, list[float]]) -> str:
    rows = [
        [
            name,
            f"{images / statistics.median(times):,.0f}",
            record.spread(record.ratios(seconds, "ImageFolder")[name], 1),
        ]
        for name, times in seconds.items()
    ]
    return (
        f"Batches of {opt.batch_size} from {images:,} training images of `{opt.dataset}` at {opt.image_size}x"
        f"{opt.image_size}x{channels}, cropped, mirrored, normalised; n = {opt.rounds} epochs in turns.\n\n"
        f"{record.table(['pipeline', 'images a second', 'times ImageFolder'], rows)}\n\n"
        f"Reading, splitting and decoding, once before the first step: {decoding:.1f} s."
    )


if __name__ == "__main__":
    options.entry(main)
