from pathlib import Path

import pytest
import torch
from torch import nn

import genotypes
import main
import search
import utils
from loading.batches import Data
from model_search import Network
from objective import Terms
from options import UserError
from options.default_option import TrainOptions
from sampling import Z
from training import checkpoint, evaluation

CLOCK = {"images_per_second", "epoch_seconds"}


def rows(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what a clock says."""
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in utils.read_metrics(folder / "metrics.jsonl")]


def test_a_search_leaves_all_its_artefacts(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = main.main(arguments)
    names = {path.name for path in found.folder.iterdir()}
    assert {"options.yaml", "split.json", "metrics.jsonl", "weights_epoch_2.pt", "genotype.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert [p.name for p in found.pictures][1::2] == ["normal_epoch_2.png", "reduction_epoch_2.png"]
    assert genotypes.Genotype.from_json((found.folder / "genotype.json").read_text()) == found.genotype
    logged = utils.read_metrics(found.folder / "metrics.jsonl")
    assert [row["epoch"] for row in logged] == [1, 2] and logged[-1] == found.metrics
    wanted = {
        "epoch", "temperature", "train_loss", "train_acc", "valid_loss", "valid_acc", "child_valid_acc",
        "valid_balanced_acc", "child_free_share", "entropy_normal", "entropy_reduce", "images_per_second", "epoch_seconds",
    }  # fmt: skip
    assert wanted <= logged[0].keys()
    assert logged[-1]["temperature"] == pytest.approx(0.03)
    assert logged[0]["learning_rate"] == pytest.approx(0.025)
    assert logged[1]["learning_rate"] == pytest.approx((0.025 + 0.001) / 2)  # half a cosine
    printed = capsys.readouterr().out
    assert (
        "device   cpu" in printed and "3 classes" in printed and "parameters" in printed and "time     about" in printed
    )
    assert printed.index("Mflops") < printed.index("epoch   1")


def test_tensorboard_has_the_rows_of_the_metrics(arguments: list[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = main.main(arguments)
    events = EventAccumulator(str(found.folder))
    events.Reload()
    for name in ("train_loss", "child_valid_acc", "entropy_normal"):
        logged = [row[name] for row in utils.read_metrics(found.folder / "metrics.jsonl")]
        assert [event.value for event in events.Scalars(name)] == pytest.approx(logged)
        assert [event.step for event in events.Scalars(name)] == [1, 2]


def test_the_same_seed_gives_the_same_metrics_and_another_does_not(arguments: list[str]) -> None:
    runs = [
        rows(main.main([*arguments, f"--name={n}", f"--seed={s}"]).folder) for n, s in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--drop_path_prob=0.3", "--resample_cell=True", "--balance=True", "--cutout=True"],
        ["--sampler=dsnas", "--select=6", "--finalists=2", "--finalist_epochs=1"],
        ["--sampler=straight_through", "--warmup_epochs=1"],
        ["--sampler=truncated", "--drop_path_prob=0.3", "--recompute=True"],
    ],
)
def test_an_interrupted_run_resumes_bit_for_bit(
    arguments: list[str], extra: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*arguments, "--epochs=4", *extra]
    whole = main.main([*arguments, "--name=whole"])
    fit, steps = search.search_step, 0

    def dying(*args: object) -> object:
        nonlocal steps
        steps += 1
        if steps == 8:  # within the third epoch, of 3 steps each
            raise KeyboardInterrupt
        return fit(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(search, "search_step", dying)
    with pytest.raises(KeyboardInterrupt):
        main.main([*arguments, "--name=cut"])
    monkeypatch.undo()
    cut = whole.folder.with_name("cut")
    assert len(rows(cut)) == 2
    (cut / "metrics.jsonl").write_text((cut / "metrics.jsonl").read_text().splitlines()[0] + "\n")  # a row is lost
    (cut / ".weights_epoch_3.pt.tmp").write_bytes(b"half")
    resumed = main.main([*arguments, "--name=cut", "--resume=True"])
    assert rows(cut) == rows(whole.folder)
    first, second = (checkpoint.load(f.folder / "weights_epoch_4.pt")["parts"] for f in (whole, resumed))
    for name, value in first["network"].items():
        assert torch.equal(value, second["network"][name]), name
    assert first["alpha_optimizer"]["state"][0]["step"] == second["alpha_optimizer"]["state"][0]["step"]


def test_resuming_a_finished_run_changes_nothing(arguments: list[str]) -> None:
    found = main.main(arguments)
    before = (found.folder / "metrics.jsonl").read_text()
    again = main.main([*arguments, "--resume=True"])
    assert (found.folder / "metrics.jsonl").read_text() == before
    assert again.genotype == found.genotype and again.metrics == found.metrics


def test_an_existing_experiment_is_refused_and_untouched(arguments: list[str]) -> None:
    found = main.main(arguments)
    before = {path: path.stat().st_mtime_ns for path in found.folder.iterdir()}
    with pytest.raises(UserError, match="--name, or --resume True"):
        main.main(arguments)
    with pytest.raises(UserError, match=r"--learning_rate is 0.5 but .* --config"):
        main.main([*arguments, "--resume=True", "--learning_rate=0.5"])
    assert {path: path.stat().st_mtime_ns for path in found.folder.iterdir()} == before


def test_rows_without_a_checkpoint_are_not_wiped(arguments: list[str]) -> None:
    found = main.main(arguments)
    (found.folder / "weights_epoch_2.pt").unlink()
    for name in ("genotype.json", "metrics.jsonl"):
        for resume in (True, False):
            with pytest.raises(UserError, match="exists"):
                main.main([*arguments, f"--resume={resume}"])
        (found.folder / name).unlink()


def test_other_images_under_the_same_names_are_not_resumed_on(arguments: list[str], tmp_path: Path) -> None:
    from pictures import write_images

    main.main(arguments)
    other = write_images(tmp_path / "other", size=(9, 9))
    with pytest.raises(UserError, match="does not hold the images"):
        main.main([*arguments, f"--dataset={other}", "--resume=True"])


@pytest.mark.parametrize("option", ["--name=taken", "--experiments_dir={0}/experiments/taken"])
def test_a_file_in_the_way_is_named(arguments: list[str], tmp_path: Path, option: str) -> None:
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "taken").write_text("mine")
    with pytest.raises(UserError, match="a file is in the way"):
        main.main([*arguments, option.format(tmp_path)])
    assert (tmp_path / "experiments" / "taken").read_text() == "mine"


def test_a_start_that_never_reached_a_checkpoint_may_be_repeated(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "search_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        main.main(arguments)
    monkeypatch.undo()
    assert main.main(arguments).metrics["epoch"] == 2


def test_checkpoints_are_kept_every_save_freq_and_the_last_always(arguments: list[str]) -> None:
    found = main.main([*arguments, "--epochs=5", "--save_freq=2"])
    assert checkpoint.epochs(found.folder, "weights") == [2, 4, 5]


def test_bad_data_leaves_no_folder(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        main.main([*arguments, "--dataset=/nowhere"])
    assert not (tmp_path / "experiments").exists()


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_last_checkpoint(arguments: list[str]) -> None:
    class Broken(search.Objective):
        calls = 0

        def forward(self, logits: torch.Tensor, targets: torch.Tensor, z: Z) -> tuple[torch.Tensor, Terms]:
            self.calls += 1
            loss, terms = super().forward(logits, targets, z)
            return (loss * float("nan") if self.calls > 3 else loss), terms  # after the first epoch

    import options

    opt = options.parse(TrainOptions, arguments, "main.py", "")
    with pytest.raises(UserError, match=r"weights_epoch_1.pt") as error:
        search.run_search(opt, lambda *_: Broken())
    assert "epoch 2" in str(error.value) and "\n" not in str(error.value)


def test_one_step_moves_theta_and_alpha_by_sgd_and_adam_with_clipped_gradients(arguments: list[str]) -> None:
    """The SNAS step against the same step written out."""
    import copy

    import options

    opt = options.parse(TrainOptions, [*arguments, "--grad_clip=0.1", "--arch_grad_clip=0.001"], "main.py", "")
    data = Data(opt)
    learner = search.make_learner(opt, data.info, lambda *_: search.Objective())
    before = copy.deepcopy(learner.network)
    images, targets = next(data.train_batches(8, 1, torch.device("cpu")))
    seed = torch.Generator().manual_seed(1)
    search.search_step(
        learner, images, targets, learner.network.sample(0.7, seed), torch.autocast("cpu", enabled=False)
    )

    loss = nn.functional.cross_entropy(before(images, before.sample(0.7, torch.Generator().manual_seed(1))), targets)
    for parameters, trained, limit in (
        (before.thetas(), learner.network.thetas(), 0.1),
        (before.alphas(), learner.network.alphas(), 0.001),
    ):
        grads = torch.autograd.grad(loss, parameters, retain_graph=True)
        norm = torch.sqrt(sum((g**2).sum() for g in grads))
        assert norm > limit  # so that clipping is seen
        for p, g, after in zip(parameters, grads, trained, strict=True):
            g = g * (limit / (norm + 1e-6))
            if limit == 0.1:
                wanted = p - 0.025 * (g + 3e-4 * p)  # the first step of SGD with momentum
            else:
                g = g + 1e-3 * p
                wanted = p - 0.01 * g / (g.abs() + 1e-8)  # the first step of Adam
            assert torch.allclose(after, wanted, rtol=1e-4, atol=1e-6)


def test_evaluation_does_not_disturb_training(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = main.main([*arguments, "--name=with"])
    nothing = {f"{p}_{f}": 0.0 for p in ("valid", "child_valid") for f in ("loss", "acc", "balanced_acc")}
    empty = {**nothing, "child_free_share": 0.0, "entropy_normal": 0.0, "entropy_reduce": 0.0}
    monkeypatch.setattr(search, "_evaluate_epoch", lambda *_: dict(empty))
    without = main.main([*arguments, "--name=without"])
    first, second = (checkpoint.load(f.folder / "weights_epoch_2.pt")["parts"]["network"] for f in (whole, without))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_child_accuracy_is_that_of_the_child_network_with_the_supernets_weights(arguments: list[str]) -> None:
    import options
    from model import ChildNetwork

    found = main.main(arguments)
    content = checkpoint.load(found.folder / "weights_epoch_2.pt")
    opt = options.parse(TrainOptions, arguments, "main.py", "")
    data, cpu = Data(opt, content["split"]), torch.device("cpu")
    network = Network.from_checkpoint(content)
    child = ChildNetwork(found.genotype, 4, 3, 3, affine=False)
    child.load_state_dict(network.child_state_dict(found.genotype))
    batches = data.plain_train_batches(opt.eval_batch_size, opt.calibration_batches, 2, cpu)
    with evaluation.calibrated(child, child, batches):
        figures = evaluation.evaluate(lambda images: child(images)[0], data.batches("valid", 100, cpu))
    assert figures.acc == pytest.approx(found.metrics["child_valid_acc"])
    assert figures.loss == pytest.approx(found.metrics["child_valid_loss"], rel=1e-4)


@pytest.mark.parametrize("space", ["nasnet", "amoebanet", "convs"])
def test_other_spaces_are_searched(arguments: list[str], space: str) -> None:
    found = main.main([*arguments, f"--space={space}"])
    alpha = checkpoint.load(found.folder / "weights_epoch_2.pt")["parts"]["network"]["alpha_normal"]
    assert found.genotype.space == space
    assert alpha.shape == (2, len(genotypes.SPACES[space]))


def test_the_exponential_schedule_counts_steps_over_the_whole_run(arguments: list[str]) -> None:
    found = main.main([*arguments, "--temp_schedule=exponential", "--anneal_rate=0.1", "--initial_temp=2"])
    last_steps = [3 - 1, 6 - 1]  # 3 steps an epoch
    logged = [row["temperature"] for row in rows(found.folder)]
    assert logged == [pytest.approx(2 * 2.718281828459 ** (-0.1 * step)) for step in last_steps]


def test_size_nodes_and_cells_reach_the_network(arguments: list[str]) -> None:
    found = main.main([*arguments, "--nodes=2", "--layers=4", "--image_size=7"])
    content = checkpoint.load(found.folder / "weights_epoch_2.pt")
    assert content["parts"]["network"]["alpha_reduce"].shape == (5, 8)
    assert {name.split(".")[1] for name in content["parts"]["network"] if name.startswith("cells.")} == set("0123")
    assert content["data"]["image_size"] == [7, 7]


def test_mapped_images_give_the_same_run(arguments: list[str], tmp_path: Path) -> None:
    whole = main.main([*arguments, "--name=ram"])
    mapped = main.main([*arguments, "--name=map", "--max_ram_gb=1e-9", f"--cache_dir={tmp_path}/cache"])
    assert rows(mapped.folder) == rows(whole.folder)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1


def test_bf16_trains_close_to_fp32(arguments: list[str]) -> None:
    full = rows(main.main([*arguments, "--name=fp32"]).folder)
    half = rows(main.main([*arguments, "--name=bf16", "--precision=bf16"]).folder)
    assert half[0]["train_loss"] != full[0]["train_loss"]
    assert half[0]["train_loss"] == pytest.approx(full[0]["train_loss"], rel=0.05)


def test_a_search_learns(tiny: Path, arguments: list[str]) -> None:
    found = main.main(
        [*arguments, "--epochs=12", "--learning_rate=0.1", "--init_channels=8", "--arch_learning_rate=0.3"]
    )
    logged = rows(found.folder)
    assert min(row["train_loss"] for row in logged) < 0.6 * logged[0]["train_loss"]
    assert found.metrics["entropy_normal"] < 0.7 * 2 * 2.0794  # 2 edges, ln 8
    assert found.metrics["child_valid_acc"] > 80


def test_a_search_that_decided_nothing_says_so(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    import inspect_model

    main.main([*arguments, "--arch_learning_rate=1e-6"])
    assert "warning: the search has not decided" in capsys.readouterr().out
    inspect_model.main(["--experiment=run", arguments[1], arguments[2]])
    assert "warning: the search has not decided" in capsys.readouterr().out
    found = main.main([*arguments, "--name=sure", "--arch_learning_rate=3", "--epochs=4"])
    printed = capsys.readouterr().out
    assert min(found.metrics["margin_normal"], found.metrics["margin_reduce"]) > 0.1 and "not decided" not in printed


def test_the_papers_rate_of_alpha_grows_in_a_shorter_run(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    usual, given = TrainOptions(), TrainOptions(arch_learning_rate=0.02)
    assert search.alpha_rate(usual, 58_500) == search.alpha_rate(usual, 10**6) == 3e-4
    assert search.alpha_rate(usual, 5_850) == pytest.approx(3e-3) and search.alpha_rate(usual, 10) == 0.1
    assert search.alpha_rate(given, 10) == 0.02
    short = [argument for argument in arguments if "arch_learning_rate" not in argument]
    found = main.main([*short, "--epochs=1"])
    optimizer = checkpoint.load(found.folder / "weights_epoch_1.pt")["parts"]["alpha_optimizer"]
    assert optimizer["param_groups"][0]["lr"] == 0.1
    assert "alpha's learning rate is 0.1: 0.0003 is for 58,500 steps" in capsys.readouterr().out
    main.main([*arguments, "--epochs=1", "--name=given"])
    assert "alpha's learning rate" not in capsys.readouterr().out


def test_alpha_stays_as_it_is_while_theta_warms_up(arguments: list[str]) -> None:
    found = main.main([*arguments, "--warmup_epochs=2", "--epochs=3", "--save_freq=1", "--arch_learning_rate=0.1"])
    states = [checkpoint.load(found.folder / f"weights_epoch_{epoch}.pt")["parts"]["network"] for epoch in (1, 2, 3)]
    assert torch.equal(states[0]["alpha_normal"], states[1]["alpha_normal"])
    assert not torch.equal(states[0]["stem.0.weight"], states[1]["stem.0.weight"])
    assert not torch.equal(states[1]["alpha_normal"], states[2]["alpha_normal"])
    assert states[0]["alpha_normal"].abs().max() < 0.01  # as it began
    with pytest.raises(SystemExit):
        main.main([*arguments, "--warmup_epochs=3", "--epochs=3", "--name=never"])
