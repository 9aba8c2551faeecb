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


def path_of(folder: Path, stem: str, epoch: int) -> Path:
    """STEM_epoch_N.pt, the state after epoch N."""
    return folder / f"{stem}_epoch_{epoch}.pt"
