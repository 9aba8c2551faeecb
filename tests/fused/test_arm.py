"""The kernels compiled for aarch64 (vectors of 4 floats, 32 registers) and run in an emulator, one process a call."""

import ctypes
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from test_operation import OPS, agrees

from fused import build
from fused import operation as kernels

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
POINTERS = [name for name, kind in kernels._Part._fields_ if kind is ctypes.c_void_p]

# A file holds the number of parts and of floats, the parts, the floats; a part's pointers are 1 + a place there, or 0.
DRIVER = r"""
#include "kernels.cpp"
#include <cstdio>
#include <vector>

int main(int, char **arguments) {
    FILE *file = fopen(arguments[1], "r+b");
    int64_t counts[2];
    if (!file || fread(counts, 8, 2, file) != 2) return 1;
    std::vector<Part> parts(counts[0]);
    std::vector<float> floats(counts[1]);
    if (fread(parts.data(), sizeof(Part), parts.size(), file) != parts.size()) return 1;
    const long start = ftell(file);
    if (fread(floats.data(), 4, floats.size(), file) != floats.size()) return 1;
    for (Part &part : parts)
        for (int64_t *at = (int64_t *)&part.x; at < (int64_t *)(&part + 1); at++)
            if (*at) *at = int64_t(&floats[*at - 1]);
    if ((arguments[2][6] == 'f' ? parts_forward : parts_backward)(parts.data(), parts.size())) return 1;
    fseek(file, start, SEEK_SET);
    return fwrite(floats.data(), 4, floats.size(), file) != floats.size() || vector_width() != 4;
}
"""


def sizes(part: kernels._Part) -> dict[str, int]:
    """Floats behind each pointer."""
    batch, inputs, channels = part.batch, part.inputs, part.channels
    pixels = -(-part.height // part.stride) * -(-part.width // part.stride)
    image, output = batch * part.height * part.width * inputs, batch * pixels * channels
    weights = {"depthwise": inputs * part.kernel**2, "pointwise": channels * inputs, "scale": 1}
    return (
        dict.fromkeys(POINTERS, channels)
        | {"x": image, "grad_x": image, "out": output, "grad": output, "normal": output, "kept": kept_floats(part)}
        | {"statistics": 2 * channels, "tracked": 2, "keep": batch}
        | weights
        | {f"grad_{name}": size for name, size in weights.items()}
    )


def kept_floats(part: kernels._Part) -> int:
    pixels = -(-part.height // part.stride) * -(-part.width // part.stride)
    return int(part.batch * (pixels + 8) * (part.channels + 4))


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every call of the kernels goes to the emulator."""
    if not shutil.which(COMPILER) or not shutil.which(EMULATOR):
        pytest.skip(f"{COMPILER} and {EMULATOR} are not here: Debian's g++-aarch64-linux-gnu and qemu-user")
    (tmp_path / "driver.cpp").write_text(DRIVER)
    flags = ["-std=c++17", "-O1", "-ffp-contract=fast", "-fopenmp", "-static", f"-I{build.SOURCE.parent}"]
    subprocess.run([COMPILER, *flags, tmp_path / "driver.cpp", "-o", tmp_path / "driver"], check=True)

    def call(name: str, table: Sequence[kernels._Part]) -> None:
        found: dict[int, int] = {}  # address -> floats
        for part in table:
            for field, size in sizes(part).items():
                at = getattr(part, field)
                if at:
                    found[at] = max(size, found.get(at, 0))
        places, end = {}, 0
        for at, size in found.items():
            places[at], end = end, end + (size + 15) // 16 * 16
        floats = np.zeros(end, np.float32)
        for at, size in found.items():
            ctypes.memmove(floats[places[at] :].ctypes.data, at, 4 * size)
        rows = (kernels._Part * len(table))(*table)
        for row in rows:
            for field in POINTERS:
                at = getattr(row, field)
                setattr(row, field, places[at] + 1 if at else None)
        file, head = tmp_path / "call", np.array([len(table), end], np.int64)
        file.write_bytes(head.tobytes() + bytes(rows) + floats.tobytes())
        subprocess.run([EMULATOR, tmp_path / "driver", file, name], check=True)
        floats = np.frombuffer(file.read_bytes(), np.float32, offset=16 + ctypes.sizeof(rows))
        for at, size in found.items():
            ctypes.memmove(at, floats[places[at] :].ctypes.data, 4 * size)

    monkeypatch.setattr(kernels, "_call", call)
    monkeypatch.setattr(kernels, "_kept_floats", kept_floats)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() == "aarch64", reason="here the other tests are this one")
def test_on_arm_an_operation_is_pytorchs_too(emulated: None) -> None:
    for name in (*OPS, "skip_connect"):
        for channels in (3, 20):
            for stride in (1, 2):
                agrees(name, channels, stride, (7, 12))
