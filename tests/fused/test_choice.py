import json
from pathlib import Path

import pytest
import torch

import operations
from fused import build, choice
from fused import operation as kernels
from operations import make_op

pytestmark = pytest.mark.usefixtures("compiled")


def test_the_faster_form_is_measured_once_and_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SNAS_KERNELS", "")
    monkeypatch.setattr(build, "path", lambda: tmp_path / "kernels.so")
    monkeypatch.setattr(choice, "_taken", [])
    monkeypatch.setattr(choice, "_ratios", {})
    before = torch.get_rng_state()
    assert choice.taken(operations._contest) and torch.equal(before, torch.get_rng_state())
    (stored,) = tmp_path.glob("kernels.*.json")
    assert json.loads(stored.read_text()).keys() == {*choice.NAMES.values()}
    stored.write_text(json.dumps(dict.fromkeys(choice.NAMES.values(), 2.0) | {"max": 0.5, "mean": 0.95}))
    choice._taken.clear()
    assert choice.taken(operations._contest) == {*choice.NAMES} - {kernels.MAX}
    assert "but not for max" in operations.kernels_in_words() and "max 0.5" in operations.kernels_in_words()
    state = torch.randn(2, 4, 6, 6)
    calls = []
    monkeypatch.setattr(kernels, "_call", lambda name, table: calls.append((name, [row.kind for row in table])))
    make_op("max_pool_3x3", 4, 1, affine=False)(state)
    assert calls == [("parts_forward", [kernels.NOTHING])]  # of pooling only its batch norm
