import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import options
from benchmarks import (
    child_step,
    estimators,
    evidence,
    first_step,
    growth,
    input_pipeline,
    pareto,
    record,
    scaling,
    search_step,
    spread,
    widths,
)
from genotypes import GENOTYPES
from model import ChildNetwork
from options import UserError
from options.constraint_option import ConstraintOptions


def performance(tmp_path: Path, name: str) -> tuple[dict[str, Any], str]:
    page = (tmp_path / "performance.md").read_text()
    assert f"<!-- {name} -->" in page
    return json.loads((tmp_path / "performance" / f"{name}.json").read_text()), page


def test_a_search_step_is_compared_with_the_textbook_and_with_what_others_bring(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter.py"
    adapter.write_text(
        "import torch\n"
        "def contender(init_channels, layers, num_classes, device):\n"
        "    theta, alpha = torch.nn.Linear(3, num_classes), torch.nn.Parameter(torch.zeros(2))\n"
        "    return lambda x: theta(x.mean((2, 3))) * alpha.sum().exp(), list(theta.parameters()), [alpha]\n"
    )
    small = ["--init_channels=4", "--layers=3", "--batch_size=2", "--image_size=8", "--rounds=2", f"--out={tmp_path}"]
    result = search_step.main([*small, "--contenders=[textbook, ours]", f"--external={adapter}"])
    stored, page = performance(tmp_path, record.on_this("search_step"))
    assert stored["pairs"] == result["pairs"] and {*stored["pairs"]} == {"ours", "external"}
    for pair in result["pairs"].values():
        assert all(len(times) == 2 and min(times) > 0 for times in pair["seconds"].values())
    alone = result["pairs"]["ours"]["alone"]
    assert alone["textbook"]["flops"] == alone["ours"]["flops"] > 1e6  # the same function
    assert alone["ours"]["kernels"] < alone["textbook"]["kernels"] / 2
    assert alone["ours"]["bytes"] < alone["textbook"]["bytes"]
    assert "| textbook |" in page and "| external |" in page
    cold = search_step.main([*small, "--contenders=[denormals, ours]", "--temperature=0.06"])["pairs"]["ours"]["alone"]
    assert cold["denormals"]["flops"] == cold["ours"]["flops"] == alone["ours"]["flops"]
    assert "| denormals |" in performance(tmp_path, record.on_this("search_step_t0.06"))[1]
    with pytest.raises(UserError, match="no Python file"):
        search_step.main([*small, "--contenders=[textbook]", "--external=nowhere.py"])


def test_widths_are_compared_with_the_form_without_kernels(tmp_path: Path) -> None:
    small = ["--cases=[[4, 8]]", "--batch_size=2", "--rounds=2", f"--out={tmp_path}"]
    result = widths.main(small)
    assert performance(tmp_path, record.on_this("widths"))[0]["cases"] == result["cases"]
    assert all(len(times) == 2 for times in result["cases"][0]["seconds"].values())


def test_a_child_is_compared_with_its_textbook_form(tmp_path: Path) -> None:
    small = ["--init_channels=8", "--batch_size=2", "--image_size=8", "--rounds=2", f"--out={tmp_path}"]
    result = child_step.main(small)
    assert performance(tmp_path, record.on_this("child_step_8_3"))[0]["seconds"] == result["seconds"]
    assert result["params"]["textbook"] == result["params"]["ours"] == result["params"]["without kernels"]
    assert abs(result["params"]["plain CNN"] / result["params"]["ours"] - 1) < 0.2


def test_the_textbook_child_is_the_child() -> None:
    genotype = GENOTYPES["DARTS_V2"]
    ours, theirs = ChildNetwork(genotype, 4, 3, 3), child_step.TextbookChild(genotype, 4, 3, 3)
    values = list(ours.parameters())
    for p, value in zip(theirs.parameters(), values, strict=True):
        assert p.numel() == value.numel()
        p.data = value.detach().reshape(p.shape).clone()
    images = torch.randn(4, 3, 12, 12)
    outputs = [ours(images)[0], theirs(images)]
    assert torch.allclose(*outputs, rtol=1e-3, atol=1e-4)


def test_the_input_pipeline_is_compared_with_image_folder(tiny: Path, tmp_path: Path) -> None:
    result = input_pipeline.main(
        [f"--dataset={tiny}", "--image_size=8", "--batch_size=4", "--workers=0", "--rounds=2", f"--out={tmp_path}"]
    )
    assert performance(tmp_path, "input_pipeline")[0]["images"] == result["images"] == 32
    assert {*result["seconds"]} == {"ImageFolder", "ours"}


def test_results_replace_their_own_part_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text("before\n<!-- one -->\nold\n<!-- end -->\nbetween\n<!-- two -->\nkept\n<!-- end -->\nafter\n")
    opt = record.Rounds(out=str(tmp_path), rounds=2)
    result = record.publish("one", opt, {"seconds": [1.0]}, "new")
    assert result == json.loads((tmp_path / "performance" / "one.json").read_text())
    assert result["setting"] == {"rounds": 2} and result["seconds"] == [1.0]
    content = page.read_text()
    assert content.startswith("before\n<!-- one -->\nnew\n") and "old" not in content
    assert (
        content.endswith("between\n<!-- two -->\nkept\n<!-- end -->\nafter\n")
        and "`python -m benchmarks.one --rounds=2`" in content
    )


def test_slopes_and_spreads() -> None:
    assert record.slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert record.spread([3.0, 1.0, 2.0]) == "2.00 (1.00 to 3.00)"
    assert record.ratios({"a": [4.0, 9.0], "b": [2.0, 3.0]}, "a") == {"a": [1, 1], "b": [2, 3]}


@pytest.mark.slow
def test_the_first_step_is_timed_cold_and_warm(tiny: Path, tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text("layers: 3\ninit_channels: 2\nnodes: 1\nbatch_size: 4\nepochs: 1\ndevice: cpu\n")
    result = first_step.main(
        [f"--dataset={tiny}", f"--preset={preset}", "--rounds=1", "--copies=2", f"--out={tmp_path}"]
    )
    assert performance(tmp_path, "first_step")[0]["files"] == result["files"] == 72
    assert all(0.5 < seconds < 100 for times in result["seconds"].values() for seconds in times)


@pytest.mark.slow
def test_growth_and_scaling_give_a_row_for_every_size(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "SIZES", {"batch_size": [2, 4]})
    monkeypatch.setattr(growth, "_BASE", {"batch_size": 2, "layers": 3, "init_channels": 2, "image_size": 8})
    result = growth.main(["--rounds=1", "--device=cpu", f"--out={tmp_path}"])
    assert result["batch_size"]["slopes"]["flops"] == pytest.approx(1, abs=0.01)
    small = ["--init_channels=2", "--layers=3", "--batch_size=4", "--epochs=1"]
    given = [f"--search_options={json.dumps(small)}", f"--dataset={tiny}", "--rounds=1"]
    epochs = scaling.main([*given, f"--out={tmp_path}"])["epochs"]
    assert {*epochs} == {"1", "2"} and all(row["images_per_second"] > 0 for rows in epochs.values() for row in rows)
    assert "| 2 |" in (tmp_path / "performance.md").read_text()
    with pytest.raises(UserError, match=r"main.py failed: .*batch norm needs at least 2"):
        scaling.main([*given[1:], "--search_options=[--batch_size=1]", f"--out={tmp_path}"])


def test_the_sweep_skips_what_is_done_and_draws_the_rest(arguments: list[str], tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    options.save(options.parse(ConstraintOptions, arguments, "", ""), preset, "recipe")
    common = [
        f"--preset={preset}",
        f"--experiments_dir={tmp_path}/experiments",
        f"--out={tmp_path}",
        "--seeds=1",
    ]
    assert pareto.main([*common, "--budgets=[3000]", "--part=2/2"]) is None
    first = pareto.main([*common, "--budgets=[3000]"])
    assert first is not None
    weights = sorted((tmp_path / "experiments").rglob("weights_*.pt"))
    dates = [path.stat().st_mtime_ns for path in weights]
    second = pareto.main([*common, "--budgets=[3000, 2500]"])
    assert [path.stat().st_mtime_ns for path in weights] == dates  # nothing was run again
    assert second is not None and [run["budget"] for run in second["runs"]] == [None, 3000, 2500]
    assert second["runs"][:2] == first["runs"]
    page = (tmp_path / "budget.md").read_text()
    assert "| 2,500 | 1 |" in page and (tmp_path / "budget" / "params.png").stat().st_size > 10_000


def test_jobs_are_spread_and_what_failed_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "job.py"
    script.write_text("import sys, pathlib; pathlib.Path(sys.argv[1]).touch(); sys.exit(int(sys.argv[2]))")
    given = ["--jobs=2", "--where=local", f"--logs={tmp_path}/logs", "--", str(script)]
    assert spread.main([*given, f"{tmp_path}/{{k}}_of_{{jobs}}", "0"]) == [0, 0]
    assert (tmp_path / "1_of_2").exists() and (tmp_path / "2_of_2").exists()
    with pytest.raises(UserError, match="1 of 2 jobs failed, see above; the same command goes on"):
        spread.main([*given, f"{tmp_path}/a{{n}}", "{n}"])
    assert "exit code 1" in capsys.readouterr().out
    for words, advice in ((["x"], r"all be the same: .* use \{n\} or \{k\}"), (["{seed}"], r"'seed' is none of")):
        with pytest.raises(UserError, match=advice):
            spread.commands([str(script), *words], 2)
    with pytest.raises(UserError, match="put it after --"):
        spread.main(["--jobs=2"])
    assert spread.commands(["benchmarks.pareto", "{k}"], 1)[0][1:] == ["-m", "benchmarks.pareto", "1"]


def test_the_estimators_are_compared_on_the_exact_gradient(tmp_path: Path) -> None:
    rows = estimators.main(["--draws=200", "--temperatures=[1.0, 0.1]", f"--out={tmp_path}"])["rows"]
    figures = {(r["alpha"], r["estimator"], r["temperature"]): r for r in rows}
    assert figures["undecided", "expectation", None]["noise"] == 0
    assert (
        figures["decided", "policy_gradient", 1.0]["bias"] < 0.3 < figures["decided", "policy_gradient", 1.0]["noise"]
    )
    relaxed = [figures["decided", "reparametrization", t]["noise"] for t in (1.0, 0.1)]
    assert relaxed[0] < relaxed[1]
    assert "| undecided | expectation | - | 0.000 | 0.00 |" in (tmp_path / "budget.md").read_text()


def pack(folder: Path) -> Path:
    """Four files as Fashion-MNIST has them, of smaller images with noise and a sign of their class."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, count in (("train", 600), ("t10k", 100)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = np.zeros((count, 10, 10), np.uint8)
        images[:, :2] = rng.integers(0, 99, (count, 2, 10))
        images[np.arange(count), 4, labels] = 255
        for kind, values, head in (
            ("images-idx3", images, (2051, count, 10, 10)),
            ("labels-idx1", labels, (2049, count)),
        ):
            with gzip.open(folder / f"{part}-{kind}-ubyte.gz", "wb", compresslevel=1) as file:
                file.write(np.array(head, ">i4").tobytes() + values.tobytes())
    return folder


STAGES = ("compare", "recipe", "remedies", "gap", "ranking")


def test_every_stage_of_the_study_writes_its_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "RECIPE", {"as it is": [], "drop path": ["--drop_path_prob=0.1"]})
    monkeypatch.setattr(evidence, "REMEDIES", {"frozen": ("alpha frozen", ["--sampler=straight_through"])})
    monkeypatch.setattr(evidence, "SAMPLERS", ("dsnas", "softmax"))
    monkeypatch.setattr(evidence, "_POOL", 2)
    small = ["--init_channels=4", "--epochs=2", "--batch_size=8", "--crop_padding=1", "--device=cpu"]
    select = ["--warmup_epochs=1", "--select=3", "--finalists=1", "--finalist_epochs=1"]
    given = [
        f"--source={pack(tmp_path / 'source')}", "--images=50", "--test_images=60", "--n=2", "--tries=1", "--params=9000",
        f"--data_dir={tmp_path}/data", f"--experiments_dir={tmp_path}/experiments", f"--out={tmp_path}/docs",
        f"--visualizations_dir={tmp_path}/visualizations",
        f"--search_options={json.dumps([*small, *select])}",
        f"--retrain_options={json.dumps(small)}",
    ]  # fmt: skip
    evidence.main([*given, "--stage=prepare"])
    splits = [json.loads((tmp_path / "data" / f"fashion_{name}.json").read_text()) for name in ("study", "tuning")]
    assert all([len(split[part]) for part in ("train", "valid", "test")] == [40, 10, 60] for split in splits)
    named = [name for split in splits for part in split.values() for name in part]
    assert len({*named}) == len(named)  # what is tuned on is not in the comparison
    few = json.loads((tmp_path / "data" / "fashion_few.json").read_text())
    assert len(few["train"]) == 10 and {*few["train"], *few["valid"]} < {*splits[1]["train"]}
    assert few["test"] == splits[1]["test"]
    assert evidence.main([*given, "--stage=compare", "--minutes=1e-9"]) is None
    assert "runs are missing" in capsys.readouterr().out
    found = {stage: evidence.main([*given, f"--stage={stage}"]) for stage in STAGES}
    page = (tmp_path / "docs" / "evidence.md").read_text()
    for stage, result in found.items():
        assert result is not None and f"<!-- {stage} -->" in page
        assert json.loads((tmp_path / "docs" / "evidence" / f"{stage}.json").read_text()) == json.loads(
            json.dumps(result)
        )
    compared = found["compare"]
    assert compared is not None and 0 <= compared["analysis"]["permutation_p"] <= 1
    assert [run["seed"] for run in compared["runs"]["resnet"]] == [0, 1]
    for name in ("compare", "gap"):
        assert (tmp_path / "docs" / "evidence" / f"{name}.png").stat().st_size > 5000
    capsys.readouterr()
    evidence.main([*given, "--stage=compare"])
    assert "epoch   1" not in capsys.readouterr().out  # nothing is run twice
    carried = tmp_path / "experiments" / "evidence_compare" / "comparison.json"
    again = evidence.main([*given, "--stage=compare", f"--experiments_dir={tmp_path}/new", f"--others=[{carried}]"])
    assert again is not None and again["runs"] == json.loads(carried.read_text())["runs"]
    assert not list((tmp_path / "new").glob("*_search_*"))  # every round is carried over
    with pytest.raises(UserError, match="--part foo is none of 1/2"):
        evidence.main([*given, "--stage=gap", "--part=foo"])
    with pytest.raises(UserError, match=r"has no train-images-idx3-ubyte\.gz; apt-get install dataset-fashion-mnist"):
        evidence.main([*given, "--stage=prepare", f"--source={tmp_path}"])
