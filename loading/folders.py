"""What lies in a data folder: one subfolder of images per class."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from PIL import Image

from options import UserError

_NEEDS_MORE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow knows but cannot read alone
_SPLITS = re.compile(  # the names of folders that are splits and not classes: train2017, Test Set, trainA, imagesTs
    r"(?:images?)?(train|tr|val|va|test|ts|eval|dev|holdout|unlabell?ed|extra|pred)(?:ing|id|idation|uation)?"
    r"(?:set|data|split|images?|imgs?|[ab])?"
)


class ImageFolder(NamedTuple):
    """The class names of a folder and, in order, the files with their classes."""

    root: Path
    classes: list[str]
    files: list[str]  # relative to root, with forward slashes
    labels: list[int]
    left_out: str = ""  # in words
    option: str = "--dataset"  # where it was asked for
    again: Mapping[str, str] = MappingProxyType({})  # files left out, and those that they are the same as


@cache
def formats() -> dict[str, tuple[str, ...]]:
    """The endings, in lower case, of the files that Pillow reads: each with its formats, the likeliest first.

    (All of them are registered here; in Pillow's order a folder of TIFFs took a seventh longer to decode.)
    """
    known = {end: "JPEG" if kind == "MPO" else kind for end, kind in Image.registered_extensions().items()}
    able = [kind for kind in Image.ID if kind not in _NEEDS_MORE]
    return {end: (kind, *(other for other in able if other != kind)) for end, kind in known.items() if kind in able}


def scan(root: Path, names: Iterable[str] = (), option: str = "--dataset") -> ImageFolder:
    """List a folder with one subfolder of images per class, at any depth, linked folders too, hidden ones left out.

    Args:
        names: what might have been meant instead.
        option: where it was asked for; to be tested on, one class does.

    Raises:
        UserError: no such folder, fewer than two classes, a class without an image, splits in place of classes, or
            a file in two classes.
    """
    where = f"{option} {root}"
    if not root.is_dir():
        raise UserError(
            f"{where}: no such folder; give a folder with one subfolder of images per class"
            + "".join(f", or {name}" for name in names)
        )
    with os.scandir(root) as entries:
        listed = sorted((entry for entry in entries if not entry.name.startswith((".", "__"))), key=lambda e: e.name)
    folders = [root / entry.name for entry in listed if entry.is_dir()]
    _check_classes(where, folders)
    walk, files, labels = _Walk(where, root), [], []
    strays = [entry for entry in listed if not entry.is_dir() and os.path.splitext(entry.name)[1].lower() in formats()]
    if strays:
        walk.left_out["image outside of the class folders"] += len(strays)
    for label, folder in enumerate(folders):
        found = sorted(walk.files(str(folder), f"{folder.name}/", folder.name))
        if not found and option != "--dataset":
            walk.left_out["empty class folder"] += 1
        elif not found:
            left = f" but {_in_words(walk.left_out)}" if walk.left_out else ""
            raise UserError(f"{where}: the class folder {folder.name!r} holds no images{left}; fill it or remove it")
        files += found
        labels += [label] * len(found)
    least = 2 if option == "--dataset" else 1
    if len(folders) < least or not files:
        raise UserError(
            f"{where}: {len(folders) if files else 0} class folders with images found, at least {least} are needed; "
            "each subfolder is a class"
        )
    return ImageFolder(
        root, [folder.name for folder in folders], files, labels, _in_words(walk.left_out), option, walk.again
    )


def _check_classes(where: str, folders: list[Path]) -> None:
    """Refuse folders that are splits, or that have splits in them."""
    advice = "give a folder with one subfolder per class, and --split with a file of the lists train, valid and test"
    if _are_splits([path.name for path in folders]):
        names = ", ".join(path.name for path in folders)
        raise UserError(f"{where}: its folders {names} are splits, not classes; {advice}")
    for folder in folders:
        try:
            with os.scandir(folder) as entries:
                inside = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        except OSError as error:
            raise UserError(f"{where}: {folder.name} cannot be read: {error.strerror}") from None
        if _are_splits(inside):
            raise UserError(f"{where}: {folder.name} holds splits ({', '.join(inside)}); {advice}")


def _are_splits(names: Sequence[str]) -> bool:
    """Whether all names are those of splits, of several kinds. Classes may be called train, or test tube."""
    words = [[*filter(None, re.split(r"[^a-z]+", name.lower()))] for name in names if not name.startswith((".", "__"))]
    common = set.intersection(*map(set, words)) if words else set()  # such as seg in seg_train, seg_test
    kinds = [_SPLITS.fullmatch("".join(word for word in its if word not in common)) for its in words]
    return all(kinds) and len({match[1] for match in kinds if match}) > 1


class _Walk:
    """Goes through the class folders once; what is left out is counted.

    Args:
        where: for messages. root: of the class folders.
    """

    def __init__(self, where: str, root: Path) -> None:
        self.left_out: Counter[str] = Counter()
        self.again: dict[str, str] = {}  # files left out: the same as
        self._where, self._met = where, {_identity(os.stat(root)): (".", "")}  # file or folder: path, class

    def files(self, folder: str, prefix: str, label: str) -> Iterator[str]:
        """The images in a folder and below, as prefix + relative path; of several names the first, links last."""
        if self._same(_identity(os.stat(folder)), prefix, label, "folder"):
            return
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name))
        for entry in listed:
            if entry.name.startswith("."):
                continue
            path, ending = prefix + entry.name, os.path.splitext(entry.name)[1].lower()
            try:
                folder_, file = entry.is_dir(), entry.is_file()
                identity = _identity(os.stat(entry.path))
            except OSError:  # it leads nowhere, or to itself
                self.left_out["broken link"] += 1
                continue
            if folder_ and entry.name.startswith("__"):
                self.left_out[f"folder {entry.name}"] += 1
            elif folder_:
                yield from self.files(entry.path, f"{path}/", label)
            elif not file:
                self.left_out["special file"] += 1
            elif ending not in formats():
                self.left_out[ending or "file without an ending"] += 1
            elif not self._same(identity, path, label, "file"):
                yield path

    def _same(self, identity: tuple[int, int], path: str, label: str, kind: str) -> bool:
        """Whether it was met before; raises UserError if in another class."""
        first, of = self._met.setdefault(identity, (path, label))
        if first == path or not identity[1]:  # some file systems have no numbers
            return False
        if of not in ("", label):
            raise UserError(f"{self._where}: {path} and {first} are the same {kind}, in two classes; remove one")
        if kind == "file":
            self.again[path] = first
        self.left_out[f"linked {kind} met before"] += 1
        return True


def _identity(about: os.stat_result) -> tuple[int, int]:
    return about.st_dev, about.st_ino


def _in_words(left_out: Mapping[str, int]) -> str:
    """50 .jfif, 1 .db."""
    return ", ".join(f"{count:,} {what}" for what, count in sorted(left_out.items()))
