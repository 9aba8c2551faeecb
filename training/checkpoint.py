"""Checkpoints: tensors and plain containers, written in one move, loaded with weights_only=True, or not if damaged."""

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

import options
import utils
from genotypes import SPACES, Genotype, num_edges
from loading import records
from loading.sets import DataInfo
from options import UserError
from options.child_option import ChildOptions
from options.constraint_option import ConstraintOptions
from options.default_option import TrainOptions

FORMAT = 2  # of the mapping in the file; a loader refuses others, but for 1, which had no digest
_MARK = b"blake2b "  # the archive's comment: this and the digest, in hexadecimal digits, of all that is before it
_COMMENT = len(_MARK) + 64


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint so that a crash leaves the old file or the new one, never half of one; raises OSError."""
    try:
        with utils.replacing(path) as temporary, temporary.open("w+b") as file:
            torch.save({"format": FORMAT, **content}, file)
            _seal(file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's writer hides what the system refused
        refused: BaseException | None = error
        while refused is not None and not isinstance(refused, OSError):
            refused = refused.__context__
        if refused is None:
            raise
        raise OSError(refused.errno, refused.strerror, str(path)) from None


def _seal(file: BinaryIO) -> None:
    """Give the archive a comment with the digest of its bytes."""
    file.seek(-2, os.SEEK_END)  # the length of the comment, which torch leaves empty
    file.write(_COMMENT.to_bytes(2, "little"))
    digest = _digest(file, file.tell())
    file.seek(0, os.SEEK_END)
    file.write(_MARK + digest)


def _digest(file: BinaryIO, size: int) -> bytes:
    """Of the first `size` bytes."""
    found = hashlib.blake2b(digest_size=32)
    file.seek(0)
    while size:
        block = file.read(min(size, 1 << 20))
        found.update(block)
        size -= len(block) or size
    return found.hexdigest().encode()


_KINDS = {"stem": str, "epoch": int, **dict.fromkeys(("options", "data", "split", "metrics", "extra", "parts"), dict)}


def load(path: Path) -> dict[str, Any]:
    """The checkpoint of a run: read, and with all that a run's has; options that it lacks have their defaults.

    Raises:
        UserError: see read; or it holds something else.
    """
    content = read(path)
    try:
        for name, kind in _KINDS.items():
            if not isinstance(content.get(name), kind):
                raise UserError(f"its {name} is missing or of another kind")
        if content["epoch"] < 0 or not all(isinstance(part, dict) for part in content["parts"].values()):
            raise UserError("its epoch or a part of it is of another kind")
        if not all(isinstance(value, torch.Tensor) for value in content["parts"].get("network", {0: 0}).values()):
            raise UserError("its network is missing or of another kind")
        json.dumps([value for name, value in content.items() if name != "parts"])  # all but tensors is plain
        DataInfo(**content["data"]).check()
        records.of_record(content["split"])
        if not all(type(value) in (int, float) for value in content["metrics"].values()):
            raise UserError("its metrics are no numbers")
        if content["epoch"] and content["metrics"].get("epoch") != content["epoch"]:
            raise UserError("its metrics are of another epoch")
        search = content["stem"] == "weights"
        content["options"] = options.to_dict(TrainOptions() if search else ChildOptions()) | content["options"]
        if search:
            opt, state = options.restore(ConstraintOptions, content["options"]), content["parts"].get("network", {})
            shape = (num_edges(opt.nodes), len(SPACES[opt.space]))
            if any(tuple(state[f"alpha_{kind}"].shape) != shape for kind in ("normal", "reduce")):
                raise UserError("its alpha is not of its space")
        elif options.restore(ChildOptions, content["options"]).network == "cells":
            Genotype.from_dict(content["extra"]["genotype"])
        _check_within(content.get("within"))
    except UserError as error:
        raise UserError(f"{path} is no checkpoint of a run: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, re.error):
        raise UserError(f"{path} is no checkpoint of a run: its data or its split is of another kind") from None
    return content


def _check_within(within: Any) -> None:
    """Raise an error where it is not what Run.save_within takes."""
    if within is None:
        return
    mean, count = within["mean"], len(within["mean"]["names"]) + 1
    numbers = [within["seconds"], *(number for row in mean["sums"] for number in row)]
    whole = all(type(within[name]) is int and within[name] >= 0 for name in ("steps", "skipped"))
    rows = mean["sums"] and all(len(row) == count for row in mean["sums"]) and set(map(type, numbers)) <= {int, float}
    if not whole or not rows or not isinstance(within["head"], dict) or set(map(type, mean["names"])) - {str}:
        raise TypeError


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        UserError: the file is missing, damaged, of another program or of another format.
    """
    try:
        fault = _fault(path)
        content = None if fault else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # torch raises a dozen types for a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} is damaged or not a checkpoint ({reason[:100]}){_instead(path)}") from None
    if fault:
        raise UserError(f"{path} is damaged: {fault}{_instead(path)}")
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(f"{path} is not a checkpoint of this program")
    if content["format"] not in (1, FORMAT):
        raise UserError(f"{path} has format {content['format']}, this version reads {FORMAT}; use the version it is of")
    if content["format"] == FORMAT and not _sealed(path):
        raise UserError(f"{path} is damaged: its digest is missing{_instead(path)}")
    return content


def _sealed(path: Path) -> bytes | None:
    """The digest that a checkpoint says it has."""
    with path.open("rb") as file:
        file.seek(-min(_COMMENT, file.seek(0, os.SEEK_END)), os.SEEK_END)
        found = re.fullmatch(_MARK + rb"([0-9a-f]{64})", file.read())
    return found and found[1]


def _fault(path: Path) -> str | None:
    """What is wrong with the bytes of a checkpoint, before anything is made of them; None if it is whole.

    One of format 1 has the checksums of its archive alone.
    """
    said = _sealed(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                return "its parts are larger than the file"  # compressed, which no checkpoint is
            if said is not None:
                with path.open("rb") as file:
                    if _digest(file, file.seek(0, os.SEEK_END) - _COMMENT) == said:
                        return None
            broken = archive.testzip()
    except (zipfile.BadZipFile, EOFError, ValueError, RuntimeError):
        return "it is no whole archive"
    if broken is not None:
        return f"{_name(path, broken)} is not what was written"
    return None if said is None else "it is not what was written"


def _name(path: Path, entry: str) -> str:
    """What the user calls an entry of the archive: tensors lie in data/0, data/1, ... in the order of the content."""
    number = re.fullmatch(r"[^/]+/data/(\d+)", entry)
    try:
        named = [*_tensors(torch.load(path, map_location="cpu", weights_only=True))] if number else []
    except Exception:
        named = []
    places = dict.fromkeys(tensor.untyped_storage()._cdata for _, tensor in named)
    names = {place: name for name, tensor in reversed(named) for place in [tensor.untyped_storage()._cdata]}
    ordered = [names[place] for place in places]
    return ordered[int(number[1])] if number and int(number[1]) < len(ordered) else f"its {entry.partition('/')[2]}"


def _tensors(content: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of nested containers with the keys that lead to them."""
    if isinstance(content, torch.Tensor):
        yield name, content
    elif isinstance(content, Mapping | Sequence) and not isinstance(content, str):
        pairs = content.items() if isinstance(content, Mapping) else enumerate(content)
        for key, value in pairs:
            yield from _tensors(value, f"{name}.{key}" if name else str(key))


def _instead(path: Path) -> str:
    """What to go on from, in words, where a checkpoint is damaged."""
    stem = re.match(r"(\w+)_epoch_\d+", path.name)
    others = [path_of(path.parent, stem[1], epoch) for epoch in epochs(path.parent, stem[1])[::-1]] if stem else []
    for other in others:
        try:
            if other.name != path.name and _fault(other) is None:
                return f"; {other} is whole: --resume True goes on from it where {path.name} is removed"
        except OSError:
            continue
    return "; take another"


def epochs(folder: Path, stem: str) -> list[int]:
    """The epochs whose checkpoint STEM_epoch_N.pt lies in a folder, ascending."""
    names = (re.fullmatch(rf"{stem}_epoch_(\d+)\.pt", path.name) for path in folder.glob(f"{stem}_epoch_*.pt"))
    return sorted(int(name[1]) for name in names if name)


def newest(folder: Path, stem: str) -> Path | None:
    """The last STEM_epoch_N.pt of a folder."""
    known = epochs(folder, stem)
    return path_of(folder, stem, known[-1]) if known else None


def within(folder: Path, stem: str) -> dict[tuple[int, int], Path]:
    """The checkpoints STEM_epoch_N_step_K.pt of a folder, by N and K: the state after step K of epoch N."""
    names = (
        (re.fullmatch(rf"{stem}_epoch_(\d+)_step_(\d+)\.pt", path.name), path)
        for path in folder.glob(f"{stem}_epoch_*_step_*.pt")
    )
    return {(int(name[1]), int(name[2])): path for name, path in names if name}


def latest(folder: Path, stem: str) -> Path | None:
    """The furthest checkpoint of a folder, that of a step included."""
    finished = max(epochs(folder, stem), default=0)
    ahead = {moment: path for moment, path in within(folder, stem).items() if moment[0] > finished}
    return ahead[max(ahead)] if ahead else newest(folder, stem)


def path_of(folder: Path, stem: str, epoch: int, step: int | None = None) -> Path:
    """STEM_epoch_N.pt, the state after epoch N, or STEM_epoch_N_step_K.pt, that after K steps of it."""
    return folder / f"{stem}_epoch_{epoch}{'' if step is None else f'_step_{step}'}.pt"
