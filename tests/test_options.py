import importlib
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import options
from options import UserError
from options.child_option import ChildOptions
from options.default_option import TrainOptions

PRESETS = sorted((Path(__file__).parents[1] / "options" / "presets").glob("*.yaml"))


def parse(*argv: str) -> TrainOptions:
    return options.parse(TrainOptions, argv, "main.py", "")


def parse_child(*argv: str) -> ChildOptions:
    return options.parse(ChildOptions, argv, "retrain.py", "")


def test_defaults_are_those_of_the_paper() -> None:
    opt = parse()
    assert opt == TrainOptions()
    assert (opt.init_channels, opt.layers, opt.batch_size, opt.epochs) == (16, 8, 64, 150)
    assert (opt.learning_rate, opt.learning_rate_min, opt.momentum, opt.weight_decay, opt.grad_clip) == (
        0.025, 0.001, 0.9, 3e-4, 5,
    )  # fmt: skip
    assert (opt.arch_learning_rate, opt.arch_betas, opt.arch_weight_decay) == (3e-4, (0.5, 0.999), 1e-3)
    assert (opt.temp_schedule, opt.initial_temp, opt.min_temp) == ("linear", 1.0, 0.03)


def test_every_option_has_a_help_text() -> None:
    import contextlib
    import io

    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit) as exit_info:
        parse("--help")
    assert exit_info.value.code == 0
    for field in fields(TrainOptions):
        entry = text.getvalue().split(f"\n  --{field.name} ")[1].split("\n  --")[0]
        assert len(entry.split()) > 6, field.name


@pytest.mark.parametrize("script", ["main", "main_constraint", "retrain", "inspect_model", "compare", "export_model"])
def test_help_fits_a_terminal_and_groups_the_options(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        importlib.import_module(script).main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"usage: {script}.py [--OPTION VALUE ...]"
    assert max(map(len, lines)) <= 92 and len([line for line in lines if len(line) > 80]) <= 3  # titles are not wrapped
    shown = [line.split()[0] for line in lines if line.startswith("  --")]
    assert len({*shown}) == len(shown)
    groups = [line for line in lines if line.endswith(":") and not line.startswith((" ", "usage"))]
    assert len(groups) >= {"main": 4, "main_constraint": 6, "retrain": 4}.get(script, 2), groups


def test_command_line_wins_over_config_and_numbers_are_plain(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("learning_rate: 3e-2\nepochs: 7\narch_betas: [0.1, 0.2]\n")
    opt = parse("--config", str(config), "--epochs=9", "--balance", "True")
    assert (opt.learning_rate, opt.epochs, opt.arch_betas, opt.balance) == (0.03, 9, (0.1, 0.2), True)
    assert type(opt.epochs) is int and type(opt.learning_rate) is float and type(opt.arch_betas[0]) is float


def test_saved_options_are_read_back(tmp_path: Path) -> None:
    opt = parse("--epochs=9", "--arch_betas=[0.3,0.9]", "--group_pattern", r"^(\d+)_", "--image_size=16")
    options.save(opt, tmp_path / "options.yaml", "how to use it")
    assert parse("--config", str(tmp_path / "options.yaml")) == opt
    assert (tmp_path / "options.yaml").read_text().startswith("# how to use it\n")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--epoch=3"], "epoch"),  # abbreviations are not guessed
        (["--epochs=0"], "--epochs"),
        (["--epochs=three"], "--epochs"),
        (["--momentum=1.0"], "--momentum"),
        (["--learning_rate=-1"], "--learning_rate"),
        (["--space=mars"], "--space"),
        (["--balance=perhaps"], "--balance"),
        (["--arch_betas=[0.5]"], "--arch_betas"),
        (["--layers=2"], "--layers 2"),
        (["--batch_size=1"], "--batch_size 1"),
        (["--name=a/b"], "--name"),
        (["--name=.."], "--name"),
        (["--select=1"], "--select 1"),
        (["--sampler=dsnas", "--compile=True"], "--compile True"),
        (["--min_temp=2"], "--min_temp"),
        (["--learning_rate_min=2"], "--learning_rate_min"),
        (["--group_pattern=("], "--group_pattern"),
        (["--config=/nowhere.yaml"], "no such file"),
        (["--config"], "config"),
        (["stray"], "stray"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse(*argv)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert error.startswith("main.py: error: ") and error.count("\n") == 1 and words in error


@pytest.mark.parametrize("content", ["a: [1", "- 1\n- 2", "", "nonsense: 3", "epochs: many"])
def test_bad_config_files_are_one_line(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(content)
    with pytest.raises(SystemExit) as exit_info:
        parse("--config", str(config))
    error = capsys.readouterr().err
    assert exit_info.value.code == 2 and error.count("\n") == 1
    assert str(config) in error or "epochs" in error or "nonsense" in error


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_are_valid_and_say_what_to_expect(path: Path) -> None:
    script = "retrain" if path.stem.startswith("retrain") else "main"
    (parse_child if script == "retrain" else parse)(f"--config={path}")
    head = path.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    for word in (f"python {script}.py", "Hardware", "Time", "Accuracy"):
        assert word in head
    if path.stem in ("paper", "retrain_cifar10", "retrain_imagenet"):
        assert "by us" in head
        return
    assert all(
        any(c.isdigit() for c in line) for line in head.splitlines() if line.startswith(("# Time", "# Accuracy"))
    )


def test_defaults_of_the_child_are_those_of_the_paper() -> None:
    opt = parse_child()
    assert (opt.init_channels, opt.layers, opt.batch_size, opt.epochs) == (36, 20, 96, 600)
    assert (opt.learning_rate, opt.learning_rate_min, opt.schedule) == (0.025, 0.0, "cosine")
    assert (opt.auxiliary, opt.auxiliary_weight, opt.drop_path_prob) == (True, 0.4, 0.2)
    assert (opt.cutout, opt.cutout_length, opt.crop_padding, opt.flip) == (True, 16, 4, "horizontal")
    assert parse_child("--config=options/presets/retrain_cifar10.yaml") == ChildOptions(name="retrain_cifar10")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--genotype=random:x"], "random:3"),
        (["--match_params=9"], "--genotype random"),
        (["--genotype=random:1", "--match_flops=9"], "--match_flops"),
        (["--layers=2"], "--layers 2"),
    ],
)
def test_options_of_the_child_are_checked(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_child(*argv)
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_the_paper_preset_states_the_defaults() -> None:
    path = next(p for p in PRESETS if p.stem == "paper")
    assert parse(f"--config={path}") == TrainOptions(name="paper")
    assert {"epochs", "learning_rate", "arch_learning_rate", "initial_temp"} <= yaml.safe_load(path.read_text()).keys()


@pytest.mark.parametrize("number", ["100000000000000000000", "0", "-1"])
@pytest.mark.parametrize(
    "option", ["cutout_length", "eval_batch_size", "init_channels", "nodes", "layers", "image_size"]
)
def test_numbers_of_no_use_are_refused_by_name(option: str, number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options.parse(TrainOptions, [f"--{option}={number}"], "main.py", "")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--{option}" in error


@pytest.mark.parametrize("option", ["learning_rate", "arch_betas", "epochs", "resume"])
def test_null_is_refused_where_there_is_a_value(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"{option}: null\nsplit: null\n")
    for argv in ([f"--config={config}"], [f"--{option}=null"]):
        with pytest.raises(SystemExit):
            options.parse(TrainOptions, argv, "main.py", "")
        assert f"--{option}" in capsys.readouterr().err
    with pytest.raises(UserError, match=option):
        options.restore(TrainOptions, {option: None, "split": None})


@pytest.mark.parametrize("option", ["split", "dataset", "name", "cache_dir"])
def test_an_empty_value_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options.parse(TrainOptions, [f"--{option}="], "main.py", "")
    assert f"--{option} " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["1e3", "0x1f", "1_000", "nan", "12:30", ".5", "true", "null", "~", "a: b", "5 %"])
def test_every_name_is_read_back(name: str, tmp_path: Path) -> None:
    options.save(TrainOptions(name=name), tmp_path / "options.yaml", "python main.py")
    assert options.parse(TrainOptions, [f"--config={tmp_path}/options.yaml"], "", "").name == name
    assert [path.name for path in tmp_path.iterdir()] == ["options.yaml"]


def test_a_name_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options.parse(TrainOptions, ["--name=a\nb"], "main.py", "")
    assert "leave out slashes and line ends" in capsys.readouterr().err


def test_what_was_said_is_known(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("epochs: 150\n")
    opt = options.parse(TrainOptions, [f"--config={tmp_path}/c.yaml", "--seed=0"], "", "")
    assert options.given(opt) == {"epochs", "seed"} and options.given(TrainOptions(seed=3)) == {"seed"}
