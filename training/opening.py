"""How a run begins or goes on: who may write its folder, which checkpoint, which options may differ."""

import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

import options
import utils
from loading.batches import Data, write_split
from loading.records import Given
from options import UserError
from options.default_option import RunOptions
from training import checkpoint, distributed
from training.distributed import World
from training.run import Options, Run

# Options that may change when a run is resumed: what is computed stays the same function of the same images.
FREE = {
    "name",  # the folder may have been renamed
    "resume",
    "overwrite",
    "eval_only",
    "test_folder",
    "save_freq",
    "save_every_minutes",
    "on_nonfinite",  # without such a step both are the same
    "report_freq",
    "experiments_dir",
    "visualizations_dir",
    "download",
    "data_dir",
    "dataset",  # the images may have moved: names, counts, size, mean and std are compared, other pixels told
    "device",
    "recompute",
    "max_ram_gb",
    "cache_dir",
    "max_cache_gb",
}
# What a start that never reached a checkpoint leaves behind; it may be written over
_LEFTOVERS = (
    "options.yaml",
    "split.json",
    "metrics.jsonl",
    "alphas.jsonl",
    "events.out.tfevents.*",
    ".*.tmp",
    ".lock",
    ".writer",
)
# What runs leave besides, and what is made of them: --overwrite removes it, and nothing else
_RESULTS = re.compile(
    r"(weights|child)_epoch_\d+(_step_\d+)?\.pt|(genotype|selection|test)\.json|guesses\.csv|(metrics|alphas)\.jsonl|"
    r"events\.out\.tfevents\..*|child(_fp16|_int8)?(\.(onnx|pt2)(\.md|\.json)?|_(onnx|pt2)\.py)"
)


@contextmanager
def one_writer(folder: Path, instead: str) -> Iterator[None]:
    """Holds a folder for this process. The lock ends with the process, however that ends.

    Args:
        instead: what to try where another process holds it, in words.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    holder, lock = folder / ".writer", FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        who = holder.read_text(encoding="utf-8") if holder.exists() else "another process"
        raise UserError(f"{folder} is being written by {who}; wait for it, or {instead}") from None
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None
    try:
        with suppress(OSError):  # a full disk: only the name is lacking then
            holder.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


@contextmanager
def open_run(
    opt: Options, stem: str, given: Callable[[], Given] = Given, train_on_valid: bool = False
) -> Iterator[Run[Options]]:
    """Check the name, read the data, hold the folder, create it or find the checkpoint to resume from.

    Args:
        opt: the options.
        stem: checkpoints are STEM_epoch_N.pt.
        given: gives the split of a run that begins; the others have that of their checkpoint.
        train_on_valid: train on the validation split too.
    Raises:
        UserError: the experiment exists or another process writes it, its options differ, or the data cannot be used.
    """
    with (
        utils.no_denormals(),
        distributed.joined(opt.device) as (world, device),
        _opened(opt, stem, given, train_on_valid, world, device) as run,
    ):
        yield run


@contextmanager
def _opened(
    opt: Options, stem: str, given: Callable[[], Given], train_on_valid: bool, world: World, device: torch.device
) -> Iterator[Run[Options]]:
    folder = Path(opt.experiments_dir) / opt.name
    newest = checkpoint.latest(folder, stem) if opt.resume else None
    if newest is None:
        _check_free(folder, opt, stem)
    loaded = checkpoint.load(newest) if newest else None
    if loaded:
        check_same_options(opt, loaded["options"], folder)
        data = Data(opt, loaded["split"], train_on_valid)
        if not _same_data(data.info.to_dict(), loaded["data"]):
            raise UserError(
                f"--dataset {opt.dataset} does not hold the images of the run in {folder}; use a new --name"
            )
    else:
        split, carry = given()
        data = Data(opt, split, train_on_valid, carry)
    distributed.check(world, opt.batch_size, sum(data.info.counts["train"]))
    stands = (newest and newest.name, loaded and loaded["epoch"], data.info, sorted(data.stored.pixels.items()))
    distributed.same(world, stands, "the same checkpoint or the same images")
    with one_writer(folder, "give another --name") if world.first else nullcontext():
        if newest is None and world.first:
            _check_free(folder, opt, stem)  # again: reading the data took its time
        if world.first and (checkpoint.latest(folder, stem) if opt.resume else None) != newest:
            raise UserError(f"{folder} was written while the data was read; start again")
        overwrite, opt = opt.overwrite, replace(opt, overwrite=False)  # options.yaml does not ask again
        before = options.heads(folder / "options.yaml") if loaded else []
        where = before[1] if len(before) > 1 else utils.hardware(device)  # it began on
        begin = partial(_begin, folder, opt, data, overwrite, where)
        epoch = loaded["epoch"] if loaded else 0
        run = Run(opt, stem, folder, device, data, epoch, loaded, world=world, begin=begin)
        try:
            yield run
        except KeyboardInterrupt as interrupt:
            kept = checkpoint.latest(folder, stem)
            instead = "give --resume True instead of --overwrite True" if overwrite else "add --resume True"
            interrupt.add_note(f"{instead} to go on from {kept}" if kept else "nothing was finished yet")
            raise
        except BrokenPipeError:  # who read what is printed has gone
            raise
        except OSError as error:
            raise UserError(f"{options.in_words(error)}; last good checkpoint: {run.last_good()}") from None
        except (MemoryError, RuntimeError) as error:
            if world.size > 1 and distributed.lost(error):
                words = "another process of this run has ended, see what it says"
                raise UserError(f"{words}; last good checkpoint: {run.last_good()}") from None
            if not options.out_of_memory(error):
                raise
            less = "--batch_size, --eval_batch_size, --init_channels or --layers"
            raise UserError(
                f"out of memory; take less of {less}{' or --recompute True' if hasattr(opt, 'recompute') else ''}; "
                f"last good checkpoint: {run.last_good()}"
            ) from None


def _begin(folder: Path, opt: RunOptions, data: Data, overwrite: bool, where: str) -> None:
    """Write what a run says of itself before its first step; remove an earlier one that it is to take the place of."""
    for path in [*folder.iterdir()] if overwrite else []:
        if path.is_file() and _RESULTS.fullmatch(path.name):
            path.unlink()
    utils.clear(folder, ".*.tmp")  # of a process that was killed while it wrote
    command = shlex.join(["python", Path(sys.argv[0]).name, "--config", str(folder / "options.yaml")])
    options.save(opt, folder / "options.yaml", f"{command}\n# {where}")
    write_split(folder / "split.json", data, opt)


def _same_data(now: Mapping[str, Any], then: Mapping[str, Any]) -> bool:
    """Whether both are of the same images; the last digit of mean and deviation may differ between machines."""
    white = now["white"] | {kind: value for kind, value in then.get("white", {}).items() if kind in now["white"]}
    both = [dict(info) for info in (now, {**then, "white": white})]  # earlier runs have none, or of all kinds
    numbers = [[*info.pop("mean"), *info.pop("std")] for info in both]
    return both[0] == both[1] and all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(*numbers, strict=True))


def _check_free(folder: Path, opt: RunOptions, stem: str) -> None:
    """Refuse a folder that holds more than a start which never finished an epoch, or that may not be overwritten."""
    if any(path.exists() and not path.is_dir() for path in (folder, folder.parent)):
        raise UserError(f"{folder} cannot be made: a file is in the way; change --name or --experiments_dir")
    if not folder.exists():
        return
    kept = {p.name for p in folder.iterdir()} - {p.name for pattern in _LEFTOVERS for p in folder.glob(pattern)}
    metrics = folder / "metrics.jsonl"
    if opt.overwrite:
        strange = [name for name in kept if not _RESULTS.fullmatch(name) or not (folder / name).is_file()]
        if strange or not _own(folder, opt, stem):
            what = f"has {min(strange)}, which no run leaves" if strange else "is of another script"
            raise UserError(f"--overwrite True: {folder} {what}; give another --name, or remove it yourself")
    elif kept or (metrics.exists() and metrics.stat().st_size):
        other = "it has no checkpoint of this script to go on from" if opt.resume else "or --resume True to go on"
        raise UserError(f"{folder} exists; give another --name, {other}, or --overwrite True to lose it")


def _own(folder: Path, opt: RunOptions, stem: str) -> bool:
    """Whether the run in a folder is of the script of these options, as far as it is known."""
    others = [other for other in ("weights", "child") if other != stem]
    if any(checkpoint.latest(folder, other) for other in others):
        return False
    try:
        stored = yaml.safe_load((folder / "options.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return True
    marks = ("genotype", "sampler", "eta")  # of retrain.py, of searches, of main_constraint.py
    return isinstance(stored, dict) and all((mark in stored) == hasattr(opt, mark) for mark in marks)


def check_same_options(opt: RunOptions, stored: Mapping[str, Any], folder: Path, advice: str = "") -> None:
    """Refuse options that differ from those of the run in the folder, but for FREE ones; raises UserError."""
    again = f"--config {folder}/options.yaml --name {folder.name} --resume True"
    advice = advice or f"a resumed run keeps its options; use {again}, or a new --name"
    now = options.to_dict(opt)
    earlier = options.to_dict(type(opt)()) | dict(stored)  # what is newer than the run had its default
    changed = [name for name in now if name not in FREE and now[name] != earlier[name]]
    if changed:
        name = changed[0]
        raise UserError(f"--{name} is {now[name]} but the run in {folder} has {earlier[name]}: {advice}")


def finished(opt: RunOptions, leaves: str) -> bool:
    """Whether a run of these options lies in its folder and has ended; raises UserError if it is of others.

    Args:
        opt: the options. leaves: the file that only a finished run has.
    """
    folder = Path(opt.experiments_dir) / opt.name
    if not (folder / leaves).exists():
        return False
    try:
        stored = dict(yaml.safe_load((folder / "options.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        raise UserError(f"{folder}/options.yaml does not say what the run was; use a new --name") from None
    check_same_options(opt, stored, folder)
    if Path(stored["dataset"]).resolve() != Path(opt.dataset).resolve():
        raise UserError(f"the run in {folder} is of the images in {stored['dataset']}; use a new --name")
    return True
