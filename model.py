"""The child network: the discrete architecture of a genotype, on its own."""

from collections.abc import Sequence
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genotypes import CellPlan, Genotype, Node, cell_plan
from operations import Norm, Skip, State, drop_mask, drop_probability, make_op, prepare


class ChildCell(nn.Module):
    """One cell of a child: every node is the sum of its operations, a zero tensor if it has none."""

    def __init__(self, plan: CellPlan, nodes: Sequence[Node], concat: Sequence[int], affine: bool) -> None:
        super().__init__()
        self.prepare0, self.prepare1 = prepare(plan, affine)
        self.reduction, self.concat = plan.reduction, tuple(concat)
        self.sources = [[source for _, source in node] for node in nodes]
        self.ops = nn.ModuleList(
            make_op(op, plan.channels, plan.stride(source), affine) for node in nodes for op, source in node
        )

    def forward(self, before: Tensor, last: Tensor, drop: Tensor | None = None) -> Tensor:
        """c_{k-2}, c_{k-1} and drop path's probability -> (B, len(concat) * C, H', W')."""
        states = [State(self.prepare0(before)), State(self.prepare1(last))]
        batch, channels, height, width = states[1].x.shape
        if self.reduction:
            height, width = ceil(height / 2), ceil(width / 2)
        ops = iter(self.ops)
        for sources in self.sources:
            total: Tensor | None = None
            for source in sources:
                op, state = next(ops), states[source]
                keep = None if drop is None or isinstance(op, Skip) else drop_mask(state.x, drop)
                total = op(state, None, total, keep)
            states.append(State(last.new_zeros(batch, channels, height, width) if total is None else total))
        return torch.cat([states[state].x for state in self.concat], 1)


def sees_images(genotype: Genotype, layers: int) -> bool:
    """Whether anything of an image reaches the classifier of a network of so many cells: not through nodes of zeros."""
    before = last = True
    for plan in cell_plan(1, layers, 1):
        nodes, concat = (
            (genotype.reduce, genotype.reduce_concat) if plan.reduction else (genotype.normal, genotype.normal_concat)
        )
        states = [before, last]
        for node in nodes:
            states.append(any(states[source] for _, source in node))
        before, last = last, any(states[state] for state in concat)
    return last


class AuxiliaryHead(nn.Sequential):
    """A second classifier on the features at 2/3 of the depth (DARTS's form), for training only.

    Args:
        channels: of the features (B, channels, H, W), H and W of 5 + stride or more.
        num_classes: size of its logits.
        stride: of the pooling: 3 for CIFAR's 8 x 8 features, 2 for ImageNet's 7 x 7.
    """

    def __init__(self, channels: int, num_classes: int, stride: int) -> None:
        super().__init__(
            nn.ReLU(),
            nn.AvgPool2d(5, stride, count_include_pad=False),  # published: to 2 x 2
            nn.Conv2d(channels, 128, 1, bias=False),
            Norm(128),
            nn.ReLU(inplace=True),
            nn.Conv2d(128, 768, 2, bias=False),
            Norm(768),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),  # 1 x 1 already for the published sizes
            nn.Flatten(),
            nn.Linear(768, num_classes),
        )


def _imagenet_stems(in_channels: int, channels: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Image -> C at 1/4 of the size, and C at 1/4 -> C at 1/8."""

    def conv(c_in: int, c_out: int) -> nn.Conv2d:
        return nn.Conv2d(c_in, c_out, 3, 2, 1, bias=False)

    half = channels // 2
    first = nn.Sequential(
        conv(in_channels, half), Norm(half), nn.ReLU(inplace=True), conv(half, channels), Norm(channels)
    )
    return first, nn.Sequential(nn.ReLU(), conv(channels, channels), Norm(channels))


class ChildNetwork(nn.Module):
    """The network of a genotype.

    Args:
        genotype: the cells; any number of nodes, of inputs per node, any concat.
        init_channels: C of the first cell.
        num_classes: size of the logits.
        layers: number of cells.
        auxiliary: give logits of an auxiliary head too, in training mode.
        stem: cifar (full size) or imagenet (1/8 of the size before the first cell).
        affine: whether batch norms learn inside the cells; False builds the child of a supernet exactly.
        in_channels: of the images.
        drop_path_prob: probability that a sample skips an operation, in training; may be set at any time.
    """

    def __init__(
        self,
        genotype: Genotype,
        init_channels: int,
        num_classes: int,
        layers: int,
        auxiliary: bool = False,
        stem: str = "cifar",
        affine: bool = True,
        in_channels: int = 3,
        drop_path_prob: float = 0.0,
    ) -> None:
        super().__init__()
        self.drop_path_prob = drop_path_prob
        concat = (len(genotype.normal_concat), len(genotype.reduce_concat))
        if stem == "cifar":
            channels = 3 * init_channels
            self.stem = nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), Norm(channels))
        elif stem == "imagenet":
            channels = init_channels
            self.stem, self.stem1 = _imagenet_stems(in_channels, channels)
        else:
            raise ValueError(f"stem {stem!r} is none of cifar, imagenet")
        plans = cell_plan(init_channels, layers, channels, concat, after_reduction=stem == "imagenet")
        self.cells = nn.ModuleList(
            ChildCell(plan, genotype.reduce, genotype.reduce_concat, affine)
            if plan.reduction
            else ChildCell(plan, genotype.normal, genotype.normal_concat, affine)
            for plan in plans
        )
        self.auxiliary_at = 2 * layers // 3
        self.auxiliary: AuxiliaryHead | None = None
        if auxiliary:
            stride = 3 if stem == "cifar" else 2
            self.auxiliary = AuxiliaryHead(plans[self.auxiliary_at].output, num_classes, stride)
        self.classifier = nn.Linear(plans[-1].output, num_classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (B, channels, H, W) -> logits (B, classes), and those of the auxiliary head in training."""
        before = self.stem(images.contiguous(memory_format=torch.channels_last))
        last = self.stem1(before) if hasattr(self, "stem1") else before
        drop = drop_probability(images, self.drop_path_prob if self.training else 0.0)
        side: Tensor | None = None
        for index, cell in enumerate(self.cells):
            before, last = last, cell(before, last, drop)
            if self.auxiliary is not None and self.training and index == self.auxiliary_at:
                side = self.auxiliary(last)
        pooled = F.adaptive_avg_pool2d(last, 1).flatten(1)
        return self.classifier(pooled), side
