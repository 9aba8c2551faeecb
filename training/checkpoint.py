"""Checkpoints: tensors and plain containers, written in one move, loaded with weights_only=True."""

import os
import re
from pathlib import Path
from typing import Any

import torch

import utils
from options import UserError

FORMAT = 1  # of the mapping in the file; a loader refuses others


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint so that a crash leaves the old file or the new one, never half of one; raises OSError."""
    try:
        with utils.replacing(path) as temporary, temporary.open("wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's writer hides what the system refused
        refused: BaseException | None = error
        while refused is not None and not isinstance(refused, OSError):
            refused = refused.__context__
        if refused is None:
            raise
        raise OSError(refused.errno, refused.strerror, str(path)) from None


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        UserError: the file is missing, damaged, of another program or of another format.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # torch raises a dozen types for a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path} is damaged or not a checkpoint ({reason[:100]}); take another; removed, the one before is"
        ) from None
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(f"{path} is not a checkpoint of this program")
    if content["format"] != FORMAT:
        raise UserError(f"{path} has format {content['format']}, this version reads {FORMAT}; use the version it is of")
    return content


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
