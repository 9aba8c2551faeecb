import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

import inspect_model
import main
import main_constraint
import options
from genotypes import Genotype, derive
from loading.batches import Data
from model_search import Network
from objective import Objective
from options import UserError
from options.default_option import TrainOptions
from resources.cost import Deployed
from training import checkpoint, selection
from training.run import Run

SELECT = ["--select=8", "--finalists=3", "--finalist_epochs=1"]


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network(4, 3, 3, nodes=2)


def test_children_are_drawn_from_p_alpha_once_each_and_the_likeliest_is_first() -> None:
    net, source = network(), torch.Generator().manual_seed(0)
    drawn = [*selection.draw(net, 30, source, lambda z: 0.0)]
    assert len(drawn) == len({*drawn}) == 30 and drawn[0] == net.genotype()
    with torch.no_grad():
        net.alpha_normal[:, 4] += 50.0  # the normal cell is decided
    kept = [*selection.draw(net, 30, source, lambda z: 0.0)]
    assert {genotype.normal for genotype in kept} == {net.genotype().normal} and len(kept) == 30
    with torch.no_grad():
        net.alpha_reduce[:, 4] += 50.0  # and so is the other
    assert [*selection.draw(net, 30, source, lambda z: 0.0)] == [net.genotype()]


def test_children_that_are_not_admitted_or_see_no_image_are_not_drawn() -> None:
    net, source = network(), torch.Generator().manual_seed(0)
    few = [*selection.draw(net, 10, source, lambda z: math.inf if z.normal[:, 1].any() else 0.0)]
    assert len(few) == 10 and all(
        op != "max_pool_3x3" for genotype in few for node in genotype.normal for op, _ in node
    )
    with torch.no_grad():
        for alpha in net.alphas():
            alpha[:, 0] += 50.0
    assert [*selection.draw(net, 10, source, lambda z: 0.0)] == []


def test_a_search_takes_the_best_finalist_and_says_what_it_looked_at(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = main.main([*arguments, *SELECT])
    record = json.loads((found.folder / "selection.json").read_text())
    children, printed = record["children"], capsys.readouterr().out
    assert 2 <= len(children) <= 8 and record["seconds"] > 0 and "select   " in printed
    assert found.genotype == Genotype.from_dict(children[0]["genotype"])
    assert Genotype.from_json((found.folder / "genotype.json").read_text()) == found.genotype
    trained = [child["trained"]["loss"] for child in children if child["trained"]]
    rest = [child["shared"]["loss"] for child in children if not child["trained"]]
    assert len(trained) == 3 and trained == sorted(trained) and rest == sorted(rest)
    shown = inspect_model.main([f"--experiment={found.folder.name}", *(a for a in arguments if "_dir=" in a)])
    assert shown.genotype == found.genotype and "chosen by --select" in capsys.readouterr().out
    likeliest = inspect_model.main(["--experiment=run", "--rule=argmax", *(a for a in arguments if "_dir=" in a)])
    printed = capsys.readouterr().out
    assert "chosen by" not in printed and "has not decided" in printed and likeliest.files[0].stem.endswith("_argmax")
    assert max(child["shared"]["loss"] for child in children[:3]) <= min(rest)


def test_the_selection_leaves_the_supernet_as_it_was(arguments: list[str]) -> None:
    found = main.main([*arguments, "--name=plain"])
    content = checkpoint.load(found.folder / "weights_epoch_2.pt")
    opt = dataclasses.replace(options.restore(TrainOptions, content["options"]), select=4, finalists=2)
    net = Network.from_checkpoint(content).train()
    run = Run(opt, "weights", found.folder, torch.device("cpu"), Data(opt, content["split"]), 2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    chosen = selection.select(run, net, lambda z: 0.0)
    assert len(chosen) == 4 and net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    again = selection.select(run, net, lambda z: 0.0)
    assert again == chosen  # the same draws, and trainings
    price = {candidate.genotype: -10.0 * place for place, candidate in enumerate(chosen)}
    dear = selection.select(run, net, lambda z: price.get(derive(z.normal, z.reduce), math.inf))
    assert [candidate.genotype for candidate in dear][:2] == [chosen[3].genotype, chosen[2].genotype]


def test_what_is_finished_is_not_chosen_again(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = main.main([*arguments, *SELECT])
    capsys.readouterr()
    assert main.main([*arguments, *SELECT, "--resume=True"]).genotype == found.genotype
    assert "select   " not in capsys.readouterr().out
    (found.folder / "genotype.json").write_text("{}")
    with pytest.raises(UserError, match=r"genotype\.json"):
        inspect_model.main(["--experiment=run", *(a for a in arguments if "_dir=" in a)])
    (found.folder / "genotype.json").unlink()  # as if it had been interrupted
    assert main.main([*arguments, *SELECT, "--resume=True"]).genotype == found.genotype
    assert "select   " in capsys.readouterr().out


def test_where_no_child_can_be_taken_the_likeliest_is(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Objective, "price", lambda self, z: math.inf)
    found = main.main([*arguments, *SELECT])
    assert "warning: none of them can be taken" in capsys.readouterr().out
    state = checkpoint.load(found.folder / "weights_epoch_2.pt")["parts"]["network"]
    assert found.genotype == derive(state["alpha_normal"], state["alpha_reduce"])


def test_a_fixed_price_counts_in_the_choice(arguments: list[str]) -> None:
    given = [*arguments, "--nodes=2", "--select=16", "--finalists=0"]
    cheap, dear = (main_constraint.main([*given, f"--eta={eta}", f"--name=eta{eta}"]) for eta in (1000, 0))
    price = Deployed(4, 3, (8, 8), 3, 3)
    seen = json.loads((cheap.folder / "selection.json").read_text())["children"]
    costs = [price.price(Genotype.from_dict(one["genotype"]))["params"] for one in seen]
    assert price.price(cheap.genotype)["params"] == min(costs) < price.price(dear.genotype)["params"]


def test_every_child_of_a_constrained_search_is_within_the_budget(arguments: list[str], tmp_path: Path) -> None:
    found = main_constraint.main([*arguments, *SELECT, "--target_params=2000", "--epochs=3"])
    child = Deployed(4, 3, (8, 8), 3, 3)
    record = json.loads((found.folder / "selection.json").read_text())
    costs = [child.price(Genotype.from_dict(one["genotype"]))["params"] for one in record["children"]]
    assert costs and max(costs) <= 2000
