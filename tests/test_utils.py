import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

import utils
from options import UserError


def test_seeds_are_folded_from_everything_that_they_are_for() -> None:
    seeds = {utils.fold(seed, *labels) for seed in (0, 1) for labels in ((), ("z",), ("z", 1), ("z", 2), ("valid", 1))}
    assert len(seeds) == 10 and all(0 <= seed < 2**63 for seed in seeds)
    assert utils.fold(0, "z", 1) == utils.fold(0, "z", 1)


@pytest.mark.parametrize("name", ["cuda:99", "xpu", "hpu", "nonsense", "cuda:x", "meta", "xla", "privateuseone"])
def test_a_device_that_is_not_here_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match=rf"^--device {name} cannot be used here; try --device cpu$"):
        utils.pick_device(name)


def test_the_device_is_a_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert utils.pick_device("auto") == torch.device("cpu") == utils.pick_device("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert utils.pick_device("auto") == torch.device("cuda")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    utils.write_atomic(path, "old")
    with pytest.raises(TypeError):
        utils.write_atomic(path, 5)  # type: ignore[arg-type]
    assert path.read_text() == "old" and [*path.parent.iterdir()] == [path]
    writers = [threading.Thread(target=utils.write_atomic, args=(path, str(n) * 10_000)) for n in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len({*path.read_text()}) == 1 and [*path.parent.iterdir()] == [path]


def test_a_torn_last_line_is_left_out_with_a_warning_and_mended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"epoch": 1, "a": 0.5}, {"epoch": 2, "a": 0.25}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"epoch": 3, "a"')
    with pytest.warns(UserWarning, match="unfinished line"):
        assert utils.read_metrics(path) == rows
    with pytest.warns(UserWarning, match="unfinished line"):
        log = utils.MetricLog(tmp_path, 2)
    assert log.epoch == 2 and utils.read_metrics(path) == rows


def test_contenders_take_turns() -> None:
    order: list[str] = []
    seconds = utils.in_turns({name: lambda name=name: order.append(name) or float(len(order)) for name in "ab"}, 3)
    assert order == [*"ababab"] and seconds == {"a": [1, 3, 5], "b": [2, 4, 6]}
    calls: list[int] = []
    assert 0 <= utils.timed(lambda: calls.append(1), 5) < 1 and len(calls) == 5


def test_one_process_uses_one_device() -> None:
    with pytest.raises(UserError, match=r"a process uses one device; give one, such as cuda:0$"):
        utils.pick_device("cuda:0,1")


def test_what_a_killed_process_left_is_cleared_after_a_day(tmp_path: Path) -> None:
    old, new = tmp_path / ".file.77-abc.tmp", tmp_path / ".file.78-abc.tmp"
    for left in (old, new, tmp_path / ".other.77-abc.tmp"):
        left.write_text("half")
    os.utime(old, (0, 0))
    utils.write_atomic(tmp_path / "file", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".file.78-abc.tmp", ".other.77-abc.tmp", "file"]


def test_pictures_of_another_run_are_not_taken_over(tmp_path: Path) -> None:
    runs = [tmp_path / "one" / "run", tmp_path / "two" / "run"]
    for run in runs:
        run.mkdir(parents=True)
    place = tmp_path / "visualizations" / "run"
    utils.claim(place, runs[0], "visualizations_dir")
    utils.claim(place, runs[0], "visualizations_dir")
    with pytest.raises(UserError, match=r"has the pictures of .*one.run; give another --visualizations_dir"):
        utils.claim(place, runs[1], "visualizations_dir")
    shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}_copy")
    copy = tmp_path.parent / f"{tmp_path.name}_copy"
    utils.claim(copy / "visualizations" / "run", copy / "one" / "run", "visualizations_dir")
    runs[0].rename(tmp_path / "gone")
    utils.claim(place, runs[1], "visualizations_dir")


def test_pictures_do_not_go_among_the_files_of_their_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is for the run's own files; give another --visualizations_dir"):
        utils.claim(tmp_path / "one" / ".." / "run", tmp_path / "run", "visualizations_dir")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("line", ["[1]", "5", "{", "\udcff"])
def test_a_line_that_is_no_row_is_left_out(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"epoch": 1}\n' + line.encode(errors="surrogateescape") + b"\n")
    with pytest.warns(UserWarning, match="is left out"):
        assert utils.read_metrics(path) == [{"epoch": 1}]


def test_one_device_is_advised_by_its_name() -> None:
    with pytest.raises(UserError, match="give one, such as cuda:0"):
        utils.pick_device("0,1")
