"""The path of a GPU, as far as a machine without one can check it; the rest where there is one."""

import copy
from collections.abc import Iterator
from pathlib import Path
from random import Random

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
from genotypes import GENOTYPES, random_genotype
from loading.batches import Data
from model import ChildNetwork
from model_search import Network
from options.default_option import TrainOptions
from sampling import Z
from training import loop

CUDA = torch.device("cuda:0")
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it


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
    loss, _ = search.Objective()(network(images, z), targets, z)
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


@pytest.fixture
def compiler() -> Iterator[CompileCounter]:
    """Counts the graphs that it is given, and runs them as they are."""
    torch._dynamo.reset()
    names = ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit")
    with torch._dynamo.config.patch({name: getattr(torch._dynamo.config, name) for name in names}):
        yield CompileCounter()
    torch._dynamo.reset()


def compiled(cells: nn.ModuleList, compiler: CompileCounter, monkeypatch: pytest.MonkeyPatch) -> None:
    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: real(self, backend=compiler))
    loop.compile_cells(cells)


def test_a_deep_child_is_compiled_as_a_whole_and_not_again_every_epoch(
    compiler: CompileCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = ChildNetwork(GENOTYPES["SNAS_aggressive"], 2, 3, 20).train()
    compiled(child.cells, compiler, monkeypatch)
    images, counts = torch.randn(4, 3, 8, 8), []
    for epoch in range(5):
        child.drop_path_prob = 0.2 * epoch / 4
        child(images)[0].sum().backward()
        counts.append(compiler.frame_count)
    assert counts[0] > 8 and counts[1] <= 2 * counts[0] and counts[1] == counts[-1]  # without drop path, and with
    assert not counters["graph_break"]


def test_a_compiled_supernet_takes_every_z_without_compiling_again(
    compiler: CompileCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, images = Network(2, 3, 12, nodes=1, drop_path_prob=0.2).train(), torch.randn(4, 3, 8, 8)
    compiled(network.cells, compiler, monkeypatch)
    counts = []
    for _ in range(3):
        network(images, network.sample(1.0)).sum().backward()
        counts.append(compiler.frame_count)
    assert counts[0] == counts[-1] > 3 and not counters["graph_break"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_step_on_a_gpu_is_that_of_the_cpu(precision: torch.dtype) -> None:
    torch.manual_seed(0)
    network, images = Network(8, 3, 3), torch.randn(4, 3, 16, 16)
    z = Z(*(part.detach() for part in network.sample(1.0)))
    there, wanted = copy.deepcopy(network).to(CUDA), network(images, z)
    sent, drawn = images.to(CUDA), Z(*(part.to(CUDA).requires_grad_() for part in z))
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == torch.bfloat16):
        torch.cuda.set_sync_debug_mode("error")  # no wait within the pass
        got = there(sent, drawn)
        got.sum().backward()
        torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(got.float().cpu(), wanted, atol=1e-3 if precision == torch.float32 else 0.2)


def test_what_the_compiler_sees_gives_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    base, images = Network(4, 5, 3, nodes=1), torch.randn(4, 3, 8, 8)
    z = Z(*(part.detach() for part in base.sample(1.0)))
    compiled = copy.deepcopy(base)
    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: real(self, backend="aot_eager"))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        loop.compile_cells(compiled.cells)
        results = []
        for network in (base, compiled):
            network(images, z).square().mean().backward()
            results.append([p.grad for p in network.thetas()] + [b.float() for b in network.buffers()])
    torch._dynamo.reset()
    assert all(torch.allclose(a, b, rtol=1e-2, atol=1e-4) for a, b in zip(*results, strict=True))
