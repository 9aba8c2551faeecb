from pathlib import Path

import pytest
import torch

from options import UserError
from training import checkpoint


def test_round_trip_and_the_epochs_of_a_folder(tmp_path: Path) -> None:
    content = {"epoch": 3, "tensor": torch.randn(4), "options": {"betas": [0.5, 0.9], "name": "x", "none": None}}
    for epoch in (10, 9):
        checkpoint.save(checkpoint.path_of(tmp_path, "weights", epoch), content)
    (tmp_path / "weights_epoch_x.pt").touch()
    assert checkpoint.epochs(tmp_path, "weights") == [9, 10] and checkpoint.epochs(tmp_path, "child") == []
    loaded = checkpoint.read(tmp_path / "weights_epoch_9.pt")
    assert torch.equal(loaded.pop("tensor"), content.pop("tensor"))
    assert loaded == {**content, "format": checkpoint.FORMAT}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "weights_epoch_1.pt"
    checkpoint.save(path, {"epoch": 1})
    with pytest.raises(AttributeError):
        checkpoint.save(path, {"epoch": lambda: 0})  # cannot be pickled
    assert checkpoint.read(path)["epoch"] == 1


def test_bad_files_are_one_line_errors(tmp_path: Path) -> None:
    path = tmp_path / "weights_epoch_1.pt"
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoint.read(path)
    checkpoint.save(path, {"tensor": torch.randn(1000)})
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"hello"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged") as error:
            checkpoint.read(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    torch.save({"something": 1}, path)
    with pytest.raises(UserError, match="not a checkpoint of this program"):
        checkpoint.read(path)
    torch.save({"format": 99}, path)
    with pytest.raises(UserError, match="format 99"):
        checkpoint.read(path)


def test_code_in_a_checkpoint_is_refused_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"format": checkpoint.FORMAT, "x": Evil()}, tmp_path / "weights_epoch_1.pt")
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        checkpoint.read(tmp_path / "weights_epoch_1.pt")
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_is_what_the_system_says_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that takes nothing, in place of the temporary file."""
    path = tmp_path / "weights_epoch_1.pt"
    checkpoint.save(path, {"a": 1})
    before = path.read_bytes()
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode="r", **how: real(Path("/dev/full"), mode, **how))
    with pytest.raises(OSError, match="No space left on device") as error:
        checkpoint.save(path, {"a": torch.zeros(100_000)})
    monkeypatch.undo()
    assert error.value.filename == str(path) and path.read_bytes() == before


def test_what_the_system_refuses_is_not_called_damage(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        checkpoint.read(tmp_path)
