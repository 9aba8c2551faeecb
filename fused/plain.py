"""Where the kernels do not work: convolutions in the forms that PyTorch trains fastest on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor


def subsample(x: Tensor, start: int = 0) -> Tensor:
    """Every other pixel: x[:, :, start::2, start::2], sliced so that the gradient keeps the layout of channels_last."""
    return x.permute(0, 2, 3, 1)[:, start::2, start::2].permute(0, 3, 1, 2)


def spatial_conv(x: Tensor, weight: Tensor, stride: int, dilation: int, training: bool) -> Tensor:
    """A padded depthwise convolution (B, C, H, W) -> (B, C, ceil(H / stride), ceil(W / stride)).

    Always the function of the last line, which is what is exported and counted; in training in forms whose backward is
    2 to 10 times faster on a CPU. A strided one is a subsampled plain one. A dilated one is a plain one
    on each of the 2 x 2 grids of pixels that never mix; with a stride of 2 only one of the four is needed.
    """
    channels, pad = weight.shape[0], dilation * (weight.shape[2] // 2)
    if training and torch.is_grad_enabled() and x.device.type == "cpu" and not torch.compiler.is_exporting():
        if stride == dilation == 2:
            return F.conv2d(subsample(x), weight, None, 1, pad // 2, 1, channels)
        if stride == 2:
            return subsample(F.conv2d(x, weight, None, 1, pad, 1, channels))
        if dilation == 2 and x.shape[2] % 2 == x.shape[3] % 2 == 0 and x.shape[2] >= 8:
            grids = F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)  # (B, 4C, H/2, W/2)
            y = F.conv2d(grids, weight.repeat_interleave(4, 0), None, 1, pad // 2, 1, 4 * channels)
            return F.pixel_shuffle(y, 2)
    return F.conv2d(x, weight, None, stride, pad, dilation, channels)
