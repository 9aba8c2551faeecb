"""The import table of CONTRIBUTING.md, walked."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = [
    {"genotypes", "options"},
    {"utils", "distributed", "fused", "sampling", "images"},
    {"operations", "splits"},
    {"data", "model_search", "model", "visualize"},
    {"cost", "checkpoint", "report"},
    {"experiment", "child", "budget", "latency"},
    {"engine"},
    {"search", "retraining", "exporting", "constraining"},
    {"main", "main_constraint", "inspect_model", "retrain", "export_model"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def modules() -> dict[str, Path]:
    return {path.stem: path for path in ROOT.glob("*.py")} | {
        package: ROOT / package / "__init__.py" for package in ("options", "fused")
    }


def test_every_module_has_a_layer_and_imports_only_lower_ones() -> None:
    for name, path in modules().items():
        assert name in RANK, f"{name} has no place in the import table"
        for other in imports(path) & RANK.keys():
            assert RANK[other] < RANK[name], f"{name} imports {other}"
    for package in ("options", "fused"):
        for path in (ROOT / package).glob("*.py"):
            assert imports(path) & RANK.keys() <= {package}, path


def test_the_lowest_layer_and_the_options_know_no_torch() -> None:
    for path in (ROOT / "genotypes.py", *(ROOT / "options").glob("*.py")):
        assert not imports(path) & {"torch", "torchvision", "sklearn"}, path


def test_search_knows_no_cost_and_nothing_imports_tests_or_benchmarks() -> None:
    assert not imports(ROOT / "search.py") & {"cost", "model", "child"}
    for path in modules().values():
        assert not imports(path) & {"tests", "benchmarks", "dataset"}


def test_scripts_import_nothing_slow_before_their_options_are_read() -> None:
    for script in LAYERS[-1] & modules().keys():
        code = f"import sys, {script}; print('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "False", script


def test_no_module_shadows_the_standard_library() -> None:
    assert not modules().keys() & sys.stdlib_module_names
