import json
from pathlib import Path

import pytest
import torch

import inspect_model
import main
import main_constraint
import utils
from genotypes import Genotype
from model_search import Network
from training import selection

SELECT = ["--select=8", "--finalists=3", "--finalist_epochs=1"]


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network(4, 3, 3, nodes=2)


def test_children_are_drawn_from_p_alpha_once_each_and_the_likeliest_is_first() -> None:
    net, source = network(), torch.Generator().manual_seed(0)
    drawn = [*selection.draw(net, 30, source, lambda z: True)]
    assert len(drawn) == len({*drawn}) == 30 and drawn[0] == net.genotype()
    with torch.no_grad():
        net.alpha_normal[:, 4] += 50.0  # the normal cell is decided
    kept = [*selection.draw(net, 30, source, lambda z: True)]
    assert {genotype.normal for genotype in kept} == {net.genotype().normal} and len(kept) == 30
    with torch.no_grad():
        net.alpha_reduce[:, 4] += 50.0  # and so is the other
    assert [*selection.draw(net, 30, source, lambda z: True)] == [net.genotype()]


def test_children_that_are_not_admitted_or_see_no_image_are_not_drawn() -> None:
    net, source = network(), torch.Generator().manual_seed(0)
    few = [*selection.draw(net, 10, source, lambda z: bool(z.normal[:, 1].sum() == 0))]
    assert len(few) == 10 and all(
        op != "max_pool_3x3" for genotype in few for node in genotype.normal for op, _ in node
    )
    with torch.no_grad():
        for alpha in net.alphas():
            alpha[:, 0] += 50.0
    assert [*selection.draw(net, 10, source, lambda z: True)] == []


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
    assert "chosen by" not in capsys.readouterr().out and likeliest.files[0].stem.endswith("_argmax")
    assert max(child["shared"]["loss"] for child in children[:3]) <= min(rest)


def test_the_ranking_leaves_the_search_as_it_was(arguments: list[str]) -> None:
    plain, chosen = main.main([*arguments, "--name=plain"]), main.main([*arguments, *SELECT, "--name=chosen"])
    clock = {"images_per_second", "epoch_seconds"}
    rows = [utils.read_metrics(found.folder / "metrics.jsonl") for found in (plain, chosen)]
    assert [{k: v for k, v in row.items() if k not in clock} for row in rows[0]] == [
        {k: v for k, v in row.items() if k not in clock} for row in rows[1]
    ]


def test_every_child_of_a_constrained_search_is_within_the_budget(arguments: list[str], tmp_path: Path) -> None:
    found = main_constraint.main([*arguments, *SELECT, "--target_params=2000", "--epochs=3"])
    from resources.cost import Deployed

    child = Deployed(4, 3, (8, 8), 3, 3)
    record = json.loads((found.folder / "selection.json").read_text())
    costs = [child.price(Genotype.from_dict(one["genotype"]))["params"] for one in record["children"]]
    assert costs and max(costs) <= 2000
