"""A loss or gradient that is no number ends a run before it is saved, or is left out; extremes stay finite."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_moments import CASES, ending, left
from torch import Tensor

import main
import retrain
import sampling
from loading.batches import Data
from model_search import Network
from objective import Objective
from options import UserError
from training import checkpoint, loop


def spoiled(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """The images of these training steps of a run of three an epoch, from 1, are no numbers."""
    real = Data.train_batches

    def batches(self: Data, size: int, epoch: int, device: torch.device, first: int, part: tuple[int, int]) -> Any:
        every = real(self, size, epoch, device, first, part)
        for number, (images, targets) in enumerate(every, 3 * (epoch - 1) + first + 1):
            yield (images * math.nan if number in steps else images), targets

    monkeypatch.setattr(Data, "train_batches", batches)


def finite(content: Any) -> bool:
    """Whether all tensors of nested containers are."""
    if isinstance(content, dict):
        return all(map(finite, content.values()))
    return bool(content.isfinite().all()) if isinstance(content, Tensor) else True


def test_a_run_stops_at_the_step_and_what_is_on_disk_is_whole(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(monkeypatch, 5)
    last = tmp_path / "experiments" / "run" / "weights_epoch_1.pt"
    with pytest.raises(UserError, match=rf"loss became nan in step 5 \(epoch 2, temperature 0.03\); .*{last}; .*skip"):
        main.main([*arguments, "--report_freq=1000"])
    assert checkpoint.latest(last.parent, "weights") == last and finite(checkpoint.load(last)["parts"])


@pytest.mark.parametrize("case", ["plain", "constrained", "retraining"])
def test_a_bad_batch_is_skipped_and_leaves_nothing(
    case: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, more, stem = CASES[case]
    begin = request.getfixturevalue("searched" if script is retrain else "arguments")
    begin = [*begin, *more, "--epochs=3", "--on_nonfinite=skip"]
    spoiled(monkeypatch, 1, 5, 6)
    whole = script.main([*begin, "--name=whole"]).folder
    found = left(whole, stem)
    assert [row["skipped_steps"] for row in found["log"]] == [1, 2, 0]
    assert finite(checkpoint.load(whole / f"{stem}_epoch_3.pt")["parts"])
    with monkeypatch.context() as patched:
        ending(5, lambda: (_ for _ in ()).throw(MemoryError), patched)
        with pytest.raises(UserError, match="out of memory"):
            script.main([*begin, "--name=cut", "--save_every_minutes=1e-9"])
    script.main([*begin, "--name=cut", "--resume=True"])
    assert left(whole.with_name("cut"), stem) == found


def test_more_than_a_few_bad_batches_end_a_run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled(monkeypatch, *range(4, 10))
    with pytest.raises(UserError, match="as in 3 other steps of this epoch"):
        main.main([*arguments, "--on_nonfinite=skip", "--batch_size=2"])


def test_an_epoch_without_a_good_batch_ends_a_run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled(monkeypatch, 1, 2, 3)
    with pytest.raises(UserError, match=r"as in 2 other steps of this epoch; last good checkpoint: none yet"):
        main.main([*arguments, "--on_nonfinite=skip"])


def test_nothing_is_stepped_where_one_of_two_gradients_is_no_number() -> None:
    theta, alpha = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [(torch.optim.SGD([p], 0.1), 1.0) for p in (theta, alpha)]
    with pytest.raises(loop.NonFinite, match="norm of the gradient became nan"):
        loop.update(theta.sum() + (alpha - 1).pow(2).sum().sqrt(), optimizers)
    assert torch.equal(theta, torch.ones(2)) and torch.equal(alpha, torch.ones(2))


LOGITS = st.lists(st.floats(-1e4, 1e4, width=32), min_size=8, max_size=8)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(sampling.SAMPLERS)), LOGITS, st.floats(1e-4, 10), DTYPES, st.integers(0, 2**31))
def test_samples_and_their_gradients_are_finite(
    name: str, logits: list[float], temperature: float, dtype: torch.dtype, seed: int
) -> None:
    alpha = torch.tensor([logits], dtype=dtype, requires_grad=True)
    z = sampling.SAMPLERS[name](alpha, temperature, torch.Generator().manual_seed(seed), None)
    assert z.isfinite().all() and (z >= 0).all() and z.float().sum().item() == pytest.approx(1, abs=0.02)
    (z.float() * torch.arange(8)).sum().backward()
    assert alpha.grad is not None and alpha.grad.isfinite().all()


@settings(max_examples=100, deadline=None)
@given(LOGITS, DTYPES)
def test_what_is_told_of_alpha_is_finite(logits: list[float], dtype: torch.dtype) -> None:
    alpha = torch.tensor([logits] * 2, dtype=dtype)
    assert math.isfinite(sampling.entropy(alpha).item()) and 0 <= sampling.margin(alpha).item() <= 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "make", [lambda a: a * 0, lambda a: 1e4 * a.sign(), lambda a: 1e4 * a], ids=["0", "1e4", "large"]
)
@pytest.mark.parametrize("sampler", sorted(sampling.SAMPLERS))
def test_a_step_at_a_temperature_of_a_ten_thousandth_is_finite(
    sampler: str, make: Callable[[Tensor], Tensor], precision: str
) -> None:
    torch.manual_seed(0)
    network = Network(4, 3, 3, nodes=2)
    with torch.no_grad():
        for alpha in network.alphas():
            alpha.copy_(make(torch.randn_like(alpha)))
    z = network.sample(1e-4, torch.Generator().manual_seed(0), sampler=sampler)
    images, targets = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        logits = network(images, z)
    loss, _ = Objective()(logits, targets, z)
    loop.update(loss, [(torch.optim.SGD(network.thetas(), 0.1), 5.0), (torch.optim.Adam(network.alphas()), 10.0)])
    assert all(p.isfinite().all() for p in network.parameters())
