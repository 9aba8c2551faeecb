import random
from typing import Any

import pytest
import torch
from counting import count_flops, count_params
from hypothesis import given, settings
from hypothesis import strategies as st

from genotypes import GENOTYPES, SPACES, Genotype, random_genotype
from model import ChildNetwork
from model_search import Network
from resources import cost
from sampling import Z


def counted(genotype: Genotype, shape: tuple[int, int, int], **how: Any) -> dict[str, int]:
    """By building the child and counting."""
    with torch.device("meta"):
        child = ChildNetwork(genotype, num_classes=7, in_channels=shape[0], **how)
        return {"params": count_params(child), "flops": count_flops(child, torch.empty(1, *shape))}


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("name", GENOTYPES)
def test_the_cost_of_a_published_genotype_is_that_of_the_built_child(name: str, stem: str) -> None:
    size = (32, 32) if stem == "cifar" else (70, 64)
    how = {"init_channels": 10, "layers": 7, "stem": stem}
    got = cost.cost(GENOTYPES[name], image_size=size, num_classes=7, **how)
    assert got.items() >= counted(GENOTYPES[name], (3, *size), **how).items()


@given(
    space=st.sampled_from(sorted(SPACES)),
    size=st.tuples(st.integers(5, 21), st.integers(5, 21)),
    init_channels=st.integers(2, 9),
    layers=st.integers(3, 9),
    in_channels=st.sampled_from([1, 3]),
    affine=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_cost_of_a_random_genotype_is_that_of_the_built_child(
    space: str, size: tuple[int, int], init_channels: int, layers: int, in_channels: int, affine: bool, seed: int
) -> None:
    genotype = random_genotype(space, random.Random(seed))
    how = {"init_channels": init_channels, "layers": layers, "affine": affine}
    got = cost.cost(genotype, image_size=size, num_classes=7, in_channels=in_channels, **how)
    assert got.items() >= counted(genotype, (in_channels, *size), **how).items()


def test_counts_of_the_references() -> None:
    how = {"init_channels": 36, "layers": 20, "image_size": 32, "num_classes": 10}
    found = cost.cost(GENOTYPES["SNAS_mild"], **how)
    assert (found["params"], found["flops"]) == (2_663_542, 422_218_368)
    how = {"init_channels": 48, "layers": 14, "image_size": 224, "num_classes": 1000, "stem": "imagenet"}
    found = cost.cost(GENOTYPES["SNAS_mild"], **how)
    assert (found["params"], found["flops"]) == (3_942_208, 438_042_432)


@pytest.mark.parametrize(("space", "nodes"), [("snas", 4), ("nasnet", 2), ("amoebanet", 3), ("convs", 4)])
def test_the_cost_of_a_supernet_is_that_of_the_built_one(space: str, nodes: int) -> None:
    deployed = cost.Deployed(5, 4, (13, 10), 7, 1, affine=False)
    got = cost.supernet_cost(space, nodes, deployed)
    with torch.device("meta"):
        network = Network(5, 7, 4, space, nodes, 1)
        alphas = Z(*(alpha.detach() for alpha in network.alphas()))
        assert got["params"] == count_params(network)
        assert got["flops"] == count_flops(network, torch.empty(1, 1, 13, 10), alphas)
    reference = cost.supernet_cost("snas", 4, cost.Deployed(16, 8, (32, 32), 10, affine=False))
    assert (reference["params"], reference["flops"]) == (1_930_618, 300_255_744)


def authors(op: str, c: int, y: int, stride: int) -> tuple[int, int, int]:
    """params (batch norm excluded), flops and mac at output side y by the formulas of the authors' code."""
    k = int(op[-1]) if op[-1].isdigit() else 0
    if op == "none" or (op == "skip_connect" and stride == 1):
        return 0, 0, 0 if op == "none" else 2 * c * y**2
    if "pool" in op:
        return 0, 0, (2 if stride == 1 else 5) * y**2 * c
    if op == "skip_connect":
        return c**2, c**2 * y**2, int(2 * y**2 * (4 * c + c / 2)) + c**2
    twice = op.startswith("sep")
    params = (2 if twice else 1) * (c * k**2 + c**2)
    touched = {(True, 1): 8, (True, 2): 11, (False, 1): 4, (False, 2): 7}[twice, stride]
    return params, params * y**2, touched * y**2 * c + params


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("op", SPACES["snas"])
def test_operations_cost_what_the_authors_formulas_say(op: str, stride: int) -> None:
    for c, y in ((16, 32), (32, 16), (64, 8)):
        got = cost.op_cost(op, c, (y * stride, y * stride), stride, affine=False)
        assert (got.params, got.flops, got.mac) == authors(op, c, y, stride)


def test_check_values() -> None:
    sep = cost.op_cost("sep_conv_3x3", 16, (32, 32), 1, affine=False)
    assert (sep.params, sep.flops, sep.mac) == (800, 819_200, 131_872)
    dil = cost.op_cost("dil_conv_5x5", 32, (32, 32), 2, affine=False)
    assert (dil.params, dil.flops, dil.mac) == (1_824, 466_944, 59_168)


@pytest.mark.parametrize("space", SPACES)
def test_a_table_prices_every_architecture(space: str) -> None:
    deployed = cost.Deployed(4, 7, (13, 9), 5, 1)
    tables = cost.tables(space, 4, deployed)
    network = Network(2, 3, 3, space=space)
    for seed in range(10):
        genotype = random_genotype(space, random.Random(seed))
        how = {"init_channels": 4, "layers": 7, "image_size": (13, 9), "num_classes": 5, "in_channels": 1}
        z = network.one_hot(genotype)
        for measure, wanted in cost.cost(genotype, **how).items():
            table = tables[measure]
            got = table.fixed + (torch.cat(z) * table.costs).sum()
            assert got.item() == pytest.approx(wanted, rel=1e-6)
            assert table.range()[0] <= wanted <= table.range()[1]
    for table in tables.values():
        cheapest, dearest = table.range()
        assert cheapest == table.fixed and dearest > table.fixed + table.uniform() > cheapest


def test_an_unknown_operation_has_no_cost() -> None:
    with pytest.raises(ValueError, match="my_conv"):
        cost.op_cost("my_conv", 4, (8, 8), 1)


def test_flops_are_one_per_multiply_add_of_convolutions_and_linear_layers() -> None:
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, 2, 1, bias=False), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 5, 1, 2, groups=8, bias=False),
        torch.nn.MaxPool2d(4), torch.nn.Flatten(), torch.nn.Linear(8, 10),
    )  # fmt: skip
    with torch.device("meta"):
        got = count_flops(layers.to("meta"), torch.empty(1, 3, 8, 8))
    assert got == 3 * 8 * 9 * 16 + 8 * 25 * 16 + 8 * 10


def test_counting_leaves_the_mode_of_a_network_alone() -> None:
    child = ChildNetwork(GENOTYPES["SNAS_mild"], 2, 3, 3).to("meta")
    for mode in (True, False):
        count_flops(child.train(mode), torch.empty(1, 3, 8, 8, device="meta"))
        assert child.training is mode
