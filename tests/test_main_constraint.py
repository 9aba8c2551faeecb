import json
from pathlib import Path
from typing import Any

import pytest
import torch

import inspect_model
import main
import main_constraint
from options import UserError
from resources import cost
from training import checkpoint

COMMON = ("train_loss", "valid_loss", "child_valid_acc", "entropy_normal", "temperature")


def rows(found: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (found.folder / "metrics.jsonl").read_text().splitlines()]


def alphas(found: Any, epoch: int = 2) -> list[torch.Tensor]:
    state = checkpoint.load(found.folder / f"weights_epoch_{epoch}.pt")["parts"]["network"]
    return [state["alpha_normal"], state["alpha_reduce"]]


def test_without_a_price_it_is_main_bit_for_bit(arguments: list[str]) -> None:
    plain = main.main([*arguments, "--name=plain"])
    free = main_constraint.main([*arguments, "--name=free", "--eta=0"])
    assert all(map(torch.equal, alphas(plain), alphas(free)))
    for ours, theirs in zip(rows(free), rows(plain), strict=True):
        assert all(ours[name] == theirs[name] for name in COMMON)
        assert ours["cost_params"] > 0 and ours["eta"] == 0
    dear = main_constraint.main([*arguments, "--name=dear", "--eta=5"])
    assert not torch.equal(alphas(dear)[0], alphas(plain)[0])


def test_a_budget_is_logged_kept_and_shown(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budgets = ["--target_params=3000", "--target_flops=5e4", "--child_layers=4"]
    found = main_constraint.main([*arguments, *budgets, "--arch_learning_rate=0.3", "--epochs=3"])
    row = rows(found)[-1]
    assert row["budget_params"] == 3000 and row["budget_flops"] == 5e4
    free = rows(
        main_constraint.main(
            [*arguments, *budgets[2:], "--arch_learning_rate=0.3", "--epochs=3", "--name=free", "--eta=0"]
        )
    )
    assert row["child_params"] <= 3000 < free[-1]["child_params"] and row["child_flops"] <= 5e4
    priced = cost.cost(found.genotype, init_channels=4, layers=4, image_size=8, num_classes=3)
    # the derived genotype has one node here, and is priced as deployed: with four cells
    assert row["child_params"] == priced["params"] and row["child_flops"] == priced["flops"]
    assert row["eta_params"] >= 0 and row["eta"] == pytest.approx(row["eta_params"] + row["eta_flops"])
    assert "% of the budget" in capsys.readouterr().out
    inspect_model.main(
        [f"--experiments_dir={tmp_path}/experiments", f"--visualizations_dir={tmp_path}/v", "--experiment=run"]
    )
    assert "budget 3,000" in capsys.readouterr().out


def test_a_budget_is_for_the_stem_that_is_deployed(arguments: list[str], tmp_path: Path) -> None:
    """The ImageNet stem has parameters of its own, and divides the size by 8 before the first cell."""
    deployed = ["--child_stem=imagenet", "--child_init_channels=6", "--child_image_size=64"]
    found = main_constraint.main([*arguments, *deployed, "--epochs=1", "--eta=0", "--measure=flops"])
    how = {"init_channels": 6, "layers": 3, "image_size": 64, "num_classes": 3, "stem": "imagenet"}
    priced = cost.cost(found.genotype, **how)
    assert found.metrics["child_flops"] == priced["flops"]
    places = [f"--experiments_dir={tmp_path}/experiments", "--visualize=False"]
    assert inspect_model.main([*places, "--experiment=run"]).params == priced["params"]
    plain = main.main([*arguments, "--epochs=1", "--name=plain"])
    seen = inspect_model.main([*places, "--experiment=plain", *deployed])
    assert (
        seen.flops
        == cost.cost(plain.genotype, **how)["flops"]
        != inspect_model.main([*places, "--experiment=plain"]).flops
    )


def test_a_run_goes_on_with_the_script_that_began_it(arguments: list[str]) -> None:
    """The other one would forget the budget, or find none."""
    main_constraint.main([*arguments, "--target_params=3000", "--epochs=1"])
    main.main([*arguments, "--epochs=1", "--name=plain"])
    for other, name in ((main.main, "run"), (main_constraint.main, "plain")):
        with pytest.raises(UserError, match="is of another script"):
            other([*arguments, "--epochs=1", f"--name={name}", "--resume=True"])


def test_the_multiplier_resumes_where_it_was(arguments: list[str]) -> None:
    tight = ["--target_params=1000", "--arch_learning_rate=0.1", "--save_freq=1"]
    whole = main_constraint.main([*arguments, *tight, "--name=whole"])
    main_constraint.main([*arguments, *tight, "--name=parts"])
    folder = whole.folder.parent / "parts"
    (folder / "weights_epoch_2.pt").unlink()
    parts = main_constraint.main([*arguments, *tight, "--name=parts", "--resume=True"])
    assert rows(whole)[0]["eta"] > 0
    for ours, theirs in zip(rows(parts), rows(whole), strict=True):
        assert {k: v for k, v in ours.items() if "second" not in k} == {
            k: v for k, v in theirs.items() if "second" not in k
        }
    assert all(map(torch.equal, alphas(parts), alphas(whole)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--target_params=10", "below the cheapest"),
        ("--target_flops=1e12", "not below the dearest"),
        ("--target_mac=1", "--target_mac 1 is below"),
    ],
)
def test_a_budget_out_of_reach_is_refused_with_the_range(
    arguments: list[str], given: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(main_constraint.options.UserError, match=message) as caught:
        main_constraint.main([*arguments, given])
    assert " to " in str(caught.value) and "\n" not in str(caught.value)
    assert not list((tmp_path / "experiments" / "run").glob("*.pt"))
    main_constraint.main([*arguments, "--level=moderate", "--epochs=1"])  # the name is still free


def test_options_that_do_not_go_together(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--level=mild", "--target_params=1e5"], ["--child_layers=2"], ["--eta=-1"], ["--target_params=0"]):
        with pytest.raises(SystemExit) as caught:
            main_constraint.main([*arguments, *wrong])
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and wrong[-1].split("=")[0] in error


def test_levels_are_tighter_one_after_the_other(arguments: list[str]) -> None:
    budgets = []
    for level in ("mild", "moderate", "aggressive"):
        found = main_constraint.main([*arguments, "--epochs=1", f"--level={level}", f"--name={level}", "--measure=mac"])
        budgets.append(rows(found)[0]["budget_mac"])
    assert budgets == sorted(budgets, reverse=True) and len(set(budgets)) == 3


@pytest.mark.parametrize(
    ("sampler", "estimator"), [("softmax", "policy_gradient"), ("straight_through", "reparametrization")]
)
def test_an_estimator_without_the_draws_that_it_needs_is_refused(
    sampler: str, estimator: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main_constraint.main([*arguments, f"--sampler={sampler}", f"--estimator={estimator}"])
    assert f"--estimator {estimator} needs the draws of another --sampler" in capsys.readouterr().err


@pytest.mark.parametrize("estimator", ["expectation", "reparametrization", "policy_gradient"])
@pytest.mark.parametrize("penalty", ["linear", "log"])
def test_every_estimator_and_penalty_makes_the_child_cheaper(
    arguments: list[str], estimator: str, penalty: str
) -> None:
    common = [*arguments, "--epochs=3", "--arch_learning_rate=0.2", "--nodes=2"]
    free = main_constraint.main([*common, "--name=free", "--eta=0"])
    priced = main_constraint.main([*common, "--eta=20", f"--estimator={estimator}", f"--penalty={penalty}"])
    assert priced.metrics["cost_params"] < free.metrics["cost_params"]


def test_a_warm_up_is_not_projected(arguments: list[str]) -> None:
    """Though the budget is in force by then."""
    tight = ["--target_params=1000", "--epochs=4", "--save_freq=1", "--arch_learning_rate=0.1"]
    found = main_constraint.main([*arguments, *tight, "--warmup_epochs=3"])
    assert all(map(torch.equal, alphas(found, 1), alphas(found, 3)))
    assert rows(found)[2]["child_params"] > 1000 >= rows(found)[3]["child_params"]
