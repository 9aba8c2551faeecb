"""Networks that a user would take instead of a search: a plain convolutional one, and a small residual one.

Both have three stages of 3 x 3 convolutions with C, 2C and 4C channels, each half the size of the one before, then the
mean of every channel and a linear classifier.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("plain", "resnet")


class Baseline(nn.Sequential):
    """Images (B, channels, H, W) -> logits (B, classes), and None where a child has an auxiliary head's.

    Args:
        stages: the three stages, of `channels` each.
        num_classes: size of the logits.
    """

    cells: Sequence[nn.Module] = ()  # to compile

    def __init__(self, stages: Sequence[nn.Module], channels: int, num_classes: int) -> None:
        super().__init__(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
        self.drop_path_prob = 0.0  # a child's option, without meaning here
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """See the class."""
        return super().forward(images.contiguous(memory_format=torch.channels_last)), None


def _conv(c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(c_out)]


def plain(width: int, num_classes: int, in_channels: int) -> Baseline:
    """Two convolutions a stage, each with batch norm and ReLU, and a max pool between stages; at least 4 x 4 pixels."""
    stages: list[nn.Module] = []
    for number, channels in enumerate((width, 2 * width, 4 * width)):
        before = in_channels if number == 0 else channels // 2
        pool = [nn.MaxPool2d(2)] if number else []
        first, second = _conv(before, channels), _conv(channels, channels)
        stages += [*pool, *first, nn.ReLU(inplace=True), *second, nn.ReLU(inplace=True)]
    return Baseline(stages, 4 * width, num_classes)


class _Block(nn.Module):
    """ReLU(x + BN(conv(ReLU(BN(conv(x)))))), x through a 1 x 1 convolution where its shape changes (He et al. 2015)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_conv(c_in, c_out, stride=stride), nn.ReLU(inplace=True), *_conv(c_out, c_out))
        same = c_in == c_out and stride == 1
        self.short = nn.Identity() if same else nn.Sequential(*_conv(c_in, c_out, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return F.relu(self.body(x) + self.short(x))


def resnet(width: int, num_classes: int, in_channels: int) -> Baseline:
    """A convolution and one residual block a stage."""
    blocks = [_Block(width, width, 1), _Block(width, 2 * width, 2), _Block(2 * width, 4 * width, 2)]
    return Baseline([*_conv(in_channels, width), nn.ReLU(inplace=True), *blocks], 4 * width, num_classes)


_MAKERS: dict[str, Callable[[int, int, int], Baseline]] = {"plain": plain, "resnet": resnet}


def make(kind: str, width: int, num_classes: int, in_channels: int, params: int | None = None) -> Baseline:
    """The baseline of a kind, of C = width; or of the width that comes nearest to `params` learnable parameters."""
    maker = _MAKERS[kind]
    if params is None:
        return maker(width, num_classes, in_channels)

    def size(width: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in maker(width, num_classes, in_channels).parameters())

    width = 1
    while size(width + 1) <= params:
        width += 1
    nearest = width if params - size(width) <= size(width + 1) - params else width + 1
    return maker(nearest, num_classes, in_channels)
