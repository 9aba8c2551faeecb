import os
import shutil
from pathlib import Path

import pytest
from pictures import write_images

from loading import folders
from loading.batches import Data
from options import UserError
from options.default_option import DataOptions


def test_a_folder_that_is_linked_twice_counts_once(tmp_path: Path) -> None:
    root = write_images(tmp_path / "d", classes=2, per_class=4)
    more = write_images(tmp_path / "more", classes=1, per_class=4)
    for name in ("x", "y"):
        (root / "class0" / name).symlink_to(more / "class0")
    os.link(root / "class1" / "0_0.png", root / "class1" / "same.png")
    folder = folders.scan(root)
    assert folder.labels.count(0) == 8 and folder.labels.count(1) == 4
    assert folder.again == {"class1/same.png": "class1/0_0.png"} and "class0/x/0_0.png" in folder.files
    assert folder.left_out == "1 linked file met before, 1 linked folder met before"


@pytest.mark.parametrize("link", ["class0/more -> class1", "class2 -> class0", "class0/x.png -> class1/0_0.png"])
def test_a_file_in_two_classes_is_refused(link: str, tmp_path: Path) -> None:
    root = write_images(tmp_path / "d", classes=2, per_class=4)
    name, _, target = link.partition(" -> ")
    (root / name).symlink_to(root / target)
    with pytest.raises(UserError, match=r"are the same (file|folder), in two classes; remove one"):
        folders.scan(root)


@pytest.mark.parametrize(
    "names",
    ["train2017 val2017", "Training_Set Test_Set", "train test unlabeled", "seg_train seg_test seg_pred", "train dev",
     "train validation extra", "Train holdout", "trainA testA trainB testB", "imagesTr imagesTs", "train_set test_set"],
)  # fmt: skip
def test_splits_are_known_by_their_names(names: str, tmp_path: Path) -> None:
    for name in names.split():
        write_images(tmp_path / "outer" / name)
        shutil.copytree(write_images(tmp_path / "in", classes=1) / "class0", tmp_path / "inner" / "cat" / name)
        shutil.rmtree(tmp_path / "in")
    with pytest.raises(UserError, match="are splits, not classes; give"):
        folders.scan(tmp_path / "outer")
    with pytest.raises(UserError, match="cat holds splits"):
        folders.scan(tmp_path / "inner")


def test_classes_may_be_called_like_a_split(tmp_path: Path) -> None:
    for number, names in enumerate(
        ("train plane test", "train station,test tube", "dev board,eval kit,trainer,testudo")
    ):
        for name in names.split(",") if "," in names else names.split():
            shutil.copytree(write_images(tmp_path / name, classes=1) / "class0", tmp_path / str(number) / name)
            (tmp_path / str(number) / name / "test car").mkdir()
            (tmp_path / str(number) / name / "train station").mkdir()
        assert len(folders.scan(tmp_path / str(number)).classes) >= 2


def test_what_lies_elsewhere_is_counted(tmp_path: Path) -> None:
    root = write_images(tmp_path / "d", classes=2, per_class=4)
    image = root / "class0" / "0_0.png"
    shutil.copy(image, root / "stray.png")
    (root / "README.md").write_text("no image")
    for folder in (root / "class0" / "__MACOSX", root / "class0" / ".cache"):
        folder.mkdir()
        shutil.copy(image, folder / "x.png")
    (root / "class0" / "self.png").symlink_to(root / "class0" / "self.png")
    os.mkfifo(root / "class0" / "pipe.png")
    shutil.copy(image, root / "class1" / "photo.MPO")
    folder = folders.scan(root)
    assert folder.left_out == ("1 broken link, 1 folder __MACOSX, 1 image outside of the class folders, 1 special file")
    assert "class1/photo.MPO" in folder.files and len(folder.files) == 9


def test_of_several_names_the_first_is_taken_and_files_before_links(tmp_path: Path) -> None:
    root = write_images(tmp_path / "d", classes=2, per_class=4)
    os.link(root / "class0" / "0_0.png", root / "class0" / "00.png")
    (root / "class0" / "0.png").symlink_to(root / "class0" / "0_1.png")
    folder = folders.scan(root)
    assert folder.again == {"class0/0_0.png": "class0/00.png", "class0/0.png": "class0/0_1.png"}


def test_a_run_of_before_that_took_linked_files_twice_goes_on(tmp_path: Path) -> None:
    root = write_images(tmp_path / "d", classes=2, per_class=6)
    (root / "class0" / "link.png").symlink_to(root / "class0" / "0_1.png")
    opt = DataOptions(dataset=str(root))
    fresh = Data(opt)
    both = {**fresh.split, "train": [*fresh.split["train"], "class0/link.png"]}
    again = Data(opt, both)
    assert len(again.indices["train"]) == len(fresh.indices["train"]) + 1
    assert again.indices["train"][-1] == folders.scan(root).files.index("class0/0_1.png")
