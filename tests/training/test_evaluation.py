import math

import pytest
import torch
from torch import nn

from operations import Norm
from training import evaluation


def test_evaluation_counts_every_image_whatever_the_batch_size() -> None:
    torch.manual_seed(0)
    forward = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).eval()
    images, labels = torch.rand(17, 3, 8, 8), torch.randint(0, 3, (17,))
    logits = forward(images).detach()
    for size in (1, 5, 100):
        figures = evaluation.evaluate(forward, zip(images.split(size), labels.split(size), strict=True))
        assert figures.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
        assert figures.acc == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())


def test_balanced_accuracy_is_the_mean_recall_of_the_classes_present() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1])  # class 2 is absent
    always_0, always_2 = (evaluation.figures(torch.eye(3)[c].repeat(5, 1), labels) for c in (0, 2))
    assert (always_0.acc, always_0.balanced_acc) == (pytest.approx(80), pytest.approx(50))
    assert (always_2.acc, always_2.balanced_acc) == (0, 0)


def test_figures_are_those_of_sklearn_and_torchmetrics() -> None:
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix
    from torchmetrics.functional.classification import multiclass_calibration_error

    torch.manual_seed(0)
    labels = torch.randint(0, 7, (400,))
    logits = 2 * torch.randn(400, 7) + 3 * nn.functional.one_hot(labels, 7)
    figures, guessed = evaluation.figures(logits, labels), logits.argmax(1)
    assert figures.acc == pytest.approx(100 * accuracy_score(labels, guessed))
    assert figures.balanced_acc == pytest.approx(100 * balanced_accuracy_score(labels, guessed))
    assert evaluation.confusion(logits, labels).tolist() == confusion_matrix(labels, guessed).tolist()
    wanted = multiclass_calibration_error(logits.softmax(1), labels, 7, n_bins=15).item()
    assert evaluation.calibration_error(logits, labels) == pytest.approx(wanted, rel=1e-4)
    assert math.isnan(evaluation.recalls(evaluation.confusion(logits, labels.clamp_max(5)))[6])


def test_calibrated_statistics_are_those_of_all_images_together_and_leave_no_trace() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(Norm(3), nn.Dropout(0.5)).train()
    module(torch.randn(8, 3, 4, 4) + 5)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    batches = [(torch.randn(60 * n, 3, 4, 4) * n + 2 * n, torch.zeros(60 * n)) for n in (1, 3, 2)]  # unequal in all
    with evaluation.calibrated(module, module, batches):
        every = torch.cat([x for x, _ in batches]).transpose(0, 1).flatten(1)  # (3, values)
        assert torch.allclose(module[0].running_mean, every.mean(1), rtol=1e-5)
        assert torch.allclose(module[0].running_var, every.var(1), rtol=1e-3)
        assert not any(m.training for m in module.modules())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module[0].momentum == 0.1 and all(m.training for m in module.modules())


def test_calibration_restores_after_an_error() -> None:
    module = Norm(3).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with (
        pytest.raises(KeyboardInterrupt),
        evaluation.calibrated(module, module, [(torch.randn(2, 3, 2, 2), torch.zeros(2))]),
    ):
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items()) and module.training
