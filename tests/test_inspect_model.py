import json
from pathlib import Path

import pytest

import inspect_model
import main
import main_constraint
from genotypes import Genotype, derive
from options import UserError


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    return [f"--experiments_dir={tmp_path}/experiments", f"--visualizations_dir={tmp_path}/visualizations"]


def test_it_works_from_the_checkpoint_alone(
    arguments: list[str], places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = main.main([*arguments, "--space=amoebanet", "--seed=5"])
    for name in ("options.yaml", "split.json", "metrics.jsonl", "genotype.json"):
        (found.folder / name).unlink()
    capsys.readouterr()
    seen = inspect_model.main([*places, "--experiment=run", "--epoch=last", "--visualize=True"])
    assert seen.genotype == found.genotype and seen.metrics == found.metrics and seen.epoch == 2
    assert [p.name for p in seen.files][1::2] == ["normal_epoch_2.png", "reduction_epoch_2.png"]
    printed = capsys.readouterr().out
    for words in (
        "epoch 2 of 2",
        "loss",
        "accuracy",
        "temperature 0.03",
        "entropy",
        "node 0",
        f"{seen.params:,} parameters",
    ):
        assert words in printed
    again = inspect_model.main([*places, "--experiment=run", "--visualize=False"])
    assert again.genotype == seen.genotype and again.files == []  # nothing is drawn at random


def test_the_genotype_is_that_of_the_stored_alphas(arguments: list[str], places: list[str]) -> None:
    from training import checkpoint

    found = main.main(arguments)
    state = checkpoint.load(found.folder / "weights_epoch_2.pt")["parts"]["network"]
    for rule in ("argmax", "top2"):
        seen = inspect_model.main([*places, "--experiment=run", f"--rule={rule}", "--visualize=False"])
        assert seen.genotype == derive(state["alpha_normal"], state["alpha_reduce"], rule=rule)
    assert Genotype.from_dict(json.loads((found.folder / "genotype.json").read_text())) == found.genotype


def test_missing_experiments_and_epochs_are_named(arguments: list[str], places: list[str]) -> None:
    with pytest.raises(UserError, match=r"run main.py first"):
        inspect_model.main([*places, "--experiment=run"])
    main.main(arguments)
    with pytest.raises(UserError, match="experiments with one: run"):
        inspect_model.main([*places, "--experiment=walk"])
    with pytest.raises(UserError, match="there are 2"):
        inspect_model.main([*places, "--experiment=run", "--epoch=7"])
    with pytest.raises(SystemExit):
        inspect_model.main([*places, "--epoch=first"])


def test_bad_input_is_refused_before_anything_is_printed(
    arguments: list[str], places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main.main(arguments)
    capsys.readouterr()
    for wrong in ("--epoch=\u00b2", f"--experiment={tmp_path}/experiments/run"):
        with pytest.raises(SystemExit):
            inspect_model.main([*places, wrong])
        assert len(capsys.readouterr().err.splitlines()) == 1
    (tmp_path / "taken").write_text("")
    for wrong, words in (
        (f"--out={tmp_path}/taken/g.json", "--out"),
        (f"--visualizations_dir={tmp_path}/taken", "--vis"),
    ):
        with pytest.raises(UserError, match=f"^{words}.*cannot be written"):
            inspect_model.main([*places, "--experiment=run", wrong])
        assert capsys.readouterr().out == ""


def test_a_cell_that_lets_nothing_through_is_told(
    arguments: list[str], places: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main_constraint.main([*arguments, "--eta=1000", "--arch_learning_rate=1", "--epochs=4"])
    words = "warning: the cell lets nothing of an image through"
    assert words in capsys.readouterr().out
    inspect_model.main([*places, "--experiment=run", "--visualize=False"])
    assert words in capsys.readouterr().out
