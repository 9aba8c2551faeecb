import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import write_images
from PIL import Image

from loading import splits
from loading.augmentation import Augmentation, augment
from loading.batches import Data, write_split
from options import UserError
from options.default_option import TrainOptions


def options(folder: Path, **changes: object) -> TrainOptions:
    return TrainOptions(**({"dataset": str(folder)} | changes))  # type: ignore[arg-type]


def test_splits_are_stratified_disjoint_and_complete(tiny: Path) -> None:
    split = Data(options(tiny, test_portion=0.25, train_portion=0.67)).split
    names = [name for part in split.values() for name in part]
    assert len(names) == len(set(names)) == 36
    for part, share in (("train", 6), ("valid", 3), ("test", 3)):
        assert [sum(n.startswith(f"class{c}/") for n in split[part]) for c in range(3)] == [share] * 3


def test_splits_depend_on_the_seed_and_on_nothing_else(tiny: Path) -> None:
    assert Data(options(tiny)).split == Data(options(tiny, batch_size=3)).split
    assert Data(options(tiny)).split != Data(options(tiny, seed=1)).split


def test_groups_stay_whole(tiny: Path) -> None:
    split = Data(options(tiny, group_pattern=r"^(\d+)_", test_portion=0.33)).split
    groups = {part: {Path(name).name.split("_")[0] for name in names} for part, names in split.items()}
    assert all(groups.values())
    assert not groups["train"] & groups["valid"] | groups["train"] & groups["test"] | groups["valid"] & groups["test"]


def test_chips_are_split_by_scene_with_every_class_in_every_split(chips: Path) -> None:
    made = Data(options(chips, group_pattern=r"^(\d+)_", train_portion=0.75))
    scenes = {part: {Path(name).name.split("_")[0] for name in names} for part, names in made.split.items()}
    assert not scenes["train"] & scenes["valid"] | scenes["train"] & scenes["test"] | scenes["valid"] & scenes["test"]
    assert sum(map(len, made.split.values())) == 4688
    assert all(min(counts) > 0 for counts in made.info.counts.values())
    assert made.info.image_size == [48, 48]
    for part, share in (("train", 0.6), ("valid", 0.2), ("test", 0.2)):
        assert sum(made.info.counts[part]) / 4688 == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_pattern": r"^scene(\d+)"}, "--group_pattern"),
        ({"group_pattern": r"^(\d+)_(x)?", "test_portion": 0.005}, "split|no training image"),
        ({"group_pattern": "^(x)?"}, "--group_pattern"),
        ({"train_portion": 0.01}, "split|no training image"),
        ({"dataset": "/nowhere"}, "no such folder"),
        ({"dataset": "cifar10", "data_dir": "/nowhere"}, "--download True"),
    ],
)
def test_wrong_options_are_named(tiny: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Data(options(tiny, **changes))


def test_a_class_too_small_to_split_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the smallest class, 'class0', has 1 images"):
        Data(options(write_images(tmp_path / "d", per_class=1)))


def test_a_lost_image_of_a_stored_split_is_named(tiny: Path) -> None:
    split = Data(options(tiny)).split
    with pytest.raises(UserError, match=r"gone, e.g. class9/x.png"):
        Data(options(tiny), {**split, "test": ["class9/x.png"]})


def test_named_data_set_is_read_offline_with_its_own_test_set(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for stem, count in (("train", 40), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = np.array([2051, count, 28, 28], ">i4").tobytes()
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(np.array([2049, count], ">i4").tobytes() + labels.tobytes())
    made = Data(options(tmp_path, dataset="fashion_mnist", data_dir=str(tmp_path), image_size=14))
    assert [sum(c) for c in made.info.counts.values()] == [20, 20, 20]
    assert made.split["test"] == [f"fashion_mnist/{i}" for i in range(40, 60)]
    assert made.info.image_size == [14, 14] and made.info.channels == 1 and len(made.info.classes) == 10
    # a split of an earlier version, and one of another data set
    earlier = {part: [name.split("/")[1] for name in names] for part, names in made.split.items()}
    again = Data(options(tmp_path, dataset="fashion_mnist", data_dir=str(tmp_path), image_size=14), earlier)
    assert again.split == made.split
    other = {part: [f"cifar10/{name}" for name in names] for part, names in earlier.items()}
    with pytest.raises(UserError, match="60 images of the split are gone"):
        Data(options(tmp_path, dataset="fashion_mnist", data_dir=str(tmp_path), image_size=14), other)


def test_mean_and_std_are_those_of_the_training_split(tiny: Path) -> None:
    made = Data(options(tiny))
    pixels = made.pixels[made.indices["train"]].double() / 255
    assert made.info.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert made.info.std == pytest.approx(pixels.std((0, 2, 3), unbiased=False).tolist())
    plain = torch.cat([images for images, _ in made.plain_train_batches(7, 99, 0, torch.device("cpu"))])
    assert len(plain) == len(pixels) == 14
    assert plain.mean().abs() < 1e-5 and plain.std((0, 2, 3), unbiased=False).tolist() == pytest.approx(
        [1] * 3, rel=1e-5
    )


def test_balance_draws_classes_equally_in_training_and_leaves_validation_alone(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "d", classes=2, per_class=40)
    for path in sorted((folder / "class1").iterdir())[:32]:
        path.unlink()
    device = torch.device("cpu")
    made = Data(options(folder, balance=True, test_portion=0.0))
    drawn = torch.cat([labels for epoch in range(50) for _, labels in made.train_batches(4, epoch, device)])
    assert drawn.double().mean().item() == pytest.approx(0.5, abs=0.05)
    valid = torch.cat([labels for _, labels in made.batches("valid", 7, device)])
    assert valid.bincount().tolist() == made.info.counts["valid"] == [20, 4]


def test_an_epoch_visits_every_training_image_once(tiny: Path) -> None:
    made = Data(options(tiny, crop_padding=0, flip="none"))
    count = len(made.indices["train"])
    images = torch.cat([images for images, _ in made.train_batches(1, 0, torch.device("cpu"))])
    wanted = torch.cat([images for images, _ in made.plain_train_batches(100, 1, 3, torch.device("cpu"))])
    assert len(images) == count == made.info.steps(1)
    assert torch.equal(images.flatten(1).sum(1).sort().values, wanted.flatten(1).sum(1).sort().values)


def test_epochs_differ_and_repeat_themselves(tiny: Path) -> None:
    made, device = Data(options(tiny)), torch.device("cpu")
    first, again, other = (next(made.train_batches(8, epoch, device))[0] for epoch in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_batches_are_moved_to_the_device(tiny: Path) -> None:
    made, device = Data(options(tiny)), torch.device("meta")
    for batches in (made.train_batches(4, 0, device), made.batches("valid", 4, device)):
        images, labels = next(batches)
        assert images.device == labels.device == device


def test_every_image_is_decoded_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loading import images

    read, paths = images._read, []
    monkeypatch.setattr(images, "_read", lambda path, *rest: paths.append(path) or read(path, *rest))
    made = Data(options(tiny))
    list(made.train_batches(4, 0, torch.device("cpu")))
    assert len(paths) == len(set(paths)) == 36


def test_calibration_batches_are_of_equal_sizes(tiny: Path) -> None:
    made, device = Data(options(tiny)), torch.device("cpu")
    for size, count, wanted in ((5, 9, [5, 5]), (5, 1, [5]), (13, 3, [13]), (99, 2, [14])):
        assert [len(labels) for _, labels in made.plain_train_batches(size, count, 0, device)] == wanted


def test_a_short_training_set_still_gives_a_step(tiny: Path) -> None:
    made = Data(options(tiny))
    batches = list(made.train_batches(1000, 0, torch.device("cpu")))
    assert len(batches) == made.info.steps(1000) == 1 and len(batches[0][1]) == len(made.indices["train"])


def counted(batch: int = 64, size: int = 6) -> torch.Tensor:
    return (torch.arange(batch * size * size).view(batch, 1, size, size) % 250 + 1).byte()


def test_crops_differ_by_image_and_are_windows_of_the_padded_one() -> None:
    pixels = counted()
    got = augment(pixels, Augmentation(crop_padding=2), torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(pixels, (2, 2, 2, 2))
    places = []
    for image, frame in zip(got, padded, strict=True):
        windows = [(y, x) for y in range(5) for x in range(5) if torch.equal(image, frame[:, y : y + 6, x : x + 6])]
        assert len(windows) == 1
        places += windows
    assert len(set(places)) > 15


def test_flips_mirror_about_half_of_the_images() -> None:
    pixels = counted(400)
    got = augment(pixels, Augmentation(flip="horizontal"), torch.Generator().manual_seed(0))
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(got, pixels, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(got, pixels, strict=True)]
    assert all(m != k for m, k in zip(mirrored, kept, strict=True)) and 160 < sum(mirrored) < 240
    both = augment(pixels, Augmentation(flip="both"), torch.Generator().manual_seed(0))
    forms = [(), (-1,), (-2,), (-2, -1)]
    counts = [sum(torch.equal(a, b.flip(f) if f else b) for a, b in zip(both, pixels, strict=True)) for f in forms]
    assert sum(counts) == 400 and min(counts) > 60


def test_the_eight_symmetries_of_a_square_come_equally_often() -> None:
    pixels = counted(800)
    got = augment(pixels, Augmentation(flip="dihedral"), torch.Generator().manual_seed(0))
    forms = [(turned, mirrored) for turned in range(4) for mirrored in (False, True)]
    counts = [
        sum(
            torch.equal(a, (b.flip(-1) if mirrored else b).rot90(turned, (1, 2)))
            for a, b in zip(got, pixels, strict=True)
        )
        for turned, mirrored in forms
    ]
    assert sum(counts) == 800 and min(counts) > 70


def test_images_that_are_turned_are_square(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--flip dihedral turns images, which have to be square, not 6x8"):
        Data(options(write_images(tmp_path / "d", size=(8, 6)), flip="dihedral"))


def test_cutout_blanks_one_square_that_may_hang_over_the_border() -> None:
    pixels = counted(200, 12)
    got = augment(pixels, Augmentation(cutout=4), torch.Generator().manual_seed(0))
    areas = []
    for image, before in zip(got[:, 0], pixels[:, 0], strict=True):
        hole = image == 0
        rows, columns = hole.any(1).sum().item(), hole.any(0).sum().item()
        assert hole.sum() == rows * columns and 2 <= rows <= 4 and 2 <= columns <= 4
        assert torch.equal(image[~hole], before[~hole])
        areas.append(rows * columns)
    assert max(areas) == 16 and min(areas) < 16


def test_no_augmentation_changes_nothing() -> None:
    assert torch.equal(augment(counted(), Augmentation()), counted())


def test_split_file_says_how_it_was_drawn(tiny: Path, tmp_path: Path) -> None:
    opt = options(tiny, seed=3)
    made = Data(opt)
    write_split(tmp_path / "split.json", made, opt)
    stored = json.loads((tmp_path / "split.json").read_text())
    assert stored["seed"] == 3 and {k: stored[k] for k in made.split} == made.split


def test_the_bundled_slice_is_complete() -> None:
    folder = Path(__file__).parents[2] / "dataset"
    made = Data(options(folder))
    assert [sum(column) for column in zip(*made.info.counts.values(), strict=True)] == [200] * 10
    assert made.info.image_size == [28, 28] and made.info.channels == 1
    with Image.open(folder / "Bag" / "00023.png") as image:
        assert image.mode == "L"


def test_the_split_of_many_images_is_kept(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "_MANY", 10)
    fresh = Data(options(tiny, cache_dir=str(tmp_path))).split
    assert len(list(tmp_path.glob("*.json"))) == 1
    monkeypatch.setattr(splits, "_new_split", lambda *_: pytest.fail("split again"))
    assert Data(options(tiny, cache_dir=str(tmp_path))).split == fresh
    monkeypatch.undo()
    monkeypatch.setattr(splits, "_MANY", 10)
    assert Data(options(tiny, cache_dir=str(tmp_path), seed=1)).split != fresh


def test_cutout_fills_with_what_normalisation_makes_zero(tiny: Path) -> None:
    made = Data(options(tiny, cutout=True, cutout_length=3, crop_padding=0, flip="none"))
    images, _ = next(made.train_batches(36, 0, torch.device("cpu")))
    plain = Data(options(tiny, crop_padding=0, flip="none"))
    before, _ = next(plain.train_batches(36, 0, torch.device("cpu")))
    assert images.shape == before.shape
    changed = (images != before).any(1)  # (B, H, W)
    assert 0 < changed.float().mean() < 0.2
    assert images.abs().permute(0, 2, 3, 1)[changed].max() < 0.02  # a byte is as near to the mean as it can be
    assert any("blanks most" in note for note in Data(options(tiny, cutout=True, cutout_length=7)).notes)
