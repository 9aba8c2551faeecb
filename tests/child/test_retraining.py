import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import write_images
from torch import nn

import export_model
import genotypes
import inspect_model
import main
import options
import retrain
import utils
from child import retraining, source
from loading.augmentation import Augmentation, augment, symmetries
from loading.batches import Data
from model import ChildNetwork
from options import UserError
from options.child_option import ChildOptions
from training import checkpoint, evaluation

CLOCK = {"images_per_second", "epoch_seconds"}


def rows(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in utils.read_metrics(folder / "metrics.jsonl")]


def test_a_retraining_leaves_its_artefacts_and_tests_once(searched: list[str], tmp_path: Path) -> None:
    tested = retrain.main(searched)
    stored = json.loads((tested.folder / "test.json").read_text())
    assert stored == tested.figures
    assert {"acc", "balanced_acc", "params", "flops", "seed", "ece", "confusion", "per_class_acc"} <= stored.keys()
    assert checkpoint.epochs(tested.folder, "child") == [3]
    genotype = genotypes.Genotype.from_json((tmp_path / "experiments" / "run" / "genotype.json").read_text())
    assert tested.genotype == genotype == genotypes.Genotype.from_dict(stored["genotype"])
    network = ChildNetwork(genotype, 4, 3, 3)
    assert stored["params"] == sum(p.numel() for p in network.parameters())
    assert not any("valid_acc" in row for row in rows(tested.folder))  # it was trained on


def test_figures_of_the_test_split_agree_with_each_other_and_the_checkpoint(searched: list[str]) -> None:
    tested = retrain.main(searched)
    confusion = np.array(tested.figures["confusion"])
    with (tested.folder / "guesses.csv").open(encoding="utf-8", newline="") as file:
        table = [*csv.DictReader(file)]
    assert [row["image"] for row in table] == json.loads((tested.folder / "split.json").read_text())["test"]
    assert all(row["image"].startswith(f"{row['class']}/") and 1 / 3 <= float(row["probability"]) <= 1 for row in table)
    assert sum(row["class"] == row["guess"] for row in table) == confusion.trace()
    assert confusion.sum() == tested.figures["test_images"] == 8
    assert tested.figures["acc"] == pytest.approx(100 * confusion.trace() / 8)
    recalls = 100 * confusion.diagonal() / confusion.sum(1)
    assert list(tested.figures["per_class_acc"].values()) == pytest.approx(recalls)
    assert tested.figures["balanced_acc"] == pytest.approx(recalls.mean())
    content = checkpoint.load(tested.folder / "child_epoch_3.pt")
    network, _ = source.load_child(content)
    made = Data(options.restore(ChildOptions, content["options"]), content["split"], train_on_valid=True)
    images, labels = next(made.batches("test", 99, torch.device("cpu")))
    with torch.no_grad():
        logits = network(images)[0]
    loss = nn.functional.cross_entropy(logits, labels).item()
    assert tested.figures["loss"] == pytest.approx(loss, rel=1e-5)
    again = retrain.main([*searched, "--eval_only=True"])
    assert again.figures["acc"] == tested.figures["acc"]
    assert again.figures["ece"] == pytest.approx(tested.figures["ece"])


@pytest.mark.parametrize("extra", [[], ["--ema_decay=0.9", "--schedule=exponential", "--label_smoothing=0.1"]])
def test_an_interrupted_retraining_resumes_bit_for_bit(
    searched: list[str], extra: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = retrain.main([*searched, *extra, "--name=whole"])
    one_epoch = retraining._one_epoch

    def dying(run: object, learner: object, epoch: int, buffers: object) -> object:
        if epoch == 3:
            raise KeyboardInterrupt
        return one_epoch(run, learner, epoch, buffers)  # type: ignore[arg-type]

    monkeypatch.setattr(retraining, "_one_epoch", dying)
    with pytest.raises(KeyboardInterrupt):
        retrain.main([*searched, *extra, "--name=cut"])
    monkeypatch.undo()
    resumed = retrain.main([*searched, *extra, "--name=cut", "--resume=True"])
    assert rows(resumed.folder) == rows(whole.folder)
    assert resumed.figures == whole.figures


def test_schedules_and_drop_path_are_ramped_over_the_run(searched: list[str]) -> None:
    logged = rows(retrain.main([*searched, "--drop_path_prob=0.2", "--learning_rate=0.1"]).folder)
    cosine = [0.1 * (1 + np.cos(np.pi * e / 3)) / 2 for e in range(3)]
    assert [row["learning_rate"] for row in logged] == pytest.approx(cosine)
    assert [row["drop_path_prob"] for row in logged] == pytest.approx([0, 0.1, 0.2])
    logged = rows(retrain.main([*searched, "--name=exp", "--schedule=exponential", "--learning_rate=0.1"]).folder)
    assert [row["learning_rate"] for row in logged] == pytest.approx([0.1, 0.097, 0.09409])


def test_the_average_is_the_exponential_one(searched: list[str]) -> None:
    opt = options.parse(ChildOptions, [*searched, "--ema_decay=0.8"], "", "")
    network = ChildNetwork(genotypes.GENOTYPES["SNAS_mild"], 2, 3, 3)
    learner = retraining.make_learner(opt, network, 3)
    history = []
    for step in range(4):
        with torch.no_grad():
            network.classifier.weight.fill_(step)
        learner.average.update_parameters(network)
        history.append(learner.evaluated().classifier.weight[0, 0].item())
    assert history == pytest.approx([0, 0.2, 0.56, 1.048])


def test_the_supernets_weights_are_taken_over_and_give_its_accuracy(
    searched: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The paper's no-retraining case: the accuracy of the search's child on the validation split, exactly."""
    content = checkpoint.load(tmp_path / "experiments" / "run" / "weights_epoch_2.pt")
    split = tmp_path / "swapped.json"  # test on what the search validated on
    swapped = {"train": content["split"]["train"], "valid": content["split"]["test"], "test": content["split"]["valid"]}
    split.write_text(json.dumps(swapped))
    opt = options.parse(ChildOptions, [*searched, "--init_from=run", f"--split={split}"], "", "")
    data, cpu = Data(opt, swapped), torch.device("cpu")
    genotype = source.find_genotype(opt, data.info)
    network = source.make_network(opt, genotype, data.info)
    source.inherit(opt, network, genotype)
    evaluation.estimate_statistics(network, network, data.plain_train_batches(256, 8, 2, cpu))
    figures = evaluation.evaluate(lambda images: network(images)[0], data.batches("test", 100, cpu))
    assert figures.acc == pytest.approx(content["metrics"]["child_valid_acc"])
    assert figures.loss == pytest.approx(content["metrics"]["child_valid_loss"], rel=1e-3)
    capsys.readouterr()
    retrain.main([*searched, "--init_from=run", "--eval_only=True"])
    assert "weights from the supernet of run" in capsys.readouterr().out
    assert not (tmp_path / "experiments" / "again").exists()
    tuned = retrain.main([*searched, "--init_from=run", "--init_channels=8"])  # other shapes: only what fits
    assert tuned.figures["params"] > 0


def test_an_auxiliary_head_is_trained_but_not_counted_and_needs_room(arguments: list[str], tmp_path: Path) -> None:
    folder = write_images(tmp_path / "large", size=(32, 32), per_class=6)
    common = [f"--dataset={folder}", arguments[1], "--genotype=SNAS_mild", "--layers=3", "--init_channels=2", "--epochs=1",
              "--batch_size=4", "--device=cpu", "--test_portion=0.34"]  # fmt: skip
    tested = retrain.main([*common, "--name=head"])
    state = checkpoint.load(tested.folder / "child_epoch_1.pt")["parts"]["network"]
    assert any(name.startswith("auxiliary.") for name in state)
    bare = ChildNetwork(genotypes.GENOTYPES["SNAS_mild"], 2, 3, 3)
    assert tested.figures["params"] == sum(p.numel() for p in bare.parameters())
    with pytest.raises(UserError, match="--auxiliary False"):
        retrain.main([*common, "--name=small", "--image_size=28"])


def test_random_genotypes_are_uniform_and_seeded() -> None:
    drawn = [genotypes.random_genotype("snas", random.Random(seed)) for seed in range(400)]
    assert drawn[0] == genotypes.random_genotype("snas", random.Random(0)) != drawn[1]
    ops = [op for genotype in drawn for _, nodes, _ in genotype.cells() for node in nodes for op, _ in node]
    shares = [ops.count(op) / (400 * 28) for op in genotypes.PRIMITIVES[1:]]
    assert shares == pytest.approx([1 / 8] * 7, abs=0.014)  # 4.5 standard errors


def test_match_params_draws_until_the_size_fits(searched: list[str]) -> None:
    matching = [*searched[:3], *searched[4:], "--genotype=random:3"]
    free = retrain.main([*matching, "--name=free"]).figures["params"]
    wanted = int(free * 0.8)
    tested = retrain.main([*matching, f"--match_params={wanted}"])
    assert abs(tested.figures["params"] - wanted) <= 0.05 * wanted
    with pytest.raises(UserError, match="they have"):
        retrain.main([*matching, "--name=no", "--match_params=10000000"])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--genotype=nothing"], "no experiment"),
        (["--genotype={0}/bad.json"], "normal node 0, edge 0: 'sep_conv_9x9'"),
        (["--genotype=AmoebaNet", "--init_from=run"], "'amoebanet'"),
        (["--init_from=nothing"], "no search checkpoint"),
        (["--split={0}/none.json"], "no such file"),
        (["--split={0}/bad.json"], "no split.json"),
        (["--test_portion=0", "--genotype=SNAS_mild"], "no test images"),
        (["--eval_only=True", "--name=nothing"], "no child checkpoint"),
    ],
)
def test_bad_input_is_one_line(searched: list[str], tmp_path: Path, extra: list[str], message: str) -> None:
    bad = {"normal": [[["sep_conv_9x9", 0]]], "normal_concat": [2], "reduce": [[]], "reduce_concat": [2]}
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    with pytest.raises(UserError, match=message) as error:
        retrain.main([*searched, *(option.format(tmp_path) for option in extra)])
    assert "\n" not in str(error.value)


def test_a_run_that_started_from_a_supernet_is_tested_again(
    searched: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = retrain.main([*searched, "--init_from=run"])
    capsys.readouterr()
    again = retrain.main([*searched, "--init_from=run", "--eval_only=True"])
    assert again.figures["loss"] == pytest.approx(tuned.figures["loss"])
    assert "again/child_epoch_3.pt, epoch 3 of 3" in capsys.readouterr().out  # which weights these are
    retrain.main([*searched, "--init_from=run", "--eval_only=True", "--name=none"])
    assert "weights  the supernet of run, epoch 2 of 2" in capsys.readouterr().out


def test_what_is_said_counts_even_if_it_is_the_default(searched: list[str], tmp_path: Path) -> None:
    trained = retrain.main([*searched, "--label_smoothing=0.1"])
    only = [option for option in searched if option.startswith(("--experiments", "--name"))]
    assert retrain.main([*only, "--eval_only=True"]).figures["acc"] == trained.figures["acc"]
    with pytest.raises(UserError, match="cifar10"):
        retrain.main([*only, "--eval_only=True", "--dataset=cifar10", f"--data_dir={tmp_path}"])
    with pytest.raises(UserError, match=r"--label_smoothing is 0\.0 but .* leave it out, an evaluation takes it"):
        retrain.main([*only, "--eval_only=True", "--label_smoothing=0"])


def test_a_run_may_be_renamed(searched: list[str]) -> None:
    trained = retrain.main(searched)
    moved = trained.folder.rename(trained.folder.with_name("moved"))
    again = retrain.main([*searched, "--name=moved", "--resume=True"])
    assert again.folder == moved and again.figures["loss"] == trained.figures["loss"]
    assert retrain.main([*searched, "--name=moved", "--eval_only=True"]).figures["acc"] == trained.figures["acc"]


def test_half_a_network_is_not_evaluated(searched: list[str]) -> None:
    with pytest.raises(UserError, match="--init_channels and --layers"):
        retrain.main([*searched, "--init_from=run", "--eval_only=True", "--layers=4"])


def test_bf16_trains_close_to_fp32(searched: list[str]) -> None:
    full, half = (
        retrain.main([*searched, "--learning_rate=0.001", f"--name={precision}", f"--precision={precision}"])
        for precision in ("fp32", "bf16")
    )
    first, second = (rows(tested.folder)[0]["train_loss"] for tested in (full, half))
    assert first != second == pytest.approx(first, rel=0.02)
    assert half.figures["test_images"] == 8 and half.figures["loss"] != full.figures["loss"]


def test_the_cell_of_an_epoch_is_handed_on(searched: list[str], tmp_path: Path) -> None:
    experiments = tmp_path / "experiments"
    main.main([f"--config={experiments}/run/options.yaml", "--name=kept", "--save_freq=1", "--arch_learning_rate=1"])
    where = ["--experiment=kept", f"--experiments_dir={experiments}", "--epoch=1", "--visualize=False"]
    shown = inspect_model.main([*where, f"--out={tmp_path}/g.json"]).genotype
    with pytest.raises(UserError, match="exists"):
        inspect_model.main([*where, f"--out={tmp_path}/g.json"])
    ways = (["--genotype=kept", "--genotype_epoch=1"], [f"--genotype={tmp_path}/g.json"],
            [f"--genotype={experiments}/kept/weights_epoch_1.pt"])  # fmt: skip
    for number, way in enumerate(ways):
        assert retrain.main([*searched, *way, f"--name=way{number}", "--epochs=1"]).genotype == shown
    with pytest.raises(UserError, match=r"is not kept in .*kept; it has 1, 2"):
        retrain.main([*searched, "--genotype=kept", "--genotype_epoch=9", "--name=none"])


def test_a_cell_that_lets_nothing_through_is_refused(searched: list[str], tmp_path: Path) -> None:
    blind = {"normal": [[]], "normal_concat": [2], "reduce": [[["skip_connect", 0]]], "reduce_concat": [2]}
    (tmp_path / "blind.json").write_text(json.dumps(blind))
    with pytest.raises(UserError, match="lets nothing of an image through to the classifier"):
        retrain.main([*searched, f"--genotype={tmp_path}/blind.json"])


def test_one_cycle_rises_for_a_fifth_of_the_steps_and_falls_to_nothing(searched: list[str], tmp_path: Path) -> None:
    given = [*searched, "--schedule=onecycle", "--nesterov=True", "--learning_rate=0.1", "--epochs=5", "--save_freq=1"]
    whole = retrain.main([*given, "--name=whole"])
    rates = [row["learning_rate"] for row in rows(whole.folder)]  # at the start of an epoch
    assert (
        rates[0] == pytest.approx(0.1 / 25)
        and rates[1] == pytest.approx(0.1, rel=0.02)
        and rates == [rates[0], *sorted(rates[1:], reverse=True)]
    )
    last = checkpoint.load(whole.folder / "child_epoch_5.pt")["parts"]
    assert last["scheduler"]["last_epoch"] == last["scheduler"]["total_steps"] == 5 * 7
    assert last["optimizer"]["param_groups"][0]["nesterov"]
    learner = retraining.make_learner(options.parse(ChildOptions, given, "", ""), nn.Linear(2, 2), 7)
    for _ in range(34):
        learner.optimizer.step()
        learner.scheduler.step()
    assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 25 / 1e4)  # of the last of the 35 steps
    parts = retrain.main([*given, "--name=parts"])
    for epoch in (4, 5):
        (parts.folder / f"child_epoch_{epoch}.pt").unlink()
    (parts.folder / "test.json").unlink()
    again = retrain.main([*given, "--name=parts", "--resume=True"])
    assert again.figures == whole.figures and rows(again.folder) == rows(whole.folder)


@pytest.mark.parametrize(("flip", "forms"), [("none", 1), ("horizontal", 2), ("both", 4), ("dihedral", 8)])
def test_the_symmetries_of_a_flip_are_what_it_makes_of_images(flip: str, forms: int) -> None:
    image = torch.arange(32).view(1, 2, 4, 4).byte()
    found = {tuple(form.flatten().tolist()) for form in symmetries(image, flip)}
    assert len(found) == len(symmetries(image, flip)) == forms
    drawn = augment(image.expand(200, -1, -1, -1), Augmentation(flip=flip), torch.Generator().manual_seed(0))
    assert {tuple(form.flatten().tolist()) for form in drawn} == found


def test_the_mean_over_symmetries_is_tested_and_exported(searched: list[str], tmp_path: Path) -> None:
    """A turned image then has the logits of the upright one, in the exported file too."""
    tested = retrain.main([*searched, "--flip=dihedral", "--tta=True"])
    exported = export_model.main([f"--experiments_dir={tmp_path}/experiments", "--checkpoint=again", "--format=pt2"])
    assert exported.card["test"]["acc"] == tested.figures["acc"]
    file = torch.export.load(exported.path).module()
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        upright, turned = file(images), file(images.rot90(1, (2, 3)))
    plain = retrain.main([*searched, "--flip=dihedral", "--name=plain"])
    assert torch.allclose(upright, turned, atol=1e-5)
    assert plain.figures["weights"] == tested.figures["weights"] and plain.figures["loss"] != tested.figures["loss"]


def test_what_a_killed_export_left_is_cleared(searched: list[str]) -> None:
    folder = retrain.main(searched).folder
    (folder / ".child.onnx.x1.tmp").mkdir()
    (folder / ".child.onnx.x1.tmp" / "child.onnx").write_bytes(b"half")
    retrain.main([*searched, "--resume=True"])
    assert not list(folder.glob(".child*"))


def test_a_recipe_that_cannot_be_followed_is_one_line(searched: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="onecycle needs 6 steps or more to rise and fall, --epochs 1 are 1"):
        retrain.main([*searched, "--schedule=onecycle", "--epochs=1", "--batch_size=64"])
    with pytest.raises(SystemExit):
        retrain.main([*searched, "--nesterov=True", "--momentum=0"])
    with pytest.raises(UserError, match="no such search, whose split --network plain would take"):
        retrain.main([*searched, "--network=plain", "--genotype=typo"])


def test_all_passes_of_a_test_are_counted(searched: list[str]) -> None:
    one = retrain.main([*searched, "--flip=both", "--epochs=1"]).figures
    four = retrain.main([*searched, "--flip=both", "--epochs=1", "--tta=True", "--name=four"]).figures
    assert (four["flops"], four["mac"], four["params"]) == (4 * one["flops"], 4 * one["mac"], one["params"])
