"""The path of a GPU, as far as a machine without one can check it; the rest where there is one."""

import copy
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorDeviceMismatchError,
    FakeTensorMode,
    unset_fake_temporarily,
)

import options
import search
from data import Data
from genotypes import random_genotype
from model import ChildNetwork
from model_search import Network
from options.default_option import TrainOptions

CUDA = torch.device("cuda:0")


@pytest.fixture
def pretended(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Data]:
    """Inside, a CUDA device is pretended: what mixes devices or waits for values raises."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)  # cannot be pretended
    data = Data(options.parse(TrainOptions, [f"--dataset={tiny}", "--image_size=8"], "", ""))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield data


def moved(network: nn.Module) -> nn.Module:
    """Module.to cannot move to a pretended device."""
    for module in network.modules():
        for kind in (module._parameters, module._buffers):
            for name, value in kind.items():
                if value is not None:
                    fake = torch.empty(value.shape, dtype=value.dtype, device=CUDA)
                    kind[name] = nn.Parameter(fake) if kind is module._parameters else fake
    return network.train()


def test_a_pretended_device_notices_mistakes(pretended: Data) -> None:
    x = torch.ones(2, device=CUDA)
    with pytest.raises(FakeTensorDeviceMismatchError):
        x + torch.ones(2)
    with pytest.raises(DataDependentOutputException):
        x.sum().item()


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_a_batch_a_sample_and_a_loss_stay_on_the_device(drop: float, pretended: Data) -> None:
    with unset_fake_temporarily():
        network = Network(4, 3, 3, drop_path_prob=drop)
    moved(network)
    images, targets = pretended._batch(torch.arange(4), CUDA)
    z = network.sample(1.0)
    assert images.device == targets.device == z.normal.device == CUDA
    loss, _ = search.cross_entropy(network(images, z), targets, z)
    assert loss.device == CUDA and loss.requires_grad


def test_a_child_stays_on_the_device(pretended: Data) -> None:
    with unset_fake_temporarily():
        child = ChildNetwork(random_genotype("snas", Random(1)), 4, 3, 3, drop_path_prob=0.2)
    images, targets = pretended._batch(torch.arange(4), CUDA)
    assert F.cross_entropy(moved(child)(images)[0], targets).device == CUDA


def test_statistics_of_the_images_are_sent_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Data(options.parse(TrainOptions, [f"--dataset={tiny}", "--image_size=8", "--batch_size=4"], "", ""))
    cpu, made = torch.device("cpu"), []
    real = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *rest, **more: made.append(rest) or real(*rest, **more))
    assert len(list(data.train_batches(4, 1, cpu))) > 2 and len(made) == 1
