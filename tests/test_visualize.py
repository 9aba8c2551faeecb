import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

import visualize
from genotypes import GENOTYPES, SPACES, derive


def test_cells_are_drawn_to_svg_and_png(tmp_path: Path) -> None:
    files = visualize.draw_genotype(GENOTYPES["DARTS_V2"], tmp_path, "_epoch_3")
    assert [f.name for f in files] == [
        "normal_epoch_3.svg", "normal_epoch_3.png", "reduction_epoch_3.svg", "reduction_epoch_3.png",
    ]  # fmt: skip
    with Image.open(files[1]) as image:
        assert image.width > image.height > 100
    text = files[0].read_text()
    assert text.count("sep_conv_3x3") == 5 and "dil_conv_3x3" in text and "normal cell: 8 operations" in text


def test_none_edges_are_absent_and_nodes_without_input_marked() -> None:
    genotype = GENOTYPES["SNAS_aggressive"]
    source = visualize.cell_graph("reduce", genotype.reduce, genotype.reduce_concat, {}).source
    assert source.count("sep_conv_5x5") == 2 and "label=none" not in source
    assert source.count("no input") == 2 and '2 operations"' in source


def test_every_operation_of_every_space_has_a_colour() -> None:
    for op in {op for space in SPACES.values() for op in space} - {"none"}:
        assert f"[label={op} color=" in visualize.cell_graph("normal", (((op, 0),),), (2,), {}).source


def test_edges_carry_the_probability_of_their_op() -> None:
    alpha = torch.zeros(14, 8)
    alpha[0, 4] = 3.0
    probabilities = visualize.op_probabilities(alpha, "snas")
    assert probabilities[0, 0, "sep_conv_3x3"] == pytest.approx(alpha[0].softmax(0)[4].item())
    genotype = derive(alpha, alpha)
    source = visualize.cell_graph("normal", genotype.normal, genotype.normal_concat, probabilities).source
    assert "sep_conv_3x3 0.74" in source


def test_without_a_renderer_the_source_is_kept_and_the_reason_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(visualize, "find_renderer", lambda: None)
    files = visualize.draw_genotype(GENOTYPES["DARTS_V1"], tmp_path)
    assert [f.name for f in files] == ["normal.gv", "reduction.gv"]
    assert "digraph" in files[0].read_text() and "pip install graphviz-pure" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("program", "words"),
    [("#!/bin/sh\necho 'no fonts' >&2\nexit 3\n", "no fonts"), ("#!/nonexistent/interpreter\n", "cannot be run")],
)
def test_a_failing_renderer_keeps_the_source(
    program: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "dot"
    broken.write_text(program)
    broken.chmod(0o755)
    monkeypatch.setattr(visualize, "find_renderer", lambda: str(broken))
    files = visualize.draw_genotype(GENOTYPES["DARTS_V1"], tmp_path / "out")
    assert {f.suffix for f in files} == {".gv"} and words in capsys.readouterr().out


def test_the_renderer_is_called_without_a_viewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **kw: calls.append(command) or real(command, **kw))
    visualize.draw_genotype(GENOTYPES["DARTS_V1"], tmp_path)
    assert [call[1:] for call in calls] == [["-Kdot", "-Tsvg"], ["-Kdot", "-Tpng"]] * 2


def test_a_renderer_that_hangs_is_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = tmp_path / "dot"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(visualize, "find_renderer", lambda: str(slow))
    monkeypatch.setattr(visualize, "_PATIENCE", 0.2)
    files = visualize.draw_genotype(GENOTYPES["DARTS_V2"], tmp_path / "v")
    assert [file.suffix for file in files] == [".gv", ".gv"] and "did not end in 0.2 seconds" in capsys.readouterr().out
