import json
from pathlib import Path

import pytest

import genotypes
from child import source
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
        assert source.read_genotype(tmp_path / "cell") == wanted
    for text, words in (
        (PRINTED.replace("sep_conv_3x3", "sep_conv_9x9"), "normal node 0, edge 0: 'sep_conv_9x9'"),
        ("Genotype(__import__('os').system('touch hacked'))", "is not Genotype"),
        ("Genotype(normal=open('x'))", "malformed node"),
        ("{", "not JSON"),
        ("Genotype(normal=", "never closed"),
    ):
        (tmp_path / "cell").write_text(text)
        with pytest.raises(UserError, match=words) as error:
            source.read_genotype(tmp_path / "cell")
        assert "\n" not in str(error.value)
