import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fused import build

compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler is called c++ here")


@compiler
def test_without_a_compiler_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for compiler, word in (
        ("/nonexistent/c++", "no C++ compiler"),
        ("false", "false failed"),
        ("c++ -nonsense", "failed"),
        ('c++ "', "is no command"),
    ):
        monkeypatch.setenv("CXX", compiler)
        monkeypatch.setattr(build, "missing", "")
        build.path.cache_clear()
        assert build.library.__wrapped__() is None and word in build.missing
    monkeypatch.setenv("SNAS_KERNELS", "off")
    assert build.library.__wrapped__() is None and build.missing == "SNAS_KERNELS=off"
    assert not list(tmp_path.rglob("*.so"))
    build.path.cache_clear()


@pytest.mark.usefixtures("compiled")
def test_a_damaged_library_is_compiled_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    good, damaged = build.path(), tmp_path / "kernels.so"
    damaged.write_bytes(b"torn")
    monkeypatch.setattr(build, "path", lambda: damaged)
    monkeypatch.setattr(build, "_compile", lambda file: shutil.copy(good, file))
    assert build.library.__wrapped__() is not None and damaged.read_bytes() == good.read_bytes()


@compiler
def test_a_compiler_with_a_launcher_and_further_flags_is_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {build.path.__wrapped__()}
    monkeypatch.setenv("CXX", "env c++")
    paths.add(build.path.__wrapped__())
    monkeypatch.setenv("SNAS_CXXFLAGS", "-O2 -DEXAMPLE='a b'")
    paths.add(build.path.__wrapped__())
    assert len(paths) == 3 and build._command()[-2:] == ["-O2", "-DEXAMPLE=a b"]


@compiler
def test_every_source_belongs_to_the_name_of_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for file in build.SOURCE.parent.iterdir():
        if file.suffix in (".cpp", ".h"):
            shutil.copy(file, tmp_path)
    monkeypatch.setattr(build, "SOURCE", tmp_path / build.SOURCE.name)
    paths = {build.path.__wrapped__()}
    for file in sorted(tmp_path.iterdir()):
        file.write_text(file.read_text() + "// changed\n")
        paths.add(build.path.__wrapped__())
    assert len(paths) == 1 + len([*tmp_path.iterdir()]) > 10


@pytest.mark.usefixtures("compiled")
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm is here")
def test_the_library_gives_out_its_four_functions_alone() -> None:
    listed = subprocess.run(["nm", "-D", "--defined-only", build.path()], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in listed.stdout.splitlines()}
    assert {name for name in names if "asan" not in name and not name.startswith("__")} == {
        "parts_forward", "parts_backward", "kept_floats", "vector_width",
    }  # fmt: skip


def test_one_of_several_processes_compiles_for_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[list[str]] = []

    def slow(command: list[str]) -> str:
        calls.append(command)
        Path(command[command.index("-o") + 1]).write_text("made")
        os.sched_yield()
        return ""

    monkeypatch.setattr(build, "_run", slow)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(build._compile, [tmp_path / "new" / "kernels.so"] * 4))
    assert len(calls) == 1 and (tmp_path / "new" / "kernels.so").read_text() == "made"
