"""The report of a run: what it says is what the run's files say, in one page that is safe and needs no other file."""

import csv
import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from xml.etree import ElementTree

import pytest
import torch
from pictures import write_images
from PIL import Image

import genotypes
import inspect_model
import main
import main_constraint
import retrain
import utils
import visualize
from options import UserError
from report import charts, runs
from training import checkpoint

NASTY = '<script>alert("1")</script> & co'.replace("/", "\u2215")


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    return [f"--experiments_dir={tmp_path}/experiments", f"--visualizations_dir={tmp_path}/visualizations"]


class Page(HTMLParser):
    """What a page refers to, its identifiers, its words; raises where elements are not closed in order."""

    EMPTY = frozenset({"meta", "img", "input", "br", "path", "use", "rect", "polygon", "ellipse", "image"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: Counter[str] = Counter()
        self.refers: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids.update([found["id"] or ""] if "id" in found else [])
        self.refers += [found[name] or "" for name in ("src", "href", "xlink:href", "action") if name in found]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["script"], ["style"]):
            self.words.append(" ".join(data.split()))


def page_of(places: list[str], *more: str) -> tuple[str, Page]:
    seen = inspect_model.main([*places, "--experiment=run", "--report=True", *more])
    assert seen is not None
    text = next(path for path in seen.files if path.name == "report.html").read_text()
    return text, Page(text)


def test_the_page_of_a_trained_search(
    searched: list[str], places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = retrain.main(searched).figures
    text, page = page_of(places)
    row = utils.read_metrics(tmp_path / "experiments" / "run" / "metrics.jsonl")[-1]
    said = " ".join(page.words)
    for words in (
        f"{row['valid_acc']:.2f} % of the validation images",
        f"{row['child_valid_acc']:.2f} % (balanced",
        f"{figures['acc']:.2f} %",
        f"{figures['params']:,}",
        "--config",
        "--crop_padding",
        "class0",
        "Test images guessed",
        f"torch {torch.__version__}",
    ):
        assert words in said, words
    assert {one.split(":")[0].split("#")[0] for one in page.refers} <= {"data", ""}  # nothing from elsewhere
    assert not re.search(r"url\((?!#)", text) and "@import" not in text
    assert max(page.ids.values()) == 1
    assert "report" in capsys.readouterr().out
    for name in ("curves", "probabilities_normal", "probabilities_reduce", "confusion"):
        drawn = (tmp_path / "visualizations" / "run" / f"report_{name}.svg").read_text()
        ElementTree.fromstring(drawn)
        assert charts.INK not in drawn and "#01020" not in drawn and "var(" not in drawn


def test_probabilities_are_those_of_every_epoch(arguments: list[str], places: list[str], tmp_path: Path) -> None:
    main.main([*arguments, "--epochs=3"])
    text, _ = page_of(places)
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    for row, normal in zip(
        utils.read_metrics(tmp_path / "experiments" / "run" / "alphas.jsonl"), data["p"]["normal"], strict=True
    ):
        expected = torch.tensor(row["normal"]).softmax(-1)
        assert torch.allclose(torch.tensor(normal), expected, rtol=0, atol=6e-4)
    assert len(data["words"]) == 3 and len(data["boxes"]) == len(data["p"]["normal"][0])


def test_a_run_of_before_has_the_epochs_of_its_checkpoints(arguments: list[str], tmp_path: Path) -> None:
    main.main([*arguments, "--epochs=5", "--save_freq=2"])
    folder = tmp_path / "experiments" / "run"
    kept = runs.read_search(folder.parent, "run").history()
    (folder / "alphas.jsonl").unlink()
    left = runs.read_search(folder.parent, "run").history()
    assert [*kept] == [1, 2, 3, 4, 5] and [*left] == checkpoint.epochs(folder, "weights") == [2, 4, 5]
    assert all(torch.allclose(a, b, atol=1e-5) for e in left for a, b in zip(kept[e], left[e], strict=True))
    assert [*runs.read_search(folder.parent, "run", "4").history()] == [2, 4]


def test_alphas_that_another_program_wrote_are_left_out(arguments: list[str], tmp_path: Path) -> None:
    main.main(arguments)
    path = tmp_path / "experiments" / "run" / "alphas.jsonl"
    path.write_text('{"epoch": 1, "normal": "x", "reduce": []}\n{"epoch": 1}\n[1]\n{"epoch": 1, "normal": [[1]]')
    with pytest.warns(UserWarning, match="unfinished line"):
        assert [*runs.read_search(path.parents[1], "run").history()] == [2]


def test_names_that_look_like_html_are_words(tmp_path: Path, places: list[str]) -> None:
    data = write_images(tmp_path / NASTY)
    (data / "class0").rename(data / NASTY)
    small = [*places, f"--dataset={data}", "--layers=3", "--init_channels=4", "--batch_size=4", "--crop_padding=1"]
    small += ["--device=cpu", "--epochs=1"]
    main.main([*small, "--name=run", "--nodes=1"])
    retrain.main([*small, "--name=again", "--genotype=run", "--auxiliary=False", "--cutout_length=2"])
    text, page = page_of(places)
    assert NASTY not in text and NASTY in " ".join(page.words)
    for path in (tmp_path / "visualizations" / "run").glob("*.svg"):
        ElementTree.fromstring(path.read_text())


def test_a_training_of_another_cell_is_not_the_child(searched: list[str], places: list[str], tmp_path: Path) -> None:
    retrain.main(searched)
    search = runs.read_search(tmp_path / "experiments", "run")
    assert [one.folder.name for one in runs.trained_of(search)] == ["again"]
    path = tmp_path / "experiments" / "again" / "test.json"
    test = json.loads(path.read_text())
    test["genotype"] = json.loads(genotypes.random_genotype("snas", Random(3), 1).to_json())
    path.write_text(json.dumps(test))
    assert runs.trained_of(search) == [] and "its cell, trained" not in " ".join(page_of(places)[1].words)


@pytest.mark.parametrize("name", ["a$_$b", "_first", "x$^", "bell\x07", "byte\udcff"])
def test_names_of_every_kind_are_drawn(name: str) -> None:
    for svg in (
        charts.confusion([[1, 0], [1, 2]], [name, "other"]),
        charts.curves({name: [{"epoch": 1, "train_loss": 1.0}], "other": [{"epoch": 1, "train_loss": 2.0}]}),
        charts.against_cost([(name, 1.0, 2.0)], "accuracy", "cost"),
    ):
        ElementTree.fromstring(charts.for_file(svg))
        assert name.strip("_\x07\udcff").replace("$", "")[:1] in svg
    assert "first" in charts.curves({"_first": [{"epoch": 1, "train_loss": 1.0}], "b": [{"epoch": 1, "train_loss": 2}]})


def test_what_is_damaged_beside_a_run_is_left_out(
    searched: list[str], places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    retrain.main(searched)
    folder = tmp_path / "experiments" / "again"
    whole = (folder / "test.json").read_text()
    (folder / "guesses.csv").write_text("image,class,guess,probability\nonly\na\0b,c,d,0.5\nx,y,z,much\n")
    assert "again" in " ".join(page_of(places)[1].words)
    for wrong in ({"acc": None}, {"confusion": [[1]]}, {"per_class_acc": []}, {"params": "many"}):
        (folder / "test.json").write_text(json.dumps(json.loads(whole) | wrong))
        page_of(places)
        inspect_model.main(places)
    assert "again: training" in capsys.readouterr().out


def test_a_comparison_is_shown_and_a_damaged_one_is_not(
    arguments: list[str], places: list[str], tmp_path: Path
) -> None:
    main.main([*arguments, "--name=mine_search_0"])
    run = {"acc": 50.0, "balanced_acc": 50.0, "params": 1, "flops": 1, "latency_ms": 1.0, "minutes": 1.0}
    gap = {"difference": 0.0, "low": None, "high": None, "p": None}
    whole = {"runs": {"found": [run], "plain": [run]}, "differences": {"plain": gap}}
    place = tmp_path / "experiments" / "mine"
    place.mkdir()
    for content, shown in ((whole, True), ({**whole, "runs": {"found": [{}], "other": [1]}}, False), ([], False)):
        (place / "comparison.json").write_text(json.dumps(content))
        inspect_model.main([*places, "--experiment=mine_search_0", "--report=True"])
        page = Page((tmp_path / "visualizations" / "mine_search_0" / "report.html").read_text())
        assert ("Was it worth it?" in page.words) == shown


def test_the_time_of_a_search_has_its_choice_among_children(arguments: list[str], tmp_path: Path) -> None:
    folder = main.main([*arguments, "--select=2", "--finalists=1", "--finalist_epochs=1"]).folder
    epochs = sum(row["epoch_seconds"] for row in utils.read_metrics(folder / "metrics.jsonl"))
    choice = json.loads((folder / "selection.json").read_text())["seconds"]
    assert choice > 0 and runs.minutes_of(folder) == pytest.approx((epochs + choice) / 60)


def test_a_resumed_run_of_before_keeps_the_epochs_of_its_checkpoints(arguments: list[str], tmp_path: Path) -> None:
    main.main([*arguments, "--epochs=4", "--save_freq=2"])
    folder = tmp_path / "experiments" / "run"
    (folder / "alphas.jsonl").unlink()
    main.main([*arguments, "--epochs=4", "--save_freq=2", "--resume=True"])
    assert [*runs.read_search(folder.parent, "run").history()] == [2, 4]
    (folder / "weights_epoch_2.pt").write_bytes(b"damaged")
    assert [*runs.read_search(folder.parent, "run").history()] == [4]


def test_where_graphviz_fails_its_words_stand_in_the_page(
    arguments: list[str], places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main.main(arguments)
    monkeypatch.setattr(visualize, "drawn", lambda *_: (b"", "dot failed: <stdin>: no <b>fonts"))
    assert "dot failed: <stdin>: no <b>fonts" in " ".join(page_of(places)[1].words)


def test_a_run_begun_elsewhere_says_where(arguments: list[str], places: list[str], tmp_path: Path) -> None:
    main.main([*arguments, "--epochs=1"])
    path = tmp_path / "experiments" / "run" / "options.yaml"
    first, second = path.read_text().splitlines()[:2]
    path.write_text(path.read_text().replace(second, "# a machine of before"))
    main.main([*arguments, "--epochs=1", "--resume=True"])
    assert path.read_text().startswith(f"{first}\n# a machine of before\n")
    assert "a machine of before" in " ".join(page_of(places)[1].words)


def test_an_image_outside_the_data_is_not_shown(searched: list[str], places: list[str], tmp_path: Path) -> None:
    retrain.main(searched)
    (tmp_path / "secret.png").write_bytes(next(Path(searched[0].partition("=")[2]).rglob("*.png")).read_bytes())
    path = tmp_path / "experiments" / "again" / "guesses.csv"
    root = Path(searched[0].partition("=")[2])
    others = [str(tmp_path / "secret.png"), "../" * len(root.parts) + str(tmp_path / "secret.png")[1:]]
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "class", "guess", "probability"])
        table.writerows([name, "class0", "class1", "0.9"] for name in others)
    assert "<img" not in page_of(places)[0]


def test_a_budget_and_its_cost_are_shown(arguments: list[str], places: list[str], tmp_path: Path) -> None:
    main_constraint.main([*arguments, "--target_params=3000"])
    said = " ".join(page_of(places)[1].words)
    assert "budget" in said and "3,000" in said and "python main_constraint.py --config" in said


def test_several_searches_side_by_side(arguments: list[str], places: list[str], tmp_path: Path) -> None:
    for name in ("run", "other"):
        main.main([*arguments, f"--name={name}", f"--seed={len(name)}"])
    assert inspect_model.main([*places, "--experiment=run,other", "--report=True"]) is None
    page = Page((tmp_path / "visualizations" / "run+other" / "report.html").read_text())
    said = " ".join(page.words)
    assert "run and other" in said and "seed 3" in said and "seed 5" in said and max(page.ids.values()) == 1
    for wrong in (
        ["--experiment=run,other"],
        ["--experiment=run,run", "--report=True"],
        ["--experiment=run,", "--report=True"],
    ):
        with pytest.raises(SystemExit):
            inspect_model.main([*places, *wrong])


def test_without_a_name_runs_are_listed(
    searched: list[str], places: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    figures = retrain.main(searched).figures
    capsys.readouterr()
    assert inspect_model.main(places) is None
    said = capsys.readouterr().out
    assert "run: search, epoch 2/2" in said and f"test {figures['acc']:.2f} %, {figures['params']:,} parameters" in said
    with pytest.raises(UserError, match="holds no run"):
        inspect_model.main(["--experiments_dir=nowhere"])


def test_the_cells_are_animated_over_the_epochs(arguments: list[str], places: list[str], tmp_path: Path) -> None:
    main.main([*arguments, "--epochs=3"])
    seen = inspect_model.main([*places, "--experiment=run", "--visualize=False", "--animate=True"])
    assert seen is not None and [path.name for path in seen.files] == ["normal.webp", "reduction.webp"]
    for path in seen.files:
        with Image.open(path) as image:
            assert image.n_frames == 3 and image.info["loop"] == 0


MOVES = """
<script>
const seen = [];
for (const epoch of [0, Number(slider.max)]) {
  slider.value = epoch;
  slider.dispatchEvent(new Event("input"));
  seen.push([words.textContent, ...data.boxes.map((box) => document.querySelector(`#s0-normal-normal-${box} text`).textContent)]);
}
play.click();
seen.push([play.textContent, slider.value]);
document.body.dataset.seen = JSON.stringify(seen);
</script>
"""


def test_the_slider_moves_the_cell_in_a_browser(arguments: list[str], places: list[str], tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium here: apt-get install chromium")
    folder = main.main([*arguments, "--epochs=3"]).folder
    rows = utils.read_metrics(folder / "alphas.jsonl")
    rows[0]["normal"] = [[9.0 if op == 4 else 0.0 for op in range(8)] for _ in rows[0]["normal"]]
    (folder / "alphas.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, _ = page_of(places)
    moved = tmp_path / "moved.html"
    moved.write_text(text.replace("</body>", MOVES + "</body>"))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path}/browser", moved.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'data-seen="(.*?)"', done.stdout)
    assert found, done.stderr
    first, last, playing = json.loads(found[1].replace("&quot;", '"'))
    assert first[0].startswith("epoch 1,") and last[0].startswith("epoch 3,")
    assert set(first[1:]) == {"sep_conv_3x3 1.00"} and last[1:] != first[1:]
    assert playing == ["stop", "0"]
