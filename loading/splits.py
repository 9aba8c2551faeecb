"""Splits of a data set: stratified by class, seeded, groups of images kept whole."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import utils
from loading import records
from loading.records import PORTIONS, SPLITS, Split, Stored
from options import UserError
from options.default_option import DataOptions

_FORMAT = 1  # of kept splits; to be raised when splitting changes
_MANY = 10_000  # images whose split is worth keeping


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
            return old._replace(split=fitted), notes + _unused(old, opt)
    made = make_split(names, labels, classes, opt, official_test)
    return Stored(made, opt.group_pattern, portions={name: getattr(opt, name) for name in PORTIONS}), notes


def _unused(old: Stored, opt: DataOptions) -> list[str]:
    """A note, if options are given that a split which exists has no use for."""
    usual, drawn = vars(DataOptions()), {**old.portions, "group_pattern": old.group_pattern}
    unused = [
        name for name, value in drawn.items() if name != "seed" and getattr(opt, name) not in (value, usual[name])
    ]
    words = ", ".join(f"--{name}" for name in unused)
    return [f"the images are split as in the split that there is, without regard to {words}"] if unused else []


def with_groups(given: Stored, opt: DataOptions, refuse: bool) -> tuple[Stored, list[str]]:
    """A given split with --group_pattern, if it has none of its own and keeps these groups whole; and what to say.

    Args:
        given: used as it is. opt: the options.
        refuse: a split that does not keep them whole.
    """
    if opt.group_pattern is None or given.group_pattern is not None:
        return given, _unused(given, opt)
    group = group_of([name for names in given.split.values() for name in names], opt.group_pattern)
    parts = [{group(name) for name in names} for names in given.split.values()]
    torn = sorted(parts[0] & (parts[1] | parts[2]) | parts[1] & parts[2])
    if torn and refuse:
        raise UserError(
            f"--split {opt.split} divides what --group_pattern keeps whole, e.g. {torn[0]}; give one of both"
        )
    return (given if torn else given._replace(group_pattern=opt.group_pattern)), []


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
    taken = set(named)
    alike = {same_name(name): name for name in reversed(names) if name not in taken}
    here = {name: name if name in label else alike.pop(same_name(name), "") for name in named}
    kept = {part: [now for name in stored.split[part] if (now := here[name])] for part in SPLITS}
    gone = sorted(name for part in SPLITS for name in stored.split[part] if not here[name])
    total = sum(map(len, stored.split.values()))
    if len(gone) == total:
        return None, ["no image of the split is here: this is other data, which gets a split of its own"]
    notes = [f"{len(gone):,} of the {total:,} images of the split are gone, e.g. {gone[0]}"] if gone else []
    known = {label[name] for part in kept.values() for name in part}
    used = {*here.values()}
    group = group_of([*names, *named], stored.group_pattern)  # also of images that are gone
    held = {group(name) for part in ("valid", "test") for name in stored.split[part]}
    trained = {group(name) for name in stored.split["train"]}
    joining: list[str] = []
    anew: list[str] = []
    for name in names:
        if name not in used and group(name) not in held:
            join = group(name) in trained or (label[name] in known and 2 * len(gone) <= total)
            (joining if join else anew).append(name)
    more = _split_anew(anew, label, classes, replace(opt, group_pattern=stored.group_pattern))
    if anew and more is None and {label[name] for name in anew} <= known:  # too few to be split
        joining, anew = joining + anew, []
    kept["train"] = kept["train"] + joining
    if joining:
        notes.append(f"{len(joining):,} images that the split does not name are trained on, e.g. {joining[0]}")
    if anew:
        if more is None:
            raise UserError(
                f"{len(anew):,} images are new, e.g. {anew[0]}, too few to be split; add some, or --split new"
            )
        kept = {part: kept[part] + more[part] for part in SPLITS}
        notes.append(f"{len(anew):,} images that the split does not name are split anew, e.g. {anew[0]}")
    for part in ("train", "valid"):
        if not kept[part]:
            raise UserError(f"no image of the split's part {part} is here any more; give --split new")
    return kept, notes


def _split_anew(names: list[str], label: Mapping[str, int], classes: list[str], opt: DataOptions) -> Split | None:
    """A new split of some images, those without a group apart; None if they are too few."""
    pattern, split = opt.group_pattern, {part: list[str]() for part in SPLITS}
    for grouped in (True, False):
        chosen = [name for name in names if (pattern is not None and _key(name, pattern) is not None) == grouped]
        if chosen:
            ours = replace(opt, group_pattern=pattern if grouped else None)
            try:
                found = make_split(chosen, torch.tensor([label[name] for name in chosen]), classes, ours)
            except UserError:
                return None
            split = {part: split[part] + found[part] for part in SPLITS}
    return split


def group_of(names: list[str], pattern: str | None) -> Callable[[str], str]:
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
        return records.of_record(json.loads(path.read_text(encoding="utf-8"))).split
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
