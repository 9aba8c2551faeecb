import json
from pathlib import Path

import pytest
import torch

import main
from loading import records, splits
from loading.records import Stored
from options import UserError
from options.default_option import DataOptions

SPLIT = {"train": ["a/1_1", "b/1_2"], "valid": ["a/2_1", "b/2_2"], "test": ["a/3_1", "b/3_2"]}


def fit(stored: Stored, *names: str) -> tuple[dict[str, list[str]] | None, list[str]]:
    labels = torch.tensor([ord(name[0]) - ord("a") for name in names])
    return splits.fit_split(stored, list(names), labels, sorted({name[0] for name in names}), DataOptions())


def test_new_images_of_a_group_that_is_tested_on_are_not_trained_on() -> None:
    everything = [name for part in SPLIT.values() for name in part]
    grown = [*everything, "a/3_9", "a/1_9", "b/7_1"]
    split, notes = fit(Stored(SPLIT, r"(\d+)_"), *grown)
    assert split == SPLIT | {"train": ["a/1_1", "b/1_2", "a/1_9", "b/7_1"]} and "2 images" in notes[0]
    split, _ = fit(Stored(SPLIT, None), *grown)
    assert split is not None and split["train"][2:] == ["a/3_9", "a/1_9", "b/7_1"]
    assert fit(Stored(SPLIT, None), *everything) == (SPLIT, [])


def test_images_of_which_none_is_known_are_other_data() -> None:
    split, notes = fit(Stored(SPLIT), "a/x", "b/y")
    assert split is None and "this is other data" in notes[0]


def test_known_images_keep_their_part_and_those_of_new_classes_are_split_anew() -> None:
    everything = [name for part in SPLIT.values() for name in part]
    fresh = [f"c/{n}" for n in range(10)]
    split, notes = fit(Stored(SPLIT), *everything, *fresh, "a/new")
    assert split is not None
    for part in records.SPLITS:
        assert set(SPLIT[part]) <= set(split[part]) and set(split[part]) & set(fresh)
    assert "a/new" in split["train"] and "1 images that the split does not name are trained on" in notes[0]
    assert "10 images that the split does not name are split anew, e.g. c/0" in notes[1]


def test_where_most_of_a_split_is_gone_new_images_are_split_anew_around_what_is_left() -> None:
    many = {part: [f"{c}/{part}{n}" for c in "ab" for n in range(30)] for part in records.SPLITS}
    left = [name for names in many.values() for name in names if int(name[-1]) < 2]
    new = [f"{c}/new{n}" for c in "ab" for n in range(40)]
    split, notes = fit(Stored(many), *left, *new)
    assert split is not None and "are gone" in notes[0] and "80 images" in notes[1] and "split anew" in notes[1]
    for part in records.SPLITS:
        assert {name for name in many[part] if name in left} <= set(split[part]) and set(split[part]) & set(new)
    for part in ("valid", "train"):
        with pytest.raises(UserError, match=f"no image of the split's part {part} is here any more; give --split new"):
            fit(Stored(SPLIT), *(name for other, names in SPLIT.items() if other != part for name in names))


def test_names_that_are_written_otherwise_are_the_same() -> None:
    """Of a folder that was renamed to capitals, or copied from a system that decomposes accents."""
    stored = {"train": ["caf\u00e9/1", "b/1"], "valid": ["caf\u00e9/2", "b/2"], "test": ["caf\u00e9/3", "b/3"]}
    split, notes = fit(Stored(stored), *(f"{c}/{n}" for c in ("cafe\u0301", "B") for n in (1, 2, 3)))
    assert split == {
        "train": ["cafe\u0301/1", "B/1"],
        "valid": ["cafe\u0301/2", "B/2"],
        "test": ["cafe\u0301/3", "B/3"],
    }
    assert notes == []
    stored = {"train": ["a/x", "b/1"], "valid": ["a/2", "b/2"], "test": ["a/X"]}  # two images, not one
    assert fit(Stored(stored), "a/x", "b/1", "a/2", "b/2", "a/X")[0] == stored


def test_what_a_split_left_out_stays_out() -> None:
    everything = [name for part in SPLIT.values() for name in part]
    split, _ = fit(Stored(SPLIT, left_out=["a/secret"]), *everything, "a/secret")
    assert split == SPLIT


def test_images_outside_the_pattern_of_a_split_are_groups_of_their_own() -> None:
    everything = [name for part in SPLIT.values() for name in part]
    split, _ = fit(Stored(SPLIT, r"(\d+)_"), *everything, "a/holiday")
    assert split is not None and split["train"][-1] == "a/holiday"


def test_the_record_of_a_split_says_how_it_was_drawn_for_good() -> None:
    opt = DataOptions(seed=3, test_portion=0.3, group_pattern="x")
    stored = Stored(SPLIT, r"(\d+)_", ("a/secret",), {"train": "8x8x3 ab"}, {"seed": 1, "test_portion": 0.1})
    again = records.of_record(json.loads(json.dumps(records.to_record(stored, opt))))
    assert again == stored._replace(dataset="cifar10")
    assert records.of_record(SPLIT) == Stored(SPLIT)  # one made by hand


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"test": ["a/1_1"]}, "1 images are in it more than once, e.g. a/1_1"),
        ({"train": ["a/1_1", "a/1_1"]}, "more than once"),
        ({"valid": []}, "its list valid is empty"),
        ({"test": None}, "is no split.json"),
        ({"test": "a/1"}, "is no split.json"),
        ({"train": {"a/1": 1}}, "is no split.json"),
        ({"group_pattern": "("}, "is no split.json"),
        ({"group_pattern": 5}, "is no split.json"),
        ({"pixels": {"test": 5}}, "is no split.json"),
        ({"left_out": [5]}, "is no split.json"),
        ({"seed": "x"}, "is no split.json"),
    ],
)
def test_what_is_no_partition_is_refused(changed: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    path.write_text(json.dumps(SPLIT | changed))
    with pytest.raises(UserError, match=message):
        records.read_split(path)


def test_new_images_that_are_too_few_to_be_split_are_trained_on() -> None:
    many = {part: [f"{c}/{part}{n}" for c in "ab" for n in range(10)] for part in records.SPLITS}
    left = [name for names in many.values() for name in names if int(name[-1]) < 4]
    split, notes = fit(Stored(many), *left, "a/new")
    assert split is not None and split["train"][-1] == "a/new" and "are trained on" in notes[-1]
    with pytest.raises(
        UserError, match=r"1 images are new, e\.g\. c/new, too few to be split; add some, or --split new"
    ):
        fit(Stored(many), *left, "c/new")


def test_groups_of_images_that_are_gone_are_remembered() -> None:
    """The search has seen the scene, whatever became of its images."""
    many = {
        "train": [f"a/s{n}_1" for n in range(10)] + ["b/s0_1"],
        "valid": ["a/s20_1", "b/s20_2"],
        "test": ["a/s21_1"],
    }
    names = ["b/s0_1", "a/s20_1", "b/s20_2", "a/s21_1", *(f"a/s{n}_{k}" for n in range(10) for k in (7, 8))]
    split, _ = fit(Stored(many, r"(s\d+)_"), *names, "a/s21_9")
    assert split is not None and split["test"] == ["a/s21_1"] and split["valid"] == many["valid"]
    assert len(split["train"]) == 21


def test_a_given_split_takes_the_groups_of_the_options_if_it_keeps_them_whole() -> None:
    opt = DataOptions(split="own.json", group_pattern=r"(\d+)_")
    assert splits.with_groups(Stored(SPLIT), opt, True) == (Stored(SPLIT, r"(\d+)_"), [])
    torn = Stored(SPLIT | {"test": ["a/1_9"]})
    with pytest.raises(UserError, match=r"--split own\.json divides what --group_pattern keeps whole, e\.g\. group 1"):
        splits.with_groups(torn, opt, True)
    assert splits.with_groups(torn, opt, False) == (torn, [])  # of a run that goes on
    notes = splits.with_groups(Stored(SPLIT, "x"), opt, True)[1]
    assert "without regard to --group_pattern" in notes[0]


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
    groups = [{name.split("/")[1][0] for name in split[part]} for part in records.SPLITS]
    assert all(groups) and sum(map(len, groups)) == scenes


def test_what_cannot_be_split_says_what_there_is() -> None:
    names = [f"{c}/{scene}_{n}.png" for c in "ab" for scene in range(2) for n in range(6)]
    labels = torch.tensor([0 if name[0] == "a" else 1 for name in names])
    with pytest.raises(UserError, match="there are 2 groups"):
        splits.make_split(names, labels, ["a", "b"], DataOptions(group_pattern=r"^(\d+)_"))
    labels[:-1], labels[-1] = 0, 1
    with pytest.raises(UserError, match=r"the smallest class, 'rare', has 1 images there"):
        splits.make_split(names, labels, ["common", "rare"], DataOptions())
