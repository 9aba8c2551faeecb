import json
from pathlib import Path
from random import Random

import pytest
from test_retrain import searched  # noqa: F401

import options
import retrain
from benchmarks import random_baseline
from genotypes import random_genotype
from options.child_option import ChildOptions


def test_the_baseline_skips_what_is_done_and_tabulates_the_rest(
    searched: list[str],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opt = options.parse(ChildOptions, [*searched, "--epochs=1"], "", "")
    options.save(opt, tmp_path / "recipe.yaml", "recipe")
    (tmp_path / "experiments" / "run" / "genotype.json").write_text(random_genotype("snas", Random(7)).to_json())
    common = [f"--experiments_dir={tmp_path}/experiments", "--experiment=run", f"--preset={tmp_path}/recipe.yaml",
              "--seeds=1", f"--out={tmp_path}/table"]  # fmt: skip
    first = random_baseline.main([*common, "--random=1"])
    ran: list[list[str]] = []
    real = retrain.main
    monkeypatch.setattr(retrain, "main", lambda argv: ran.append(argv) or real(argv))
    second = random_baseline.main([*common, "--random=2"])
    assert len(ran) == 1  # only the new one
    assert second["found"] == first["found"]
    assert second["random"][:1] == first["random"]
    assert json.loads((tmp_path / "table.json").read_text()) == second
    params = second["found"][0]["params"]
    assert all(abs(row["params"] - params) <= 0.05 * params for row in second["random"])
    mean = sum(row["acc"] for row in second["random"]) / 2
    assert f"| random | 2 | {mean:.2f} %" in (tmp_path / "table.md").read_text()
