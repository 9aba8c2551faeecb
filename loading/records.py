"""What a split.json and a checkpoint say of a split."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from options import UserError
from options.default_option import DataOptions

SPLITS = ("train", "valid", "test")
PORTIONS = ("seed", "test_portion", "train_portion")
Split = dict[str, list[str]]  # names of the images of each of SPLITS


class Stored(NamedTuple):
    """What a split.json or a checkpoint says of a split."""

    split: Split
    group_pattern: str | None = None  # by which its groups were kept whole
    left_out: Sequence[str] = ()  # images that are in none of its parts on purpose
    pixels: Mapping[str, str] = MappingProxyType({})  # a fingerprint of each part, "HxWxC digest"
    portions: Mapping[str, float] = MappingProxyType({})  # the options it was drawn with, as far as they are known
    dataset: str = ""  # of the run that drew it


def read_split(path: Path, what: str = "--split") -> Stored:
    """A split.json; raises UserError where it is none: every image is in one place, and training has some.

    Args:
        what: names it, for messages.
    """
    try:
        stored = of_record(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{what} {path}: no such file; take the split.json of an experiment") from None
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, re.error):
        raise UserError(f"{what} {path} is no split.json: it has the lists train, valid and test") from None
    names = Counter(name for part in stored.split.values() for name in part)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise UserError(f"{what} {path} is no split: {len(twice)} images are in it more than once, e.g. {twice[0]}")
    for part in ("train", "valid"):
        if not stored.split[part]:
            raise UserError(f"{what} {path}: its list {part} is empty; training and validation need images")
    return stored


def given_split(opt: DataOptions) -> Stored | None:
    """That of --split FILE; raises UserError."""
    return None if opt.split in (None, "new") else read_split(Path(str(opt.split)))


class Given(NamedTuple):
    """The split that a run is given: one to be used as it is, or that of another run to take over; or neither."""

    split: Stored | None = None
    carry: Stored | None = None


def of_record(record: Any) -> Stored:
    """What the mapping of a split.json says; raises ValueError, KeyError, TypeError or re.error where it is none."""
    split = {part: record[part] for part in SPLITS}
    if not all(isinstance(part, list) and all(isinstance(name, str) for name in part) for part in split.values()):
        raise TypeError
    pattern = record.get("group_pattern")
    if pattern is not None:
        re.compile(pattern)
    portions = {name: float(record[name]) for name in PORTIONS if name in record}
    left_out, found = tuple(record.get("left_out", ())), dict(record.get("pixels", {}))
    if not all(isinstance(text, str) for text in (*left_out, *found.values())):
        raise TypeError
    return Stored(split, pattern, left_out, found, portions, str(record.get("dataset", "")))


def to_record(stored: Stored, opt: DataOptions) -> dict[str, Any]:
    """The mapping of a split.json, and how the split was drawn."""
    how = {"group_pattern": stored.group_pattern, **stored.portions}
    record = {"dataset": opt.dataset, **how, "pixels": dict(stored.pixels)}
    return record | ({"left_out": list(stored.left_out)} if stored.left_out else {}) | stored.split
