"""Files that others may have made or damaged: read, or refused in one line; nothing of them is run."""

import copy
import json
import os
import random
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from test_damage import folder  # noqa: F401
from test_moments import ending, handlers  # noqa: F401

import inspect_model
import main
import options
import retrain
import utils
from child import cells
from loading import kept, records
from loading.batches import Data
from model_search import Network
from options import UserError
from options.default_option import TrainOptions
from training import checkpoint

CASES = 2000 if os.environ.get("SNAS_FAULTS") == "long" else 40  # of each loader
ODD = (
    None, True, 0, -1, 1, 3, 1e308, -1e-300, float("nan"), float("inf"), 2**31, 2**63, 10**40, "", "x", "snas", "\x00", "../../x",
    "a" * 5000, "ä\u2028", [], [[]], {}, {"a": []}, [None], [1, 2], ["sep_conv_3x3", 0], "1e5", "yes", b"x", (1,),
)  # fmt: skip


def mutated(content: Any, draw: random.Random) -> Any:
    """A copy of nested containers in which something is another, is gone, or is there twice."""
    content = copy.deepcopy(content)
    place, path = content, []
    while isinstance(place, dict | list) and place and (not path or draw.random() < 0.75):
        key = draw.choice([*place]) if isinstance(place, dict) else draw.randrange(len(place))
        path.append((place, key))
        place = place[key]
    if not path:
        return draw.choice(ODD)
    where, key = path[-1]
    kind = draw.randrange(6)
    if kind == 0:
        del where[key]
    elif kind == 1 and isinstance(where, list):
        where.insert(key, copy.deepcopy(where[key]))
    elif kind == 2 and isinstance(where, dict):
        where[draw.choice(["x", "", "space", "epoch", "\u2028"])] = where.pop(key)
    elif kind == 3 and isinstance(where[key], int | float) and not isinstance(where[key], bool):
        where[key] *= draw.choice([-1, 0, 1000, 0.5])
    else:
        where[key] = draw.choice(ODD)
    return content


def damaged(text: bytes, draw: random.Random) -> bytes:
    """Bytes of which some are others, are gone, or are there twice."""
    found = bytearray(text)
    for _ in range(draw.randint(1, 3)):
        start = draw.randrange(len(found) + 1)
        end = min(len(found), start + draw.choice([1, 1, 2, 20]))
        found[start:end] = draw.choice(
            [b"", bytes(found[start:end]) * 2, bytes([draw.randrange(256)]), b"\xff\xfe", b"{[(", b"- "]
        )
    return bytes(found)


def plainly(content: Any) -> Any:
    """What JSON and YAML can hold."""
    if isinstance(content, dict):
        return {str(key): plainly(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [plainly(value) for value in content]
    return content.decode() if isinstance(content, bytes) else content


def variants(content: Any, dump: Callable[[Any], str]) -> Iterator[bytes]:
    """As many files as are tried: half with other values, half with other bytes."""
    draw, text = random.Random(0), dump(content).encode()
    for number in range(CASES):
        if number % 2:
            yield damaged(text, draw)
        else:
            yield dump(plainly(mutated(content, draw))).encode("utf-8", "surrogatepass")


def tried(load: Callable[[], object], what: str) -> None:
    """It is read, or refused in one line, soon."""
    start, found = time.monotonic(), None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            load()
        except (Exception, SystemExit) as error:
            found = error
    if isinstance(found, SystemExit):
        assert found.code == 2, what
    elif found is not None:
        assert isinstance(found, UserError), f"{type(found).__name__}: {found}: {what[:2000]}"
        assert "\n" not in str(found) and len(str(found)) < 20_000, what
    assert time.monotonic() - start < 20, what


def test_genotypes(tmp_path: Path, folder: Path) -> None:  # noqa: F811
    path = tmp_path / "genotype.json"
    printed = "x = Genotype(normal=[('sep_conv_3x3', 0), ('skip_connect', 1)], normal_concat=range(2, 3), "
    printed += "reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1)], reduce_concat=[2])"
    draw = random.Random(1)
    for number, content in enumerate(variants(json.loads((folder / "genotype.json").read_text()), json.dumps)):
        path.write_bytes(content if number % 4 else damaged(printed.encode(), draw))
        tried(lambda: cells.read_genotype(path), repr(path.read_bytes()))


def test_options(tmp_path: Path, folder: Path) -> None:  # noqa: F811
    path = tmp_path / "options.yaml"
    stored = yaml.safe_load((folder / "options.yaml").read_text())
    for content in variants(stored, lambda value: yaml.safe_dump(value, allow_unicode=True)):
        path.write_bytes(content)
        tried(lambda: options.parse(TrainOptions, [f"--config={path}"], "main.py", ""), repr(content))


def test_splits(tmp_path: Path, folder: Path) -> None:  # noqa: F811
    path = tmp_path / "split.json"
    opt = options.restore(TrainOptions, yaml.safe_load((folder / "options.yaml").read_text()))
    for content in variants(json.loads((folder / "split.json").read_text()), json.dumps):
        path.write_bytes(content)
        tried(lambda: Data(opt, records.read_split(path)), repr(content))


def test_checkpoints_that_are_whole_but_hold_something_else(tmp_path: Path, folder: Path) -> None:  # noqa: F811
    content, draw = checkpoint.load(folder / "weights_epoch_2.pt"), random.Random(2)
    small = {**content, "parts": {"network": content["parts"]["network"]}}
    place = tmp_path / "experiments" / "run"
    place.mkdir(parents=True)
    path = place / "weights_epoch_2.pt"
    for _ in range(CASES):
        other = mutated(small, draw)
        checkpoint.save(path, {key: value for key, value in other.items() if key != "format"})

        def look() -> None:
            given = ["--experiment=run", f"--experiments_dir={place.parent}", f"--visualizations_dir={tmp_path}/v"]
            inspect_model.main([*given, f"--visualize={draw.random() < 0.1}"])
            loaded = checkpoint.load(path)
            Network.from_checkpoint(loaded)
            records.of_record(loaded["split"])

        tried(look, repr({key: value for key, value in other.items() if key != "parts"}))


def test_options_that_a_checkpoint_lacks_are_defaults_and_bytes_are_refused(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    content, path = checkpoint.load(folder / "weights_epoch_2.pt"), tmp_path / "weights_epoch_2.pt"
    del content["format"]
    fewer = {name: value for name, value in content["options"].items() if name not in ("flip", "init_channels")}
    checkpoint.save(path, {**content, "options": fewer})
    loaded = checkpoint.load(path)["options"]
    assert loaded == content["options"] | {"flip": "horizontal", "init_channels": TrainOptions().init_channels}
    with pytest.raises(UserError, match="not those of a network of its options"):  # 4 channels, not the default
        Network.from_checkpoint(checkpoint.load(path))
    checkpoint.save(path, {**content, "extra": {"x": b"x"}})
    with pytest.raises(UserError, match="no checkpoint of a run"):
        checkpoint.load(path)


@pytest.mark.parametrize("stem", ["weights", "child"])
def test_runs_go_on_from_a_checkpoint_that_holds_something_else_or_not(
    stem: str, searched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one that was written within an epoch, whose parts are all there."""
    small = ["--layers=3", "--init_channels=4", "--nodes=1", "--batch_size=4", "--crop_padding=1", "--device=cpu"]
    script, given = (main, [*searched[:3], *small]) if stem == "weights" else (retrain, searched)
    given = [*given, "--epochs=2", "--name=cut", "--resume=True"]
    with monkeypatch.context() as patched:
        ending(2, lambda: os.kill(os.getpid(), signal.SIGTERM), patched)
        with pytest.raises(options.Interrupted):
            script.main(given)
    place = tmp_path / "experiments" / "cut"
    content, draw = checkpoint.load(place / f"{stem}_epoch_1_step_2.pt"), random.Random(3)
    for number in range(CASES // 2):
        utils.clear(tmp_path / "experiments", "cut")
        place.mkdir(parents=True)
        key = draw.choice(["within", "extra", "parts", "options", "split"]) if number % 2 else None
        other = mutated(content, draw) if key is None else {**content, key: mutated(content[key], draw)}
        path = place / f"{stem}_epoch_1_step_2.pt"
        checkpoint.save(path, {name: value for name, value in other.items() if name != "format"})
        tried(lambda: script.main(given), repr({**other, "parts": 0})[:3000])


def test_decoded_images(tmp_path: Path) -> None:
    path, pixels = tmp_path / f"{'0' * 24}.npy", torch.randint(0, 255, (20, 3, 8, 8), dtype=torch.uint8)
    kept.keep(path, pixels, {"I": 1.0}, ["a note"])
    whole = {one: one.read_bytes() for one in tmp_path.iterdir()}
    draw = random.Random(4)
    for _ in range(CASES):
        target = draw.choice([*whole])
        target.write_bytes(damaged(whole[target], draw))
        found = kept.load(path)
        assert found is None or (torch.equal(found.pixels, pixels) and found.white == {"I": 1.0}), target.read_bytes()
        for one, content in whole.items():
            one.write_bytes(content)
    assert kept.load(path) is not None


def test_code_in_decoded_images_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / f"{'0' * 24}.npy"
    kept.keep(path, torch.zeros((1, 1, 1, 1), dtype=torch.uint8), {}, [])
    with path.open("wb") as file:
        np.save(file, np.array([Evil()], dtype=object), allow_pickle=True)
    assert kept.load(path) is None and not (tmp_path / "ran").exists()
    for text in ("!!python/object/apply:os.system ['touch ran']", "name: !!python/name:os.system", "&a [*a]"):
        (tmp_path / "o.yaml").write_text(text)
        tried(lambda: options.parse(TrainOptions, [f"--config={tmp_path}/o.yaml"], "main.py", ""), text)
    (tmp_path / "g.json").write_text("Genotype(normal=[__import__('os').system('touch ran')], normal_concat=[2])")
    tried(lambda: cells.read_genotype(tmp_path / "g.json"), "a call")
    assert not Path("ran").exists() and not (tmp_path / "ran").exists()


def test_logs_and_choices(tmp_path: Path, folder: Path) -> None:  # noqa: F811
    log = tmp_path / "metrics.jsonl"
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    for content in variants(row, json.dumps):
        log.write_bytes(content + b"\n" + content)
        tried(lambda: utils.MetricLog(tmp_path, 1).close(), repr(content))
