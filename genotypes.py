"""What an architecture is, without torch: operation spaces, edges, genotypes, the plan of the cells.

A cell has two inputs (the outputs of the two cells before it) and N intermediate nodes; node i has
2 + i incoming edges, one from every earlier state. Edges are ordered by node, then by source
(0 = c_{k-2}, 1 = c_{k-1}, 2.. = earlier nodes). alpha holds the logits of one cell type, shape (E, O).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import exp, log
from random import Random
from typing import Any, NamedTuple

NONE = "none"

SPACES: dict[str, tuple[str, ...]] = {
    "snas": (
        *(NONE, "max_pool_3x3", "avg_pool_3x3", "skip_connect"),
        *("sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"),
    ),
    # Zoph et al. 2018 (arXiv 1707.07012, section 3.1): the 13 candidate operations, and none.
    "nasnet": (
        *(NONE, "skip_connect", "conv_3x1_1x3", "conv_7x1_1x7", "dil_conv_3x3", "avg_pool_3x3", "max_pool_3x3"),
        *("max_pool_5x5", "max_pool_7x7", "conv_1x1", "conv_3x3", "sep_conv_3x3", "sep_conv_5x5", "sep_conv_7x7"),
    ),
    # Real et al. 2019 (arXiv 1802.01548, methods): the 8 candidate operations, and none.
    "amoebanet": (
        *(NONE, "skip_connect", "sep_conv_3x3", "sep_conv_5x5", "sep_conv_7x7"),
        *("avg_pool_3x3", "max_pool_3x3", "dil_conv_3x3", "conv_7x1_1x7"),
    ),
    "convs": (NONE, "skip_connect", "avg_pool_3x3", "conv_1x1", "conv_3x3", "sep_conv_3x3", "sep_conv_5x5"),
}
PRIMITIVES = SPACES["snas"]


class Op(NamedTuple):
    """A candidate operation: what it is, and the side of its window in pixels."""

    kind: str  # none, skip, max_pool, avg_pool, sep_conv, dil_conv, conv, or conv_pair (1 x k, then k x 1)
    kernel: int = 1


OPS: dict[str, Op] = {
    NONE: Op("none"),
    "skip_connect": Op("skip"),
    "max_pool_3x3": Op("max_pool", 3),
    "max_pool_5x5": Op("max_pool", 5),
    "max_pool_7x7": Op("max_pool", 7),
    "avg_pool_3x3": Op("avg_pool", 3),
    "sep_conv_3x3": Op("sep_conv", 3),
    "sep_conv_5x5": Op("sep_conv", 5),
    "sep_conv_7x7": Op("sep_conv", 7),
    "dil_conv_3x3": Op("dil_conv", 3),
    "dil_conv_5x5": Op("dil_conv", 5),
    "conv_1x1": Op("conv", 1),
    "conv_3x3": Op("conv", 3),
    "conv_3x1_1x3": Op("conv_pair", 3),
    "conv_7x1_1x7": Op("conv_pair", 7),
}


def find_op(name: str) -> Op:
    """The operation of a name of OPS; raises ValueError for others."""
    try:
        return OPS[name]
    except KeyError:
        raise ValueError(f"no operation is called {name!r}") from None


Node = tuple[tuple[str, int], ...]  # the (op, input) pairs of one node


def num_edges(nodes: int) -> int:
    """The number of edges of a cell with `nodes` intermediate nodes: 14 for 4 nodes."""
    return nodes * (nodes + 3) // 2


def num_nodes(edges: int) -> int:
    """The number of intermediate nodes of a cell with `edges` edges.

    Raises:
        ValueError: no cell has that many edges.
    """
    nodes = 0
    while num_edges(nodes) < edges:
        nodes += 1
    if nodes == 0 or num_edges(nodes) != edges:
        raise ValueError(f"a cell has 2, 5, 9, 14, 20, ... edges, not {edges}")
    return nodes


def edge_list(nodes: int) -> list[tuple[int, int]]:
    """The (node, source) of every edge, in the order of alpha's rows."""
    return [(node, source) for node in range(nodes) for source in range(2 + node)]


class CellPlan(NamedTuple):
    """Where one cell stands in the network."""

    reduction: bool  # strides 2 on the edges from its two inputs
    channels: int  # C of every node
    inputs: tuple[int, int]  # channels of c_{k-2} and c_{k-1}
    after_reduction: bool  # c_{k-2} is twice the size of c_{k-1}
    output: int  # channels of the concatenated output

    def stride(self, source: int) -> int:
        """Of the operations on an edge from a state: 0 and 1 are the cell's inputs."""
        return 2 if self.reduction and source < 2 else 1


def cell_plan(
    init_channels: int,
    layers: int,
    stem_channels: int,
    concat: tuple[int, int] = (4, 4),
    after_reduction: bool = False,
) -> list[CellPlan]:
    """The cells of a network: reduction cells at layers // 3 and 2 * layers // 3 double the channels.

    Args:
        init_channels: C of the first cell.
        layers: number of cells.
        stem_channels: channels of both inputs of the first cell.
        concat: number of nodes concatenated by a normal and by a reduction cell.
        after_reduction: the first cell's c_{k-2} is twice the size of its c_{k-1} (ImageNet stems).
    """
    plan: list[CellPlan] = []
    channels, inputs = init_channels, (stem_channels, stem_channels)
    for index in range(layers):
        reduction = index in (layers // 3, 2 * layers // 3)
        channels = 2 * channels if reduction else channels
        output = channels * concat[reduction]
        plan.append(CellPlan(reduction, channels, inputs, after_reduction, output))
        inputs, after_reduction = (inputs[1], output), reduction
    return plan


@dataclass(frozen=True)
class Genotype:
    """A discrete architecture: for each node of each cell type its (op, input) pairs.

    Edges whose op is none are left out; a node without pairs is a zero tensor. `normal_concat` and
    `reduce_concat` are the states (2 = the first node) that make up the cell's output.
    """

    normal: tuple[Node, ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[Node, ...]
    reduce_concat: tuple[int, ...]
    space: str = "snas"

    def cells(self) -> Iterator[tuple[str, tuple[Node, ...], tuple[int, ...]]]:
        """("normal", nodes, concat), then ("reduce", nodes, concat)."""
        yield "normal", self.normal, self.normal_concat
        yield "reduce", self.reduce, self.reduce_concat

    def to_json(self) -> str:
        """The text of genotype.json; `from_json` reads it back."""
        return json.dumps(self.to_dict(), indent=1)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, as in genotype.json and checkpoints; `from_dict` reads them back."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, text: str) -> "Genotype":
        """Read genotype.json; raises ValueError with one line that names the cell, node and edge at fault."""
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error}") from None
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: Any) -> "Genotype":
        """Check a mapping of the form of genotype.json and turn it into a Genotype; raises ValueError."""
        wanted = {"normal", "normal_concat", "reduce", "reduce_concat"}
        if not isinstance(raw, dict) or not wanted <= raw.keys():
            raise ValueError(f"a genotype has the entries {', '.join(sorted(wanted))}")
        space = raw.get("space", "snas")
        if not isinstance(space, str) or space not in SPACES:
            raise ValueError(f"space {space!r} is none of {', '.join(SPACES)}")
        parts: dict[str, Any] = {}
        for kind in ("normal", "reduce"):
            if not isinstance(raw[kind], list | tuple):
                raise ValueError(f"{kind} is a list of nodes")
            parts[kind] = tuple(_check_node(kind, i, node, space) for i, node in enumerate(raw[kind]))
            concat = raw[f"{kind}_concat"]
            states = range(2, 2 + len(parts[kind]))
            if not isinstance(concat, list | tuple) or not concat or not all(_is_in(s, states) for s in concat):
                raise ValueError(f"{kind}_concat {concat!r} names states of {list(states)}, at least one")
            if len({*concat}) < len(concat):
                raise ValueError(f"{kind}_concat {concat!r} names a state twice")
            parts[f"{kind}_concat"] = tuple(concat)
        return cls(**parts, space=space)


def _is_in(value: Any, allowed: range) -> bool:
    return type(value) is int and value in allowed


def _check_node(kind: str, index: int, node: Any, space: str) -> Node:
    where = f"{kind} node {index}"
    if not isinstance(node, list | tuple):
        raise ValueError(f"{where} is a list of [op, input] pairs, not {node!r}")
    for number, edge in enumerate(node):
        if not isinstance(edge, list | tuple) or len(edge) != 2:
            raise ValueError(f"{where}, edge {number}: {edge!r} is not an [op, input] pair")
        op, source = edge
        if op not in SPACES[space] or op == NONE:
            raise ValueError(f"{where}, edge {number}: {op!r} is not an op of the space {space!r}")
        if not _is_in(source, range(2 + index)):
            raise ValueError(f"{where}, edge {number}: input {source!r} is not one of 0..{1 + index}")
    return tuple((op, source) for op, source in node)


def free_share(genotype: Genotype) -> float:
    """Per cent of the operations of both cells that are pools or skips, which learn nothing; 0 if there is none."""
    kinds = [find_op(op).kind for _, nodes, _ in genotype.cells() for node in nodes for op, _ in node]
    return 100 * sum(kind in ("max_pool", "avg_pool", "skip") for kind in kinds) / max(1, len(kinds))


def derive(alpha_normal: Any, alpha_reduce: Any, space: str = "snas", rule: str = "argmax") -> Genotype:
    """The discrete architecture of alpha.

    `argmax` (SNAS, section 2.1): every edge keeps its most likely op, none included; an edge whose
    argmax is none disappears. `top2` (DARTS, section 2.4, for comparison): none is left out of the
    competition, and each node keeps the two edges whose best op has the highest probability.

    Args:
        alpha_normal, alpha_reduce: logits (E, O), tensors or nested lists. Ties go to the first op.
        space: the operation space of the columns.
        rule: argmax or top2.
    Raises:
        ValueError: the shape does not fit the space, or the rule is unknown.
    """
    if rule not in ("argmax", "top2"):
        raise ValueError(f"rule {rule!r} is none of argmax, top2")
    cells = []
    for alpha in (alpha_normal, alpha_reduce):
        rows = alpha.tolist() if hasattr(alpha, "tolist") else [list(row) for row in alpha]
        if any(len(row) != len(SPACES[space]) for row in rows):
            raise ValueError(f"alpha has a column for each of the {len(SPACES[space])} ops of {space!r}")
        cells.append(_derive_cell(rows, SPACES[space], rule))
    concats = [tuple(range(2, 2 + len(cell))) for cell in cells]
    return Genotype(cells[0], concats[0], cells[1], concats[1], space)


def _derive_cell(rows: list[list[float]], ops: Sequence[str], rule: str) -> tuple[Node, ...]:
    nodes: list[list[tuple[float, str, int]]] = [[] for _ in range(num_nodes(len(rows)))]
    for (node, source), row in zip(edge_list(len(nodes)), rows, strict=True):
        allowed = range(len(ops)) if rule == "argmax" else [k for k, op in enumerate(ops) if op != NONE]
        best = max(allowed, key=lambda k: row[k])
        if ops[best] != NONE:
            # log softmax(row)[best]: what ranks the edges of a node under top2
            nodes[node].append((row[best] - _logsumexp(row), ops[best], source))
    if rule == "top2":
        nodes = [sorted(sorted(node, key=lambda edge: -edge[0])[:2], key=lambda edge: edge[2]) for node in nodes]
    return tuple(tuple((op, source) for _, op, source in node) for node in nodes)


def _logsumexp(row: Sequence[float]) -> float:
    top = max(row)
    return top + log(sum(exp(value - top) for value in row))


def random_genotype(space: str, random: Random, nodes: int = 4) -> Genotype:
    """An architecture drawn uniformly: every edge takes each op of the space, none included, equally often."""
    cells = []
    for _ in range(2):
        pairs: list[list[tuple[str, int]]] = [[] for _ in range(nodes)]
        for node, source in edge_list(nodes):
            op = random.choice(SPACES[space])
            if op != NONE:
                pairs[node].append((op, source))
        cells.append(tuple(tuple(node) for node in pairs))
    concat = tuple(range(2, 2 + nodes))
    return Genotype(cells[0], concat, cells[1], concat, space)


_SHORT = {"skip": "skip_connect", "max": "max_pool_3x3", "avg": "avg_pool_3x3"}
_SHORT |= {f"sep{k}": f"sep_conv_{k}x{k}" for k in (3, 5, 7)} | {f"dil{k}": f"dil_conv_{k}x{k}" for k in (3, 5)}


def _cell(text: str) -> tuple[Node, ...]:
    """Nodes as "sep3:0 skip:1 | dil5:2"; what has no op is a node without an input."""
    nodes = [[edge.split(":") for edge in node.split()] for node in text.split("|")]
    return tuple(tuple((_SHORT.get(op, op), int(source)) for op, source in node) for node in nodes)


def _published(
    normal: str, reduce: str, space: str = "snas", concats: tuple[tuple[int, ...], ...] = ((2, 3, 4, 5),) * 2
) -> Genotype:
    return Genotype(_cell(normal), concats[0], _cell(reduce), concats[1], space)


GENOTYPES: dict[str, Genotype] = {
    "SNAS_mild": _published(
        "sep3:0 sep3:1 | skip:0 dil3:1 | skip:0 skip:1 | skip:0 sep3:1",
        "max:0 max:1 | max:1 skip:2 | max:1 skip:2 | max:0 dil5:2",
    ),
    "SNAS_moderate": _published(
        "dil5:0 skip:1 | sep3:0 skip:1 | skip:0 skip:1 | sep3:0 dil5:1",
        "max:0 max:1 | sep5:0 dil5:1 | sep5:0 sep5:1 | sep5:0 sep5:1",
    ),
    "SNAS_aggressive": _published(
        "sep5:0 skip:1 | skip:0 skip:1 | skip:0 dil5:1 | skip:0 dil5:1", "sep5:0 | sep5:0 | |"
    ),
    "DARTS_V1": _published(
        "sep3:1 sep3:0 | skip:0 sep3:1 | skip:0 sep3:1 | sep3:0 skip:2",
        "max:0 max:1 | skip:2 max:0 | max:0 skip:2 | skip:2 avg:0",
    ),
    "DARTS_V2": _published(
        "sep3:0 sep3:1 | sep3:0 sep3:1 | sep3:1 skip:0 | skip:0 dil3:2",
        "max:0 max:1 | skip:2 max:1 | max:0 skip:2 | skip:2 max:1",
    ),
    "NASNet": _published(
        "sep5:1 sep3:0 | sep5:0 sep3:0 | avg:1 skip:0 | avg:0 avg:0 | sep3:1 skip:1",
        "sep5:1 sep7:0 | max:1 sep7:0 | avg:1 sep5:0 | skip:3 avg:2 | sep3:2 max:1",
        "nasnet",
        ((2, 3, 4, 5, 6), (4, 5, 6)),
    ),
    "AmoebaNet": _published(
        "avg:0 max:1 | sep3:0 sep5:2 | sep3:0 avg:3 | sep3:1 skip:1 | skip:0 avg:1",
        "avg:0 sep3:1 | max:0 sep7:2 | sep7:0 avg:1 | max:0 max:1 | conv_7x1_1x7:0 sep3:5",
        "amoebanet",
        ((4, 5, 6), (3, 4, 6)),
    ),
}
