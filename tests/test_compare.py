import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import compare
import options
from child import comparison
from options import UserError

SEARCH = ["--image_size=8", "--init_channels=4", "--layers=3", "--epochs=1", "--batch_size=8", "--crop_padding=1"]
TRAIN = [*SEARCH, "--auxiliary=False", "--cutout=False", "--drop_path_prob=0"]


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
    assert stored == json.loads(json.dumps(result)) and {*stored["runs"]} == {"found", "random", "plain", "resnet"}
    splits = [json.loads(path.read_text()) for path in experiments.glob("compare_*/split.json")]
    assert len(splits) == 2 + 4 * 2 and all(split["test"] == splits[0]["test"] for split in splits)
    for name, rows in stored["runs"].items():
        assert [row["seed"] for row in rows] == [0, 1] and all(row["minutes"] > 0 for row in rows)
        for row, found in zip(rows, stored["runs"]["found"], strict=True):
            assert abs(row["params"] / found["params"] - 1) < (0.051 if name == "random" else 0.35)
    assert "At the same parameters the search" in printed and "| plain CNN | 2 |" in printed
    assert (experiments / "compare" / "comparison.png").stat().st_size > 5000
    again = compare.main(given)  # nothing is run twice
    assert again["runs"]["found"][0]["minutes"] == result["runs"]["found"][0]["minutes"]
    assert "epoch   1" not in capsys.readouterr().out


def test_it_stops_in_time_and_goes_on(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="not every contender has been trained yet; give more --minutes"):
        compare.main([*given, "--minutes=1e-6"])
    assert "are over; the same command goes on" in capsys.readouterr().out
    assert len(compare.main([*given, "--n=1"])["runs"]["plain"]) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        "--contenders=[plain]",
        "--contenders=[found]",
        "--contenders=[found,svm]",
        "--name=a/b",
        "--n=0",
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
    assert "compare.py: --retrain_options: error" in capsys.readouterr().err
    assert not list((tmp_path / "experiments").glob("*_search_*"))


def test_the_interval_holds_the_true_difference_as_often_as_it_says() -> None:
    """Of normal samples of 20, 95 % of the intervals, give or take the bootstrap's known optimism."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(60):
        gap = comparison.difference(rng.normal(1.0, 1.0, 20).tolist(), rng.normal(0.0, 1.0, 20).tolist())
        assert gap["low"] is not None and gap["high"] is not None
        hits += gap["low"] <= 1.0 <= gap["high"]
    assert hits >= 51


def test_the_permutation_p_of_few_runs_is_exact() -> None:
    """By hand: of the 20 ways to divide six values, two are as far apart as 1, 2, 3 and 4, 5, 6."""
    gap = comparison.difference([4.0, 5.0, 6.0], [1.0, 2.0, 3.0])
    assert gap["difference"] == 3 and gap["p"] == pytest.approx(2 / 20)
    assert comparison.difference([1.0], [2.0, 3.0])["low"] is None


def test_the_verdict_says_what_is_shown_and_what_is_not() -> None:
    def rows(*accuracies: float) -> list[dict[str, Any]]:
        return [{"acc": value} for value in accuracies]

    gaps = comparison.compare({"found": rows(90, 91, 92), "random": rows(90, 91, 92.1), "plain": rows(80, 81, 82)})
    text = comparison.verdict(gaps)
    assert "lost 0.0 points" in text and "so nothing is shown) against a random cell" in text
    assert f"gained {statistics.mean([90, 91, 92]) - 81:.1f} points (" in text and "against a plain CNN." in text
    one = comparison.verdict(comparison.compare({"found": rows(90), "random": rows(80)}))
    assert "gained 10.0 points (one run of each shows nothing) against a random cell" in one


def test_the_presets_of_the_comparison_exist() -> None:
    opt = compare.CompareOptions()
    assert Path(opt.search_config).is_file() and Path(opt.retrain_config).is_file()
    assert options.given(opt) == set()
