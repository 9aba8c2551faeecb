"""What lies in the folders of runs: searches, children trained of them, comparisons. Nothing is written."""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

import genotypes
import options
import utils
from child import cells, comparison
from genotypes import Genotype
from loading.sets import DataInfo
from options import UserError
from options.constraint_option import ConstraintOptions
from training import checkpoint


@dataclass(frozen=True)
class Search:
    """A search as one of its checkpoints has it."""

    folder: Path
    epoch: int  # of the checkpoint
    opt: ConstraintOptions  # those of main.py and more
    constrained: bool
    info: DataInfo
    row: Mapping[str, Any]  # of metrics.jsonl, of that epoch
    alphas: list[Tensor]  # [alpha_normal, alpha_reduce], (E, O)
    genotype: Genotype
    chosen: bool  # by --select; else the likeliest

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.folder.name

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """metrics.jsonl up to the checkpoint."""
        return [row for row in _rows(self.folder) if row["epoch"] <= self.epoch]

    def history(self) -> dict[int, list[Tensor]]:
        """[alpha_normal, alpha_reduce] of every epoch that is kept, of runs of before those of checkpoints alone."""
        path = self.folder / "alphas.jsonl"
        found: dict[int, list[Tensor]] = {}
        for row in utils.read_metrics(path) if path.exists() else []:
            with suppress(KeyError, TypeError, ValueError):
                pair = [torch.tensor(row[kind], dtype=torch.float32) for kind in ("normal", "reduce")]
                if all(a.shape == b.shape for a, b in zip(pair, self.alphas, strict=True)):
                    found[row["epoch"]] = pair
        for epoch in {*checkpoint.epochs(self.folder, "weights")} - found.keys() - {self.epoch}:
            with suppress(UserError):  # a damaged one is left out
                state = checkpoint.load(checkpoint.path_of(self.folder, "weights", epoch))["parts"]["network"]
                found[epoch] = [state["alpha_normal"], state["alpha_reduce"]]
        found[self.epoch] = self.alphas
        return {epoch: found[epoch] for epoch in sorted(found) if epoch <= self.epoch}


class _Row(dict[str, Any]):
    """A row of metrics.jsonl."""

    def __missing__(self, column: str) -> Any:
        raise UserError(f"the checkpoint has no {column} among its metrics: it is not main.py's; take another --epoch")


def read_search(base: Path, name: str, epoch: str = "last", rule: str = "search") -> Search:
    """A search.

    Args:
        base: the folder of all runs. name: of the run. epoch: whose checkpoint is read, or last.
        rule: how the genotype is derived: search (as the search itself does), argmax or top2.
    Raises:
        UserError: there is no such checkpoint.
    """
    folder = base / name
    content = checkpoint.load(_checkpoint_path(folder, epoch))
    opt = options.restore(ConstraintOptions, content["options"])
    state = content["parts"]["network"]
    alphas = [state["alpha_normal"], state["alpha_reduce"]]
    genotype = genotypes.derive(alphas[0], alphas[1], opt.space, "top2" if rule == "top2" else "argmax")
    chosen = rule == "search" and opt.select > 0 and content["epoch"] == opt.epochs
    if chosen and not (folder / "genotype.json").is_file():
        print("note: --select was interrupted, here is the likeliest child; --resume True goes on")
        chosen = False
    if chosen:
        genotype = cells.read_genotype(folder / "genotype.json")
    constrained = "eta" in content["options"]
    info, row = DataInfo(**content["data"]), _Row(content["metrics"])
    return Search(folder, content["epoch"], opt, constrained, info, row, alphas, genotype, chosen)


def _checkpoint_path(folder: Path, epoch: str) -> Path:
    known = checkpoint.epochs(folder, "weights")
    if not known:
        others = sorted(p.name for p in folders(folder.parent) if checkpoint.epochs(p, "weights"))
        hint = (
            f"experiments with one: {', '.join(others)}" if others else f"{folder.parent} has none: run main.py first"
        )
        raise UserError(f"--experiment {folder.name}: no search checkpoint in {folder}; {hint}")
    number = known[-1] if epoch == "last" else int(epoch)
    if number not in known:
        raise UserError(f"--epoch {number} is not kept in {folder}; there are {', '.join(map(str, known))}")
    return checkpoint.path_of(folder, "weights", number)


def folders(base: Path) -> list[Path]:
    """Of all runs, by name."""
    return sorted(path for path in base.iterdir() if path.is_dir()) if base.is_dir() else []


class Listed(NamedTuple):
    """A run in a line."""

    name: str
    kind: str  # search, constrained search or training
    epochs: str  # finished of all
    data: str
    figures: str
    minutes: float


def listing(base: Path) -> list[Listed]:
    """The runs of a folder, by name."""
    found = []
    for folder in folders(base):
        stem = next((stem for stem in ("weights", "child") if checkpoint.latest(folder, stem)), None)
        opt, rows = options_of(folder), _rows(folder)
        if stem is None or not opt:
            continue
        kind = "training" if stem == "child" else "constrained search" if "eta" in opt else "search"
        last, test = rows[-1] if rows else {}, _tested(folder)
        names = {"valid_acc": "valid"} | ({"child_valid_acc": "child"} if stem == "weights" else {})
        shown = [f"{words} {last[key]:.2f} %" for key, words in names.items() if isinstance(last.get(key), int | float)]
        shown += [f"test {test['acc']:.2f} %, {test['params']:,} parameters"] if test else []
        epochs = f"{last.get('epoch', 0)}/{opt.get('epochs', '?')}"
        found.append(Listed(folder.name, kind, epochs, str(opt.get("dataset")), ", ".join(shown), minutes_of(folder)))
    return found


def _rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return utils.read_metrics(path) if path.exists() else []


def minutes_of(folder: Path) -> float:
    """Of a run: its epochs, and if it is a search its choice among children."""
    seconds = [row.get("epoch_seconds") for row in _rows(folder)] + [stored(folder / "selection.json").get("seconds")]
    return sum(one for one in seconds if isinstance(one, int | float)) / 60


def searched(folder: Path) -> dict[str, Any]:
    """Of a finished search: minutes, share of the operations that learn nothing, what its last row has."""
    genotype, rows = cells.read_genotype(folder / "genotype.json"), _rows(folder)
    if not rows:
        raise UserError(f"{folder}/metrics.jsonl has no row of an epoch")
    last = rows[-1]
    kept = ("valid_acc", "child_valid_acc", "entropy_normal", "entropy_reduce")
    found = {"minutes": minutes_of(folder), "free": genotypes.free_share(genotype)}
    return found | {name: last[name] for name in kept if name in last}


def _tested(folder: Path) -> dict[str, Any]:
    """test.json, or nothing where it lacks what a report shows."""
    found = stored(folder / "test.json")
    try:
        good = math.isfinite(found["acc"]) and found["params"] >= 0 and found["flops"] >= 0
        classes = found["per_class_acc"]
        square = [[int(count) for count in row] for row in found["confusion"]]
        good = good and len(square) == len(classes) and all(len(row) == len(classes) for row in square)
        good = good and all(acc is None or math.isfinite(acc) for acc in classes.values())
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
    return found if good else {}


def options_of(folder: Path) -> dict[str, Any]:
    """What options.yaml says, or nothing where it is no such file."""
    try:
        found = yaml.safe_load((folder / "options.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def stored(path: Path) -> dict[str, Any]:
    """A JSON object, or nothing where the file is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


class Trained(NamedTuple):
    """A training of a search's child that was tested."""

    folder: Path
    opt: Mapping[str, Any]
    test: Mapping[str, Any]  # test.json
    minutes: float


def trained_of(search: Search) -> list[Trained]:
    """The tested trainings of this very genotype that name the search, the newest first."""
    found = []
    for folder in folders(search.folder.parent):
        opt, test = options_of(folder), _tested(folder)
        named = opt.get("genotype") == search.name and opt.get("network", "cells") == "cells"
        if named and test and test.get("genotype") == json.loads(search.genotype.to_json()):
            found.append(Trained(folder, opt, test, minutes_of(folder)))
    return sorted(found, key=lambda one: -(one.folder / "test.json").stat().st_mtime)


def comparison_of(search: Search) -> dict[str, Any]:
    """comparison.json of a comparison that this search is one of; nothing where there is none, or it is damaged."""
    for folder in folders(search.folder.parent):
        if search.name.startswith(f"{folder.name}_search_"):
            found = stored(folder / "comparison.json")
            with suppress(KeyError, TypeError, ValueError, AttributeError):
                its = {name: rows for name, rows in found["runs"].items() if rows}
                verdict = comparison.verdict(its, found["differences"], found.get("against_best_of"))
                accuracies = {comparison.NAMES[name]: [float(row["acc"]) for row in rows] for name, rows in its.items()}
                return {"table": comparison.table(its), "verdict": verdict, "accuracies": accuracies}
    return {}


def deployed(search: Search, wanted: Mapping[str, Any]) -> ConstraintOptions:
    """The options of a search with what is wanted of the deployed child instead of its own."""
    return replace(search.opt, **{name: value for name, value in wanted.items() if value is not None})
