import json
from pathlib import Path

import pytest
import torch

import main
from loading import splits
from loading.splits import Stored
from options import UserError
from options.default_option import DataOptions

SPLIT = {"train": ["a/1_1", "b/1_2"], "valid": ["a/2_1", "b/2_2"], "test": ["a/3_1", "b/3_2"]}


def fit(stored: Stored, *names: str) -> tuple[dict[str, list[str]] | None, list[str]]:
    labels = torch.tensor([ord(name[0]) - ord("a") for name in names])
    return splits.fit_split(stored, list(names), labels, sorted({name[0] for name in names}))


def test_new_images_of_a_group_that_is_tested_on_are_not_trained_on() -> None:
    everything = [name for part in SPLIT.values() for name in part]
    grown = [*everything, "a/3_9", "a/1_9", "b/7_1"]
    split, notes = fit(Stored(SPLIT, r"(\d+)_"), *grown)
    assert split == SPLIT | {"train": ["a/1_1", "b/1_2", "a/1_9", "b/7_1"]} and "2 images" in notes[0]
    split, _ = fit(Stored(SPLIT, None), *grown)
    assert split is not None and split["train"][2:] == ["a/3_9", "a/1_9", "b/7_1"]
    assert fit(Stored(SPLIT, None), *everything) == (SPLIT, [])


def test_other_images_and_other_classes_are_other_data() -> None:
    everything = [name for part in SPLIT.values() for name in part]
    for names in (["a/x", "b/y"], everything[:4], [*everything, "c/1"]):
        split, notes = fit(Stored(SPLIT, None), *names)
        assert split is None and "this is other data" in notes[0], names


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"test": ["a/1_1"]}, "1 images are in it more than once, e.g. a/1_1"),
        ({"train": ["a/1_1", "a/1_1"]}, "more than once"),
        ({"valid": []}, "its list valid is empty"),
        ({"test": None}, "is no split.json"),
    ],
)
def test_what_is_no_partition_is_refused(changed: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    path.write_text(json.dumps(SPLIT | changed))
    with pytest.raises(UserError, match=message):
        splits.read_split(path)


def test_a_search_takes_a_split_of_ones_own(arguments: list[str], tiny: Path, tmp_path: Path) -> None:
    names = sorted(str(path.relative_to(tiny)) for path in tiny.rglob("*.png"))
    mine = {"train": names[::3], "valid": names[1::3], "test": names[2::3]}
    (tmp_path / "mine.json").write_text(json.dumps(mine))
    found = main.main([*arguments, f"--split={tmp_path}/mine.json"])
    stored = json.loads((found.folder / "split.json").read_text())
    assert {part: stored[part] for part in mine} == mine


@pytest.mark.parametrize("scenes", [3, 4, 5])
def test_a_few_scenes_are_divided_as_well_as_they_can(scenes: int) -> None:
    names = [f"{c}/{scene}_{n}.png" for c in "ab" for scene in range(scenes) for n in range(6)]
    labels = torch.tensor([0 if name[0] == "a" else 1 for name in names])
    opt = DataOptions(group_pattern=r"^(\d+)_", train_portion=0.7)
    split = splits.make_split(names, labels, ["a", "b"], opt)
    groups = [{name.split("/")[1][0] for name in split[part]} for part in splits.SPLITS]
    assert all(groups) and sum(map(len, groups)) == scenes


def test_what_cannot_be_split_says_what_there_is() -> None:
    names = [f"{c}/{scene}_{n}.png" for c in "ab" for scene in range(2) for n in range(6)]
    labels = torch.tensor([0 if name[0] == "a" else 1 for name in names])
    with pytest.raises(UserError, match="there are 2 groups"):
        splits.make_split(names, labels, ["a", "b"], DataOptions(group_pattern=r"^(\d+)_"))
    labels[:-1], labels[-1] = 0, 1
    with pytest.raises(UserError, match=r"the smallest class, 'rare', has 1 images there"):
        splits.make_split(names, labels, ["common", "rare"], DataOptions())
