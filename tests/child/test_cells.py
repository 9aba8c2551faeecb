import json
from pathlib import Path

import pytest

import genotypes
from child import cells
from options import UserError

PRINTED = """
DARTS_V2 = Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1),
('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)], normal_concat=[2, 3, 4, 5],
reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0),
('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=range(2, 6))
"""


def test_cells_as_darts_prints_them_are_read(tmp_path: Path) -> None:
    wanted = genotypes.GENOTYPES["DARTS_V2"]
    flat = {kind: [pair for node in nodes for pair in node] for kind, nodes, _ in wanted.cells()}
    flat |= {"normal_concat": [2, 3, 4, 5], "reduce_concat": [2, 3, 4, 5]}
    for text in (PRINTED, PRINTED.split(" = ")[1], json.dumps(flat), wanted.to_json()):
        (tmp_path / "cell").write_text(text)
        assert cells.read_genotype(tmp_path / "cell") == wanted
    for text, words in (
        (PRINTED.replace("sep_conv_3x3", "sep_conv_9x9"), "normal node 0, edge 0: 'sep_conv_9x9'"),
        ("Genotype(__import__('os').system('touch hacked'))", "neither JSON nor Genotype"),
        ("Genotype(normal=open('x'))", "it is not Genotype"),
        ("{", "neither JSON"),
        (PRINTED.replace("range(2, 6)", "range(2, 10000000000000)"), "it is not Genotype"),
        (PRINTED.replace("range(2, 6)", "[2, 3, 3]"), "names a state twice"),
        (PRINTED.replace("('sep_conv_3x3', 1),", "", 1), "normal has 7 pairs, an odd number"),
        (
            PRINTED + PRINTED.replace("V2", "V1").replace("max_pool", "avg_pool"),
            r"several cells \(DARTS_V2, DARTS_V1\)",
        ),
        ("Genotype(normal=", "never closed"),
    ):
        (tmp_path / "cell").write_text(text)
        with pytest.raises(UserError, match=words) as error:
            cells.read_genotype(tmp_path / "cell")
        assert "\n" not in str(error.value)


def test_cells_are_found_in_logs_and_modules(tmp_path: Path) -> None:
    wanted, file = genotypes.GENOTYPES["DARTS_V2"], tmp_path / "cells.py"
    file.write_text(f"11/20 05:12:21 AM genotype = {PRINTED.split(' = ')[1]}")
    assert cells.read_genotype(file) == wanted
    other = PRINTED.replace("V2", "V1").replace("max_pool", "avg_pool")
    head = "from collections import namedtuple\nGenotype = namedtuple('Genotype', 'normal normal_concat')\n"
    file.write_text(head + other + PRINTED.replace("Genotype", "genotypes.Genotype"))
    assert cells.read_genotype(file, "DARTS_V2") == wanted != cells.read_genotype(file, "DARTS_V1")
    with pytest.raises(UserError, match="it has no X = Genotype"):
        cells.read_genotype(file, "X")
    file.write_text(PRINTED + PRINTED)  # the same again
    assert cells.read_genotype(file, "DARTS_V2") == wanted
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is no text"):
        cells.read_genotype(file)


def test_the_space_of_a_printed_cell_is_one_that_has_its_operations(tmp_path: Path) -> None:
    cell = tmp_path / "cell"
    cell.write_text(PRINTED.replace("sep_conv_3x3", "sep_conv_7x7"))
    assert cells.read_genotype(cell).space == "nasnet"
