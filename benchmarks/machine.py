"""What every benchmark shares: the machine in words, its limits, contenders that take turns, the page of results."""

import json
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import utils

ROOT = Path(__file__).parents[1]


def describe(benchmark: str, argv: Sequence[str] | None) -> dict[str, Any]:
    """Hardware, versions, commit and command of a measurement; argv as its main was given it."""
    command = shlex.join(["python", "-m", f"benchmarks.{benchmark}", *(sys.argv[1:] if argv is None else argv)])
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": command,
        "commit": git.stdout.strip() or None,
        "processor": utils.processor(),
        "instructions": capability(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def capability() -> str:
    """The vector instructions that PyTorch uses: AVX512, AVX2, ..."""
    return str(torch.backends.cpu.get_cpu_capability())


def on_this(name: str) -> str:
    """The name of a result that holds for one kind of processor."""
    return f"{name}_{capability().lower().replace(' ', '_')}"


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second read and written by a copy that does not fit into the cache; the best of 10."""
    source = torch.ones(2**26, device=device)  # 256 MB
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / min(timed(lambda: target.copy_(source), device) for _ in range(10))


def matmul_rate(device: torch.device) -> float:
    """Multiply-adds a second of a float32 matrix product; the best of 10."""
    a = torch.randn(2048, 2048, device=device)
    return 2048**3 / min(timed(lambda: a @ a, device) for _ in range(10))


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, what the device still has to do included."""
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait for what a device still has to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def alternate(contenders: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every contender, one call each in turn, after one call each that does not count."""
    for call in contenders.values():
        timed(call, device)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            seconds[name].append(timed(call, device))
    return seconds


def ratios(seconds: Mapping[str, Sequence[float]], base: str) -> dict[str, list[float]]:
    """How many times faster than `base` each contender was, round by round."""
    return {name: [b / t for b, t in zip(seconds[base], times, strict=True)] for name, times in seconds.items()}


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median (lowest to highest)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of log(value) over log(size): 1 where a value grows in proportion."""
    x, y = torch.tensor([sizes, values], dtype=torch.float64).log()
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def publish(name: str, result: Mapping[str, Any], text: str, out: Path, topic: str = "performance") -> None:
    """Write out/TOPIC/NAME.json and replace the part of out/TOPIC.md between the marks of NAME."""
    folder = out / topic
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    page = out / f"{topic}.md"
    content = page.read_text(encoding="utf-8") if page.exists() else ""
    machine = result["machine"]
    cpu = f"{machine['processor']} with {machine.get('instructions', '?')}, {machine['threads']} threads"
    device = machine["gpu"] or cpu
    foot = f"`{machine['command']}`, {device}, torch {machine['torch']}, commit {machine['commit']}"
    block = f"<!-- {name} -->\n{text}\n\n{foot}\n<!-- end -->"
    pattern = re.compile(rf"<!-- {name} -->.*?<!-- end -->", re.DOTALL)
    found = pattern.search(content)
    content = content.replace(found.group(), block) if found else f"{content}\n{block}\n".lstrip("\n")
    page.write_text(content, encoding="utf-8")
    print(f"{text}\n\n{foot}")
