"""A run that was ended at any moment and went on is the run that was not: metrics, weights, genotype, bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import main
import main_constraint
import retrain
from options import Interrupted
from training import checkpoint, loop, run, stopping

OWN = {
    "images_per_second",
    "epoch_seconds",
    "seconds",
    "name",
    "resume",
    "save_every_minutes",
    "experiments_dir",
}  # differ between runs
ROOT = Path(__file__).parents[2]
CASES: dict[str, tuple[ModuleType, list[str], str]] = {
    "plain": (main, ["--drop_path_prob=0.3"], "weights"),
    "dsnas": (main, ["--sampler=dsnas", "--warmup_epochs=1", "--select=3", "--finalists=1"], "weights"),
    "constrained": (main_constraint, ["--target_params=3000", "--arch_learning_rate=0.3"], "weights"),
    "retraining": (
        retrain,
        ["--schedule=onecycle", "--ema_decay=0.9", "--drop_path_prob=0.2", "--use_valid=False", "--tta=True"],
        "child",
    ),
}


def plain(value: Any) -> Any:
    """Containers without clocks and names, tensors as lists."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items() if key not in OWN}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def left(folder: Path, stem: str) -> dict[str, Any]:
    """All that a run left which has to be the same."""
    newest = checkpoint.newest(folder, stem)
    assert newest is not None and not checkpoint.within(folder, stem)
    found = {"log": [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]}
    found |= {"newest": newest.name, "kept": checkpoint.load(newest)}
    alphas = folder / "alphas.jsonl"
    found["alphas"] = alphas.read_text().splitlines() if alphas.exists() else None
    for name in ("genotype.json", "test.json", "selection.json", "split.json"):
        path = folder / name
        found[name] = json.loads(path.read_text()) if path.exists() else None
    return {key: plain(value) for key, value in found.items()}


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Those of a process in the foreground, also where the tests run in the background, which ignores SIGINT.

    Afterwards as before: a run that was told to stop leaves its own, since the process is about to end.
    """
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for one, handler in before.items():
        signal.signal(one, handler)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[ModuleType, list[str], str]:
    """A script, its command line but for the name, and the stem of its checkpoints."""
    script, more, stem = CASES[request.param]
    given = request.getfixturevalue("searched" if script is retrain else "arguments")
    return script, [*given, *more, "--epochs=3", "--save_freq=1"], stem


def ending(at: int, how: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """`how` is called in the `at`-th update."""
    update, count = loop.update, 0

    def counted(*args: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count == at:
            how()
        return update(*args, **more)

    monkeypatch.setattr(loop, "update", counted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_its_step_and_it_goes_on(
    case: tuple[ModuleType, list[str], str],
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    script, given, stem = case
    whole = script.main([*given, "--name=whole"]).folder
    with monkeypatch.context() as patched:
        ending(5, lambda: os.kill(os.getpid(), number), patched)
        with pytest.raises(Interrupted) as raised:
            script.main([*given, "--name=cut"])
    cut = whole.with_name("cut")
    kept = cut / f"{stem}_epoch_2_step_2.pt"  # the fifth of three steps an epoch
    assert raised.value.code == 128 + number and kept.exists()
    assert raised.value.__notes__ == [f"add --resume True to go on from {kept}"]
    assert "once more stops at once" in capfd.readouterr().err
    script.main([*given, "--name=cut", "--resume=True"])
    assert left(cut, stem) == left(whole, stem)


def test_a_run_saves_within_an_epoch_and_goes_on_from_there(
    case: tuple[ModuleType, list[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script, given, stem = case
    whole = script.main([*given, "--name=whole"]).folder

    def killed() -> None:
        raise MemoryError  # nothing is written any more

    for at in (2, 3, 5):  # of the updates of each start
        with monkeypatch.context() as patched:
            ending(at, killed, patched)
            with pytest.raises(Exception, match="out of memory"):
                script.main([*given, "--name=cut", "--save_every_minutes=1e-9", "--resume=True"])
        assert len(checkpoint.within(whole.with_name("cut"), stem)) <= 1
    script.main([*given, "--name=cut", "--save_every_minutes=1e-9", "--resume=True"])
    assert left(whole.with_name("cut"), stem) == left(whole, stem)


def test_a_run_that_is_told_to_stop_after_the_last_step_of_an_epoch_finishes_it(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = main.main([*arguments, "--name=whole"]).folder
    with monkeypatch.context() as patched:
        save = run.Run.save

        def told(self: Any, epoch: int, metrics: Any) -> None:
            if epoch == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            save(self, epoch, metrics)

        patched.setattr(run.Run, "save", told)
        with pytest.raises(Interrupted):
            main.main([*arguments, "--name=cut"])
    cut = whole.with_name("cut")
    assert checkpoint.epochs(cut, "weights") == [1] and len((cut / "metrics.jsonl").read_text().splitlines()) == 1
    main.main([*arguments, "--name=cut", "--resume=True"])
    assert left(cut, "weights") == left(whole, "weights")


def test_the_second_signal_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = stopping.Stop()
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def twice() -> None:
        with stop.watched():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # the same one, handed on
            assert stop.told
            monkeypatch.setattr(stopping, "_AGAIN", -1)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

    with pytest.raises(KeyboardInterrupt) as raised:
        twice()
    assert not isinstance(raised.value, Interrupted)
    with pytest.raises(Interrupted):
        stop.check()


def start(given: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "ignore", *given]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # where the tests run in the background it is ignored
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=heard)


def end(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """Exit code and what was written to standard error."""
    error = process.communicate()[1]
    return process.returncode, error.decode()


@pytest.mark.parametrize("script", ["main.py", "main_constraint.py", "retrain.py"])
def test_a_process_that_is_killed_at_random_moments_goes_on(
    script: str, searched: list[str], tmp_path: Path, moments: int
) -> None:
    """SIGKILL, SIGTERM and SIGINT by turns, at moments drawn between the first step and the end."""
    of_search = [*searched[:3], "--layers=3", "--init_channels=4", "--nodes=1", "--batch_size=4", "--crop_padding=1"]
    given = [script, *(searched if script == "retrain.py" else of_search), "--device=cpu", "--epochs=6"]
    given += ["--target_params=3000"] if script == "main_constraint.py" else []
    stem = "child" if script == "retrain.py" else "weights"
    begun = time.perf_counter()
    assert end(start([*given, "--name=whole"]))[0] == 0
    seconds, drawn = time.perf_counter() - begun, random.Random(script)
    cut, whole = tmp_path / "experiments" / "cut", left(tmp_path / "experiments" / "whole", stem)
    for number in range(moments):
        process = start([*given, "--name=cut", "--resume=True", "--save_every_minutes=0.0005"])
        moment = time.perf_counter() + drawn.uniform(0.3, 1.0) * seconds
        while process.poll() is None and time.perf_counter() < moment:
            time.sleep(0.01)
        how = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[number % 3]
        process.send_signal(how)
        code, error = end(process)
        assert code in (0, -how, 128 + how) and ("Traceback" not in error or how == signal.SIGINT), error
        if code == 0:  # it had ended before: from the start again
            assert left(cut, stem) == whole
            shutil.rmtree(cut)
    assert end(start([*given, "--name=cut", "--resume=True"]))[0] == 0
    assert left(cut, stem) == whole
