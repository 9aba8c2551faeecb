"""One record of every benchmark: machine, command, commit, setting and figures, as JSON and as a part of a page."""

import dataclasses
import json
import platform
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any, TypeVar

import torch
from jsonargparse.typing import PositiveInt

import options
import utils

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Recorded:
    """What every benchmark has."""

    out: str = "docs"
    """The folder of the pages and of the JSON files."""


@dataclass(frozen=True)
class Rounds(Recorded):
    """Of contenders that take turns."""

    rounds: PositiveInt = 10
    """How often each is timed, in turns, after a call that does not count."""


Options = TypeVar("Options", bound=Recorded)


def parse(kind: type[Options], argv: Sequence[str] | None, name: str, text: str | None) -> Options:
    """The options of `python -m benchmarks.NAME`; `text` is its help."""
    return options.parse(kind, argv, f"python -m benchmarks.{name}", text or "")


def describe(benchmark: str, opt: Recorded) -> dict[str, Any]:
    """Hardware, versions, commit and command of a measurement: the options that are not the defaults."""
    usual = dataclasses.asdict(type(opt)())
    given = {key: value for key, value in dataclasses.asdict(opt).items() if value != usual[key] and key != "out"}
    command = ["python", "-m", f"benchmarks.{benchmark}", *(f"--{key}={_plain(value)}" for key, value in given.items())]
    return {
        "command": shlex.join(command),
        "commit": utils.commit(12),
        "processor": utils.processor(),
        "instructions": capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _plain(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list) else str(value)


def capability() -> str:
    """The vector instructions that PyTorch uses: AVX512, AVX2, ..."""
    return str(torch.backends.cpu.get_cpu_capability())


def on_this(name: str) -> str:
    """The name of a result that holds for one kind of processor."""
    return f"{name}_{capability().lower().replace(' ', '_')}"


def publish(
    benchmark: str, opt: Recorded, figures: Mapping[str, Any], text: str, name: str = "", topic: str = "performance"
) -> dict[str, Any]:
    """Write OUT/TOPIC/NAME.json and the part of OUT/TOPIC.md between the marks of NAME; returns what the JSON holds.

    Args:
        benchmark: the module. opt: its options.
        figures: what was measured.
        text: the part of the page; what it was measured with is added.
        name: the benchmark's if empty.
        topic: the page.
    """
    name = name or benchmark
    setting = {key: value for key, value in dataclasses.asdict(opt).items() if key != "out" and value is not None}
    result = {"machine": describe(benchmark, opt), "setting": setting, **figures}
    folder, page = Path(opt.out) / topic, Path(opt.out) / f"{topic}.md"
    utils.write_atomic(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
    machine = result["machine"]
    device = machine["gpu"] or f"{machine['processor']} with {machine['instructions']}, threads: {machine['threads']}"
    foot = f"`{machine['command']}`, {device}, torch {machine['torch']}, commit {machine['commit']}"
    block = f"<!-- {name} -->\n{text}\n\n{foot}\n<!-- end -->"
    content = page.read_text(encoding="utf-8") if page.exists() else ""
    found = re.search(rf"<!-- {name} -->.*?<!-- end -->", content, re.DOTALL)
    content = content.replace(found.group(), block) if found else f"{content}\n{block}\n".lstrip("\n")
    utils.write_atomic(page, content)
    print(f"{text}\n\n{foot}")
    return result


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median (lowest to highest)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def ratios(seconds: Mapping[str, Sequence[float]], base: str) -> dict[str, list[float]]:
    """How many times faster than `base` each contender was, round by round."""
    return {name: [b / t for b, t in zip(seconds[base], times, strict=True)] for name, times in seconds.items()}


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of log(value) over log(size): 1 where a value grows in proportion."""
    return statistics.linear_regression([log(x) for x in sizes], [log(y) for y in values]).slope
