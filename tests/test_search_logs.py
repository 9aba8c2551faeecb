"""What a search leaves besides its metrics: alpha of every epoch, and what TensorBoard shows."""

from pathlib import Path

import torch

import main
import utils
from training import checkpoint


def test_alpha_of_every_epoch_is_kept(arguments: list[str]) -> None:
    found = main.main([*arguments, "--epochs=2"])
    rows = utils.read_metrics(found.folder / "alphas.jsonl")
    state = checkpoint.load(found.folder / "weights_epoch_2.pt")["parts"]["network"]
    assert [row["epoch"] for row in rows] == [1, 2]
    for kind in ("normal", "reduce"):
        assert torch.allclose(torch.tensor(rows[1][kind]), state[f"alpha_{kind}"], rtol=0, atol=1e-5)
        assert rows[0][kind] != rows[1][kind]


def test_tensorboard_has_probabilities_cells_and_options(arguments: list[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = main.main([*arguments, "--epochs=2"]).folder
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    assert {"p_normal", "p_reduce", "normal", "reduction"} <= {*tags["images"]}
    assert [event.step for event in events.Images("p_normal")] == [1, 2]
    assert "last/valid_acc" in tags["scalars"] and "_hparams_/experiment" in events.summary_metadata
    before = {*folder.iterdir()}
    main.main([*arguments, "--epochs=2", "--resume=True"])  # nothing is left to do
    assert {*folder.iterdir()} == before
    (last,) = folder.glob("events.*.end")
    last.unlink()  # as where the choice after the last epoch was interrupted
    main.main([*arguments, "--epochs=2", "--resume=True"])
    assert [*folder.glob("events.*.end")]


def test_what_tensorboard_cannot_hold_does_not_fail_a_search(arguments: list[str], tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "byte\udcff").symlink_to(tiny)
    assert main.main([*arguments, f"--dataset={tmp_path}/byte\udcff", "--epochs=1"]).genotype
