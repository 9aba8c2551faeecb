"""The processes of one run, as torchrun starts them: each has its own Z and its share of the images of a step.

After every step all of them hold the same weights, statistics and optimizers, so that the first may write for all.
"""

import gc
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

import utils
from options import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Which of how many processes this is."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether it is the one that writes and speaks."""
        return self.rank == 0

    @property
    def label(self) -> tuple[int, ...]:
        """What its own random numbers are seeded with besides: nothing in the first, as in a process alone."""
        return (self.rank,) if self.rank else ()

    @property
    def part(self) -> tuple[int, int]:
        """Rank and size, as Data takes them."""
        return self.rank, self.size

    def share(self, batches: Iterator[T]) -> Iterator[T]:
        """Every size-th of them, beginning with this process's."""
        return (batch for number, batch in enumerate(batches) if number % self.size == self.rank)

    def gather(self, item: T) -> list[T]:
        """The items of all processes, by rank."""
        if self.size == 1:
            return [item]
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, item)
        return every

    def join(self, items: Sequence[T]) -> list[T]:
        """What the processes made of their shares, in the order of the whole."""
        rows = zip_longest(*([(item,) for item in its] for its in self.gather(list(items))))
        return [cell[0] for row in rows for cell in row if cell is not None]

    def of_first(self, item: T) -> T:
        """The item of the first process."""
        return self.gather(item)[0]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def average(self, loss: Tensor, parameters: Sequence[nn.Parameter], buffers: Sequence[Tensor]) -> Tensor:
        """Put the means over all processes in place of gradients and buffers; returns that of the loss.

        A gradient that a process lacks counts as zero; one that all lack stays lacking. One message for all.
        """
        if self.size == 1:
            return loss
        lacking = [p.grad is None for p in parameters]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        parts = [torch.tensor(lacking, device=loss.device).logical_not(), loss.detach().view(1), *grads, *buffers]
        flat = torch.cat([part.flatten().float() for part in parts])
        dist.all_reduce(flat)
        flat /= self.size
        had, total, *means = flat.split([part.numel() for part in parts])
        own = [*grads, *buffers]
        torch._foreach_copy_(own, [mean.view_as(one) for mean, one in zip(means, own, strict=True)])
        some = had.tolist() if any(lacking) else []  # which waits for a GPU
        for place, parameter in enumerate(parameters):
            if lacking[place] and some[place]:
                parameter.grad = grads[place]
        return total[0]


ALONE = World()


def buffers_of(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Those that are means of what was seen, as batch norms have, not counts."""
    return [b for module in modules for b in module.buffers() if b is not None and b.is_floating_point()]


class _Quiet(io.TextIOWrapper):
    """A stream that draws no bars."""

    def isatty(self) -> bool:
        return False


@contextmanager
def joined(device: str) -> Iterator[tuple[World, torch.device]]:
    """The processes that torchrun has started, or this one alone, and the device of this one.

    Args:
        device: of --device; on a machine with several GPUs each process takes its own.
    """
    size, rank = count(), int(os.environ.get("RANK", "0"))
    if size == 1:
        yield ALONE, utils.pick_device(device)
        return
    here, near = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
    chosen = _device(device, here, near)
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun sets 1 where nothing is set
        torch.set_num_threads(max(1, utils.cores() // near))
    # a process that dies is met at once; the others may take long, as in the choice of --select
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(days=1))
    try:
        if rank == 0:
            yield World(rank, size), chosen
        else:
            with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
                errors = _Quiet(os.fdopen(os.dup(sys.stderr.fileno()), "wb"), line_buffering=True)
                with errors, redirect_stderr(errors):
                    yield World(rank, size), chosen
    finally:
        dist.destroy_process_group()
        gc.collect()  # its threads end now, not somewhere in the end of the process


def count() -> int:
    """How many processes torchrun has started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "MASTER_ADDR" in os.environ else 1


def _device(name: str, here: int, near: int) -> torch.device:
    """That of the process `here` of `near` on this machine."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise UserError(f"--device {name}: several processes take cpu, or cuda without a number; torchrun numbers them")
    if near > torch.cuda.device_count():
        raise UserError(f"torchrun starts {near} processes here and there are {torch.cuda.device_count()} GPUs")
    torch.cuda.set_device(here)
    return torch.device("cuda", here)


def same(world: World, what: object, words: str) -> None:
    """Raise UserError where the processes do not agree on something."""
    if len({repr(one) for one in world.gather(what)}) > 1:
        raise UserError(
            f"the processes do not see {words}; all need one shared folder of experiments and the same images"
        )


def check(world: World, batch_size: int, images: int) -> None:
    """Raise UserError where a step cannot be divided among the processes."""
    if batch_size % world.size or batch_size < 2 * world.size:
        raise UserError(
            f"--batch_size {batch_size} is that of all {world.size} processes together: take a multiple of "
            f"{world.size}, at least {2 * world.size}"
        )
    if world.size > 1 and images < batch_size:
        raise UserError(f"--batch_size {batch_size} is more than the {images} training images there are")


def lost(error: BaseException) -> bool:
    """Whether it says that another process of the run has gone."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"DistError", "DistBackendError"}) or "gloo" in str(error) or "Connection" in str(error)
