"""A trained child as a file that runs without this repository, checked, timed and described."""

import json
import re
import runpy
import statistics
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import options
import utils
from child import card, program, smaller, source
from loading import pixels
from loading.augmentation import symmetries
from loading.batches import Data
from loading.sets import DataInfo
from options import UserError
from options.child_option import ChildOptions
from options.export_option import ExportOptions
from resources import latency
from training import checkpoint
from training.opening import one_writer

Predict = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]  # images (B, C, H, W) -> logits (B, classes)


class Exported(NamedTuple):
    """What an export leaves: the file, its cards, and what the card says."""

    path: Path
    cards: list[Path]
    card: dict[str, Any]


class Classifier(nn.Module):
    """The child with its normalisation: images as they come from a file -> logits.

    Args:
        network: the child, in eval mode.
        info: of its data; mean and std are those of pixels in 0..1.
        scale: the value of a white pixel: 255 for bytes, 1 for floats.
        flip: over whose forms of an image the logits are averaged, see augmentation.symmetries.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, info: DataInfo, scale: float, flip: str = "none") -> None:
        super().__init__()
        self.network, self.flip = network, flip
        for parameter in network.parameters():  # plain strides, which every format stores as they are
            parameter.data = parameter.data.contiguous().clone()
        self.register_buffer("mean", torch.tensor(info.mean).view(1, -1, 1, 1) * scale)
        self.register_buffer("std", torch.tensor(info.std).view(1, -1, 1, 1) * scale)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 or float32 -> (B, classes) float32."""
        images = (images.float() - self.mean) / self.std
        forms = symmetries(images, self.flip)  # one pass for all of them: the file holds the network once
        return self.network(torch.stack(forms, 1).flatten(0, 1))[0].unflatten(0, (-1, len(forms))).mean(1)


def run_export(opt: ExportOptions) -> Exported:
    """Export a child, compare the reloaded file with it, measure its latency, write its model card.

    Raises:
        UserError: no such checkpoint, a file in the way, a missing package, or a file that disagrees with the model.
    """
    weights = _find_checkpoint(opt)
    content = checkpoint.load(weights)
    if content.get("stem") != "child":
        raise UserError(f"--checkpoint {weights} is a search's; retrain its child first: python retrain.py")
    kind = "" if opt.precision == "fp32" else f"_{opt.precision}"
    path = Path(opt.out) if opt.out else weights.with_name(f"child{kind}.{opt.format}")
    cards = [path.with_name(f"{path.name}.{ending}") for ending in ("md", "json")]
    cards.append(path.with_name(f"{path.stem}_{opt.format}.py"))
    with nullcontext() if opt.out else one_writer(path.parent, "name a file elsewhere with --out"):
        _check_free(path, *cards)
        network, genotype = source.load_child(content)
        info = DataInfo(**content["data"])
        trained = options.restore(ChildOptions, content["options"])
        model = Classifier(network, info, 255 if opt.input == "uint8" else 1, trained.test_flip).eval()
        images, kind, data = _images(opt, content, info)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not opt.out:
            utils.clear(path.parent, f".{path.name}.*.tmp")
        # Made and checked in a folder of its own, so that nothing unchecked is left behind, whatever ends this process.
        with TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as name:
            made, *described = (Path(name) / file.name for file in (path, *cards))
            write = _export_onnx if opt.format == "onnx" else _export_pt2
            predict = write(model, images, made, _metadata(info, opt))
            difference = _compare(model, predict, images)
            print(f"compared with the model on {len(images)} {kind}: largest difference of a logit {difference:.2e}")
            checked: dict[str, Any] = {"largest_difference": difference, "compared_on": f"{len(images)} {kind}"}
            if opt.precision != "fp32":
                predict, checked["smaller"] = _smaller(opt, made, predict, images, data)
                checked["largest_difference"] = _difference(model, predict, images)
            utils.write_atomic(described[2], _program(path))
            if kind == "test images":
                _compare_files(described[2], content, opt, images, predict)
            checked["latency"] = _latency({opt.format: predict}, images[:1].numpy())[opt.format]
            test = card.test_figures(weights.parent / "test.json", source.fingerprint(network))
            said = card.describe(opt, path, content, genotype) | checked | {"test": test}
            utils.write_atomic(described[1], json.dumps(said, indent=1) + "\n")
            utils.write_atomic(described[0], card.markdown(said))
            _check_free(path, *cards)  # again: another export may have been faster
            for file, target in zip((made, *described), (path, *cards), strict=True):
                file.replace(target)
        print(f"written  {path}, {', '.join(map(str, cards))}")
        return Exported(path, cards, said)


def _check_free(*files: Path) -> None:
    for file in files:
        if file.exists():
            raise UserError(f"{file} exists; name another file with --out")


def _compare(model: Classifier, predict: Predict, images: Tensor) -> float:
    """The largest difference of a logit between the file and the model; raises UserError for a wrong file."""
    with torch.no_grad():
        most = float(model(images).abs().max())
    difference = _difference(model, predict, images)
    if not difference <= 1e-3 * max(1.0, most):
        raise UserError(f"the exported file computes something else than the model (difference {difference:.2e})")
    return difference


def _difference(model: Classifier, predict: Predict, images: Tensor) -> float:
    with torch.no_grad():
        return float(np.abs(predict(images.numpy()) - model(images).numpy()).max())


def _program(path: Path) -> str:
    """The program beside the file: what training did to pixels, and how to classify with it."""
    first, second = (Path(str(module.__file__)).read_text(encoding="utf-8") for module in (pixels, program))
    second = re.sub(r"from loading.pixels import .*\n\n", "", second)
    return f"{first}\n\n{second}".replace('MODEL = "child.onnx"', f"MODEL = {json.dumps(path.name)}")


def _compare_files(
    written: Path, content: Mapping[str, Any], opt: ExportOptions, images: Tensor, predict: Predict
) -> None:
    """The program's own way from some of the files to pixels and guesses against the file's; raises UserError."""
    folder = Path(opt.dataset or content["options"]["dataset"])
    names = content["split"]["test"][: min(len(images), 32)]
    if not (folder / names[0]).is_file():  # a named data set
        return
    info = DataInfo(**content["data"])
    height, width = info.image_size
    module = runpy.run_path(str(written))
    guess = module["classifier"]()
    for name, wanted in zip(names, images, strict=False):
        share = float(torch.from_numpy(predict(wanted[None].numpy())).softmax(-1).max())
        got = module["preprocess"](folder / name, "L" if info.channels == 1 else "RGB", (width, height), info.white)
        same = np.array_equal(got[0], (wanted if opt.input == "uint8" else wanted * 255).round().byte().numpy())
        if not same or abs(guess(str(folder / name))[1] - share) > 1e-3:
            what = "guesses otherwise about" if same else "has other pixels of"
            raise UserError(f"the program beside the exported file {what} {folder / name} than the model")


def _smaller(
    opt: ExportOptions, path: Path, whole: Predict, images: Tensor, data: Data | None
) -> tuple[Predict, dict[str, Any]]:
    """Make the file one of less precision; what that loses and gains. Raises UserError where it cannot be made."""
    before = path.stat().st_size
    if opt.precision == "fp16":
        smaller.to_half(path)
    elif data is None:
        raise UserError("--precision int8 measures its ranges on training images; give --dataset")
    else:
        chosen = data.indices["train"][torch.randperm(len(data.indices["train"]), generator=torch.Generator())]
        smaller.to_bytes(path, _as_taken(opt, data.pixels[chosen[: opt.calibration_images]]).numpy())
    session = latency.session(str(path))
    predict: Predict = lambda images: session.run(None, {"images": images})[0]  # noqa: E731
    if not np.isfinite(predict(images.numpy())).all():
        raise UserError(f"--precision {opt.precision} makes logits that are no numbers; keep fp32")
    times = _latency({"fp32": whole, opt.precision: predict}, images[:1].numpy())
    found: dict[str, Any] = {
        "bytes": path.stat().st_size,
        "bytes_fp32": before,
        "latency_ms": times[opt.precision]["latency_ms"],
        "latency_ms_fp32": times["fp32"]["latency_ms"],
    }
    if data is not None and len(data.indices["test"]):
        found |= _accuracies(opt, data, {"acc": predict, "acc_fp32": whole})
    lost = f"accuracy {found['acc']:.2f} % instead of {found['acc_fp32']:.2f} %, " if "acc" in found else ""
    print(
        f"{opt.precision}: {lost}{found['latency_ms']:.2f} ms an image instead of {found['latency_ms_fp32']:.2f}, "
        f"{found['bytes'] / 1024:,.0f} KiB instead of {before / 1024:,.0f}"
    )
    return predict, found


def _accuracies(opt: ExportOptions, data: Data, files: Mapping[str, Predict]) -> dict[str, float]:
    """Per cent of the test images that each file guesses."""
    right = dict.fromkeys(files, 0)
    for chosen in data.indices["test"].split(256):
        batch, labels = _as_taken(opt, data.pixels[chosen]).numpy(), data.labels[chosen].numpy()
        for name, predict in files.items():
            right[name] += int((predict(batch).argmax(1) == labels).sum())
    return {name: 100 * count / len(data.indices["test"]) for name, count in right.items()}


def _as_taken(opt: ExportOptions, pixels: Tensor) -> Tensor:
    """Bytes in the type that the file takes."""
    return pixels if opt.input == "uint8" else pixels.float() / 255


def _find_checkpoint(opt: ExportOptions) -> Path:
    given = Path(opt.checkpoint)
    if given.is_file():
        return given
    folder = Path(opt.experiments_dir) / opt.checkpoint
    newest = checkpoint.newest(folder, "child")
    if newest is None:
        raise UserError(f"--checkpoint {opt.checkpoint}: no such file, and no child checkpoint in {folder}")
    return newest


def _images(opt: ExportOptions, content: Mapping[str, Any], info: DataInfo) -> tuple[Tensor, str, Data | None]:
    """Images to compare on, in the type the exported model takes, what they are, and the data where it is there."""
    stored = options.restore(ChildOptions, content["options"])
    stored = replace(stored, dataset=opt.dataset or stored.dataset, data_dir=opt.data_dir)
    data = None
    try:
        data = Data(stored, content["split"], like=info)
        for note in data.notes:
            print(f"note: {note}")
        tested = data.indices["test"][: max(2, opt.check_images)]
        if not len(tested):
            raise UserError("the split has no test images")
        images, kind = data.pixels[tested], "test images"
    except UserError as error:
        if opt.dataset:
            raise UserError(f"{error.problem}; give the data that the child was trained on") from None
        print(f"note: no test images to compare on ({error.problem}); random ones are taken: give --dataset")
        shape = (max(2, opt.check_images), info.channels, *info.image_size)
        images, kind = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator()), "random images"
    return _as_taken(opt, images), kind, data


def _metadata(info: DataInfo, opt: ExportOptions) -> dict[str, str]:
    """What a user of the file needs to know, kept inside it; values are JSON but for the mode of PIL."""
    height, width = info.image_size
    return {
        "classes": json.dumps(info.classes),
        "size": json.dumps([width, height]),
        "mode": "L" if info.channels == 1 else "RGB",
        "input": opt.input,
        "white": json.dumps(info.white),
    }


def _export_onnx(model: Classifier, images: Tensor, path: Path, metadata: Mapping[str, str]) -> Predict:
    latency.onnxruntime("--format onnx")
    import onnx

    torch.onnx.export(
        model,
        (images[[0, -1]],),
        path,
        dynamo=True,
        external_data=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    proto = onnx.load(path)
    for part in (proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.graph.initializer):
        part.ClearField("metadata_props")  # which line made it, with this machine's paths: more than half of the file
    onnx.helper.set_model_props(proto, dict(metadata))
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)
    session = latency.session(str(path))
    return lambda images: session.run(None, {"images": images})[0]


def _export_pt2(model: Classifier, images: Tensor, path: Path, metadata: Mapping[str, str]) -> Predict:
    program = torch.export.export(model, (images[[0, -1]],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # this machine's paths
    torch.export.save(program, path, extra_files={"metadata.json": json.dumps(dict(metadata))})
    loaded = torch.export.load(path).module()

    def predict(images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        with torch.no_grad():
            return loaded(torch.from_numpy(images)).numpy()

    return predict


def _latency(files: Mapping[str, Predict], image: np.ndarray[Any, Any]) -> dict[str, dict[str, Any]]:
    """Milliseconds for one image, median and 10th to 90th percentile of 100 calls in turns after 20 to warm up."""
    calls = {name: partial(utils.timed, partial(predict, image)) for name, predict in files.items()}
    found = {}
    for name, seconds in utils.in_turns(calls, 120).items():
        times = [1000 * t for t in seconds[20:]]
        tenths = statistics.quantiles(times, n=10)
        found[name] = {
            "latency_ms": statistics.median(times),
            "p10_ms": tenths[0],
            "p90_ms": tenths[-1],
            "n": len(times),
            "batch": 1,
            "runtime": "torch.export, eager" if name == "pt2" else "onnxruntime",
            "device": f"{utils.processor()}, threads: {torch.get_num_threads()}",
        }
    return found
