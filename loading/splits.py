"""Splits of a data set: stratified by class, seeded, groups of images kept whole."""

import json
import re
from collections import Counter
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

import utils
from options import UserError
from options.default_option import DataOptions

SPLITS = ("train", "valid", "test")
_FORMAT = 1  # of kept splits; to be raised when splitting changes
_MANY = 10_000  # images whose split is worth keeping


Split = dict[str, list[str]]  # names of the images of each of SPLITS


class Stored(NamedTuple):
    """What a split.json says."""

    split: Split
    group_pattern: str | None  # by which its groups were kept whole


def read_split(path: Path) -> Stored:
    """A split.json; raises UserError where it is none: every image is in one place, and training has some."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        split = {part: [str(name) for name in stored[part]] for part in SPLITS}
    except OSError:
        raise UserError(f"--split {path}: no such file; take the split.json of an experiment") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--split {path} is no split.json: it has the lists train, valid and test") from None
    names = Counter(name for part in split.values() for name in part)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise UserError(f"--split {path} is no split: {len(twice)} images are in it more than once, e.g. {twice[0]}")
    for part in ("train", "valid"):
        if not split[part]:
            raise UserError(f"--split {path}: its list {part} is empty; training and validation need images")
    return Stored(split, stored.get("group_pattern"))


def fit_split(stored: Stored, names: list[str], labels: Tensor, classes: list[str]) -> tuple[Split | None, list[str]]:
    """The split of a run for the images that are here now, and what there is to say about it.

    New images of the same classes join the training split, never the others, and only if their group is in neither; up
    to a tenth of the images may be gone. Otherwise this is other data, and None.
    """
    split, label = stored.split, dict(zip(names, labels.tolist(), strict=True))
    known = {name for part in split.values() for name in part}
    gone = sorted(known - label.keys())
    if len(gone) > len(known) // 10 or len({label[name] for name in known & label.keys()}) < len(classes):
        here = f"{len(known) - len(gone):,} of the {len(known):,} images of the split are here"
        return None, [f"{here}: this is other data, which gets a split of its own"]
    key = {name: name for name in [*names, *known]}
    if stored.group_pattern is not None:
        key = dict(zip(key, _keys(list(key), stored.group_pattern), strict=True))
    held = {key[name] for name in [*split["valid"], *split["test"]]}
    new = [name for name in names if name not in known and key[name] not in held]
    notes = []
    if gone:
        notes.append(f"{len(gone):,} of the {len(known):,} images of the split are gone, e.g. {gone[0]}")
    if new:
        notes.append(f"{len(new):,} images that the split does not name are trained on, e.g. {new[0]}")
    kept = {part: [name for name in split[part] if name in label] for part in SPLITS}
    return kept | {"train": kept["train"] + new}, notes


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
    if path.exists():
        stored: Split = json.loads(path.read_text(encoding="utf-8"))
        return stored
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
    matches = [re.search(pattern, Path(name).name) for name in names]
    keys: list[Any] = [match and match.group(1 if match.re.groups else 0) for match in matches]
    if None in keys:
        name = names[keys.index(None)]
        raise UserError(f"--group_pattern {pattern!r} is not found in {Path(name).name!r}; every file name needs it")
    return keys


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
