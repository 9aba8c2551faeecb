import json
import random
from pathlib import Path

import pytest
import torch
from torch import nn

import genotypes
import main_constraint
from options import UserError
from resources import cost, latency
from resources.latency import Latencies
from resources.projection import child_cost

DEPLOYED = cost.Deployed(4, 3, (8, 8), 3)


def made_up(fixed: float = 1.0, scale: float = 2.0) -> Latencies:
    ops = {latency._key(p): 0.01 * (1 + i) for i, p in enumerate(latency._places("snas", 4, DEPLOYED))}
    return Latencies("here", ops, fixed, scale, 1.0, 0.0, [])


def test_the_table_prices_a_child_as_the_line_through_the_sum_of_its_operations() -> None:
    found = made_up()
    table = found.table("snas", 4, DEPLOYED)
    genotype = genotypes.random_genotype("snas", random.Random(3))
    alphas = [nn.Parameter(torch.zeros(14, 8)) for _ in range(2)]
    with torch.no_grad():
        for alpha, nodes in zip(alphas, (genotype.normal, genotype.reduce), strict=True):
            alpha[:, genotypes.SPACES["snas"].index("none")] = 1
            for e, (node, source) in enumerate(genotypes.edge_list(4)):
                for op, kept in nodes[node]:
                    if kept == source:
                        alpha[e, genotypes.SPACES["snas"].index(op)] = 2
    wanted = 1.0 + 2.0 * latency._sum(found.ops, DEPLOYED, genotype)
    assert child_cost(table, alphas).item() == pytest.approx(wanted, rel=1e-5)
    assert table.fixed == 1.0


def test_the_line_and_what_it_leaves_are_those_of_the_children() -> None:
    sums = [1.0, 2.0, 3.0, 5.0, 8.0]
    exact = latency.fit("here", {}, sums, [0.5 + 2 * s for s in sums])
    assert (exact.fixed, exact.scale) == pytest.approx((0.5, 2.0))
    assert (exact.correlation, exact.error) == pytest.approx((1.0, 0.0), abs=1e-9)
    off = latency.fit("here", {}, sums, [0.5 + 2 * s for s in sums[:-1]] + [12.375])  # a fourth below the line's 16.5
    assert off.error > 0.25 / 5 and off.correlation < 1


@pytest.mark.slow
def test_measuring_finds_larger_operations_slower_and_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(latency, "_CHILDREN", 3)
    large = cost.Deployed(32, 3, (64, 64), 3)
    monkeypatch.setitem(genotypes.SPACES, "two", ("none", "skip_connect", "sep_conv_5x5"))
    found = latency.find("two", 1, large, tmp_path)
    assert found.ops["sep_conv_5x5 32 64x64/1"] > found.ops["skip_connect 32 64x64/1"] >= 0
    monkeypatch.setattr(latency, "time_all", lambda *_: pytest.fail("measured again"))
    again = latency.find("two", 1, large, tmp_path)
    assert again.ops == found.ops and again.table("two", 1, large).fixed == found.table("two", 1, large).fixed
    path = next(tmp_path.glob("latency-*.json"))
    assert json.loads(path.read_text())["of"]["device"] == found.device
    path.write_text("{")
    monkeypatch.setattr(latency, "time_all", lambda *_: found)
    assert latency.find("two", 1, large, tmp_path).ops == found.ops
    assert "is damaged" in capsys.readouterr().out


def test_a_search_within_a_latency(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resuming takes the table of the checkpoint: nothing is measured, which could refuse the budget."""
    monkeypatch.setattr(latency, "find", lambda *_: made_up())
    budget = ["--target_latency_ms=2.5", "--save_freq=1", "--nodes=4"]
    found = main_constraint.main([*arguments, *budget])
    rows = [json.loads(line) for line in (found.folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["budget_latency_ms"] == 2.5 and 1.0 <= rows[-1]["child_latency_ms"] <= 2.5
    assert "correlation 1.000" in capsys.readouterr().out
    (found.folder / "weights_epoch_2.pt").unlink()
    with monkeypatch.context() as later:
        later.setattr(latency, "find", lambda *_: pytest.fail("measured again"))
        main_constraint.main([*arguments, *budget, "--resume=True"])
    again = [json.loads(line) for line in (found.folder / "metrics.jsonl").read_text().splitlines()]
    assert again[-1]["child_latency_ms"] == rows[-1]["child_latency_ms"]
    monkeypatch.setattr(latency, "find", lambda *_: made_up(fixed=1.2))
    with pytest.raises(UserError, match=r"--target_latency_ms 0\.5 is below the cheapest .* 1\.2 to "):
        main_constraint.main([*arguments, "--target_latency_ms=0.5", "--name=other", "--nodes=4"])


def test_a_level_of_latency_resumes_with_its_budget(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "find", lambda *_: made_up())
    given = [*arguments, "--level=moderate", "--measure=latency_ms", "--nodes=4", "--save_freq=1"]
    whole = main_constraint.main(given)
    (whole.folder / "weights_epoch_2.pt").unlink()
    monkeypatch.setattr(latency, "find", lambda *_: made_up(scale=3.0))
    again = main_constraint.main([*given, "--resume=True"])
    assert {k: v for k, v in again.metrics.items() if "second" not in k} == {
        k: v for k, v in whole.metrics.items() if "second" not in k
    }


def test_a_measurement_that_makes_no_sense_is_refused_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    for wrong in (lambda: made_up(scale=-1.0), lambda: latency.fit("here", {}, [1.0, 1.0, 1.0], [2.0, 3.0, 4.0])):
        monkeypatch.setattr(latency, "time_all", lambda *_, wrong=wrong: wrong())
        with pytest.raises(UserError, match="measure again"):
            latency.find("snas", 4, DEPLOYED, tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_onnxruntime_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-export\.txt"):
        latency.find("snas", 4, DEPLOYED, tmp_path)


def test_no_child_is_faster_than_a_call() -> None:
    """A line that begins below is drawn from there, so that a budget of nothing is refused."""
    sums, measured = [1.0, 2.0, 3.0], [0.1, 1.1, 2.1]  # begins at -0.9
    found = latency.fit("here", {}, sums, measured, 0.05)
    assert found.fixed == 0.05
    assert found.scale == pytest.approx(sum(s * (m - 0.05) for s, m in zip(sums, measured, strict=True)) / 14)
