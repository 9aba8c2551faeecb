import random

import pytest
import torch

import cost
from genotypes import GENOTYPES, SPACES, random_genotype
from model import ChildNetwork


@pytest.mark.parametrize("space", SPACES)
def test_parameters_of_operations_add_up_to_those_of_the_child(space: str) -> None:
    """All children of one size differ by their operations alone."""
    differences = set()
    for seed in range(5):
        genotype = random_genotype(space, random.Random(seed))
        with torch.device("meta"):
            whole = cost.count_params(ChildNetwork(genotype, 4, 3, 5))
        differences.add(whole - cost.ops_params(genotype, 4, 5))
    assert len(differences) == 1


def test_flops_are_one_per_multiply_add_of_convolutions_and_linear_layers() -> None:
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, 2, 1, bias=False), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 5, 1, 2, groups=8, bias=False),
        torch.nn.MaxPool2d(4), torch.nn.Flatten(), torch.nn.Linear(8, 10),
    )  # fmt: skip
    with torch.device("meta"):
        got = cost.count_flops(layers.to("meta"), torch.empty(1, 3, 8, 8))
    assert got == 3 * 8 * 9 * 16 + 8 * 25 * 16 + 8 * 10


def test_counting_leaves_the_mode_of_a_network_alone() -> None:
    child = ChildNetwork(GENOTYPES["SNAS_mild"], 2, 3, 3).to("meta")
    for mode in (True, False):
        cost.count_flops(child.train(mode), torch.empty(1, 3, 8, 8, device="meta"))
        assert child.training is mode
