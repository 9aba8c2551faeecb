"""main.py as a program, and options of a search whose effect is the same function computed in another way."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
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


@pytest.mark.parametrize("kind", ["ImportError", "SystemError", "RuntimeError"])
def test_an_interruption_that_a_module_makes_another_error_of_is_one(kind: str) -> None:
    code = f"""
import os, signal, options
def main():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            pass
    except BaseException as error:
        raise {kind}("initialization failed") from error
options.entry(main)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 143 and done.stderr == "\n-c: interrupted\n"


def test_an_interruption_while_a_class_is_made_is_one() -> None:
    code = """
import os, signal, options
class Field:
    def __set_name__(self, owner, name):
        os.kill(os.getpid(), signal.SIGINT)
        while True:
            pass
signal.signal(signal.SIGINT, signal.default_int_handler)
options.entry(lambda: type("Record", (), {"field": Field()}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and done.stderr == "\n-c: interrupted\n"


def test_a_fault_while_an_interruption_is_dealt_with_is_shown() -> None:
    def fail() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise RuntimeError("a fault")  # noqa: B904

    with pytest.raises(RuntimeError, match="a fault"):
        options.entry(fail)


def test_a_module_that_cannot_be_imported_keeps_its_cause() -> None:
    def fail() -> None:
        raise ImportError("initialization failed") from KeyError("why")

    with pytest.raises(ImportError) as caught:
        options.entry(fail)
    assert isinstance(caught.value.__cause__, KeyError)


def test_ctrl_c_in_a_search_says_how_to_go_on(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "main.py", *arguments, "--epochs=1000"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # where the tests run in the background it is ignored
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard
    ) as process:
        metrics = tmp_path / "experiments" / "run" / "metrics.jsonl"
        for _ in range(600):
            if metrics.exists() and metrics.stat().st_size:
                break
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search(
        r"\nmain.py: interrupted; add --resume True to go on from \S+/weights_epoch_[\d_step]+\.pt\n$", errors
    )
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
        for dataset in (sizes, tmp_path / "nothing", "cifar10", *([other] if main_ is export_model.main else [])):
            with pytest.raises(UserError) as error:
                main_([*base, f"--dataset={dataset}", f"--data_dir={tmp_path}/none"])
            assert named(str(error.value)) <= known[kind], error.value
    content = checkpoint.load(tmp_path / "experiments" / "child" / "child_epoch_1.pt")
    changed = {**content, "options": content["options"] | {"dataset": "cifar10"}}
    checkpoint.save(tmp_path / "moved.pt", {name: value for name, value in changed.items() if name != "format"})
    capsys.readouterr()
    moved = [f"--checkpoint={tmp_path}/moved.pt", f"--out={tmp_path}/child.pt2", "--format=pt2"]
    export_model.main([*moved, f"--data_dir={tmp_path}/none"])
    printed = capsys.readouterr().out
    assert "no test images to compare on" in printed and named(printed) <= known[ExportOptions]


def test_trouble_of_the_machine_is_one_line_and_exit_code_2(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    for error in (OSError(28, "No space left on device", "/cache/x.npy"), MemoryError(), RuntimeError(refused)):

        def fail(error: Exception = error) -> None:
            raise error

        with pytest.raises(SystemExit) as stopped:
            options.entry(fail)
        printed = capsys.readouterr().err
        assert stopped.value.code == 2 and printed.count("\n") == 1 and "Traceback" not in printed
    with pytest.raises(RuntimeError, match="our own"):
        options.entry(lambda: (_ for _ in ()).throw(RuntimeError("our own")))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(28, "No space left on device", "x.pt"),
            r"x.pt: No space left on device; last good .*weights_epoch_1.pt",
        ),
        (RuntimeError("can't allocate memory"), r"out of memory; take less of --batch_size.*--recompute.*epoch_1.pt"),
    ],
)
def test_a_run_that_the_machine_stops_names_its_last_checkpoint(
    arguments: list[str], error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import search

    real, steps = search.search_step, []

    def step(*given: object) -> object:
        steps.append(1)
        if len(steps) > 3:
            raise error
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(search, "search_step", step)
    with pytest.raises(UserError, match=words):
        main.main(arguments)


def test_places_to_write_are_tried_before_the_first_step(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"--visualizations_dir .*taken.run cannot be written"):
        main.main([*arguments, f"--visualizations_dir={tmp_path}/taken"])
    assert not (tmp_path / "experiments").exists()


def test_a_finished_search_does_not_fail_over_a_picture(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import visualize

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "cell.png")

    monkeypatch.setattr(visualize, "draw_genotype", full)
    found = main.main(arguments)
    assert (found.folder / "genotype.json").exists() and found.pictures == []
    assert "the cells are not drawn: cell.png: No space left on device" in capsys.readouterr().out


def test_names_that_no_encoding_holds_do_not_end_a_run(arguments: list[str], tiny: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny, data)
    os.rename(data / "class0", os.fsencode(data) + b"/caf\xe9")  # Latin-1
    (data / "class1").rename(data / "a|b \u2603")
    experiments = arguments[1]
    env = os.environ | {"PYTHONIOENCODING": "cp1252"}
    child = [f"--dataset={data}", experiments, "--genotype=run", "--name=child", "--epochs=1", "--layers=3", "--cutout=False",
             "--init_channels=2", "--batch_size=4", "--auxiliary=False", "--crop_padding=1", "--device=cpu"]  # fmt: skip
    for command in (
        ["main.py", *arguments, f"--dataset={data}"],
        ["retrain.py", *child],
        ["export_model.py", experiments, "--checkpoint=child", "--format=pt2"],
    ):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, env=env)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
    card = (tmp_path / "experiments" / "child" / "child.pt2.md").read_text(encoding="utf-8")
    assert "| a\\|b \u2603 |" in card and "caf" in card


def test_a_reader_that_goes_is_no_trouble_of_the_machine(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import search

    def gone(*_: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(search, "announce", gone)
    with pytest.raises(BrokenPipeError):
        main.main(arguments)
