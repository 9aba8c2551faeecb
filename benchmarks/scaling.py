"""Images a second of the search step on several processes with averaged gradients, against one process.

    python -m benchmarks.scaling

Every process has one thread and its own batch, PyTorch's DistributedDataParallel (gloo) averages the gradients of
theta and alpha, and all draw the same Z. main.py itself runs in one process; this is what a distributed one would give.
"""

import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import options
from benchmarks import record
from benchmarks.record import Rounds
from model_search import Network
from training import loop


@dataclass(frozen=True)
class ScalingOptions(Rounds):
    """What is measured."""

    processes: PositiveInt = 2
    """Processes that share the work."""
    init_channels: PositiveInt = 16
    """C."""
    layers: PositiveInt = 8
    """Cells."""
    batch_size: PositiveInt = 32
    """Images of a process."""
    image_size: PositiveInt = 32
    """Side in pixels."""


class _Sampling(nn.Module):
    """The supernet with the draw of Z inside, so that alpha's gradients are averaged too."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, seed: int) -> Tensor:
        logits: Tensor = self.network(images, self.network.sample(1.0, torch.Generator().manual_seed(seed)))
        return logits


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; returns the content of the JSON file."""
    opt = record.parse(ScalingOptions, argv, "scaling", __doc__)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    queue = mp.get_context("spawn").SimpleQueue()
    rates: dict[str, list[float]] = {}
    for count in (1, opt.processes):
        mp.spawn(_work, (opt, count, address, queue), nprocs=count)  # type: ignore[attr-defined]
        rates[str(count)] = [count * opt.batch_size / seconds for seconds in queue.get()]
    one = statistics.median(rates["1"])
    rows = [[n, record.spread(values, 1), f"{statistics.median(values) / one:.2f}"] for n, values in rates.items()]
    text = (
        f"C = {opt.init_channels}, {opt.layers} cells, batch {opt.batch_size} a process, {opt.image_size}x"
        f"{opt.image_size}, one thread a process; n = {opt.rounds} steps, median (lowest to highest), one after the "
        f"other.\n\n{record.table(['processes', 'images a second', 'times one'], rows)}"
    )
    return record.publish("scaling", opt, {"images_per_second": rates}, text)


def _work(rank: int, opt: ScalingOptions, count: int, address: str, queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=count)
    torch.manual_seed(0)
    model = DistributedDataParallel(_Sampling(Network(opt.init_channels, 10, opt.layers)))
    network: Network = model.module.network
    sgd = torch.optim.SGD(network.thetas(), 0.025, 0.9, weight_decay=3e-4, fused=True)
    adam = torch.optim.Adam(network.alphas(), 3e-4, fused=True)
    torch.manual_seed(rank)
    images = torch.randn(opt.batch_size, 3, opt.image_size, opt.image_size)
    targets = torch.randint(0, 10, (opt.batch_size,))
    seconds = []
    for number in range(opt.rounds + 1):
        start = time.perf_counter()
        loop.update(F.cross_entropy(model(images, number), targets), [(sgd, 5.0), (adam, 10.0)])
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        queue.put(seconds[1:])
    dist.destroy_process_group()


if __name__ == "__main__":
    options.entry(main)
