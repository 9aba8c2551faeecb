"""The supernet: every candidate operation on every edge, weighted by Z; it owns alpha.

forward(images, Z) is a deterministic function of both. With a one-hot Z it is the child of that
architecture with the supernet's weights.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sampling
import utils
from fused import operation as kernels
from genotypes import NONE, SPACES, CellPlan, Genotype, cell_plan, derive, edge_list, num_edges
from operations import (
    Norm,
    Operation,
    State,
    drop_mask,
    drop_probability,
    frozen_statistics,
    fused,
    make_op,
    prepare,
)
from sampling import Drawn, Z


class MixedOp(nn.Module):
    """An edge: sum_k Z_k O_k(x), x the source state."""

    ops: Mapping[str, Operation]

    def __init__(self, space: Sequence[str], channels: int, stride: int) -> None:
        super().__init__()
        self.names = tuple(space)
        ops = {name: make_op(name, channels, stride, affine=False) for name in space if name != NONE}
        self.ops = nn.ModuleDict(ops)  # type: ignore[assignment]

    def forward(
        self, state: State, row: Tensor, active: Sequence[bool], total: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor | None:
        """total + keep * the sum of the active operations weighted by Z's row (O,), in place; None if there is none.

        Those that the fused kernels work on are a single call.
        """
        chosen = [k for k, name in enumerate(self.names) if active[k] and name != NONE]
        parts = {k: self.ops[self.names[k]].parts() for k in chosen}
        together = [k for k in chosen if fused(state.x, parts[k])]
        if together:
            total = kernels.apply(state.x, [parts[k] for k in together], row, together, total, keep)
        for k in chosen:
            if k not in together:
                total = self.ops[self.names[k]](state, row[k], total, keep)
        return total


class Cell(nn.Module):
    """Two prepared inputs, N nodes that sum their edges, and the concatenation of the nodes."""

    edges: Sequence[MixedOp]

    def __init__(self, plan: CellPlan, space: Sequence[str], nodes: int) -> None:
        super().__init__()
        self.plan = plan
        self.prepare0, self.prepare1 = prepare(plan, affine=False)
        self.nodes = nodes
        self.edges = nn.ModuleList(  # type: ignore[assignment]
            MixedOp(space, plan.channels, plan.stride(source)) for _, source in edge_list(nodes)
        )

    def forward(
        self, before: Tensor, last: Tensor, z: Tensor, active: Sequence[Sequence[bool]], drop: Tensor | None = None
    ) -> Tensor:
        """c_{k-2}, c_{k-1} and Z (E, O) -> (B, N * C, H', W')."""
        states = [State(self.prepare0(before)), State(self.prepare1(last))]
        edges = zip(self.edges, z.unbind(), active, strict=True)
        for _ in range(self.nodes):
            total: Tensor | None = None
            for state, (edge, row, on) in zip(states, edges, strict=False):  # one edge from every earlier state
                keep = None if drop is None else drop_mask(state.x, drop)
                total = edge(state, row, on, total, keep)
            states.append(State(self._zeros(states[1].x) if total is None else total))
        return torch.cat([state.x for state in states[2:]], 1)

    def _zeros(self, x: Tensor) -> Tensor:
        if not self.plan.reduction:
            return torch.zeros_like(x)
        return torch.zeros_like(x[:, :, ::2, ::2])


class Network(nn.Module):
    """The supernet of SNAS (Xie et al. 2019, section 2): theta, and alpha as logits.

    Args:
        init_channels: C of the first cell.
        num_classes: size of the logits.
        layers: number of cells; reduction cells at layers // 3 and 2 * layers // 3.
        space: a name of genotypes.SPACES.
        nodes: intermediate nodes of a cell.
        in_channels: channels of the images.
        drop_path_prob: probability that a sample skips an edge, in training.
        recompute: keep only the inputs of each cell for the backward pass and compute the rest again.
    """

    cells: Sequence[Cell]

    def __init__(
        self,
        init_channels: int,
        num_classes: int,
        layers: int,
        space: str = "snas",
        nodes: int = 4,
        in_channels: int = 3,
        drop_path_prob: float = 0.0,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.space, self.nodes, self.drop_path_prob, self.recompute = space, nodes, drop_path_prob, recompute
        stem_channels = 3 * init_channels
        self.stem = nn.Sequential(nn.Conv2d(in_channels, stem_channels, 3, padding=1, bias=False), Norm(stem_channels))
        plans = cell_plan(init_channels, layers, stem_channels, (nodes, nodes))
        self.cells = nn.ModuleList(Cell(plan, SPACES[space], nodes) for plan in plans)  # type: ignore[assignment]
        reductions = sum(plan.reduction for plan in plans)
        self.cells_of_kind = (layers - reductions, reductions)
        self.classifier = nn.Linear(plans[-1].output, num_classes)
        shape = (num_edges(nodes), len(SPACES[space]))
        self.alpha_normal = nn.Parameter(1e-3 * torch.randn(shape))
        self.alpha_reduce = nn.Parameter(1e-3 * torch.randn(shape))
        self.to(memory_format=torch.channels_last)

    @classmethod
    def of(cls, opt: Mapping[str, Any], data: Mapping[str, Any]) -> "Network":
        """The supernet of a search's options and data (options.to_dict, DataInfo.to_dict), as a checkpoint has them."""
        sizes = (opt["init_channels"], len(data["classes"]), opt["layers"], opt["space"], opt["nodes"])
        return cls(*sizes, data["channels"], opt.get("drop_path_prob", 0.0), opt.get("recompute", False))

    @classmethod
    def from_checkpoint(cls, content: Mapping[str, Any]) -> "Network":
        """The supernet of a search's checkpoint (checkpoint.load), with its weights and alpha; raises UserError."""
        opt, state = content["options"], content["parts"]["network"]
        return utils.rebuilt(lambda: cls.of(opt, content["data"]), state, opt["layers"])

    def forward(self, images: Tensor, z: Z) -> Tensor:
        """Images (B, channels, H, W) and Z -> logits (B, classes).

        An operation whose weight is exactly zero is not computed when Z asks for no gradient, as in the
        evaluation of a one-hot Z, or is Drawn; its term is zero either way.
        """
        self._check(z)
        before = last = self.stem(images.contiguous(memory_format=torch.channels_last))
        drop = drop_probability(images, self.drop_path_prob if self.training else 0.0)
        of_kind = [iter(self._per_cell(rows, kind, isinstance(z, Drawn))) for kind, rows in enumerate(z)]
        for cell in self.cells:
            rows, active = next(of_kind[cell.plan.reduction])
            if self.recompute and self.training and torch.is_grad_enabled():
                before, last = last, self._recomputed(cell, before, last, rows, active, drop)
            else:
                before, last = last, cell(before, last, rows, active, drop)
        return self.classifier(last.mean((2, 3)))

    def _recomputed(
        self,
        cell: Cell,
        before: Tensor,
        last: Tensor,
        rows: Tensor,
        active: Sequence[Sequence[bool]],
        drop: Tensor | None,
    ) -> Tensor:
        """cell(...), of which the backward pass keeps only the inputs and computes the rest again."""

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), frozen_statistics(cell)  # of the forward pass, of its repetition

        return checkpoint(cell, before, last, rows, active, drop, use_reentrant=False, context_fn=contexts)

    def _check(self, z: Z) -> None:
        """Z as sample and one_hot give it, or a mistake that no operation downstream would notice."""
        for name, rows, alpha, cells in zip(Z._fields, z, self.alphas(), self.cells_of_kind, strict=True):
            if rows.dtype != alpha.dtype or rows.device != alpha.device:
                raise TypeError(
                    f"Z of the {name} cells is {rows.dtype} on {rows.device}, alpha {alpha.dtype} on {alpha.device}"
                )
            if rows.shape not in (alpha.shape, (cells, *alpha.shape)):
                raise ValueError(
                    f"Z of the {name} cells has the shape {tuple(rows.shape)}, not {tuple(alpha.shape)}, or that a cell"
                )

    def _per_cell(self, rows: Tensor, kind: int, drawn: bool) -> Sequence[tuple[Tensor, Sequence[Sequence[bool]]]]:
        """The Z (E, O) of each cell of a kind (0 normal, 1 reduce), shared or its own, and which operations run."""
        cells, (edges, ops) = self.cells_of_kind[kind], rows.shape[-2:]
        each = list(rows) if rows.dim() == 3 else [rows] * cells
        if rows.is_meta or (rows.requires_grad and not drawn):  # meta tensors, used to count flops, have no values
            return [(own, [[True] * ops] * edges) for own in each]
        active = (rows != 0).tolist()  # waits for the device, once a kind
        return [*zip(each, active if rows.dim() == 3 else [active] * cells, strict=True)]

    def alphas(self) -> list[nn.Parameter]:
        """[alpha_normal, alpha_reduce], each (E, O)."""
        return [self.alpha_normal, self.alpha_reduce]

    def thetas(self) -> list[nn.Parameter]:
        """All parameters but alpha."""
        return [p for name, p in self.named_parameters() if not name.startswith("alpha_")]

    def genotype(self) -> Genotype:
        """The child that alpha stands for now: the argmax of every edge, none included."""
        return derive(self.alpha_normal, self.alpha_reduce, self.space)

    def sample(
        self,
        temperature: float,
        generator: torch.Generator | None = None,
        per_cell: bool = False,
        sampler: str = "concrete",
    ) -> Z:
        """Z ~ Concrete(alpha, temperature), differentiable in alpha, or that of another of sampling.SAMPLERS.

        Args:
            temperature: of the softmax, > 0.
            generator: source of the noise, on alpha's device.
            per_cell: draw an independent Z for every cell.
            sampler: how Z depends on alpha.
        """
        counts = self.cells_of_kind if per_cell else (None, None)
        draw = sampling.SAMPLERS[sampler]
        draws = [draw(a, temperature, generator, n) for a, n in zip(self.alphas(), counts, strict=True)]
        return (Drawn if sampler in sampling.SPARSE else Z)(*draws)

    def one_hot(self, genotype: Genotype) -> Z:
        """The Z at which the supernet is the child of `genotype`: rows one-hot, none where no op is left.

        Raises:
            ValueError: the genotype is of another space or size, or has two ops on one edge.
        """
        if genotype.space != self.space:
            raise ValueError(f"the genotype is of the space {genotype.space!r}, the supernet of {self.space!r}")
        edges = edge_list(self.nodes)
        result = []
        for kind, nodes, concat in genotype.cells():
            if len(nodes) != self.nodes or sorted(concat) != list(range(2, 2 + self.nodes)):
                raise ValueError(f"the {kind} cell has not the supernet's {self.nodes} nodes, all concatenated")
            index = [0] * len(edges)
            for node, pairs in enumerate(nodes):
                for op, source in pairs:
                    if index[edges.index((node, source))]:
                        raise ValueError(f"{kind} node {node} has two ops on its edge from {source}")
                    index[edges.index((node, source))] = SPACES[self.space].index(op)
            rows = F.one_hot(torch.tensor(index, device=self.alpha_normal.device), len(SPACES[self.space]))  # (E, O)
            result.append(rows.to(self.alpha_normal.dtype))
        return Z(*result)

    def child_state_dict(self, genotype: Genotype) -> dict[str, Tensor]:
        """The supernet's weights under the names of model.ChildNetwork(genotype, ..., affine=False)."""
        kept = {k: v for k, v in self.state_dict().items() if not k.startswith(("cells.", "alpha_"))}
        edges = edge_list(self.nodes)
        for index, cell in enumerate(self.cells):
            nodes = genotype.reduce if cell.plan.reduction else genotype.normal
            modules: dict[str, nn.Module] = {"prepare0": cell.prepare0, "prepare1": cell.prepare1}
            pairs = [(node, op, source) for node, pairs in enumerate(nodes) for op, source in pairs]
            for number, (node, op, source) in enumerate(pairs):
                modules[f"ops.{number}"] = cell.edges[edges.index((node, source))].ops[op]
            for name, module in modules.items():
                kept |= {f"cells.{index}.{name}.{k}": v for k, v in module.state_dict().items()}
        return kept
