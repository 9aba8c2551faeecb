"""Decoded images that are kept in a file, which later runs map into memory."""

import hashlib
import json
import os
import re
import tokenize
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import utils


class Decoded(NamedTuple):
    """Every image of a folder, and the values of white pixels of integers (I) and floats (F) of more than 8 bits."""

    pixels: Tensor  # uint8 (N, C, H, W)
    white: dict[str, float]  # empty if no image has more than 8 bits
    notes: list[str]  # what there is to say about their values


def load(path: Path) -> Decoded | None:
    """What was kept there, if it was."""
    try:
        told = json.loads(_beside(path).read_text(encoding="utf-8"))
        if told["digest"] != _digest(path, told["white"], told["notes"]):
            return None
        found = Decoded(_map(path), told["white"], told["notes"])
    except (OSError, ValueError, EOFError, KeyError, TypeError, SyntaxError, MemoryError, tokenize.TokenError):
        return None
    with suppress(OSError):
        os.utime(path)  # used just now
    return found


def keep(path: Path, pixels: Tensor, white: dict[str, float], notes: Sequence[str]) -> None:
    """Write what is in memory; raises OSError."""
    with utils.replacing(path) as temporary:
        with temporary.open("wb") as file:
            np.save(file, pixels.numpy())
        _tell(path, temporary, white, notes)


def fill(
    path: Path, shape: Sequence[int], white: dict[str, float], notes: Sequence[str], put: Callable[[Any], None]
) -> Decoded:
    """Write what is too large for memory: `put` is given the array (N, C, H, W), mapped; raises OSError.

    The file's space is taken first: a disk that is full later would end the process without a word.
    """
    with utils.replacing(path) as temporary:
        mapped = np.lib.format.open_memmap(temporary, "w+", np.uint8, tuple(shape))
        if hasattr(os, "posix_fallocate"):
            with temporary.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
        put(mapped)
        mapped.flush()
        _tell(path, temporary, white, notes)
    return Decoded(_map(path), white, list(notes))


def trim(newest: Path, most: float) -> int:
    """Remove the files that were not used for longest until the folder's hold `most` bytes; gives their number."""
    files = []
    for path in newest.parent.glob("*.npy"):
        with suppress(OSError):
            if re.fullmatch(r"[0-9a-f]{24}\.npy", path.name) and path != newest:  # no file of the user's
                files.append((path.stat().st_mtime, path.stat().st_size, path))
    total, removed = sum(size for _, size, _ in files), 0
    with suppress(OSError):
        total += newest.stat().st_size
    for _, size, path in sorted(files):
        if total <= most:
            break
        with suppress(OSError):  # another's, or gone
            path.unlink()
            _beside(path).unlink(missing_ok=True)
            total, removed = total - size, removed + 1
    return removed


def _tell(path: Path, written: Path, white: dict[str, float], notes: Sequence[str]) -> None:
    told = {"white": white, "notes": list(notes), "digest": _digest(written, white, list(notes))}
    utils.write_atomic(_beside(path), json.dumps(told))


_BLOCK, _BLOCKS = 2**20, 256


def _digest(path: Path, white: Any, notes: Any) -> str:
    """Of all that is kept; of a file of more than 256 MB 256 blocks, which tell one of other images or half written."""
    found = hashlib.blake2b(json.dumps([white, notes]).encode(), digest_size=16)
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        found.update(str(size).encode())
        for start in range(0, size, max(_BLOCK, size // _BLOCKS)):
            file.seek(start)
            found.update(file.read(_BLOCK))
    return found.hexdigest()


def _beside(path: Path) -> Path:
    return path.with_suffix(".white.json")


def _map(path: Path) -> Tensor:
    # "c": copy on write, so that torch gets a writable array and the file stays as it is
    return torch.from_numpy(np.load(path, mmap_mode="c"))
