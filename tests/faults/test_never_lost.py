"""Nothing that was finished is lost: by another run, a full disk, or data that vanish."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_moments import ending, left

import main
import main_constraint
import retrain
from options import UserError
from training import checkpoint, run

SMALL = [
    "--layers=3",
    "--init_channels=4",
    "--nodes=1",
    "--batch_size=4",
    "--crop_padding=1",
    "--epochs=2",
    "--device=cpu",
]


def test_a_run_is_overwritten_when_that_is_said_and_begins_anew(arguments: list[str]) -> None:
    fresh = left(main.main([*arguments, "--name=fresh"]).folder, "weights")
    folder = main.main([*arguments, "--epochs=3", "--save_freq=1", "--select=2", "--finalists=0"]).folder
    events = {path.name for path in folder.glob("events*")}
    (folder / "child.onnx").write_text("")
    assert left(main.main([*arguments, "--overwrite=True"]).folder, "weights") == fresh
    assert not (folder / "child.onnx").exists() and not events & {path.name for path in folder.iterdir()}
    stored = yaml.safe_load((folder / "options.yaml").read_text())
    assert stored["overwrite"] is False and checkpoint.load(folder / "weights_epoch_2.pt")["options"] == stored
    with pytest.raises(UserError, match="--resume True to go on, or --overwrite True to lose it"):
        main.main([f"--config={folder}/options.yaml"])


def test_overwriting_removes_runs_of_its_own_script_alone(searched: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "experiments" / "run"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    with pytest.raises(UserError, match="is of another script"):
        retrain.main([*searched, "--name=run", "--overwrite=True"])
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"has thesis\.txt, which no run leaves"):
        main.main([*searched[:3], "--name=run", "--overwrite=True", "--device=cpu"])
    (folder / "thesis.txt").unlink()
    with pytest.raises(UserError, match="no such folder"):
        main.main([*searched[1:3], "--dataset=nowhere/", "--name=run", "--overwrite=True"])
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"} == before
    with pytest.raises(SystemExit):
        main.main([*searched[:3], "--resume=True", "--overwrite=True"])


@pytest.mark.parametrize("bad", ["--target_params=1", "--genotype=nobody", "--auxiliary=True"])
def test_what_cannot_begin_takes_nothing_away(bad: str, searched: list[str]) -> None:
    bounded = [*searched[:3], *SMALL, "--name=again", "--target_params=3000"]
    script, given = (main_constraint, bounded) if "params" in bad else (retrain, searched)
    folder = script.main(given).folder

    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in (".lock", ".writer")}

    before = content()
    with pytest.raises(UserError):
        script.main([*given, bad, "--overwrite=True"])
    assert content() == before
    if script is retrain:  # a child of the cell that is in its own folder
        assert retrain.main([*given, "--genotype=again", "--overwrite=True"]).folder == folder


@pytest.mark.parametrize("left", ["child_epoch_1_step_5.pt", "teacher_epoch_5.pt", "child.data/", "child_notes.py"])
def test_files_of_others_are_not_taken_for_those_of_a_run(left: str, arguments: list[str]) -> None:
    folder = main.main(arguments).folder
    (folder / left).mkdir() if left.endswith("/") else (folder / left).write_text("mine")
    with pytest.raises(UserError, match=r"which no run leaves|is of another script"):
        main.main([*arguments, "--overwrite=True"])
    assert (folder / left).exists() and (folder / "genotype.json").exists()


def test_a_search_with_a_budget_and_one_without_do_not_overwrite_each_other(arguments: list[str]) -> None:
    main.main(arguments)
    main_constraint.main([*arguments, "--name=bounded", "--target_params=3000"])
    with pytest.raises(UserError, match="is of another script"):
        main_constraint.main([*arguments, "--target_params=3000", "--overwrite=True"])
    with pytest.raises(UserError, match="is of another script"):
        main.main([*arguments, "--name=bounded", "--overwrite=True"])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    place = tmp_path / "experiments"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root alone")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_becomes_full_leaves_the_last_good_epoch_and_room_is_all_it_takes(
    arguments: list[str], small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [*arguments, "--epochs=3"]
    elsewhere = [f"--experiments_dir={tmp_path}/elsewhere", "--name=whole"]
    whole = left(main.main([*given, *elsewhere]).folder, "weights")
    filler, save = small_disk / "filler", run.Run.save

    def fill() -> None:
        with suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(512))
                file.flush()

    def full(self: Any, epoch: int, metrics: Any) -> None:
        if epoch == 2:
            fill()
        save(self, epoch, metrics)

    for before, kept in (("save", "weights_epoch_1.pt"), ("step", "weights_epoch_2.pt")):  # in the next epoch
        with monkeypatch.context() as patched:
            if before == "save":
                patched.setattr(run.Run, "save", full)
            else:
                ending(5, fill, patched)  # after the second epoch, which goes on from the first
            with pytest.raises(UserError, match=rf"No space left on device; last good checkpoint: \S*{kept}"):
                main.main([*given, "--resume=True"])
        checkpoint.load(small_disk / "run" / kept)
        filler.unlink()
    main.main([*given, "--resume=True"])
    assert left(small_disk / "run", "weights") == whole


def test_data_that_vanish_in_an_epoch_are_missed_at_the_next_start_alone(
    arguments: list[str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny, data)
    given = [*arguments[1:], f"--dataset={data}"]
    with monkeypatch.context() as patched:
        ending(2, lambda: shutil.rmtree(data), patched)
        folder = main.main(given).folder
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="no such folder"):
        main.main([*given, "--resume=True"])
    assert (folder / "metrics.jsonl").read_bytes() == before and json.loads((folder / "split.json").read_text())
