"""main.py as a program, and options of a search whose effect is the same function computed in another way."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import main
import options
from options import UserError
from options.child_option import ChildOptions
from options.default_option import TrainOptions
from options.export_option import ExportOptions
from training import checkpoint

ROOT = Path(__file__).parents[1]


def program(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, script, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_bad_input_is_one_line_on_standard_error_and_exit_code_2(arguments: list[str], tmp_path: Path) -> None:
    for extra in (["--epochs=0"], ["--dataset=/nowhere"]):
        done = program("main.py", *arguments, *extra)
        assert done.returncode == 2 and re.fullmatch(r"main.py: error: .*\n", done.stderr), done.stderr
    assert not (tmp_path / "experiments").exists()


def test_ctrl_c_is_one_line_and_exit_code_130() -> None:
    code = "import options; options.entry(lambda: (_ for _ in ()).throw(KeyboardInterrupt))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr == "\n-c: interrupted\n"


def test_ctrl_c_in_a_search_says_how_to_go_on(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "main.py", *arguments, "--epochs=1000"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        metrics = tmp_path / "experiments" / "run" / "metrics.jsonl"
        for _ in range(600):
            if metrics.exists() and metrics.stat().st_size:
                break
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.endswith("main.py: interrupted; finished epochs are kept: add --resume True to go on\n")
    assert "Traceback" not in errors


def test_a_run_with_a_torn_last_line_is_resumed(arguments: list[str]) -> None:
    found = main.main(arguments)
    metrics = found.folder / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole[:-20])
    with pytest.warns(UserWarning, match="unfinished line"):
        again = main.main([*arguments, "--resume=True"])
    assert metrics.read_text() == whole and again.metrics == found.metrics


def test_recomputed_cells_give_the_same_search(arguments: list[str]) -> None:
    plain, recomputed = (
        main.main([*arguments, f"--name={name}", f"--recompute={on}"]) for name, on in (("a", False), ("b", True))
    )
    for name in ("train_loss", "valid_loss", "child_valid_loss", "entropy_normal"):
        assert recomputed.metrics[name] == pytest.approx(plain.metrics[name], rel=1e-3), name


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it
def test_a_compiled_search_is_the_same_search(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs and gradients are the compiler's; the code that it makes of them, which takes minutes, is PyTorch's."""
    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: real(self, backend="aot_eager"))
    one = [*arguments, "--epochs=1"]
    plain, compiled = (
        main.main([*one, f"--name={name}", f"--compile={on}"]) for name, on in (("a", False), ("b", True))
    )
    assert "--compile True gains nothing on a CPU" in capsys.readouterr().out
    for name in ("train_loss", "entropy_normal"):
        assert compiled.metrics[name] == pytest.approx(plain.metrics[name], rel=1e-2), name
    stored = checkpoint.load(compiled.folder / "weights_epoch_1.pt")["parts"]["network"]
    assert stored.keys() == checkpoint.load(plain.folder / "weights_epoch_1.pt")["parts"]["network"].keys()


def named(text: str) -> set[str]:
    """The options that a text names."""
    return set(re.findall(r"--(\w+)", text))


def test_errors_name_only_options_that_the_script_has(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What every script has in common is written by modules that do not know which one runs."""
    from pictures import write_images

    import export_model
    import retrain

    main.main(arguments)
    child = [*arguments[:3], "--genotype=run", "--name=child", "--epochs=1", "--layers=3", "--init_channels=2",
             "--batch_size=4", "--auxiliary=False", "--crop_padding=1", "--cutout_length=2", "--device=cpu"]  # fmt: skip
    retrain.main(child)
    sizes = write_images(tmp_path / "sizes", size=(9, 9))
    other = write_images(tmp_path / "other", classes=2)
    next(sizes.rglob("*.png")).write_bytes(next(other.rglob("*.png")).read_bytes())
    common = [f"--experiments_dir={tmp_path}/experiments", "--checkpoint=child"]
    known = {kind: {*options.to_dict(kind()), "config"} for kind in (TrainOptions, ChildOptions, ExportOptions)}
    for main_, kind, base in (
        (main.main, TrainOptions, [*arguments, "--name=new"]),
        (retrain.main, ChildOptions, [*child, "--name=new"]),
        (export_model.main, ExportOptions, common),
    ):
        for dataset in (sizes, tmp_path / "nothing", "cifar10", *([] if main_ is main.main else [other])):
            with pytest.raises(UserError) as error:
                main_([*base, f"--dataset={dataset}", f"--data_dir={tmp_path}/none"])
            assert named(str(error.value)) <= known[kind], error.value
    content = checkpoint.load(tmp_path / "experiments" / "child" / "child_epoch_1.pt")
    torch.save(content | {"options": content["options"] | {"dataset": "cifar10"}}, tmp_path / "moved.pt")
    capsys.readouterr()
    moved = [f"--checkpoint={tmp_path}/moved.pt", f"--out={tmp_path}/child.pt2", "--format=pt2"]
    export_model.main([*moved, f"--data_dir={tmp_path}/none"])
    printed = capsys.readouterr().out
    assert "no test images to compare on" in printed and named(printed) <= known[ExportOptions]
