import json
import re
import shutil
from pathlib import Path

import pytest
from pictures import write_images
from PIL import Image

import main
import options
import retrain
import utils
from child import testing
from loading import records
from loading.batches import Data
from options import UserError
from options.child_option import ChildOptions

CLOCK = {"images_per_second", "epoch_seconds"}


def genotype_call(found: testing.Tested) -> str:
    assert found.genotype is not None
    cell = found.genotype.to_dict()
    del cell["space"]
    return f"Genotype({', '.join(f'{name}={value!r}' for name, value in cell.items())})"


def test_the_test_images_are_those_the_search_held_out(searched: list[str], tmp_path: Path) -> None:
    tested = retrain.main([*searched, "--seed=9"])
    search_split = json.loads((tmp_path / "experiments" / "run" / "split.json").read_text())
    child_split = json.loads((tested.folder / "split.json").read_text())
    assert all(child_split[part] == search_split[part] for part in ("train", "valid", "test"))
    assert tested.figures["train_images"] == len(search_split["train"]) + len(search_split["valid"])
    only = retrain.main([*searched, "--use_valid=False", "--name=only"])
    assert only.figures["train_images"] == len(search_split["train"])
    assert all("valid_balanced_acc" in row for row in utils.read_metrics(only.folder / "metrics.jsonl"))


def test_training_never_looks_at_the_test_split(searched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    batches = Data.batches
    monkeypatch.setattr(Data, "batches", lambda self, split, *rest: asked.append(split) or batches(self, split, *rest))
    retrain.main([*searched, "--use_valid=False"])
    assert asked == ["valid"] * 3 + ["test"]


def test_a_cell_carries_over_to_other_data(
    searched: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_images(tmp_path / "four", classes=4, mode="L")
    capsys.readouterr()
    tested = retrain.main([*searched, f"--dataset={other}"])
    printed = capsys.readouterr().out
    assert "note:    12 images that the split does not name are split anew, e.g. class3/" in printed
    split = json.loads((tested.folder / "split.json").read_text())
    assert sum(len(split[part]) for part in ("train", "valid", "test")) == 48
    assert tested.figures["test_images"] == len(split["test"]) and len(tested.figures["per_class_acc"]) == 4
    with pytest.raises(UserError, match="of other classes"):  # weights do not
        retrain.main([*searched, f"--dataset={other}", "--init_from=run", "--eval_only=True"])


def test_new_images_join_the_training_split_and_gone_ones_are_told(
    searched: list[str], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = json.loads((tmp_path / "experiments" / "run" / "split.json").read_text())
    grown = tmp_path / "grown"
    shutil.copytree(tiny, grown)
    for label in range(3):
        shutil.copy(grown / f"class{label}" / "0_0.png", grown / f"class{label}" / "9_new.png")
    (grown / search["test"][0]).unlink()
    capsys.readouterr()
    tested = retrain.main([*searched, f"--dataset={grown}"])
    printed = capsys.readouterr().out
    assert f"note:    1 of the 36 images of the split are gone, e.g. {search['test'][0]}" in printed
    assert "note:    3 images that the split does not name are trained on, e.g. class0/9_new.png" in printed
    split = json.loads((tested.folder / "split.json").read_text())
    assert split["test"] == search["test"][1:] and split["valid"] == search["valid"]
    assert split["train"] == [*search["train"], *(f"class{label}/9_new.png" for label in range(3))]
    capsys.readouterr()
    (grown / "class0" / "later.png").write_bytes((grown / "class0" / "9_new.png").read_bytes())
    retrain.main([*searched, f"--dataset={grown}", "--resume=True"])
    assert "note:    1 images here are not in the split, and left out" in capsys.readouterr().out


def test_the_groups_of_a_search_stay_whole_from_hand_to_hand(searched: list[str], tiny: Path, tmp_path: Path) -> None:
    """Search with a pattern, retrain, retrain that one's cell on more images: no scene is in two splits."""
    first = tmp_path / "first"
    shutil.copytree(tiny, first, ignore=shutil.ignore_patterns("*_3.png"))
    places = [option for option in searched if option.startswith(("--experiments", "--visual"))]
    search = ["--image_size=8", "--init_channels=2", "--layers=3", "--nodes=1", "--epochs=1", "--batch_size=4"]
    main.main([*places, *search, "--name=scenes", f"--dataset={first}", r"--group_pattern=^(\d+)_", "--crop_padding=1"])
    own = tmp_path / "experiments" / "scenes" / "split.json"
    retrain.main([*searched, "--genotype=scenes", f"--dataset={first}", "--name=one", "--epochs=1"])
    main.main([*places, *search, "--name=second", f"--dataset={first}", f"--split={own}", "--crop_padding=1"])
    for genotype in ("one", "second"):
        found = retrain.main([*searched, f"--genotype={genotype}", f"--name=of_{genotype}", "--epochs=1"])
        split = json.loads((found.folder / "split.json").read_text())
        scenes = [{Path(name).name.split("_")[0] for name in split[part]} for part in ("train", "valid", "test")]
        assert (
            not scenes[0] & scenes[2] and not scenes[1] & scenes[2] and sum(len(split[p]) for p in records.SPLITS) >= 30
        )


def test_a_split_may_be_made_anew(searched: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """It is said that the search has seen its test images; with the search's weights it is refused."""
    anew = [*searched, "--split=new", "--seed=7", "--test_portion=0.5"]
    found = retrain.main(anew)
    assert re.search(
        r"\d+ of the 18 test images were trained or validated on by the search of run", capsys.readouterr().out
    )
    assert found.figures["test_images"] == 18
    with pytest.raises(UserError, match="by the search of run, whose weights are taken; leave out --init_from"):
        retrain.main([*anew, "--init_from=run", "--name=weights"])


def test_options_that_a_given_split_makes_idle_are_told(
    searched: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    retrain.main([*searched, "--test_portion=0.5", "--group_pattern=^zzz", "--epochs=1"])
    assert "without regard to --test_portion, --group_pattern" in capsys.readouterr().out


def test_a_search_whose_split_is_unknown_is_told(
    searched: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "experiments" / "run"
    kept = json.loads((run / "split.json").read_text())
    (run / "split.json").unlink()
    found = retrain.main([*searched, "--epochs=1"])  # its checkpoint has it
    assert json.loads((found.folder / "split.json").read_text())["test"] == kept["test"]
    away = shutil.copy(run / "weights_epoch_2.pt", tmp_path / "away.pt")
    found = retrain.main([*searched, f"--genotype={away}", "--name=pt", "--epochs=1"])
    assert json.loads((found.folder / "split.json").read_text())["test"] == kept["test"]
    assert "no split of the search" not in capsys.readouterr().out
    (run / "weights_epoch_2.pt").unlink()
    retrain.main([*searched, "--name=lost", "--epochs=1"])
    assert "no split of the search of run is here" in capsys.readouterr().out


def test_images_with_other_pixels_than_the_search_saw_are_told(
    searched: list[str], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = retrain.main([*searched])
    swapped = tmp_path / "swapped"
    shutil.copytree(tiny, swapped)
    tested = json.loads((trained.folder / "split.json").read_text())["test"]
    (swapped / tested[0]).write_bytes((tiny / tested[1]).read_bytes())
    capsys.readouterr()
    words = "the test images have other pixels than the split was made for"
    for more in (["--name=other"], ["--eval_only=True"], ["--resume=True"]):
        retrain.main([*searched, f"--dataset={swapped}", *more])
        assert words in capsys.readouterr().out, more
    retrain.main([*searched, "--resume=True"])
    assert words not in capsys.readouterr().out


def test_the_split_goes_with_a_genotype_given_as_a_file(
    searched: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "experiments"
    retrain.main([*searched, f"--genotype={folder}/run/genotype.json", "--seed=4"])
    both = [json.loads((folder / name / "split.json").read_text()) for name in ("run", "again")]
    assert both[0]["test"] == both[1]["test"]
    shutil.copy(folder / "run" / "genotype.json", tmp_path / "copied.json")
    capsys.readouterr()
    retrain.main([*searched, f"--genotype={tmp_path}/copied.json", "--name=copy", "--epochs=1"])
    assert f"no split of the search of {tmp_path}/copied.json is here" in capsys.readouterr().out


def test_test_images_that_a_search_used_are_refused(searched: list[str], arguments: list[str], tmp_path: Path) -> None:
    main.main([*arguments, "--name=other", "--seed=1"])
    other = tmp_path / "experiments" / "other" / "split.json"
    for extra in (["--init_from=other"], [f"--split={other}"]):
        with pytest.raises(UserError, match="were trained or validated on"):
            retrain.main([*searched, *extra])


def test_other_labelled_images_are_tested_as_the_network_was_trained(
    searched: list[str], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without repeating the options of the training; means and deviations are those of the checkpoint."""
    tested = retrain.main([*searched, "--image_size=7"])
    split = json.loads((tested.folder / "split.json").read_text())
    other = tmp_path / "other"
    for name in split["test"]:
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny / name, other / name)
    where = ["--eval_only=True", "--name=again", searched[1], f"--test_folder={other}"]
    again = retrain.main(where)
    assert again.figures["loss"] == pytest.approx(tested.figures["loss"], rel=1e-6)
    assert again.figures["confusion"] == tested.figures["confusion"]
    shutil.rmtree(other / "class1")  # a class without images
    assert retrain.main(where).figures["per_class_acc"]["class1"] is None
    (other / "class9").mkdir()
    shutil.copy(tiny / split["test"][0], other / "class9" / "x.png")
    with pytest.raises(UserError, match="know no class 'class9'"):
        retrain.main(where)
    with pytest.raises(SystemExit):
        options.parse(ChildOptions, [f"--test_folder={other}"], "", "")
    with pytest.raises(UserError, match="--layers is 4 but the run"):  # not silently another network's figures
        retrain.main([*where, "--layers=4"])
    shutil.rmtree(other / "class9")
    for label in (0, 2):  # one class alone, of other sizes: brought to that of the training
        image = Image.open(tiny / "class0" / "0_0.png").resize((20 + label, 20))
        image.save(next((other / "class0").iterdir()).with_name(f"large{label}.png"))
    shutil.rmtree(other / "class2")
    (other / "class1").mkdir()
    assert retrain.main(where).figures["per_class_acc"]["class2"] is None
    capsys.readouterr()
    retrain.main([*where[:3], f"--test_folder={tiny}"])
    assert "28 of these 36 images have the names of training images" in capsys.readouterr().out
    grey = write_images(tmp_path / "grey", mode="L")
    assert retrain.main([*where[:3], f"--test_folder={grey}"]).figures["test_images"] == 36  # as three channels


def test_a_folder_called_like_the_search_hides_no_split(
    searched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    found = retrain.main([*searched, "--epochs=1"])
    run = tmp_path / "experiments" / "run"
    wanted = json.loads((run / "split.json").read_text())["test"]
    assert json.loads((found.folder / "split.json").read_text())["test"] == wanted
    (run / "cells.py").write_text(f"A = {genotype_call(found)}\nB = {genotype_call(found)}\n")
    named = retrain.main([*searched, f"--genotype={run}/cells.py:A", "--name=named", "--epochs=1"])
    assert json.loads((named.folder / "split.json").read_text())["test"] == wanted
    assert "no split of the search" not in capsys.readouterr().out


def test_classes_that_differ_in_capitals_alone_are_told_apart(searched: list[str], tiny: Path, tmp_path: Path) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    for number, name in enumerate(("Owl", "dog", "owl")):
        shutil.copytree(tiny / f"class{number}", data / name)
    trained = retrain.main([*searched, f"--dataset={data}", "--genotype=SNAS_mild"])
    test = json.loads((trained.folder / "split.json").read_text())["test"]
    (other / "Owl").mkdir(parents=True)
    for name in test:
        if name.startswith("Owl"):
            shutil.copy(data / name, other / name)
    where = [searched[1], "--name=again", "--eval_only=True", f"--test_folder={other}"]
    assert retrain.main(where).figures["acc"] == pytest.approx(trained.figures["per_class_acc"]["Owl"])
    (other / "Owl").rename(other / "OWL")
    with pytest.raises(UserError, match="know no class 'OWL'"):
        retrain.main(where)
