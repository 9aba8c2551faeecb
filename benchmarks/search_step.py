"""One joint search step of several supernets: time in turns, peak memory alone, kernels, distance to the limit.

    python -m benchmarks.search_step
    python -m benchmarks.search_step --contenders='[textbook, ours, compiled]' --rounds 10
    python -m benchmarks.search_step --external my_adapter.py

A step is forward, backward, both gradient clips, SGD for theta and Adam for alpha. Contenders:

    textbook   one module per edge and op, NCHW, a multiply per op output (benchmarks/textbook.py)
    ours       what main.py runs
    recompute  the same with --recompute True
    plain      the same without the fused CPU kernels
    bf16       the same with --precision bf16
    compiled   the same with --compile True, without the fused CPU kernels; minutes before the first step
    denormals  the same as ours, but numbers below 1e-38 are computed with, as in textbook and by PyTorch's default

--external FILE names a Python file that defines

    def contender(init_channels, layers, num_classes, device):
        return forward, thetas, alphas

where forward(images) -> logits samples its own Z, and thetas and alphas are lists of parameters. Nothing of it is kept.
"""

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import options
import sampling
import utils
from benchmarks import record, runner
from benchmarks.record import Rounds
from benchmarks.textbook import Textbook
from fused import operation as kernels
from model_search import Network
from options import UserError
from training import loop

Name = Literal["textbook", "ours", "recompute", "plain", "bf16", "compiled", "denormals"]
Contender = tuple[Callable[[Tensor], Tensor], list[nn.Parameter], list[nn.Parameter]]  # forward, thetas, alphas


@dataclass(frozen=True)
class StepOptions(Rounds):
    """What is compared."""

    contenders: list[Name] = field(default_factory=lambda: ["textbook", "ours", "recompute", "plain"])
    """Who takes part, in this order; the first is what the others are compared with."""
    external: str | None = None
    """A Python file with a further contender."""
    init_channels: PositiveInt = 16
    """C."""
    layers: PositiveInt = 8
    """Cells."""
    batch_size: PositiveInt = 64
    """Images."""
    image_size: PositiveInt = 32
    """Side in pixels."""
    temperature: PositiveFloat = 1.0
    """Of the samples; at one of 0.06 most weights are next to nothing."""
    device: str = "auto"
    """As for main.py."""
    alone: str | None = None
    """Run this contender's steps as they are asked for on standard input; used by the benchmark itself."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; returns the content of the JSON file."""
    opt = record.parse(StepOptions, argv, "search_step", __doc__)
    device = utils.pick_device(opt.device)
    if opt.alone:
        name = opt.alone
        with nullcontext() if name in ("textbook", "external", "denormals") else utils.no_denormals():
            return runner.serve(
                lambda: make_step(opt, name, device), lambda step: _count(opt, name, step, device), device
            )
    names: list[str] = [*opt.contenders]
    if opt.external:
        _external(opt)
        names.append("external")
    if len(names) < 2:
        raise UserError(f"--contenders {names} has nothing to compare")
    figures = {
        "bandwidth": runner.copy_bandwidth(device),
        "matmul": runner.matmul_rate(device),
        "pairs": {name: _in_turns(opt, names[0], name) for name in names[1:]},
    }
    text = _text(opt, names[0], figures)
    name = "search_step" if opt.temperature == 1 else f"search_step_t{opt.temperature:g}"
    return record.publish("search_step", opt, figures, text, record.on_this(name))


def start(opt: StepOptions, name: str) -> runner.Worker:
    """A contender in a process of its own."""
    shared = ("init_channels", "layers", "batch_size", "image_size", "temperature", "device")
    values = {key: getattr(opt, key) for key in shared}
    external = {"external": opt.external} if opt.external else {}
    return runner.Worker("benchmarks.search_step", {"alone": name} | values | external)


def _in_turns(opt: StepOptions, first: str, second: str) -> dict[str, Any]:
    """Two contenders that take turns, each in its process."""
    workers = {name: start(opt, name) for name in (first, second)}
    seconds = utils.in_turns({name: worker.step for name, worker in workers.items()}, opt.rounds)
    return {"seconds": seconds, "alone": {name: worker.stop() for name, worker in workers.items()}}


def make_contender(opt: StepOptions, name: str, device: torch.device) -> Contender:
    """A supernet and its parameters."""
    torch.manual_seed(0)
    if name == "external":
        made: Contender = _external(opt).contender(opt.init_channels, opt.layers, 10, device)
        return made
    if name == "textbook":
        textbook = Textbook(opt.init_channels, 10, opt.layers).to(device)
        alphas = [nn.Parameter(1e-3 * torch.randn(14, 8, device=device)) for _ in range(2)]
        return (
            lambda images: textbook(images, *(sampling.concrete_sample(a, opt.temperature) for a in alphas)),
            list(textbook.parameters()),
            alphas,
        )
    network = Network(opt.init_channels, 10, opt.layers, recompute=name == "recompute").to(device)
    if name == "compiled":
        loop.compile_cells(network.cells)

    def forward(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=name == "bf16"):
            logits: Tensor = network(images, network.sample(opt.temperature))
        return logits.float()

    return forward, network.thetas(), network.alphas()


def _external(opt: StepOptions) -> Any:
    """The module of --external."""
    path = Path(str(opt.external))
    spec = importlib.util.spec_from_file_location("external", path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise UserError(f"--external {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "contender"):
        raise UserError(f"--external {path} defines no contender(init_channels, layers, num_classes, device)")
    return module


def make_step(opt: StepOptions, name: str, device: torch.device) -> Callable[[], None]:
    """The step as a call without arguments."""
    forward, thetas, alphas = make_contender(opt, name, device)
    fused = name not in ("textbook", "external")  # PyTorch's default is not
    sgd = torch.optim.SGD(thetas, 0.025, 0.9, weight_decay=3e-4, fused=fused)
    adam = torch.optim.Adam(alphas, 3e-4, (0.5, 0.999), weight_decay=1e-3, fused=fused)
    images = torch.randn(opt.batch_size, 3, opt.image_size, opt.image_size, device=device)
    targets = torch.randint(0, 10, (opt.batch_size,), device=device)

    def step() -> None:
        with kernels.switched(name != "plain"):
            loop.update(F.cross_entropy(forward(images), targets), [(sgd, 5.0), (adam, 10.0)])

    return step


class _Count(TorchDispatchMode):
    """Kernels that compute or move something, and the bytes of the tensors that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not func.name().startswith(
            ("aten::empty", "aten::new_empty", "aten::detach", "profiler::")
        ):
            self.kernels += 1
            self.bytes += _bytes((args, kwargs, result))
        return result

    def call(self, name: str, table: Sequence[Any]) -> None:
        """kernels._call, counted: of each part the input, the output and their gradients."""
        _call(name, table)
        self.kernels += len(table)
        for row in table:
            x = row.batch * row.height * row.width * row.inputs
            y = row.batch * -(-row.height // row.stride) * -(-row.width // row.stride) * row.channels
            changed = 2 if row.accumulate else 1  # read, too
            self.bytes += 4 * (x + changed * y if name == "parts_forward" else x + y + changed * x)


_call = kernels._call


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def _count(opt: StepOptions, name: str, step: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """Kernels, bytes and multiply-adds of a step."""
    if name == "compiled":  # its kernels are the compiler's
        return {}
    count = _Count()
    kernels._call = count.call
    with count:
        step()
    kernels._call = _call
    return {"kernels": count.kernels, "bytes": count.bytes, "flops": _flops(opt, name, device)}


def _flops(opt: StepOptions, name: str, device: torch.device) -> int:
    """Multiply-adds of a step: three times those of the forward pass, in each contender's own operations."""
    forward, _, _ = make_contender(replace(opt, temperature=1.0), name, device)  # where no weight of Z is nothing
    # the counter does not see into the kernels
    with kernels.switched(False), torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward(torch.zeros(opt.batch_size, 3, opt.image_size, opt.image_size, device=device))
    return 3 * counter.get_total_flops() // 2


def _text(opt: StepOptions, first: str, figures: dict[str, Any]) -> str:
    pairs, bandwidth, matmul = figures["pairs"], figures["bandwidth"], figures["matmul"]
    speed, limits = [], []
    for name, pair in ({first: next(iter(pairs.values()))} | pairs).items():
        times, own, others = pair["seconds"][name], pair["alone"][name], pair["alone"][first]
        ratio = record.spread(record.ratios(pair["seconds"], first)[name])
        share = f"1/{others['peak_bytes'] / own['peak_bytes']:.1f}"
        launches = f"{own['kernels']:,}" if "kernels" in own else "-"
        speed.append([name, record.spread(times), ratio, f"{own['peak_bytes'] / 1e9:.2f} GB", share, launches])
        if "bytes" in own:
            memory, arithmetic = own["bytes"] / bandwidth, own["flops"] / matmul
            row = [name, f"{own['flops'] / 1e9:.0f} G", f"{own['bytes'] / 1e9:.0f} GB"]
            row += [f"{own['flops'] / own['bytes']:.1f}", f"{arithmetic:.2f} s", f"{memory:.2f} s"]
            limits.append([*row, f"{min(times) / max(memory, arithmetic):.1f}"])
    head = ["contender", "s a step", f"times faster than {first}", "peak memory", f"of {first}'s", "kernels a step"]
    second = ["contender", "multiply-adds", "read and written", "multiply-adds a byte"]
    second += ["arithmetic alone", "memory alone", "best time / the larger"]
    return (
        f"One search step, C = {opt.init_channels}, {opt.layers} cells, batch {opt.batch_size}, {opt.image_size}x"
        f"{opt.image_size}, float32, temperature {opt.temperature:g}; n = {opt.rounds} steps in turns with {first}, "
        "median (lowest to highest).\n\n"
        f"{record.table(head, speed)}\n\n"
        f"Against the limits of the machine, which copies {bandwidth / 1e9:.0f} GB/s and does "
        f"{matmul / 1e9:.0f} G multiply-adds a second in a matrix product:\n\n{record.table(second, limits)}"
    )


if __name__ == "__main__":
    options.entry(main)
