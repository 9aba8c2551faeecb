import torch

from training import loop


def test_mean_weighs_by_images() -> None:
    mean = loop.Mean()
    mean.add({"a": torch.tensor(1.0)}, 3)
    mean.add({"a": torch.tensor(5.0)}, 1)
    assert mean.values() == ({"a": 2.0}, 4)
