import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
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
from loading import batches
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
    assert [p.name for p in (exported.path, *exported.cards)] == [
        "child.onnx", "child.onnx.md", "child.onnx.json", "child_onnx.py",
    ]  # fmt: skip
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


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_a_file_holds_the_network_once_and_no_path_of_its_machine(
    kind: str, searched: list[str], tmp_path: Path, tiny: Path
) -> None:
    sizes = []
    for name, tta in (("one", False), ("eight", True)):
        retrain.main([*searched, "--flip=dihedral", f"--tta={tta}", f"--name={name}", "--epochs=1"])
        exported = export_model.main(
            [f"--experiments_dir={tmp_path}/experiments", f"--checkpoint={name}", f"--format={kind}"]
        )
        sizes.append(exported.path.stat().st_size)
        content = [exported.path.read_bytes()]
        if kind == "pt2":
            with zipfile.ZipFile(exported.path) as archive:
                content = [archive.read(member) for member in archive.namelist()]
        root = str(Path(export.__file__).parents[1]).encode()
        assert not any(root in part or b"stack_trace" in part for part in content)
    assert sizes[1] < 1.3 * sizes[0]
    done = subprocess.run(
        [sys.executable, exported.cards[2], next(tiny.rglob("*.png"))], capture_output=True, text=True, check=True
    )
    assert done.stderr == "" and "class" in done.stdout


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


def classified(program: Path, *files: Path) -> list[str]:
    """What the program beside an exported file says of images, in a folder and an environment of its own."""
    command = [sys.executable, program.name, *map(str, files)]
    done = subprocess.run(command, cwd=program.parent, capture_output=True, text=True, check=True)
    return [line.split(": ")[-1].split(" (")[0] for line in done.stdout.splitlines()]


def stored(kind: str, numbers: np.ndarray) -> tuple[Image.Image, str, dict[str, object]]:
    """An image of brightness 0..179 as some kind of file: the image, its ending, how to save it."""
    grey = Image.fromarray(numbers.astype(np.uint8))
    if kind == "14 bits":
        return Image.fromarray((7000 + numbers * 8).astype(np.uint16)), "png", {}
    if kind == "12 bits":
        return Image.fromarray((numbers * 16).astype(np.uint16)), "tif", {}
    if kind == "floats":
        return Image.fromarray((numbers / 50).astype(np.float32)), "tif", {}
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        return grey, "jpg", {"exif": exif, "quality": 95}
    if kind == "transparent":
        image = grey.convert("RGBA")
        image.putalpha(Image.fromarray(np.full(numbers.shape, 128, np.uint8)))
        return image, "png", {}
    converted = {"palette": "P", "CMYK": "CMYK", "black and white": "1"}
    return (grey.convert(converted[kind]) if kind in converted else grey), {"CMYK": "tif"}.get(kind, "png"), {}


KINDS = ("8 bits", "14 bits", "12 bits", "floats", "turned", "transparent", "palette", "CMYK", "black and white")


@pytest.mark.parametrize("kind", KINDS)
def test_the_program_beside_the_file_guesses_what_the_test_figures_say(
    kind: str, tmp_path: Path, arguments: list[str]
) -> None:
    """From files to guesses: an image is dark on one side, which side is its class."""
    rng, data = np.random.default_rng(0), tmp_path / "data"
    for number in range(48):
        numbers = rng.integers(0, 60, (9, 12)) + 20
        rows = number % 2 == 0
        numbers[slice(None, 4) if rows else slice(None), slice(None) if rows else slice(None, 5)] += 100
        image, ending, how = stored(kind, numbers)
        folder = data / ("above" if rows else "left")
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number}.{ending}", **how)
    trained = [f"--dataset={data}", arguments[1], "--genotype=SNAS_mild", "--name=child", "--epochs=20", "--learning_rate=0.1",
               "--layers=3",
               "--init_channels=4", "--batch_size=8", "--auxiliary=False", "--cutout=False", "--device=cpu", "--flip=none",
               "--crop_padding=0", "--image_size=8", "--drop_path_prob=0", "--test_portion=0.25"]  # fmt: skip
    tested = retrain.main(trained)
    exported = export_model.main([arguments[1], "--checkpoint=child"])
    split = json.loads((tested.folder / "split.json").read_text())
    files = [data / name for name in split["test"]]
    guesses = classified(exported.cards[2], *files)
    right = sum(guess == file.parent.name for guess, file in zip(guesses, files, strict=True))
    assert 100 * right / len(files) == pytest.approx(tested.figures["acc"])
    assert tested.figures["acc"] > 80  # or the comparison says little


def test_the_help_says_how_to_classify(trained: list[str], tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported = export_model.main([*trained, "--format=pt2", "--input=float"])
    with pytest.raises(SystemExit):
        export_model.main(["--help"])
    assert export_model.EXAMPLE in capsys.readouterr().out
    files = sorted(tiny.rglob("*.png"))[::5]
    model = runpy.run_path(str(exported.cards[2]))
    found = [name for name, _ in model["classify"]([str(file) for file in files])]
    assert found == classified(exported.cards[2], *files) and {*found} <= {"class0", "class1", "class2"}


def test_a_program_that_reads_otherwise_than_training_is_not_kept(
    trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export._program
    monkeypatch.setattr(
        export, "_program", lambda *given: real(*given).replace(".convert(mode)", ".convert(mode).rotate(90)")
    )
    with pytest.raises(UserError, match="has other pixels of"):
        export_model.main(trained)
    assert not list((Path(trained[0].split("=")[1]) / "again").glob("child*onnx*"))


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
    def gone(*_: object, **__: object) -> object:
        raise UserError("no such folder")

    monkeypatch.setattr(export, "Data", gone)
    exported = export_model.main([*trained, "--check_images=5"])
    assert exported.card["compared_on"] == "5 random images"
    assert "give --dataset" in capsys.readouterr().out


def test_what_lies_beside_is_not_taken_for_what_it_is_not(
    trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "experiments" / "again"
    for number, text in enumerate(("{}", "none", "[]", '{"weights": "0"}')):
        (folder / "test.json").write_text(text)
        exported = export_model.main([*trained, f"--out={tmp_path}/{number}.onnx"])
        assert exported.card["test"] is None and "does not say that it is of these weights" in capsys.readouterr().out


def test_a_single_test_image_is_enough(searched: list[str], tiny: Path, tmp_path: Path) -> None:
    names = sorted(str(path.relative_to(tiny)) for path in tiny.rglob("*.png"))
    (tmp_path / "one.json").write_text(json.dumps({"train": names[1:30], "valid": names[30:], "test": names[:1]}))
    retrain.main([*searched, "--genotype=SNAS_mild", f"--split={tmp_path}/one.json", "--epochs=1"])
    for kind in ("onnx", "pt2"):
        exported = export_model.main(
            [f"--experiments_dir={tmp_path}/experiments", "--checkpoint=again", f"--format={kind}"]
        )
        assert exported.card["compared_on"] == "1 test images"


def test_an_ending_of_another_format_is_refused(trained: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("m.bin", "m", "m.pt2"):
        with pytest.raises(SystemExit):
            export_model.main([*trained, f"--out={name}"])
        assert "does not end in .onnx" in capsys.readouterr().err


def test_a_file_that_computes_something_else_is_not_kept(trained: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = export._export_onnx
    monkeypatch.setattr(export, "_export_onnx", lambda *a: lambda pixels: real(*a)(pixels) + 1)
    with pytest.raises(UserError, match="something else"):
        export_model.main(trained)
    assert not list((Path(trained[0].split("=")[1]) / "again").glob("child.onnx*"))


def test_an_earlier_epoch_does_not_carry_the_figures_of_the_last(trained: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "experiments" / "again"
    content = checkpoint.load(folder / "child_epoch_3.pt")
    content["parts"]["network"]["classifier.bias"] += 1
    checkpoint.save(folder / "child_epoch_2.pt", {**content, "epoch": 2, "metrics": {**content["metrics"], "epoch": 2}})
    exported = export_model.main([trained[0], f"--checkpoint={folder}/child_epoch_2.pt"])
    assert exported.card["test"] is None
    assert "not been tested" in exported.cards[0].read_text()


def test_the_program_goes_on_after_what_it_cannot_read(trained: list[str], tiny: Path, tmp_path: Path) -> None:
    exported = export_model.main(trained)
    good = next(tiny.rglob("*.png"))
    bad, named = tmp_path / "torn.png", tmp_path / "\u2603.png"
    bad.write_bytes(good.read_bytes()[:40])
    shutil.copy(good, named)

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, exported.cards[2].name, *map(str, arguments)]
        env = os.environ | {"PYTHONIOENCODING": "cp1252"}
        return subprocess.run(command, cwd=exported.path.parent, capture_output=True, text=True, env=env)

    done = run(bad, tmp_path / "none.png", tmp_path, named)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 3 and done.stderr.startswith(f"error: {bad}: ")
    assert len(done.stdout.splitlines()) == 1 and "u2603.png: class" in done.stdout
    assert run().returncode == 2 and run("--help").returncode == 0 and "usage" in run("--help").stdout
    exported.path.write_bytes(b"torn")
    done = run(good)
    assert done.returncode == 2 and done.stderr.startswith("error: child.onnx beside this program cannot be used")
    assert len(done.stderr.splitlines()) == 1


def test_a_killed_export_leaves_nothing_under_the_names(trained: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        assert not list((Path(trained[0].split("=")[1]) / "again").glob("child*onnx*"))
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_compare", killed)
    with pytest.raises(KeyboardInterrupt):
        export_model.main(trained)


@pytest.mark.parametrize(("precision", "most"), [("fp16", 0.05), ("int8", 0.5)])
def test_a_smaller_file_guesses_nearly_the_same_and_says_what_is_lost(
    trained: list[str], precision: str, most: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnx
    import onnxruntime

    whole = export_model.main(trained)
    done = export_model.main([*trained, f"--precision={precision}"])
    assert done.path.name == f"child_{precision}.onnx" and (done.path.parent / f"child_{precision}_onnx.py").is_file()
    sessions = [onnxruntime.InferenceSession(str(one.path)) for one in (whole, done)]
    images = np.random.default_rng(0).integers(0, 256, (16, 3, 8, 8), dtype=np.uint8)
    first, second = (session.run(None, {"images": images})[0] for session in sessions)
    assert done.card["largest_difference"] > 10 * whole.card["largest_difference"]
    assert second.dtype == np.float32 and 0 < np.abs(first - second).max() < most
    assert sessions[1].get_modelmeta().custom_metadata_map == sessions[0].get_modelmeta().custom_metadata_map
    kinds = {tensor.data_type for tensor in onnx.load(done.path).graph.initializer}
    assert {"fp16": onnx.TensorProto.FLOAT16, "int8": onnx.TensorProto.INT8}[precision] in kinds
    said = done.card["smaller"]
    assert abs(said["acc"] - said["acc_fp32"]) <= 100 / 8 and said["bytes"] == done.path.stat().st_size
    assert f"{precision} against fp32" in done.cards[0].read_text() and "instead of" in capsys.readouterr().out


def test_int8_needs_training_images_and_onnx(trained: list[str], tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        export_model.main([*trained, "--precision=int8", "--format=pt2"])
    path = next((tmp_path / "experiments").rglob("child_epoch_*.pt"))
    content = checkpoint.load(path)
    content["options"]["dataset"] = str(tmp_path / "gone")
    checkpoint.save(path, content)
    with pytest.raises(UserError, match="measures its ranges on training images; give --dataset"):
        export_model.main([*trained, "--precision=int8"])
    assert not [*path.parent.glob("child_int8*")]


def test_the_card_has_the_licence_and_the_notice_of_the_data(trained: list[str], tmp_path: Path, tiny: Path) -> None:
    shutil.copytree(tiny, tmp_path / "noticed")
    (tmp_path / "noticed" / "LICENSE.txt").write_text("Not to be sold.\n| nor rented")
    more = [f"--dataset={tmp_path / 'noticed'}", "--licence=CC BY 4.0"]
    done = export_model.main([*trained, *more])
    said = done.cards[0].read_text()
    assert done.card["data_notice"].startswith("Not to be sold") and done.card["licence"] == "CC BY 4.0"
    assert "| licence | CC BY 4.0 |" in said and "\n    Not to be sold.\n    | nor rented\n" in said
    assert "not stated" in export_model.main([*trained, f"--out={tmp_path}/other.onnx"]).cards[0].read_text()
