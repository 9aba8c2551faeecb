import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import export_model
import main
import options
import retrain
from options import UserError
from options.default_option import TrainOptions
from training import opening as runs

ROOT = Path(__file__).parents[2]


def wait_for(path: Path) -> None:
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} did not appear")


def test_a_second_start_is_refused_with_the_first_ones_name_and_writes_nothing(
    arguments: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "experiments" / "run"
    command = [sys.executable, "main.py", *arguments, "--epochs=1000"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(folder / "split.json")
            before = {name: (folder / name).read_bytes() for name in ("options.yaml", "split.json")}
            name = re.escape(f"process {process.pid} on {platform.node()}")
            with (
                pytest.raises(UserError, match=rf"is being written by {name}; .*--name"),
                runs.one_writer(folder, "give another --name"),
            ):
                pass
            started = subprocess.run([*command, "--seed=1"], cwd=ROOT, capture_output=True, text=True)
            assert started.returncode == 2 and started.stderr.count("\n") == 1, started.stderr
            assert {name: (folder / name).read_bytes() for name in before} == before
            wait_for(folder / "metrics.jsonl")
        finally:
            os.kill(process.pid, signal.SIGKILL)
    with runs.one_writer(folder, "give another --name"):  # the lock died with its process
        assert f"process {os.getpid()}" in (folder / ".writer").read_text()
    assert not (folder / ".writer").exists()


def test_a_run_that_was_made_while_the_data_was_read_is_not_written_over(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opt = options.parse(TrainOptions, arguments, "main.py", "")
    real = runs.Data

    def slow(*given: object) -> object:
        monkeypatch.setattr(runs, "Data", real)
        main.main(arguments)
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(runs, "Data", slow)
    with pytest.raises(UserError, match="exists"), runs.open_run(opt, "weights"):
        pass


def test_every_script_that_writes_into_a_run_holds_it(searched: list[str], tmp_path: Path) -> None:
    retrain.main(searched)
    experiments = tmp_path / "experiments"
    with runs.one_writer(experiments / "again", "wait"):
        with pytest.raises(UserError, match="is being written by"):
            retrain.main([*searched, "--resume=True"])
        with pytest.raises(UserError, match=r"is being written by .*--out"):  # it has no --name
            export_model.main(["--checkpoint=again", f"--experiments_dir={experiments}", "--format=pt2"])
    assert not (experiments / "again" / "child.pt2").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"cannot be written: Not a directory"),
        runs.one_writer(tmp_path / "file" / "a", "wait"),
    ):
        pass
