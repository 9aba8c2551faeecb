"""One retraining step of a child: ours, without the fused kernels, a textbook child, and a plain CNN of its parameters.

    python -m benchmarks.child_step
    python -m benchmarks.child_step --init_channels 36 --layers 20 --batch_size 96 --image_size 32

A step is forward, backward, gradient clip and SGD. The textbook child is NCHW with a module per operation, as public
implementations have it; the plain CNN is six 3x3 convolutions with batch norm and two poolings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn

import genotypes
import options
from benchmarks import record, runner, textbook
from benchmarks.record import Rounds
from fused import operation as kernels
from genotypes import Genotype
from model import ChildNetwork
from training import loop


@dataclass(frozen=True)
class ChildStepOptions(Rounds):
    """What is compared."""

    genotype: str = "SNAS_mild"
    """A published name."""
    init_channels: PositiveInt = 16
    """C."""
    layers: PositiveInt = 3
    """Cells."""
    batch_size: PositiveInt = 64
    """Images."""
    image_size: PositiveInt = 28
    """Side in pixels."""
    threads: PositiveInt = 1
    """Threads of the step."""


class TextbookCell(nn.Module):
    """A module per operation, their outputs added."""

    def __init__(self, sizes: tuple[int, int, int], nodes: Sequence[Any], reduction: bool, reduced: bool) -> None:
        super().__init__()
        before, last, c = sizes
        self.pre0 = textbook.Reduce(before, c, affine=True) if reduced else textbook.prepare(before, c, affine=True)
        self.pre1 = textbook.prepare(last, c, affine=True)
        self.sources = [[source for _, source in node] for node in nodes]
        self.ops = nn.ModuleList(
            textbook.op(name, c, 2 if reduction and source < 2 else 1, affine=True)
            for node in nodes
            for name, source in node
        )

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        """c_{k-2}, c_{k-1} -> the concatenated nodes."""
        states, ops = [self.pre0(before), self.pre1(last)], iter(self.ops)
        for sources in self.sources:
            states.append(sum(next(ops)(states[source]) for source in sources))
        return torch.cat(states[2:], 1)


class TextbookChild(nn.Module):
    """The child of a genotype whose nodes all have inputs."""

    def __init__(self, genotype: Genotype, c: int, classes: int, layers: int) -> None:
        super().__init__()
        before = last = 3 * c
        self.stem = nn.Sequential(nn.Conv2d(3, last, 3, padding=1, bias=False), nn.BatchNorm2d(last))
        self.cells, reduced = nn.ModuleList(), False
        for layer in range(layers):
            reduction = layer in (layers // 3, 2 * layers // 3)
            c = 2 * c if reduction else c
            nodes = genotype.reduce if reduction else genotype.normal
            self.cells.append(TextbookCell((before, last, c), nodes, reduction, reduced))
            before, last, reduced = last, 4 * c, reduction
        self.classifier = nn.Linear(last, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        before = last = self.stem(images)
        for cell in self.cells:
            before, last = last, cell(before, last)
        return self.classifier(last.mean((2, 3)))


def plain_cnn(width: int, classes: int) -> nn.Sequential:
    """Six 3x3 convolutions of widths w, w, 2w, 2w, 4w, 4w, with a pooling after every two."""
    modules: list[nn.Module] = []
    before = 3
    for stage in range(3):
        for _ in range(2):
            c = width * 2**stage
            modules += [nn.Conv2d(before, c, 3, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU(inplace=True)]
            before = c
        modules.append(nn.MaxPool2d(2) if stage < 2 else nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*modules, nn.Flatten(), nn.Linear(before, classes))


def parameters(module: nn.Module) -> int:
    """Their number."""
    return sum(p.numel() for p in module.parameters())


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; returns the content of the JSON file."""
    opt = record.parse(ChildStepOptions, argv, "child_step", __doc__)
    torch.set_num_threads(opt.threads)
    torch.manual_seed(0)
    genotype = genotypes.GENOTYPES[opt.genotype]
    child = ChildNetwork(genotype, opt.init_channels, 10, opt.layers)
    width = min(range(4, 257), key=lambda w: abs(parameters(plain_cnn(w, 10)) - parameters(child)))
    networks: dict[str, nn.Module] = {
        "textbook": TextbookChild(genotype, opt.init_channels, 10, opt.layers),
        "ours": child,
        "without kernels": ChildNetwork(genotype, opt.init_channels, 10, opt.layers),
        "plain CNN": plain_cnn(width, 10).to(memory_format=torch.channels_last),
    }
    images = torch.randn(opt.batch_size, 3, opt.image_size, opt.image_size)
    targets = torch.randint(0, 10, (opt.batch_size,))
    steps = {name: _step(network, images, targets, name != "without kernels") for name, network in networks.items()}
    figures: dict[str, Any] = {
        "params": {name: parameters(network) for name, network in networks.items()},
        "seconds": runner.compare(steps, opt.rounds, torch.device("cpu")),
    }
    name = record.on_this(f"child_step_{opt.init_channels}_{opt.layers}")
    return record.publish("child_step", opt, figures, _text(opt, **figures), name)


def _step(network: nn.Module, images: Tensor, targets: Tensor, enabled: bool) -> Callable[[], None]:
    sgd = torch.optim.SGD(network.parameters(), 0.025, 0.9, weight_decay=3e-4, fused=isinstance(network, ChildNetwork))

    def run() -> None:
        with kernels.switched(enabled):
            logits = network(images)
            loss = F.cross_entropy(logits[0] if isinstance(logits, tuple) else logits, targets)
            loop.update(loss, [(sgd, 5.0)])

    return run


def _text(opt: ChildStepOptions, params: dict[str, int], seconds: dict[str, list[float]]) -> str:
    rows = [
        [
            name,
            f"{params[name]:,}",
            record.spread(times, 3),
            record.spread(record.ratios(seconds, "textbook")[name]),
            record.spread([opt.batch_size / t for t in times], 0),
        ]
        for name, times in seconds.items()
    ]
    head = ["network", "parameters", "s a step", "times faster than textbook", "images a second"]
    return (
        f"One retraining step of {opt.genotype}, C = {opt.init_channels}, {opt.layers} cells, batch {opt.batch_size}, "
        f"{opt.image_size}x{opt.image_size}, float32; n = {opt.rounds} steps in turns, "
        f"median (lowest to highest).\n\n{record.table(head, rows)}"
    )


if __name__ == "__main__":
    options.entry(main)
