import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import export_model
import operations
import options
import retrain
from child import export, source
from loading import batches, images
from options import UserError
from options.child_option import ChildOptions
from training import checkpoint


@pytest.fixture
def trained(searched: list[str], tmp_path: Path) -> list[str]:
    """A trained child called again, and where experiments lie."""
    retrain.main(searched)
    return [f"--experiments_dir={tmp_path}/experiments", "--checkpoint=again"]


def test_onnx_takes_bytes_and_gives_the_logits_of_the_model(trained: list[str], tmp_path: Path, tiny: Path) -> None:
    import onnxruntime

    exported = export_model.main(trained)
    assert [p.name for p in (exported.path, *exported.cards)] == ["child.onnx", "child.onnx.md", "child.onnx.json"]
    assert not list(exported.path.parent.glob("*.data"))  # no side file
    session = onnxruntime.InferenceSession(exported.path)
    content = checkpoint.load(tmp_path / "experiments" / "again" / "child_epoch_3.pt")
    network, _ = source.load_child(content)
    made = batches.Data(options.restore(ChildOptions, content["options"]), content["split"], train_on_valid=True)
    normalised, _ = next(made.batches("test", 99, torch.device("cpu")))
    with torch.no_grad():
        wanted = network(normalised)[0].numpy()
    pixels = made.pixels[made.indices["test"]].numpy()
    for batch in (1, 3, 8):
        got = session.run(None, {"images": pixels[:batch]})[0]
        assert np.abs(got - wanted[:batch]).max() < 1e-4
    meta = session.get_modelmeta().custom_metadata_map
    assert json.loads(meta["classes"]) == ["class0", "class1", "class2"]


@pytest.mark.parametrize("name", ["sep_conv_3x3", "dil_conv_5x5"])
def test_an_exported_operation_has_no_form_that_only_training_is_faster_with(name: str) -> None:
    """Strided and dilated convolutions are one node each, not a slice or a shuffle of a larger one."""
    operation = operations.make_op(name, 4, 2 if name == "sep_conv_3x3" else 1, affine=True).eval()
    proto = torch.onnx.export(operation, (torch.rand(1, 4, 16, 16),), dynamo=True, verbose=False).model_proto
    kinds = {node.op_type for node in proto.graph.node}
    assert "Conv" in kinds and kinds <= {"Conv", "Relu", "BatchNormalization"}
    depthwise = next(node for node in proto.graph.node if node.op_type == "Conv")
    attributes = {a.name: list(a.ints) for a in depthwise.attribute if a.ints}
    assert attributes["strides"] == ([2, 2] if name == "sep_conv_3x3" else [1, 1])
    assert attributes["dilations"] == ([1, 1] if name == "sep_conv_3x3" else [2, 2])


@pytest.mark.parametrize(("kind", "taken"), [("pt2", "uint8"), ("onnx", "float")])
def test_other_formats_and_inputs_agree_too(trained: list[str], kind: str, taken: str) -> None:
    exported = export_model.main([*trained, f"--format={kind}", f"--input={taken}"])
    assert exported.card["largest_difference"] < 1e-4
    assert exported.card["compared_on"] == "8 test images"
    if kind == "pt2":
        loaded = torch.export.load(exported.path).module()
        assert loaded(torch.zeros(5, 3, 8, 8, dtype=torch.uint8)).shape == (5, 3)


def test_the_card_says_what_the_file_is(trained: list[str], tmp_path: Path) -> None:
    exported = export_model.main(trained)
    card = json.loads(exported.cards[1].read_text())
    tested = json.loads((tmp_path / "experiments" / "again" / "test.json").read_text())
    assert card == exported.card
    assert card["test"]["acc"] == tested["acc"]
    assert (card["params"], card["flops"]) == (tested["params"], tested["flops"])
    assert card["latency"]["latency_ms"] > 0
    assert card["latency"]["p10_ms"] <= card["latency"]["latency_ms"] <= card["latency"]["p90_ms"]
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", card["commit"])
    text = exported.cards[0].read_text()
    for words in (f"{tested['acc']:.2f} %", "class1", f"{tested['params']:,} parameters", "onnxruntime", "node 0"):
        assert words in text


def test_the_example_of_the_help_text_classifies_an_image(
    trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported = export_model.main(trained)
    with pytest.raises(SystemExit):
        export_model.main(["--help"])
    assert export_model.EXAMPLE in capsys.readouterr().out
    assert len(export_model.EXAMPLE.strip().splitlines()) == 5
    image = tmp_path / "wide.png"  # of another size and shape than the model's
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 33, 3), dtype=np.uint8)).save(image)
    done = subprocess.run(
        [sys.executable, "-c", export_model.EXAMPLE, image],
        cwd=exported.path.parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    pixels = images._read(image, 8).pixels.transpose(2, 0, 1)[None]
    import onnxruntime

    session = onnxruntime.InferenceSession(exported.path)
    wanted = f"class{session.run(None, {'images': pixels})[0].argmax()}"
    assert done.stdout.strip() == wanted


def test_nothing_is_overwritten_and_bad_sources_are_named(trained: list[str], tmp_path: Path) -> None:
    exported = export_model.main(trained)
    before = exported.path.read_bytes()
    with pytest.raises(UserError, match="exists; name another file with --out"):
        export_model.main(trained)
    assert exported.path.read_bytes() == before
    with pytest.raises(UserError, match="no child checkpoint"):
        export_model.main([trained[0], "--checkpoint=nothing"])
    with pytest.raises(UserError, match="is a search's"):
        export_model.main([trained[0], f"--checkpoint={tmp_path}/experiments/run/weights_epoch_2.pt"])
    with pytest.raises(UserError, match="no such folder"):
        export_model.main([*trained, "--dataset=/nowhere", f"--out={tmp_path}/x.onnx"])


def test_without_the_data_random_images_are_compared(
    trained: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(*_: object) -> object:
        raise UserError("no such folder")

    monkeypatch.setattr(export, "Data", gone)
    exported = export_model.main([*trained, "--check_images=5"])
    assert exported.card["compared_on"] == "5 random images"
    assert "give --dataset" in capsys.readouterr().out


def test_a_file_that_computes_something_else_is_not_kept(trained: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = export._export_onnx
    monkeypatch.setattr(export, "_export_onnx", lambda *a: lambda pixels: real(*a)(pixels) + 1)
    with pytest.raises(UserError, match="something else"):
        export_model.main(trained)
    assert not list((Path(trained[0].split("=")[1]) / "again").glob("child.onnx*"))


def test_an_earlier_epoch_does_not_carry_the_figures_of_the_last(trained: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "experiments" / "again"
    content = checkpoint.load(folder / "child_epoch_3.pt")
    checkpoint.save(folder / "child_epoch_2.pt", {**content, "epoch": 2})
    exported = export_model.main([trained[0], f"--checkpoint={folder}/child_epoch_2.pt"])
    assert exported.card["test"] is None
    assert "not been tested" in exported.cards[0].read_text()
