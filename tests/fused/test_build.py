from pathlib import Path

import pytest

from fused import build


def test_without_a_compiler_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for compiler, word in (
        ("/nonexistent/c++", "no C++ compiler"),
        ("false", "false failed"),
        ("c++ -nonsense", "failed"),
    ):
        monkeypatch.setenv("CXX", compiler)
        monkeypatch.setattr(build, "missing", "")
        build.path.cache_clear()
        assert build.library.__wrapped__() is None and word in build.missing
    monkeypatch.setenv("SNAS_KERNELS", "off")
    assert build.library.__wrapped__() is None and build.missing == "SNAS_KERNELS=off"
    assert not list(tmp_path.rglob("*.so"))
    build.path.cache_clear()


def test_a_compiler_with_a_launcher_and_further_flags_is_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {build.path.__wrapped__()}
    monkeypatch.setenv("CXX", "env c++")
    paths.add(build.path.__wrapped__())
    monkeypatch.setenv("SNAS_CXXFLAGS", "-O2 -DEXAMPLE='a b'")
    paths.add(build.path.__wrapped__())
    assert len(paths) == 3 and build._command()[-2:] == ["-O2", "-DEXAMPLE=a b"]
