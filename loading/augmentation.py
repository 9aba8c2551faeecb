"""What happens to training images, a batch at a time, each image on its own."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """What happens to training images; the defaults change nothing."""

    crop_padding: int = 0  # pixels
    flip: str = "none"  # none, horizontal, both, dihedral
    cutout: int = 0  # side in pixels
    fill: tuple[int, ...] = (0,)  # of the square, a byte a channel: what normalisation makes 0


def symmetries(images: Tensor, flip: str) -> list[Tensor]:
    """What a flip of Augmentation may make of images (B, C, H, W): 1, 2, 4 or 8 forms, themselves first."""
    forms = [images]
    for kinds, turned in (
        (("horizontal", "both", "dihedral"), lambda x: x.flip(3)),
        (("both", "dihedral"), lambda x: x.flip(2)),
        (("dihedral",), lambda x: x.transpose(2, 3)),
    ):
        if flip in kinds:
            forms += [turned(form) for form in forms]
    return forms


def augment(pixels: Tensor, how: Augmentation, random: torch.Generator | None = None) -> Tensor:
    """Crop, mirror and blank every image of a batch on its own: uint8 (B, C, H, W) -> the same shape.

    Args:
        pixels: the images.
        how: crop_padding zeros are put around the image before a crop of its size; each image is mirrored
            with probability 1/2 (both: vertically too; dihedral: at the diagonal too, the eight symmetries of a
            square); a cutout square, clipped at the border, takes the fill.
        random: source of the draws.
    """
    batch, _, height, width = pixels.shape
    pad = how.crop_padding

    def draw(below: int) -> Tensor:
        return torch.randint(below, (batch, 1), generator=random)  # (B, 1)

    rows, columns = torch.arange(height)[None], torch.arange(width)[None]
    if how.flip in ("both", "dihedral"):
        rows = torch.where(draw(2) == 1, height - 1 - rows, rows)  # (B, H)
    if how.flip != "none":
        columns = torch.where(draw(2) == 1, width - 1 - columns, columns)  # (B, W)
    if pad:
        pixels = torch.nn.functional.pad(pixels, (pad, pad, pad, pad))
        rows, columns = rows + draw(2 * pad + 1), columns + draw(2 * pad + 1)
    if pad or how.flip != "none":
        rows, columns = rows.expand(batch, height), columns.expand(batch, width)
        image = torch.arange(batch)[:, None, None]
        # (B, H, W, C): channels come last through the gather, each pixel being one contiguous copy
        pixels = pixels.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if how.flip == "dihedral":
        pixels = torch.where(draw(2)[:, :, None, None] == 1, pixels.transpose(2, 3), pixels)
    if how.cutout:
        half = how.cutout // 2
        down = torch.arange(height)[None] - draw(height) + half  # (B, H), 0.. inside the square
        right = torch.arange(width)[None] - draw(width) + half
        inside = ((down >= 0) & (down < how.cutout))[:, :, None] & ((right >= 0) & (right < how.cutout))[:, None]
        fill = torch.tensor(how.fill, dtype=torch.uint8)[:, None, None]  # (C, 1, 1)
        pixels = torch.where(inside[:, None], fill, pixels)
    return pixels
