"""Splits of a data set: stratified by class, seeded, groups of images kept whole."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import utils
from options import UserError
from options.default_option import DataOptions

SPLITS = ("train", "valid", "test")
_FORMAT = 1  # of kept splits; to be raised when splitting changes
_PORTIONS = ("seed", "test_portion", "train_portion")
_MANY = 10_000  # images whose split is worth keeping


Split = dict[str, list[str]]  # names of the images of each of SPLITS


class Stored(NamedTuple):
    """What a split.json or a checkpoint says of a split."""

    split: Split
    group_pattern: str | None = None  # by which its groups were kept whole
    left_out: Sequence[str] = ()  # images that are in none of its parts on purpose
    pixels: Mapping[str, str] = MappingProxyType({})  # a fingerprint of each part, "HxWxC digest"
    portions: Mapping[str, float] = MappingProxyType({})  # the options it was drawn with


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
    portions = {name: record[name] for name in _PORTIONS if name in record}
    return Stored(split, pattern, tuple(record.get("left_out", ())), dict(record.get("pixels", {})), portions)


def to_record(stored: Stored, opt: DataOptions) -> dict[str, Any]:
    """The mapping of a split.json, and how the split was drawn."""
    drawn = {name: stored.portions.get(name, getattr(opt, name)) for name in _PORTIONS}
    record = {"dataset": opt.dataset, "group_pattern": stored.group_pattern, **drawn, "pixels": dict(stored.pixels)}
    return record | ({"left_out": list(stored.left_out)} if stored.left_out else {}) | stored.split


def same_name(name: str) -> str:
    """What two names have in common that a computer or a person takes for the same."""
    return unicodedata.normalize("NFC", name).casefold()


def draw(
    old: Stored, names: list[str], labels: Tensor, classes: list[str], opt: DataOptions, official_test: int = 0
) -> tuple[Stored, list[str]]:
    """A new split, or an old one as far as it is of these images (see fit_split); and what there is to say about it.

    Args:
        old: of another run; Stored({}) is none.
        names, labels, classes, opt, official_test: see make_split.
    """
    notes: list[str] = []
    if old.split:
        fitted, notes = fit_split(old, names, labels, classes, opt)
        if fitted is not None:
            drawn = {**old.portions, "group_pattern": old.group_pattern}
            usual = vars(DataOptions())
            unused = [name for name, value in drawn.items() if getattr(opt, name) not in (value, usual[name])]
            if unused:
                words = ", ".join(f"--{name}" for name in unused)
                notes.append(f"the images are split as in the run of before, without regard to {words}")
            return old._replace(split=fitted), notes
    return Stored(make_split(names, labels, classes, opt, official_test), opt.group_pattern), notes


def fit_split(
    stored: Stored, names: list[str], labels: Tensor, classes: list[str], opt: DataOptions
) -> tuple[Split | None, list[str]]:
    """The split of another run for the images that are here now, and what there is to say about it.

    Images that the split names keep their part. New ones of its classes join the training split, but not those whose
    group validates or tests; those of new classes, or all where more than half of the split is gone, are split anew.
    None, if no image of the split is here: this is other data.
    """
    label = dict(zip(names, labels.tolist(), strict=True))
    named = [name for part in (*stored.split.values(), stored.left_out) for name in part]
    alike = {same_name(name): name for name in label.keys() - set(named)}
    here = {name: name if name in label else alike.pop(same_name(name), "") for name in named}
    kept = {part: [now for name in stored.split[part] if (now := here[name])] for part in SPLITS}
    gone = sorted(name for part in SPLITS for name in stored.split[part] if not here[name])
    total = sum(map(len, stored.split.values()))
    if len(gone) == total:
        return None, ["no image of the split is here: this is other data, which gets a split of its own"]
    notes = [f"{len(gone):,} of the {total:,} images of the split are gone, e.g. {gone[0]}"] if gone else []
    known = {label[name] for part in kept.values() for name in part}
    used = {*here.values()}
    group = _group_of(names, stored.group_pattern)
    held, trained = ({group(name) for name in part} for part in ([*kept["valid"], *kept["test"]], kept["train"]))
    joining: list[str] = []
    anew: list[str] = []
    for name in names:
        if name not in used and group(name) not in held:
            join = group(name) in trained or (label[name] in known and 2 * len(gone) <= total)
            (joining if join else anew).append(name)
    kept["train"] = kept["train"] + joining
    if joining:
        notes.append(f"{len(joining):,} images that the split does not name are trained on, e.g. {joining[0]}")
    if anew:
        ours = replace(opt, group_pattern=stored.group_pattern)
        more = make_split(anew, torch.tensor([label[name] for name in anew]), classes, ours)
        kept = {part: kept[part] + more[part] for part in SPLITS}
        notes.append(f"{len(anew):,} images that the split does not name are split anew, e.g. {anew[0]}")
    for part in ("train", "valid"):
        if not kept[part]:
            raise UserError(f"no image of the split's part {part} is here any more; give --split new")
    return kept, notes


def _group_of(names: list[str], pattern: str | None) -> Callable[[str], str]:
    """The group of an image: itself, if there are none or the pattern does not fit it."""
    if pattern is None:
        return lambda name: name
    groups = {name: f"group {_key(name, pattern)}" if _key(name, pattern) is not None else name for name in names}
    return groups.__getitem__


def make_split(names: list[str], labels: Tensor, classes: list[str], opt: DataOptions, official_test: int = 0) -> Split:
    """The names of the images of each split: stratified by class, seeded, groups kept whole.

    That of many images takes seconds and is kept in cache_dir, for the next run with the same names and options.

    Args:
        names: of all images. labels: (N,) int64. classes: their names.
        official_test: the last images, which are the test set where a data set brings its own.
    Raises:
        UserError: too few images or groups for three splits, or a group_pattern that fits no name.
    """
    if len(names) < _MANY:
        return _new_split(names, labels.numpy(), classes, opt, official_test)
    how = (opt.seed, opt.test_portion, opt.train_portion, opt.group_pattern, official_test)
    path = utils.cached(opt.cache_dir, "{}.json", _FORMAT, how, names, labels.tolist())
    with suppress(OSError, ValueError, KeyError, TypeError):
        return of_record(json.loads(path.read_text(encoding="utf-8"))).split
    split = _new_split(names, labels.numpy(), classes, opt, official_test)
    with suppress(OSError):  # it can be made again
        utils.write_atomic(path, json.dumps(split))
    return split


def _new_split(
    names: list[str], labels: np.ndarray[Any, Any], classes: list[str], opt: DataOptions, official_test: int
) -> Split:
    everything = np.arange(len(labels))
    groups = _groups(names, opt.group_pattern)
    if official_test:
        rest, test = np.split(everything, [len(everything) - official_test])
    elif opt.test_portion > 0:
        rest, test = _divide(everything, opt.test_portion, labels, groups, classes, utils.fold(opt.seed, "test"))
    else:
        rest, test = everything, everything[:0]
    train, valid = _divide(rest, 1 - opt.train_portion, labels, groups, classes, utils.fold(opt.seed, "valid"))
    missing = [classes[c] for c in set(labels) - set(labels[train])]
    if missing:
        raise UserError(f"--train_portion {opt.train_portion} leaves no training image of the class {missing[0]!r}")
    return {split: [names[i] for i in np.sort(part)] for split, part in zip(SPLITS, (train, valid, test), strict=True)}


def _groups(names: list[str], pattern: str | None) -> np.ndarray[Any, Any] | None:
    return None if pattern is None else np.unique(_keys(names, pattern), return_inverse=True)[1]


def _keys(names: list[str], pattern: str) -> list[str]:
    """The group of each image."""
    keys = [key for name in names if (key := _key(name, pattern)) is not None]
    if len(keys) < len(names):
        name = next(name for name in names if _key(name, pattern) is None)
        raise UserError(f"--group_pattern {pattern!r} is not found in {Path(name).name!r}; every file name needs it")
    return keys


def _key(name: str, pattern: str) -> str | None:
    match = re.search(pattern, Path(name).name)
    return match and match.group(1 if match.re.groups else 0)


def _divide(
    indices: np.ndarray[Any, Any],
    portion: float,
    labels: np.ndarray[Any, Any],
    groups: np.ndarray[Any, Any] | None,
    classes: list[str],
    seed: int,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(kept, taken): about `portion` of the indices taken, class by class."""
    from sklearn.model_selection import train_test_split  # a slow import

    seed %= 2**32
    try:
        if groups is None:
            kept, taken = train_test_split(indices, test_size=portion, stratify=labels[indices], random_state=seed)
            return kept, taken
        return _divide_groups(indices, portion, labels, groups, seed)
    except ValueError as error:
        (least, count) = min(Counter(labels[indices].tolist()).items(), key=lambda item: item[1])
        if groups is not None:
            few = f"there are {len(np.unique(groups[indices]))} groups"
        else:
            few = f"the smallest class, {classes[least]!r}, has {count} images there"
        raise UserError(
            f"the images cannot be split ({str(error).rstrip('.')}): {few}; "
            "add images, or change --test_portion, --train_portion or --group_pattern"
        ) from None


def _divide_groups(
    indices: np.ndarray[Any, Any], portion: float, labels: np.ndarray[Any, Any], groups: np.ndarray[Any, Any], seed: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Like _divide, groups whole: of many shuffled foldings, the folds that come closest to `portion` of each class."""
    from sklearn.model_selection import StratifiedGroupKFold

    # k of n folds, n as small as comes close to the portion, so that a fold holds many groups
    count = len(np.unique(groups[indices]))
    if min(portion, 1 - portion) * count < 0.5:
        raise ValueError(f"{portion:.3g} of {count} is less than one of them")
    near = [f for n in range(2, min(50, count) + 1) if (f := Fraction(portion).limit_denominator(n)) not in (0, 1)]
    near = near or [Fraction(1, min(50, count))]  # a small portion
    part = next((f for f in near if abs(f - portion) < 0.02), min(near, key=lambda f: abs(f - portion)))
    totals = np.bincount(labels[indices])
    best, best_gap = indices[:0], np.inf
    for attempt in range(4):
        folds = StratifiedGroupKFold(part.denominator, shuffle=True, random_state=(seed + attempt) % 2**32)
        parts = [held for _, held in folds.split(indices, labels[indices], groups[indices])]
        for first in range(len(parts)):
            taken = np.concatenate([parts[(first + i) % len(parts)] for i in range(part.numerator)])
            shares = np.bincount(labels[indices[taken]], minlength=len(totals)) / np.maximum(totals, 1)
            # Kullback-Leibler, summed over classes: a class without an image on one side costs most
            shares = shares[totals > 0].clip(0.001, 0.999)
            gap = -float((portion * np.log(shares) + (1 - portion) * np.log(1 - shares)).sum())
            if gap < best_gap:
                best, best_gap = taken, gap
    return np.delete(indices, best), indices[best]
