from pathlib import Path

import pytest
import torch
from torch import nn

from loading.batches import Data
from operations import Norm
from options.default_option import TrainOptions
from training import loop
from training.run import Run


def run_on(folder: Path, **changes: object) -> Run:
    opt = TrainOptions(dataset=str(folder), **changes)  # type: ignore[arg-type]
    return Run(opt, "weights", Path(), torch.device("cpu"), Data(opt))


def test_evaluation_counts_every_image_whatever_the_batch_size(tiny: Path) -> None:
    forward = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).eval()
    found = []
    for size in (1, 5, 100):
        found.append(loop.evaluate(run_on(tiny, eval_batch_size=size), forward, "valid"))
    images, labels = next(run_on(tiny).data.batches("valid", 1000, torch.device("cpu")))
    logits = forward(images).detach()
    for figures in found:
        assert figures.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
        assert figures.acc == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())


def test_balanced_accuracy_is_the_mean_recall_of_the_classes_present(tiny: Path) -> None:
    run = run_on(tiny)
    keep = run.data.indices["valid"][run.data.labels[run.data.indices["valid"]] < 2]  # class 2 is absent
    of_class = [keep[run.data.labels[keep] == c] for c in range(2)]
    run.data.indices["valid"] = torch.cat([of_class[0][:4], of_class[1][:1]])
    always_0 = loop.evaluate(run, lambda x: torch.tensor([1.0, 0.0, 0.0]).repeat(len(x), 1), "valid")
    assert (always_0.acc, always_0.balanced_acc) == (pytest.approx(80), pytest.approx(50))
    always_2 = loop.evaluate(run, lambda x: torch.tensor([0.0, 0.0, 1.0]).repeat(len(x), 1), "valid")
    assert (always_2.acc, always_2.balanced_acc) == (0, 0)


def test_calibration_averages_batch_statistics_and_leaves_no_trace() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(Norm(3), nn.Dropout(0.5)).train()
    module(torch.randn(8, 3, 4, 4) + 5)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    batches = [(torch.randn(6, 3, 4, 4) * (k + 1) + k, torch.zeros(6)) for k in range(3)]
    with loop.calibrated(module, module, batches):
        means = torch.stack([x.mean((0, 2, 3)) for x, _ in batches]).mean(0)
        variances = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x, _ in batches]).mean(0)
        assert torch.allclose(module[0].running_mean, means, atol=1e-6)
        assert torch.allclose(module[0].running_var, variances, rtol=1e-5)
        assert not any(m.training for m in module.modules())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module[0].momentum == 0.1 and all(m.training for m in module.modules())


def test_calibration_restores_after_an_error() -> None:
    module = Norm(3).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with (
        pytest.raises(KeyboardInterrupt),
        loop.calibrated(module, module, [(torch.randn(2, 3, 2, 2), torch.zeros(2))]),
    ):
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items()) and module.training


def test_mean_weighs_by_images() -> None:
    mean = loop.Mean()
    mean.add({"a": torch.tensor(1.0)}, 3)
    mean.add({"a": torch.tensor(5.0)}, 1)
    assert mean.values() == {"a": 2.0}
