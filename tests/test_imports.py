"""Who may import whom, walked. (import-linter refuses single-file modules, which half of these are.)"""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = {"compare", "main", "main_constraint", "inspect_model", "retrain", "export_model", "cut_xview"}
# A module imports from the rows above its own, never from its own row or below.
ROWS = [
    {"genotypes", "options", "sampling"},
    {"utils", "objective"},
    {"fused", "visualize"},
    {"operations"},
    {"model_search", "model", "loading"},
    {"resources", "training"},
    {"search", "child"},
    {"report"},
    SCRIPTS,
    {"benchmarks"},
]
# Inside a wing a module imports those before it.
WINGS = {
    "fused": ["plain", "build", "operation", "choice"],
    "loading": ["pixels", "xview", "kept", "folders", "images", "sets", "records", "splits", "augmentation", "batches"],
    "resources": ["cost", "latency", "projection", "budget"],
    "training": ["distributed", "checkpoint", "parts", "evaluation", "stopping", "run", "opening", "loop", "selection"],
    "child": [
        "baselines",
        "cells",
        "source",
        "testing",
        "program",
        "retraining",
        "card",
        "smaller",
        "export",
        "comparison",
    ],
    "report": ["runs", "charts", "page"],
}
RANK = {name: rank for rank, names in enumerate(ROWS) for name in names}


def imports(path: Path) -> set[str]:
    """Dotted names, of a `from a import b` both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)} & RANK.keys()


def files(room: str) -> list[Path]:
    return [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else [*(ROOT / room).glob("*.py")]


def test_every_module_has_a_row_and_imports_from_the_rows_above_it() -> None:
    top = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert top == RANK.keys()
    for room in top:
        for path in files(room):
            for other in rooms(path) - {room}:
                assert RANK[other] < RANK[room], f"{path.relative_to(ROOT)} imports {other}"


def test_a_wing_says_what_it_is_for_and_its_modules_build_on_each_other_in_order() -> None:
    for wing, order in WINGS.items():
        assert ast.get_docstring(ast.parse((ROOT / wing / "__init__.py").read_text())), wing
        assert {path.stem for path in files(wing)} == {*order, "__init__"}
        for place, name in enumerate(order):
            for later in order[place:]:
                assert f"{wing}.{later}" not in imports(ROOT / wing / f"{name}.py"), f"{wing}.{name} imports {later}"


def test_genotypes_and_the_options_know_no_torch() -> None:
    for path in (ROOT / "genotypes.py", *files("options")):
        assert not {name.split(".")[0] for name in imports(path)} & {"torch", "torchvision", "sklearn"}, path
        assert rooms(path) <= {"genotypes", "options"}, path


def test_search_knows_no_budget_and_nothing_imports_tests_or_images() -> None:
    assert not imports(ROOT / "search.py") & {"resources.budget", "resources.latency"}
    for room in RANK:
        for path in files(room):
            assert not {name.split(".")[0] for name in imports(path)} & {"tests", "dataset"}, path


def test_scripts_import_nothing_slow_before_their_options_are_read() -> None:
    for script in SCRIPTS:
        code = f"import sys, {script}; print('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "False", script


def test_no_module_shadows_the_standard_library() -> None:
    assert not RANK.keys() & sys.stdlib_module_names
