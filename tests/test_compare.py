import itertools
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_ind

import compare
import options
from child import comparison
from options import UserError
from options.compare_option import CONTENDERS

SEARCH = ["--image_size=8", "--init_channels=4", "--layers=3", "--epochs=1", "--batch_size=8", "--crop_padding=1"]
TRAIN = [*SEARCH, "--auxiliary=False", "--cutout=False", "--drop_path_prob=0", "--schedule=cosine"]


@pytest.fixture
def given(tiny: Path, tmp_path: Path) -> list[str]:
    return [
        f"--dataset={tiny}", "--n=2", f"--experiments_dir={tmp_path}/experiments", f"--visualizations_dir={tmp_path}/v",
        f"--search_options={json.dumps([*SEARCH, '--device=cpu'])}", f"--retrain_options={json.dumps(TRAIN)}",
    ]  # fmt: skip


def test_contenders_are_trained_alike_on_one_split_and_compared(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = compare.main(given)
    printed, experiments = capsys.readouterr().out, tmp_path / "experiments"
    stored = json.loads((experiments / "compare" / "comparison.json").read_text())
    assert stored == json.loads(json.dumps(result)) and {*stored["runs"]} == {*CONTENDERS} - {"peer"}
    splits = [json.loads(path.read_text()) for path in experiments.glob("compare_*/split.json")]
    assert len(splits) == 2 + 5 * 2
    for part in ("train", "valid", "test"):
        assert all(split[part] == splits[0][part] for split in splits)
    for name, rows in stored["runs"].items():
        assert [row["seed"] for row in rows] == [0, 1] and all(row["minutes"] > 0 for row in rows)
        for row, found in zip(rows, stored["runs"]["found"], strict=True):
            assert abs(row["params"] / found["params"] - 1) < (0.051 if name == "random" else 0.35)
    assert "The search " in printed and "| plain CNN | 2 |" in printed
    for plain, long, found in zip(*(stored["runs"][name] for name in ("plain", "long", "found")), strict=True):
        epochs = round(plain["epochs"] * found["training"] / plain["training"])
        assert long["epochs"] == max(plain["epochs"], epochs) and long["params"] == plain["params"]
        assert found["minutes"] > found["training"] and plain["minutes"] == plain["training"]
    assert (experiments / "compare" / "comparison.png").stat().st_size > 5000
    again = compare.main(given)  # nothing is run twice
    assert again["runs"]["found"][0]["minutes"] == result["runs"]["found"][0]["minutes"]
    assert "epoch   1" not in capsys.readouterr().out


def test_it_stops_in_time_and_goes_on(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="not every contender has been trained yet; give more --minutes"):
        compare.main([*given, "--minutes=1e-6"])
    assert "are over; the same command goes on" in capsys.readouterr().out
    assert len(compare.main([*given, "--n=1"])["runs"]["plain"]) == 1
    capsys.readouterr()
    assert len(compare.main([*given, "--minutes=1e-6"])["runs"]["plain"]) == 1  # what is finished is read at any time
    compare.main([*given, "--contenders=[plain,found]"])  # in any order
    assert (
        compare._left(["search", "plain", "plain"], {"search": [60.0, 120.0], "plain": [45.0]})
        == ", about 3 minutes left"
    )
    assert compare._left(["search", "plain"], {"search": [60.0]}) == ""  # not known yet


def test_two_processes_share_the_work_of_one_comparison(given: list[str], tmp_path: Path) -> None:
    given = [*given, "--contenders=[found,peer]"]
    compare.main([*given, "--n=1"])
    split = shutil.copy(tmp_path / "experiments" / "compare_search_0" / "split.json", tmp_path / "split.json")
    given += [f"--split={split}", "--name=shared"]
    assert [row["seed"] for row in compare.main([*given, "--part=2/2"])["runs"]["found"]] == [1]
    whole = compare.main([*given, "--part=1/2"])["runs"]
    assert [row["seed"] for row in whole["found"]] == [0, 1]
    for found, random in zip(whole["found"], whole["peer"], strict=True):
        assert abs(random["flops"] / found["flops"] - 1) <= 0.1 and abs(random["params"] / found["params"] - 1) <= 0.05


def test_rounds_of_another_machine_count_and_are_not_run_again(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*given, "--contenders=[found,random]"]
    compare.main([*given, "--n=1", "--name=first"])
    split = shutil.copy(tmp_path / "experiments" / "first_search_0" / "split.json", tmp_path / "split.json")
    given += [f"--split={split}"]
    there = [*given, f"--experiments_dir={tmp_path}/there"]
    compare.main([*there, "--n=1"])
    other = tmp_path / "there" / "compare" / "comparison.json"
    result = compare.main([*given, f"--others=[{other}]"])
    experiments = tmp_path / "experiments"
    assert not list(experiments.glob("compare_*_0")) and (experiments / "compare_found_1").is_dir()
    assert [row["seed"] for row in result["runs"]["random"]] == [0, 1]
    told = json.loads(other.read_text())
    assert result["runs"]["found"][0] == told["runs"]["found"][0]
    assert 0 <= result["runs"]["found"][0]["search"]["free"] <= 100
    shutil.copy(experiments / "compare" / "comparison.json", tmp_path / "both.json")
    capsys.readouterr()
    moved = [*given, f"--experiments_dir={tmp_path}/third", f"--others=[{tmp_path}/both.json]"]
    assert compare.main(moved)["runs"] == result["runs"]  # all of it was made elsewhere
    assert "are not done yet" not in capsys.readouterr().out

    for once in ([other, tmp_path / "both.json"], [tmp_path / "both.json", other]):  # a round is one file's
        twice = [*given, f"--experiments_dir={tmp_path}/fourth", f"--others={json.dumps([str(path) for path in once])}"]
        assert compare.main(twice)["runs"] == result["runs"]
    local = compare.main([*given, f"--experiments_dir={tmp_path}/there", f"--others=[{tmp_path}/both.json]"])["runs"]
    assert [row["seed"] for row in local["found"]] == [0, 1] and local["found"][1] == result["runs"]["found"][1]


def test_what_is_no_round_of_this_comparison_does_not_count(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*given, "--contenders=[found,random]", "--n=1"]
    compare.main(given)
    split = shutil.copy(tmp_path / "experiments" / "compare_search_0" / "split.json", tmp_path / "split.json")
    told = json.loads((tmp_path / "experiments" / "compare" / "comparison.json").read_text())
    half = tmp_path / "half.json"

    def again(changed: dict[str, Any], name: str = "again") -> dict[str, Any]:
        half.write_text(json.dumps(told | changed))
        return compare.main([*given, f"--split={split}", f"--name={name}", f"--others=[{half}]"])

    found, random = (told["runs"][name] for name in ("found", "random"))
    runs = again({"runs": {"found": found}})["runs"]  # a round that is not whole is run here
    assert runs["random"][0]["seed"] == 0 and (tmp_path / "experiments" / "again_random_0").is_dir()
    for lacking in ({"runs": {"found": found}, "left_out": [["random", 0]]}, {"left_out": [["random", 0]]}):
        if "runs" in lacking:
            with pytest.raises(UserError, match="not every contender"):
                again(lacking, "none")
        else:
            assert again(lacking, "more")["runs"]["random"] == random
        assert "-1 trainings" not in capsys.readouterr().out
    recipe = told["recipes"]
    for kind in ("search", "training"):
        with pytest.raises(UserError, match=f"--epochs of its {kind} is 7 there, 1 here"):
            again({"recipes": recipe | {kind: recipe[kind] | {"epochs": 7}}}, "other")
    with pytest.raises(UserError, match="another split"):
        again({"recipes": recipe | {"split": "abc"}}, "other")
    with pytest.raises(UserError, match=r"half\.json is no split\.json"):
        compare.main([*given, f"--split={half}", "--name=other", f"--others=[{half}]"])
    older = {kind: {k: v for k, v in recipe[kind].items() if k != "flip"} for kind in ("search", "training")}
    assert again({"recipes": recipe | older}, "older")["runs"] == told["runs"]  # an option that was not there yet
    row = found[0]
    wrong: list[dict[str, Any]] = [
        *({"runs": {"found": [row | {"acc": value}], "random": random}} for value in ("x", None, float("nan"), [1])),
        {"runs": {"found": [row | {"training": 0}], "random": random}},
        {"runs": {"found": [{"seed": 0}], "random": random}},
        {"runs": {"found": [row | {"seed": float("inf")}], "random": random}},
        {"runs": {"found": [{k: v for k, v in row.items() if k != "search"}], "random": random}},
        *({"runs": value} for value in (3, [], {"found": 5})),
        *({"left_out": value} for value in (3, [[1]], [["random", "x"]])),
        *({"recipes": value} for value in (5, {}, {"search": 1, "training": {}, "split": None})),
    ]
    for changed in wrong:
        with pytest.raises(UserError, match=r"half\.json is no comparison\.json"):
            again(changed, "other")
    for text in ("{", "[1]", "{}", "[" * 100_000):
        half.write_text(text)
        with pytest.raises(UserError, match=r"half\.json is no comparison\.json"):
            compare.main([*given, f"--split={split}", "--name=other", f"--others=[{half}]"])


def test_other_images_under_the_same_name_are_refused(given: list[str], tiny: Path, tmp_path: Path) -> None:
    compare.main([*given, "--n=1", "--contenders=[found,plain]"])
    shutil.copytree(tiny, tmp_path / "other")
    with pytest.raises(UserError, match=r"is of the images in .*tiny.*; use a new --name"):
        compare.main([*given, "--n=1", "--contenders=[found,plain]", f"--dataset={tmp_path}/other"])


def test_cells_of_other_sizes_than_random_ones_are_refused(given: list[str]) -> None:
    space = json.loads(next(option for option in given if "search_options" in option).partition("=")[2])
    with pytest.raises(UserError, match="random cells have 4 nodes"):
        compare.main([*given, f"--search_options={json.dumps([*space, '--nodes=2'])}"])


def test_random_cells_are_of_the_space_that_is_searched(given: list[str], tmp_path: Path) -> None:
    given = [*given, "--n=1", "--contenders=[found,random]"]
    space = json.loads(next(option for option in given if "search_options" in option).partition("=")[2])
    space += ["--space=amoebanet", r"--group_pattern=_(\d+)"]
    result = compare.main([*given, f"--search_options={json.dumps(space)}"])
    gaps = result["over_groups"]["random"]
    assert gaps["acc"]["difference"] == pytest.approx(result["differences"]["random"]["difference"])
    assert 1 < gaps["acc"]["groups"] <= 8
    for kind in ("found", "random"):
        cell = json.loads((tmp_path / "experiments" / f"compare_{kind}_0" / "genotype.json").read_text())
        assert cell["space"] == "amoebanet"


@pytest.mark.parametrize(
    "wrong",
    [
        "--contenders=[plain]",
        "--contenders=[found]",
        "--contenders=[found,svm]",
        "--contenders=[found,plain,plain]",
        '--retrain_options=["--network=resnet"]',
        "--name=a/b",
        "--n=0",
        "--contenders=[found,long]",
        "--part=2/1",
        "--part=1/2",
        "--part=4/4",
        "--others=[a.json]",
        "--split=new",
        "--split=nope.json",
        "--search_config=nope.yaml",
    ],
)
def test_bad_options_are_one_line(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        compare.main([wrong])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_typo_is_said_before_the_first_search(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        compare.main([*given, '--retrain_options=["--epoch=3"]'])
    assert "compare.py: retrain_options: error" in capsys.readouterr().err
    assert not list((tmp_path / "experiments").glob("*_search_*"))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_nothing_is_shown_where_there_is_nothing_but_one_time_in_twenty(n: int) -> None:
    rng, shown = np.random.default_rng(0), 0
    for _ in range(600):
        gap = comparison.difference(rng.normal(0, 1, n).tolist(), rng.normal(0, 1, n).tolist())
        assert gap["low"] is not None and gap["high"] is not None
        shown += not gap["low"] <= 0 <= gap["high"]
    assert shown <= 0.05 * 600 + 2 * (0.05 * 0.95 * 600) ** 0.5


def test_the_interval_is_that_of_welch() -> None:
    """By hand: means 91 and 81, variances 1 and 4, n = 3: df 2.94, t 3.218; and scipy's."""
    gap = comparison.difference([90.0, 91.0, 92.0], [79.0, 81.0, 83.0])
    assert gap["difference"] == 10
    assert gap["low"] == pytest.approx(10 - 3.218 * (5 / 3) ** 0.5, abs=0.01)
    assert gap["high"] == pytest.approx(10 + 3.218 * (5 / 3) ** 0.5, abs=0.01)
    tested = ttest_ind([90.0, 91.0, 92.0], [79.0, 81.0, 83.0], equal_var=False)
    assert gap["p"] == pytest.approx(tested.pvalue) and gap["low"] == pytest.approx(tested.confidence_interval().low)
    assert comparison.difference([1.0], [2.0, 3.0])["low"] is None
    assert comparison.difference([1.0, 1.0, 1.0], [2.0, 3.0, 2.5])["low"] is not None
    assert comparison.difference([1.0, 1.0], [2.0, 2.0])["low"] is None


def test_the_verdict_says_what_is_shown_and_what_is_not() -> None:
    def rows(*accuracies: float, params: int = 100) -> list[dict[str, Any]]:
        return [{"acc": value, "params": params} for value in accuracies]

    def said(**of: list[dict[str, Any]]) -> str:
        return comparison.verdict(of, comparison.compare(of))

    found = rows(90, 91, 92)
    text = said(found=found, random=rows(90, 91.5, 92.1), plain=rows(80, 81, 82, params=93))
    assert text.startswith("The search lost 0.2 points (-") and "so nothing is shown) against a random cell;" in text
    assert "gained 10.0 points (7.7 to 12.3) against a plain CNN with 7 % fewer parameters." in text
    assert "lost 10.0 points (7.7 to 12.3) against a plain CNN." in said(found=rows(80, 81, 82), plain=found)
    assert "gained 10.0 points (one run shows nothing)" in said(found=rows(90), random=rows(80))
    assert "gained 0.0 points (the runs of each agree)" in said(found=rows(90, 90), random=rows(90, 90))


def test_the_interval_over_groups_is_wide_where_a_scene_is_right_or_wrong_as_a_whole(tmp_path: Path) -> None:
    """60 scenes of 10 images: the first contender has 40 scenes right, the other 30; and the same by single images."""

    def write(name: str, right: list[bool]) -> Path:
        path = tmp_path / name
        lines = ["image,class,guess,probability"]
        for number, hit in enumerate(right):
            label = "ab"[number % 2]
            lines.append(f"{label}/{number // 10}_{number}.png,{label},{label if hit else 'c'},0.5")
        path.write_text("\n".join(lines) + "\n")
        return path

    scenes = [write(f"s{n}.csv", [i // 10 < n for i in range(600)]) for n in (40, 30)]
    found = comparison.over_groups(scenes[:1], scenes[1:], r"^(\d+)_")
    single = comparison.over_groups(scenes[:1], scenes[1:], r"^(\d+_\d+)\.")
    for name in ("acc", "balanced_acc"):
        assert found[name]["difference"] == pytest.approx(100 / 6) and found[name]["groups"] == 60
        widths = [gap[name]["high"] - gap[name]["low"] for gap in (found, single)]
        # a share of 1/6 of 60 scenes, or of 600 images: 2 * 1.96 standard errors
        assert widths[0] == pytest.approx(2 * 196 * (1 / 6 * 5 / 6 / 60) ** 0.5, rel=0.15)
        assert widths[1] == pytest.approx(2 * 196 * (1 / 6 * 5 / 6 / 600) ** 0.5, rel=0.15)
    rare = [write(f"r{n}.csv", [i % 2 == 0 or i < n for i in range(600)]) for n in (300, 0)]  # b is rarer to be right
    assert comparison.over_groups(rare[:1], rare[1:], r"^(\d+)_")["balanced_acc"]["difference"] == pytest.approx(25)


def test_the_best_of_k_is_what_drawing_k_cells_gives() -> None:
    rng = np.random.default_rng(1)
    valid, acc = rng.normal(80, 2, 6).tolist(), rng.normal(85, 2, 6).tolist()
    for k in (1, 2, 4, 6):
        every = [max(chosen, key=lambda i: valid[i]) for chosen in itertools.combinations(range(6), k)]
        assert comparison.best_of(valid, acc, k) == pytest.approx(statistics.mean(acc[i] for i in every))


def test_the_best_of_random_cells_has_the_time_of_a_search_with_its_training() -> None:
    def rows(accuracies: list[float], minutes: float) -> list[dict[str, Any]]:
        return [{"acc": a, "valid_acc": a, "minutes": minutes, "params": 10} for a in accuracies]

    of = {"found": rows([92.0, 93.0, 94.0], 7.0), "random": rows([90.0, 91.0, 92.0, 91.0], 2.0)}
    best = comparison.against_best_of(of)
    assert best is not None and best["k"] == 3
    assert best["difference"] == pytest.approx(93 - (3 * 92 + 91) / 4)  # 3 of the 4 draws of 3 hold the best
    assert best["low"] is None  # too few for a bootstrap
    rng = np.random.default_rng(0)
    many = comparison.against_best_of(
        {"found": rows(rng.normal(92, 1, 12).tolist(), 7.0), "random": rows(rng.normal(90, 1, 12).tolist(), 2.0)}
    )
    assert many is not None and many["low"] < many["difference"] < many["high"]
    few = comparison.against_best_of({**of, "random": of["random"][:2]})
    assert few is not None and few["k"] == 2 and few["in_time"] == 3
    assert "best of 2 random cells, trained where 3 take the same time" in comparison.verdict(
        {**of, "random": of["random"][:2]}, {}, few
    )
    assert "against the best of 3 random cells" in comparison.verdict(of, {}, best)
    assert comparison.against_best_of({**of, "random": [{**row, "valid_acc": None} for row in of["random"]]}) is None
    assert comparison.against_best_of({**of, "random": rows([90.0, 91.0], 5.0)}) is None  # there is time for one only


def test_the_presets_of_the_comparison_exist() -> None:
    opt = compare.CompareOptions()
    assert Path(opt.search_config).is_file() and Path(opt.retrain_config).is_file()
    assert options.given(opt) == set()
