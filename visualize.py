"""Cell diagrams: a genotype as a graph, drawn to SVG and PNG without a viewer or a system Graphviz."""

import io
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import graphviz
from PIL import Image, ImageOps

import utils
from genotypes import NONE, SPACES, Genotype, Node, edge_list, find_op, num_nodes

Probabilities = Mapping[tuple[int, int, str], float]  # (node, source, op) -> p_alpha(op)

COLOURS = {  # of the kinds of operations
    "sep_conv": "#1f5fa8",
    "dil_conv": "#7b3fa0",
    "conv": "#0d7d86",
    "conv_pair": "#0d7d86",
    "max_pool": "#b3541e",
    "avg_pool": "#94761a",
    "skip": "#5b6470",
    "none": "#9aa3ad",
}
_BOX = {
    "fontsize": "12",
    "height": "0.3",
    "width": "0.2",
    "margin": "0.06,0.02",
    "fillcolor": "white",
}  # of an operation
_FRAME, _EACH = 1200, 250  # of an animation: width in pixels, milliseconds of a frame
_PATIENCE = 60  # seconds for a renderer
_TITLES = {"normal": "normal cell", "reduce": "reduction cell"}


def cell_graph(
    kind: str,
    nodes: Sequence[Node],
    concat: Sequence[int],
    probabilities: Probabilities,
    room: Mapping[str, str] = MappingProxyType({}),
) -> graphviz.Digraph:
    """The graph of one cell.

    Args:
        kind: normal or reduce.
        nodes: the (op, input) pairs of each node. A node without a pair is marked as a zero tensor.
        concat: the states that make up the output.
        probabilities: p_alpha of the drawn ops; where given it is written beside the op and sets the width.
        room: Graphviz's attributes of the operations' boxes, besides the usual ones.
    """
    used = sum(len(node) for node in nodes)
    title = f"{_TITLES.get(kind, kind)}: {used} operation{'s' * (used != 1)}"
    graph = graphviz.Digraph(
        kind,
        graph_attr={
            "rankdir": "LR", "label": title, "labelloc": "t", "fontsize": "16", "fontname": "Arial",
            "nodesep": "0.28", "ranksep": "0.35", "pad": "0.25", "dpi": "110", "bgcolor": "white",
        },
        node_attr={
            "shape": "box", "style": "rounded,filled", "fontname": "Arial", "fontsize": "14", "height": "0.45",
            "width": "0.55", "color": "#8a94a0", "fillcolor": "#eef2f6",
        },
        edge_attr={"arrowsize": "0.7"},
    )  # fmt: skip
    for state, text in enumerate(("c_{k-2}", "c_{k-1}")):
        graph.node(str(state), text, fillcolor="#cfe6d0", color="#5c8f60")
    for index, node in enumerate(nodes):
        name = str(index + 2)
        if node:
            graph.node(name, str(index))
        else:
            graph.node(name, f"{index}: no input,\nzeros", style="rounded,dashed", fontcolor="#777777")
        for place, (op, source) in enumerate(node):
            probability = probabilities.get((index, source, op))
            colour = COLOURS.get(find_op(op).kind, "#333333")
            label = op if probability is None else f"{op} {probability:.2f}"
            width = f"{1.6 if probability is None else 0.8 + 2.2 * probability:.2f}"
            if op == NONE:  # drawn by every_edge alone
                width = "0.5"
            box = f"{kind}-{index}-{place}"  # a node of its own, so that no other edge runs through the words
            graph.node(box, label, **{**_BOX, **room}, id=box, color=colour, fontcolor=colour)
            graph.edge(str(source), box, color=colour, penwidth=width, arrowhead="none", id=f"{box}-in")
            graph.edge(box, name, color=colour, penwidth=width, id=f"{box}-out")
    graph.node("out", "c_{k}", fillcolor="#f6e3b5", color="#a98a3c")
    for state in concat:
        graph.edge(str(state), "out", color="#b8bec6", style="solid", penwidth="1.0", arrowsize="0.5")
    return graph


def every_edge(kind: str, space: str, p: Sequence[Sequence[float]], title: str = "") -> graphviz.Digraph:
    """The graph of a cell with all its edges and the likeliest operation of each, none too; it lies alike for every p.

    Args:
        kind: normal or reduce. space: of the O operations. p: (E, O), p(op | edge).
    """
    edges = edge_list(num_nodes(len(p)))
    best = [max(range(len(row)), key=row.__getitem__) for row in p]
    letters = max(map(len, SPACES[space])) + len(" 0.00")
    room = {"width": f"{0.1 + 0.09 * letters:.2f}", "fixedsize": "true"}  # inches, for the longest name
    nodes: list[Node] = [()] * num_nodes(len(p))
    for (node, source), op in zip(edges, best, strict=True):
        nodes[node] += ((SPACES[space][op], source),)
    shown = {(node, source, SPACES[space][op]): row[op] for (node, source), op, row in zip(edges, best, p, strict=True)}
    graph = cell_graph(kind, nodes, range(2, len(nodes) + 2), shown, room)
    graph.attr(label=title)
    return graph


def op_probabilities(alpha: Any, space: str) -> dict[tuple[int, int, str], float]:
    """softmax(alpha) as (node, source, op) -> probability; alpha is an (E, O) tensor."""
    rows = alpha.detach().float().softmax(-1).tolist()
    return {
        (node, source, op): value
        for (node, source), row in zip(edge_list(num_nodes(len(rows))), rows, strict=True)
        for op, value in zip(SPACES[space], row, strict=True)
    }


def find_renderer() -> str | None:
    """The Graphviz program to draw with: beside this Python or on PATH, `dot` before `graphviz-pure`."""
    for name in ("dot", "graphviz-pure"):
        for found in (shutil.which(name, path=str(Path(sys.executable).parent)), shutil.which(name)):
            if found:
                return found
    return None


def drawn(graph: graphviz.Digraph, kind: str) -> tuple[bytes, str]:
    """A graph as a file of this kind, svg or png; or nothing, and why."""
    renderer = find_renderer()
    if renderer is None:
        return b"", "no Graphviz found (pip install graphviz-pure)"
    command = [renderer, "-Kdot", f"-T{kind}"]
    try:
        done = subprocess.run(command, input=graph.source.encode(), capture_output=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        return b"", f"{renderer} did not end in {_PATIENCE} seconds"
    except OSError as error:
        return b"", f"{renderer} cannot be run: {error.strerror}"
    if done.returncode or not done.stdout:
        return b"", f"{renderer} failed: {done.stderr.decode(errors='replace').strip()[:200]}"
    return done.stdout, ""


def render(graph: graphviz.Digraph, stem: Path) -> list[Path]:
    """Draw a graph to STEM.svg and STEM.png; without a renderer, or if it fails, keep STEM.gv and say why.

    Returns:
        The files written.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for kind in ("svg", "png"):
        content, reason = drawn(graph, kind)
        if reason:
            source = stem.with_name(f"{stem.name}.gv")
            source.write_text(graph.source, encoding="utf-8")
            print(f"note: {source} is not drawn: {reason}")
            return [*written, source]
        path = stem.with_name(f"{stem.name}.{kind}")
        with utils.replacing(path) as temporary:
            temporary.write_bytes(content)
        written.append(path)
    return written


def draw_genotype(genotype: Genotype, folder: Path, ending: str = "", alphas: Sequence[Any] = ()) -> list[Path]:
    """Draw both cells of a genotype: FOLDER/normalENDING.svg and .png, FOLDER/reductionENDING.svg and .png.

    Args:
        genotype: what to draw.
        folder: made if missing.
        ending: of the names, such as _epoch_30.
        alphas: [alpha_normal, alpha_reduce] to write the probabilities of.
    Returns:
        The files written.
    """
    written = []
    for index, (kind, nodes, concat) in enumerate(genotype.cells()):
        probabilities = op_probabilities(alphas[index], genotype.space) if alphas else {}
        name = "reduction" if kind == "reduce" else kind
        written += render(cell_graph(kind, nodes, concat, probabilities), folder / f"{name}{ending}")
    return written


def animate(kind: str, space: str, frames: Mapping[int, Sequence[Sequence[float]]], path: Path) -> str:
    """A cell over the epochs as an animated WebP file.

    Args:
        kind: normal or reduce. space: of the operations.
        frames: p(op | edge), (E, O), of each epoch.
        path: the file; its folder is made if missing.
    Returns:
        Why it was not drawn, or nothing.
    """
    pictures = []
    for epoch, p in frames.items():
        content, reason = drawn(every_edge(kind, space, p, f"{_TITLES[kind]}, epoch {epoch}"), "png")
        if reason:
            return reason
        with Image.open(io.BytesIO(content)) as image:
            whole = image.convert("RGB")
        pictures.append(whole.resize((_FRAME, round(_FRAME * whole.height / whole.width))))
    sizes = {picture.size for picture in pictures}
    box = max(width for width, _ in sizes), max(height for _, height in sizes)
    even = [ImageOps.pad(picture, box, color="white") for picture in pictures]
    times = [_EACH] * (len(even) - 1) + [10 * _EACH]
    with utils.replacing(path) as new:
        even[0].save(new, "WEBP", save_all=True, append_images=even[1:], duration=times, loop=0, quality=80)
    return ""
