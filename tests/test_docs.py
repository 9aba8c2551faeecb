"""What docs/ says: the programs of extending.md and the commands of tutorial.md run, names and links are real."""

import importlib
import json
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import counting
import pytest
import torch

import genotypes
import operations
from loading import batches
from model import ChildNetwork
from model_search import Network
from resources import budget, cost
from sampling import Z

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
PROGRAMS = dict(re.findall(r"^## An? (\w+).*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))


@pytest.fixture
def run(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A program by its title -> what it defines; the tables that it adds to are put back."""
    tables: list[dict[str, Any]] = [genotypes.OPS, genotypes.SPACES, operations.KINDS, cost.KINDS, batches.LOADERS]
    tables.append(budget.ESTIMATORS)  # type: ignore[arg-type]
    before = [dict(table) for table in tables]
    (tmp_path / "dataset").symlink_to(tiny)
    monkeypatch.chdir(tmp_path)

    def program(title: str) -> dict[str, Any]:
        (tmp_path / "mine.py").write_text(PROGRAMS[title])
        return runpy.run_path("mine.py")

    yield program
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


def test_a_program_is_short() -> None:
    assert {*PROGRAMS} >= {"operation", "data", "objective", "estimator", "measure"}
    for title, text in PROGRAMS.items():
        own = re.sub(r"^(from|import) .*\n", "", text, flags=re.MULTILINE)
        assert len([line for line in own.splitlines() if line.strip()]) <= 30, title


def test_a_new_operation_is_that_of_the_child_and_priced_as_counted(run: Any) -> None:
    assert run("operation")["found"].genotype.space == "mine"
    torch.manual_seed(0)
    genotype, images = genotypes.random_genotype("mine", Random(1)), torch.randn(2, 3, 12, 12)
    assert any(op == "group_conv_3x3" for node in genotype.normal for op, _ in node)
    network = Network(8, 3, 3, "mine").eval()
    child = ChildNetwork(genotype, 8, 3, 3, affine=False).eval()
    child.load_state_dict(network.child_state_dict(genotype))
    assert torch.allclose(child(images)[0], network(images, network.one_hot(genotype)), atol=1e-5)
    built = ChildNetwork(genotype, 8, 3, 3).to("meta")
    found = cost.cost(genotype, init_channels=8, layers=3, image_size=12, num_classes=3)
    assert found["params"] == counting.count_params(built)
    assert found["flops"] == counting.count_flops(built, torch.zeros(1, 3, 12, 12, device="meta"))


def test_a_new_data_set_is_searched(run: Any) -> None:
    found = run("data")["found"]
    assert found.metrics["epoch"] == 1 and (found.folder / "split.json").exists()


def test_a_new_objective_is_logged(run: Any) -> None:
    metrics = run("objective")["found"].metrics
    assert 0 < metrics["entropy"] <= 2 * 2 * 2.08  # 2 edges of 2 cells, ln 8


def test_a_new_estimator_is_chosen_by_its_name(run: Any) -> None:
    found = run("estimator")
    assert found["opt"].estimator == "straight_through" and found["found"].metrics["epoch"] == 1
    table, z = cost.Table(1.0, torch.rand(4, 8)), Z(*(torch.rand(2, 8, requires_grad=True).softmax(-1) for _ in "ab"))
    hard = sum(table.costs[row, part.argmax()].item() for row, part in enumerate(torch.cat(z)))
    priced = found["straight_through"](table, z, z)  # alpha plays no part
    assert priced.item() == pytest.approx(1 + hard)
    assert torch.equal(torch.cat(torch.autograd.grad(priced, z)), table.costs)


def test_a_new_measure_is_kept_to(run: Any) -> None:
    metrics = run("measure")["found"].metrics
    assert metrics["child_launches"] <= 4 == metrics["budget_launches"]


DOCS = Path(__file__).parents[1] / "docs"


def test_every_function_of_the_map_exists() -> None:
    names = re.findall(r"`([a-z_]+(?:\.[A-Za-z_]+)+)`", (DOCS / "code.md").read_text(encoding="utf-8"))
    assert len(names) > 20
    for name in names:
        found, rest = None, name.split(".")
        for length in range(len(rest), 0, -1):
            with suppress(ImportError):
                found, rest = importlib.import_module(".".join(rest[:length])), rest[length:]
                break
        for part in rest:
            found = getattr(found, part)  # raises AttributeError with its name
        assert rest, f"{name} is a module"


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


SMALL = ["--image_size=8", "--init_channels=4", "--device=cpu", "--batch_size=128"]
SMALLER = {  # of each script, so that the tutorial takes a minute
    "main.py": [*SMALL, "--epochs=2"],
    "retrain.py": [*SMALL, "--epochs=2"],
    "compare.py": [
        "--n=1",
        "--contenders=[found,plain]",
        f"--search_options={json.dumps([*SMALL, '--epochs=1'])}",
        f"--retrain_options={json.dumps([*SMALL, '--epochs=1'])}",
    ],
}


def same_but_for_numbers(line: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"-?\d[\d,.]*(e-?\d+)?", "#", line)).strip()


def test_the_tutorial_is_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its commands run one after another, and give its lines but for the numbers."""
    for name, source in (("photos", "dataset"), ("options", "options")):
        (tmp_path / name).symlink_to(DOCS.parent / source)
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    commands = re.findall(r"^\$ (.*)\n((?:(?!\$ |```).*\n)*)", page, re.MULTILINE)
    assert [shlex.split(command)[0] for command, _ in commands].count("python") == 6
    for command, lines in commands:
        program, *given = shlex.split(command)
        if program == "pip":
            continue
        capsys.readouterr()
        if given[0].endswith("child_onnx.py"):
            done = subprocess.run([sys.executable, *given], capture_output=True, text=True)
            assert done.returncode == 0 and f"{given[1]}: " in done.stdout, done.stderr
            continue
        importlib.import_module(given[0].removesuffix(".py")).main([*given[1:], *SMALLER.get(given[0], [])])
        said = {same_but_for_numbers(line) for line in capsys.readouterr().out.splitlines()}
        for line in lines.splitlines():
            assert line == "..." or same_but_for_numbers(line) in said, f"{command}: {line}"
