from pathlib import Path

import counting
import pytest
import torch

import export_model
import retrain
from child import baselines
from options import UserError
from resources import cost


@pytest.mark.parametrize(
    ("kind", "width", "params"), [("plain", 16, 72_666), ("plain", 20, 113_150), ("resnet", 16, 77_754)]
)
def test_baselines_have_the_parameters_of_their_description(kind: str, width: int, params: int) -> None:
    """By hand, for one channel and ten classes."""
    network = baselines.make(kind, width, 10, 1)
    assert counting.count_params(network) == params == cost.count(network, 1, (28, 28))["params"]
    assert counting.count_flops(network, torch.zeros(1, 1, 28, 28)) == cost.count(network, 1, (28, 28))["flops"]


@pytest.mark.parametrize("kind", baselines.KINDS)
def test_the_width_that_comes_nearest_is_taken(kind: str) -> None:
    for wanted in (1, 5_000, 92_026, 300_000):
        size = counting.count_params(baselines.make(kind, 0, 10, 3, wanted))
        others = [counting.count_params(baselines.make(kind, width, 10, 3)) for width in range(1, 60)]
        assert abs(size - wanted) == min(abs(other - wanted) for other in others)


def test_memory_access_is_what_the_layers_read_and_write() -> None:
    """By hand, for a plain network of 4 channels on 8x8 pixels."""
    expected, pixels, channels = 0, 64, 1
    for stage, width in enumerate((4, 8, 16)):
        if stage:
            expected += channels * pixels + channels * pixels // 4  # the pool
            pixels //= 4
        for c_in in (channels, width):
            expected += c_in * pixels + width * pixels + 9 * c_in * width
        channels = width
    assert cost.count(baselines.make("plain", 4, 3, 1), 1, (8, 8))["mac"] == expected + 16 + 3 + 48


@pytest.mark.parametrize("kind", baselines.KINDS)
def test_baselines_are_trained_tested_and_exported_like_a_child(kind: str, searched: list[str], tmp_path: Path) -> None:
    given = [*searched, f"--network={kind}", "--init_channels=2", "--ema_decay=0.9"]
    tested = retrain.main(given)
    assert tested.genotype is None and tested.figures["network"] == kind and tested.figures["genotype"] is None
    assert not (tested.folder / "genotype.json").exists()
    again = retrain.main([*given, "--eval_only=True"])
    assert again.figures["loss"] == pytest.approx(tested.figures["loss"])
    exported = export_model.main([f"--experiments_dir={tmp_path}/experiments", "--checkpoint=again", "--format=pt2"])
    assert exported.card["params"] == tested.figures["params"] and exported.card["test"]["acc"] == tested.figures["acc"]
    whole = retrain.main([*given, "--name=matched", "--match_params=3000", "--epochs=1"])
    assert abs(whole.figures["params"] - 3000) < 800
    with pytest.raises(UserError, match="halves images twice"):
        retrain.main([*given, "--name=small", "--image_size=3", "--crop_padding=0"])
    with pytest.raises(SystemExit):
        retrain.main([*given, "--name=weights", "--init_from=run"])
