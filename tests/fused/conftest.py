from collections.abc import Iterator

import pytest

from fused import build
from fused import operation as kernels


@pytest.fixture(autouse=True)
def _switched_back() -> Iterator[None]:
    with kernels.switched(True):
        yield


@pytest.fixture
def compiled() -> None:
    """For tests of the kernels themselves."""
    if build.library() is None:
        pytest.skip(f"no kernels here: {build.missing}")
