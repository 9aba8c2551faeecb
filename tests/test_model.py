import pytest
import torch
from counting import count_flops, count_params
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model_search import random_genotype

from genotypes import GENOTYPES, SPACES
from model import ChildNetwork
from model_search import Network
from operations import Norm


@pytest.mark.parametrize(
    ("name", "params", "with_head", "flops"),
    [
        ("DARTS_V2", 3_351_502, 3_827_928, 528_359_040),
        ("SNAS_mild", 2_663_542, 3_139_968, 422_218_368),
        ("SNAS_aggressive", 2_313_622, 2_790_048, 374_912_640),
    ],
)
def test_counts_of_the_cifar_references(name: str, params: int, with_head: int, flops: int) -> None:
    with torch.device("meta"):
        child = ChildNetwork(GENOTYPES[name], 36, 10, 20)
        assert count_params(child) == params
        assert count_flops(child, torch.empty(1, 3, 32, 32)) == flops
        assert count_params(ChildNetwork(GENOTYPES[name], 36, 10, 20, auxiliary=True)) == with_head


def test_counts_of_the_imagenet_reference() -> None:
    with torch.device("meta"):
        child = ChildNetwork(GENOTYPES["SNAS_mild"], 48, 1000, 14, stem="imagenet")
        assert count_params(child) == 3_942_208
        assert count_flops(child, torch.empty(1, 3, 224, 224)) == 438_042_432


@given(
    space=st.sampled_from(sorted(SPACES)),
    nodes=st.integers(1, 4),
    layers=st.integers(3, 6),
    size=st.tuples(st.integers(4, 11), st.integers(4, 11)),
    channels=st.sampled_from([1, 3]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_child_equals_the_supernet_at_one_hot_z(
    space: str, nodes: int, layers: int, size: tuple[int, int], channels: int, seed: int
) -> None:
    """The master test: outputs, gradients and running statistics in training, outputs in evaluation."""
    torch.manual_seed(seed)
    genotype = random_genotype(space, nodes, seed)
    supernet = Network(2, 3, layers, space, nodes, channels).double()
    child = ChildNetwork(genotype, 2, 3, layers, affine=False, in_channels=channels).double()
    child.load_state_dict(supernet.child_state_dict(genotype))
    images, z = torch.randn(3, channels, *size, dtype=torch.float64), supernet.one_hot(genotype)
    ours, (childs, _) = supernet(images, z), child(images)
    assert torch.allclose(ours, childs, rtol=1e-8, atol=1e-10)
    with torch.no_grad():
        assert torch.allclose(supernet.eval()(images, z), child.eval()(images)[0], rtol=1e-8, atol=1e-10)
    ours.square().sum().backward()
    childs.square().sum().backward()
    # the gradients of a supernet, read as a child's
    parameters = dict(supernet.named_parameters())
    for p in parameters.values():
        p.data = torch.zeros_like(p) if p.grad is None else p.grad
    wanted = supernet.child_state_dict(genotype)
    for name, p in child.named_parameters():
        got = torch.zeros_like(p) if p.grad is None else p.grad
        assert torch.allclose(got, wanted[name], rtol=1e-6, atol=1e-8), name
    statistics = {name: b for name, b in child.named_buffers() if "running" in name}
    assert statistics and all(torch.allclose(b, wanted[name], rtol=1e-8) for name, b in statistics.items())


def test_child_equals_the_supernet_in_evaluation() -> None:
    torch.manual_seed(0)
    genotype = random_genotype("snas", 4, 5)
    supernet = Network(4, 3, 5)
    for module in supernet.modules():
        if isinstance(module, Norm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    child = ChildNetwork(genotype, 4, 3, 5, affine=False)
    child.load_state_dict(supernet.child_state_dict(genotype))
    images = torch.randn(2, 3, 10, 10)
    with torch.no_grad():
        ours, (childs, _) = supernet.eval()(images, supernet.one_hot(genotype)), child.eval()(images)
    assert torch.allclose(ours, childs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", GENOTYPES)
def test_every_published_child_runs(name: str) -> None:
    child = ChildNetwork(GENOTYPES[name], 4, 7, 6, auxiliary=True)
    logits, side = child(torch.randn(2, 3, 32, 32))
    assert logits.shape == side.shape == (2, 7)
    logits, side = child.eval()(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7) and side is None


def test_imagenet_stem_starts_at_an_eighth_and_an_unknown_one_is_refused() -> None:
    child = ChildNetwork(GENOTYPES["SNAS_mild"], 4, 5, 4, stem="imagenet", auxiliary=True)
    logits, side = child(torch.randn(2, 3, 224, 224))
    assert logits.shape == side.shape == (2, 5)
    with pytest.raises(ValueError, match="mars"):
        ChildNetwork(GENOTYPES["SNAS_mild"], 4, 5, 4, stem="mars")


def test_drop_path_spares_the_identity() -> None:
    torch.manual_seed(0)
    skips = GENOTYPES["SNAS_mild"].from_dict(
        {
            "normal": [[["skip_connect", 1]]],
            "normal_concat": [2],
            "reduce": [[["skip_connect", 0]]],
            "reduce_concat": [2],
        }
    )
    child = ChildNetwork(skips, 4, 3, 3, drop_path_prob=0.9)
    x = torch.randn(8, 12, 6, 6)
    assert torch.allclose(child.cells[0](x, x, torch.tensor(0.9)), child.cells[0].prepare1(x), atol=1e-6)
    assert (
        (child.cells[1](torch.randn(64, 12, 6, 6), torch.randn(64, 4, 6, 6), torch.tensor(0.9)).flatten(1) == 0)
        .all(1)
        .any()
    )
