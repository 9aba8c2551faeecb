"""Cells from files: genotype.json, and the forms in which others give theirs away."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import genotypes
from genotypes import Genotype
from options import UserError


def read_genotype(path: Path, name: str = "") -> Genotype:
    """A genotype.json; or the forms in which DARTS and its successors give cells away.

    These are Python's `Genotype(normal=[("sep_conv_3x3", 0), ...], normal_concat=range(2, 6), ...)`, anywhere in the
    file, and the same as JSON: a flat list of two pairs a node.

    Args:
        path: the file. name: of the cell, where a file has several: NAME = Genotype(...).
    Raises:
        UserError: with one line that names the cell, node and edge at fault.
    """
    try:
        text = path.read_text(encoding="utf-8")
        raw = _printed(text, name) if _CALL.search(text) else json.loads(text)
        if isinstance(raw, dict):
            _unflatten(raw)
        return Genotype.from_dict(raw)
    except json.JSONDecodeError as error:
        raise UserError(f"--genotype {path}: neither JSON nor Genotype(normal=...): {error}") from None
    except UnicodeDecodeError:
        raise UserError(f"--genotype {path} is no text") from None
    except (ValueError, OSError) as error:
        raise UserError(f"--genotype {path}: {error}") from None


_CALL = re.compile(r"\bGenotype\s*\((?=\s*normal\b)")
_NAME = re.compile(r"\b(\w+)\s*=\s*(?:\w+\.)*$")  # of what stands before a call


def _printed(text: str, name: str) -> dict[str, Any]:
    """NAME = Genotype(...) of a text as a mapping; nothing of it is run. Raises ValueError."""
    found: dict[str, dict[str, Any]] = {}
    for match in _CALL.finditer(text):
        called = _NAME.search(text[max(0, match.start() - 200) : match.start()])
        found[called[1] if called else ""] = _call(text[match.end() :])
    if name and name not in found:
        raise ValueError(
            f"it has no {name} = Genotype(...), but {', '.join(filter(None, found)) or 'one without a name'}"
        )
    cells = [found[name]] if name else list(found.values())
    if any(cell != cells[0] for cell in cells) or (not name and len(_CALL.findall(text)) > len(found)):
        raise ValueError(f"it has several cells ({', '.join(filter(None, found))}); give FILE:NAME, or a file with one")
    return cells[0]


def _call(text: str) -> dict[str, Any]:
    """The arguments of a call, given the text after its parenthesis."""
    depth = end = 0
    while depth >= 0:
        if end == len(text):
            raise ValueError("the parenthesis of Genotype( is never closed")
        depth += (text[end] in "([") - (text[end] in ")]")
        end += 1

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
            ends = [ast.literal_eval(argument) for argument in node.args]
            if not all(isinstance(number, int) and abs(number) < 1000 for number in ends):
                raise ValueError
            return list(range(*ends))
        return ast.literal_eval(node)

    try:
        call = ast.parse(f"Genotype({text[:end]}", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args:
            raise ValueError
        return {str(keyword.arg): value(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, TypeError):
        raise ValueError("it is not Genotype(normal=..., normal_concat=..., reduce=..., reduce_concat=...)") from None


def _unflatten(raw: dict[str, Any]) -> None:
    """Give each node its pairs where a cell is a flat list of two a node, and a space that has all operations."""
    ops: set[str] = set()
    for kind in ("normal", "reduce"):
        cell = raw.get(kind)
        if not isinstance(cell, list | tuple):
            continue
        pairs = [
            pair for pair in cell if isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str)
        ]
        if cell and len(pairs) == len(cell):
            if len(cell) % 2:
                raise ValueError(f"{kind} has {len(cell)} pairs, an odd number: a node has two")
            raw[kind] = [cell[first : first + 2] for first in range(0, len(cell), 2)]
        else:
            pairs = [pair for node in cell if isinstance(node, list | tuple) for pair in node]
        ops |= {pair[0] for pair in pairs if isinstance(pair, list | tuple) and pair and isinstance(pair[0], str)}
    fitting = [space for space, names in genotypes.SPACES.items() if ops <= {*names}]
    if fitting and "space" not in raw:
        raw["space"] = fitting[0]
