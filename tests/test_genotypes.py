import json

import pytest
import torch

from genotypes import (
    GENOTYPES,
    OPS,
    PRIMITIVES,
    SPACES,
    Genotype,
    cell_plan,
    derive,
    edge_list,
    free_share,
    num_edges,
    num_nodes,
)


def test_edges_are_ordered_by_node_then_source() -> None:
    assert edge_list(4)[:6] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0)]
    assert len(edge_list(4)) == num_edges(4) == 14
    assert [num_nodes(num_edges(n)) for n in range(1, 7)] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match="not 13"):
        num_nodes(13)


def test_primitives_are_the_eight_of_the_paper_in_their_order() -> None:
    assert PRIMITIVES == (
        "none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5",
    )  # fmt: skip
    assert all(space[0] == "none" and len(set(space)) == len(space) for space in SPACES.values())


def test_cells_reduce_at_a_third_and_two_thirds() -> None:
    plan = cell_plan(16, 8, 48)
    assert [p.reduction for p in plan] == [i in (2, 5) for i in range(8)]
    assert [p.channels for p in plan] == [16, 16, 32, 32, 32, 64, 64, 64]
    assert [p.inputs for p in plan][:4] == [(48, 48), (48, 64), (64, 64), (64, 128)]
    assert [p.after_reduction for p in plan] == [i in (3, 6) for i in range(8)]


def test_argmax_keeps_every_edge_but_those_whose_argmax_is_none() -> None:
    alpha = torch.zeros(14, 8)
    alpha[:, 0] = 1  # none everywhere
    alpha[1, 4] = 2  # node 0 <- c_{k-1}
    alpha[13, 7] = 3  # node 3 <- node 2
    alpha[13, 1] = 2.9
    got = derive(alpha, alpha)
    assert got.normal == ((("sep_conv_3x3", 1),), (), (), (("dil_conv_5x5", 4),))
    assert got == derive(alpha.tolist(), alpha.numpy())


def test_top2_keeps_the_two_likeliest_edges_and_ignores_none() -> None:
    logits = torch.randn(14, 8, generator=torch.Generator().manual_seed(0))
    got = derive(logits, logits, rule="top2")
    probabilities = logits.softmax(-1)
    row = 0
    for node, pairs in enumerate(got.normal):
        block = probabilities[row : row + 2 + node, 1:]
        strongest = sorted(block.max(-1).values.topk(2).indices.tolist())
        assert [source for _, source in pairs] == strongest
        assert [op for op, _ in pairs] == [PRIMITIVES[1 + int(block[s].argmax())] for s in strongest]
        row += 2 + node


def test_derive_refuses_a_wrong_shape_and_an_unknown_rule() -> None:
    with pytest.raises(ValueError, match="column"):
        derive(torch.zeros(14, 9), torch.zeros(14, 9))
    with pytest.raises(ValueError, match="top5"):
        derive(torch.zeros(14, 8), torch.zeros(14, 8), rule="top5")


@pytest.mark.parametrize("name", GENOTYPES)
def test_json_round_trip(name: str) -> None:
    text = GENOTYPES[name].to_json()
    assert Genotype.from_json(text) == GENOTYPES[name]
    assert set(json.loads(text)) == {"normal", "normal_concat", "reduce", "reduce_concat", "space"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normal": [[["sep_conv_9x9", 0]]]}, "normal node 0, edge 0: 'sep_conv_9x9'"),
        ({"normal": [[["none", 0]]]}, "normal node 0, edge 0: 'none'"),
        ({"reduce": [[], [["skip_connect", 0], ["skip_connect", 3]]]}, "reduce node 1, edge 1: input 3"),
        ({"reduce": [[["skip_connect", True]]]}, "reduce node 0, edge 0: input True"),
        ({"normal": [[["skip_connect"]]]}, "normal node 0, edge 0"),
        ({"normal": [7]}, "normal node 0"),
        ({"normal_concat": [9]}, "normal_concat"),
        ({"normal_concat": []}, "normal_concat"),
        ({"space": "mars"}, "mars"),
        ({"space": ["snas"]}, "snas"),
        ({"normal": 3}, "normal is a list"),
    ],
)
def test_malformed_genotypes_are_named_by_node_and_edge(change: dict[str, object], message: str) -> None:
    raw = {"normal": [[]], "normal_concat": [2], "reduce": [[], []], "reduce_concat": [2], "space": "snas"}
    with pytest.raises(ValueError, match=message):
        Genotype.from_dict(raw | change)
    with pytest.raises(ValueError, match="not JSON"):
        Genotype.from_json("{")
    with pytest.raises(ValueError, match="entries"):
        Genotype.from_json("[]")


def test_every_kind_of_operation_has_a_module_and_a_price() -> None:
    from operations import KINDS
    from resources import cost

    kinds = {op.kind for op in OPS.values()}
    assert kinds == {*KINDS, "none"} == {*cost.KINDS}
    assert {name for space in SPACES.values() for name in space} == {*OPS}


def test_the_share_of_operations_that_learn_nothing() -> None:
    """By hand: DARTS_V2 has skip_connect 2 of 8 and max_pool and skip 8 of 8."""
    assert free_share(GENOTYPES["DARTS_V2"]) == 100 * 10 / 16
    assert free_share(Genotype(((),), (2,), ((),), (2,))) == 0.0
