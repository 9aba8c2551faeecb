"""The card of an exported file: what it is, in words and as JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import options
import utils
from child import source, testing
from genotypes import Genotype
from loading.sets import DataInfo
from options.child_option import ChildOptions
from options.export_option import ExportOptions


def describe(opt: ExportOptions, path: Path, content: Mapping[str, Any], genotype: Genotype | None) -> dict[str, Any]:
    """What is known of the file without running it."""
    info, trained = DataInfo(**content["data"]), content["options"]
    child = options.restore(ChildOptions, trained)
    height, width = info.image_size
    values = "0..255" if opt.input == "uint8" else "0..1"
    return {
        "file": path.name,
        "format": opt.format,
        "precision": opt.precision,
        "input": f"images: {opt.input} (B, {info.channels}, {height}, {width}), {values}",
        "output": f"logits: float32 (B, {len(info.classes)})",
        "classes": info.classes,
        "mean": info.mean,
        "std": info.std,
        "white": info.white,
        **testing.tested_cost(child, genotype, info),
        "passes": source.passes(child),
        "data": trained["dataset"],
        "licence": opt.licence,
        "data_notice": _notice(Path(opt.dataset or trained["dataset"])),
        "train_images_per_class": dict(zip(info.classes, info.counts["train"], strict=True)),
        "epoch": content["epoch"],
        "commit": utils.commit(),
        "genotype": genotype and genotype.to_dict(),
        "options": trained,
    }


def _notice(folder: Path) -> str | None:
    """What lies beside the images about their terms: LICENSE, LICENCE, COPYING, NOTICE; 4,000 letters of each."""
    names = ("LICENSE", "LICENCE", "COPYING", "NOTICE")
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_file() and path.stem.upper() in names and path.suffix.lower() in ("", ".txt", ".md"):
            with path.open(encoding="utf-8", errors="replace") as file:
                text = file.read(4001)
            found.append(text if len(text) <= 4000 else f"{text[:4000]}\n... ({path.name} goes on)")
    return "\n\n".join(found) or None


def _cell(text: str) -> str:
    """Words as they can stand in a table."""
    return "".join(letter if letter.isprintable() else " " for letter in text).replace("|", "\\|")


def test_figures(path: Path, weights: str) -> dict[str, Any] | None:
    """acc, balanced_acc, ece, per-class accuracies and number of images of test.json, if it is of these weights."""
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["weights"] == weights:
            return {name: stored[name] for name in ("acc", "balanced_acc", "ece", "test_images", "per_class_acc")}
    except (ValueError, KeyError, TypeError):
        pass
    print(f"note: {path} does not say that it is of these weights; the card has no accuracies")
    return None


def _lost(card: Mapping[str, Any]) -> list[str]:
    """Of a file of less precision: what that loses and gains, a line of the table."""
    found = card.get("smaller")
    if not found:
        return []
    words = [f"accuracy {found['acc']:.2f} % instead of {found['acc_fp32']:.2f} %"] if "acc" in found else []
    words += [f"{found['latency_ms']:.2f} ms instead of {found['latency_ms_fp32']:.2f} in turns with it"]
    words += [f"{found['bytes'] / 1024:,.0f} KiB instead of {found['bytes_fp32'] / 1024:,.0f}"]
    return [f"| {card['precision']} against fp32 | {', '.join(words)} |"]


def markdown(card: Mapping[str, Any]) -> str:
    """The card for people."""
    test, took, smaller = card["test"], card["latency"], card.get("smaller", {})
    lines = [f"# {card['file']}", ""]
    if "acc" in smaller:
        lines += [
            f"An image classifier in {card['precision']} with **{smaller['acc']:.2f} %** accuracy on the test "
            f"images; in fp32 it has {smaller['acc_fp32']:.2f} %. The accuracies of classes below are those of fp32."
        ]
    elif test:
        lines += [
            f"An image classifier with **{test['acc']:.2f} %** accuracy ({test['balanced_acc']:.2f} % balanced, "
            f"calibration error {test['ece']:.3f}) on {test['test_images']:,} test images that it was not trained on.",
        ]
    else:
        lines += ["An image classifier that has not been tested."]
    lines += [
        "",
        "| | |",
        "| --- | --- |",
        f"| input | {card['input']}; normalisation is inside |",
        f"| output | {card['output']} |",
        f"| size | {card['params']:,} parameters, {card['flops'] / 1e6:,.2f} Mflops (multiply-adds) an image"
        f"{', the mean over ' + str(card['passes']) + ' mirrored forms' if card['passes'] > 1 else ''} |",
        f"| latency | {took['latency_ms']:.2f} ms an image ({took['p10_ms']:.2f} to {took['p90_ms']:.2f}, "
        f"n = {took['n']}), {took['runtime']}, {took['device']} |",
        f"| file against model | logits differ by at most {card['largest_difference']:.1e} on {card['compared_on']} |",
        *_lost(card),
        f"| licence | {_cell(card['licence'] or 'not stated; those of the data apply to what was learnt of it too')} |",
        f"| data | {card['data']} |",
        f"| mean, std | {[round(v, 4) for v in card['mean']]}, {[round(v, 4) for v in card['std']]} (pixels in 0..1) |",
        f"| training | {card['epoch']} epochs, seed {card['options']['seed']} |",
        f"| exported | with commit {card['commit'][:12]} |",
        "",
        "| class | training images | test accuracy |",
        "| --- | ---: | ---: |",
    ]
    for name, count in card["train_images_per_class"].items():
        share = test["per_class_acc"].get(name) if test else None
        lines.append(f"| {_cell(name)} | {count:,} | {'-' if share is None else f'{share:.1f} %'} |")
    for kind in ("normal", "reduce") if card["genotype"] else ():
        lines += ["", f"{kind} cell:", ""]
        for index, node in enumerate(card["genotype"][kind]):
            lines.append(f"- node {index}: " + (", ".join(f"{op} of {source}" for op, source in node) or "no input"))
    if card["data_notice"]:
        lines += ["", "Notice of the data:", "", *(f"    {line}" for line in card["data_notice"].splitlines())]
    return "\n".join(lines) + "\n"
