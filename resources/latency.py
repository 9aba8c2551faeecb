"""Milliseconds of a child, predicted from its operations: a table measured on this machine through onnxruntime.

Latency is not a sum over operations, but close to one: every operation is timed alone, at each of its places, and a
line is fitted to whole children,

    latency(child) = fixed + scale * sum of its operations' milliseconds,

with what it leaves unexplained reported. Tables are kept in cache_dir under the device's name.
"""

import hashlib
import json
import platform
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import StatisticsError, correlation, linear_regression, median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import genotypes
import utils
from genotypes import NONE, Genotype
from model import ChildNetwork
from operations import make_op
from options import UserError
from resources import cost
from resources.cost import Deployed, Place, Table

_FORMAT = 1
_COPIES = 8  # of an operation in its session, which shares the cost of a call among them
_CHILDREN = 12  # whole networks to fit and check the sum on
_SPARSEST = 0.6  # the share of edges that the last of them lacks; with almost none, onnxruntime folds whole cells away
_ROUNDS = 7  # every session in turn; the median of its rounds counts


@dataclass(frozen=True)
class Latencies:
    """What was measured: milliseconds of every operation at each place, and how they add up to a child's.

    correlation and error (the mean of |predicted / measured - 1|) are over whole random children, each predicted by
    a line fitted to the others.
    """

    device: str
    ops: dict[str, float]  # "op C HxW/stride"
    fixed: float
    scale: float
    correlation: float
    error: float
    children: list[tuple[float, float]]  # (sum of operations, measured)

    def op(self, place: Place) -> float:
        """Milliseconds that an operation adds to a child."""
        return 0.0 if place.op == NONE else self.scale * self.ops[_key(place)]

    def table(self, space: str, nodes: int, deployed: Deployed) -> Table:
        """The latency of every choice, in milliseconds."""
        return cost.table(space, nodes, deployed, self.fixed, self.op)

    def summary(self) -> str:
        """How far it can be trusted, in a line."""
        return (
            f"{len(self.ops)} operations timed on {self.device}; over {len(self.children)} whole children the sum has "
            f"correlation {self.correlation:.3f} and an error of {100 * self.error:.1f} % with what was measured"
        )


def find(space: str, nodes: int, deployed: Deployed, cache_dir: str | Path | None) -> Latencies:
    """The latencies of a space at this size on this machine: from cache_dir, or measured now (a minute or two).

    Raises:
        UserError: onnxruntime is missing, or what was measured is nonsense.
    """
    device = f"{utils.processor()}, {torch.get_num_threads()} threads, onnxruntime {onnxruntime().__version__}"
    what = {"format": _FORMAT, "device": device, "host": platform.node(), "torch": torch.__version__}
    what |= {"space": space, "nodes": nodes, **asdict(deployed)}
    name = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]  # not utils.cached's: earlier files are found
    path = utils.cache_folder(cache_dir) / f"latency-{name}.json"
    if path.is_file():
        try:
            stored = Latencies(**json.loads(path.read_text(encoding="utf-8"))["latencies"])
            if stored.scale > 0 and stored.ops.keys() == {_key(place) for place in _places(space, nodes, deployed)}:
                return stored
            raise ValueError
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            print(f"note: {path} is damaged; measuring anew")
    try:
        found = time_all(space, nodes, deployed, device)
    except StatisticsError:  # all the same
        found = None
    if found is None or found.scale <= 0:
        raise UserError("the latencies measured make no sense; measure again when nothing else runs on this machine")
    with suppress(OSError):  # it can be measured again
        utils.write_atomic(path, json.dumps({"of": what, "latencies": asdict(found)}, indent=1) + "\n")
    return found


def time_all(space: str, nodes: int, deployed: Deployed, device: str) -> Latencies:
    """Time every operation at each of its places and a few whole children, all in turns."""
    places = _places(space, nodes, deployed)
    source = random.Random(0)
    children = [
        _random_child(space, nodes, _SPARSEST * number / (_CHILDREN - 1), source) for number in range(_CHILDREN)
    ]
    bar = tqdm(total=len(places) + len(children), desc="latency", unit="network", leave=False, disable=None)
    with bar, torch.random.fork_rng(devices=[]):
        calls = [_call(nn.ReLU(), _noise(1, (8, 8)))]  # what a call costs
        for op, channels, size, stride in places:
            states = [_noise(channels, size) for _ in range(_COPIES)]
            calls.append(_call(_Copies(op, channels, stride), *states))
            bar.update()
        for genotype in children:
            network = ChildNetwork(
                genotype,
                deployed.init_channels,
                deployed.num_classes,
                deployed.layers,
                stem=deployed.stem,
                affine=deployed.affine,
                in_channels=deployed.in_channels,
            )
            calls.append(_call(network, _noise(deployed.in_channels, deployed.image_size)))
            bar.update()
    call, *times = _milliseconds(calls)
    ops = {_key(place): max(0.0, t - call) / _COPIES for place, t in zip(places, times, strict=False)}
    sums = [_sum(ops, deployed, genotype) for genotype in children]
    return fit(device, ops, sums, times[len(places) :], call)


def _random_child(space: str, nodes: int, dropped: float, source: random.Random) -> Genotype:
    """A random genotype without the share `dropped` of its edges: cheap children have to be predicted too."""
    full = genotypes.random_genotype(space, source, nodes)
    cells = [
        tuple(tuple(pair for pair in node if source.random() >= dropped) for node in cell)
        for cell in (full.normal, full.reduce)
    ]
    return Genotype(cells[0], full.normal_concat, cells[1], full.reduce_concat, space)


def fit(
    device: str, ops: Mapping[str, float], sums: Sequence[float], measured: Sequence[float], least: float = 0.0
) -> Latencies:
    """The line from sums of operations to whole children, and how well it predicts those left out of it.

    Args:
        least: what a call costs; a line that begins below is drawn from there instead.
    """
    pairs, predicted = list(zip(sums, measured, strict=True)), []
    for index, total in enumerate(sums):
        line = linear_regression(*zip(*pairs[:index], *pairs[index + 1 :], strict=True))
        predicted.append(line.intercept + line.slope * total)
    line = linear_regression(sums, measured)
    error = sum(abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)) / len(measured)
    slope, intercept = line.slope, line.intercept
    if intercept < least and any(sums):  # least squares through (0, least)
        slope = sum(s * (m - least) for s, m in zip(sums, measured, strict=True)) / sum(s * s for s in sums)
        intercept = least
    return Latencies(device, dict(ops), intercept, slope, correlation(predicted, measured), error, pairs)


def _call(module: nn.Module, *inputs: Tensor) -> Callable[[], Any]:
    """The module under onnxruntime, as a call on these inputs."""
    names = [f"input{index}" for index in range(len(inputs))]
    program = torch.onnx.export(module.eval(), inputs, dynamo=True, input_names=names, verbose=False)
    assert program is not None
    loaded = session(program.model_proto.SerializeToString())
    feed: dict[str, np.ndarray[Any, Any]] = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return lambda: loaded.run(None, feed)


def session(model: bytes | str) -> Any:
    """A session of onnxruntime on the CPU, with as many threads as PyTorch has, of a model or its file."""
    runtime = onnxruntime()
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 3
    return runtime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])


def onnxruntime(what: str = "a budget on latency") -> Any:
    """The package; raises UserError where it, or what torch.onnx needs, is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise UserError(f"{what} needs {error.name}: pip install -r requirements-export.txt") from None
    return onnxruntime


class _Copies(nn.Module):
    """The sum of _COPIES operations of the same kind, as at a node; each has its own input, or some would be merged."""

    def __init__(self, op: str, channels: int, stride: int) -> None:
        super().__init__()
        self.ops = nn.ModuleList(make_op(op, channels, stride, affine=True) for _ in range(_COPIES))

    def forward(self, *inputs: Tensor) -> Tensor:
        """_COPIES times (1, C, H, W) -> (1, C, H, W), or half the size."""
        total: Tensor = self.ops[0](inputs[0])
        for op, x in zip(self.ops[1:], inputs[1:], strict=True):
            total = total + op(x)
        return total


def _noise(channels: int, size: cost.Size) -> Tensor:
    return torch.rand(1, channels, *size)


def _milliseconds(calls: Sequence[Callable[[], Any]], seconds: float = 0.03) -> list[float]:
    """Of one call of each, the median of _ROUNDS rounds of at least `seconds`, in turns."""
    timers: dict[int, Callable[[], float]] = {}
    for index, call in enumerate(calls):
        utils.timed(call, 5)
        timers[index] = partial(utils.timed, call, max(3, round(seconds / max(1e-6, utils.timed(call)))))
    return [1000 * median(rounds) for rounds in utils.in_turns(timers, _ROUNDS).values()]


def _key(place: Place) -> str:
    height, width = place.size
    return f"{place.op} {place.channels} {height}x{width}/{place.stride}"


def _places(space: str, nodes: int, deployed: Deployed) -> list[Place]:
    """Every operation with each channels, size and stride that it has in some architecture."""
    every = (place for place, *_ in deployed.walk(*cost.every_pair(space, nodes)))
    return list(dict.fromkeys(place for place in every if place.op != NONE))


def _sum(ops: Mapping[str, float], deployed: Deployed, genotype: Genotype) -> float:
    """Milliseconds of a genotype's operations, each alone."""
    return sum(ops[_key(place)] for place, *_ in deployed.walk(*cost.pairs(genotype)))
