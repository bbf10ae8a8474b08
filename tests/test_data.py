"""Datasets in files: layouts, pairing, what is missing or wrong, and that nothing is read before it is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from _processes import run_python
from PIL import Image

from deeplab_kernels.errors import UserError
from deeplab_kernels.models.data import (
    CLASS_NAMES,
    IGNORE,
    Cityscapes,
    FolderDataset,
    PascalVOC,
    SceneDataset,
    generated_dataset,
    open_dataset,
    voc_palette,
    write_generated_dataset,
)


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    return write_generated_dataset(tmp_path / "VOCdevkit" / "VOC2012", train=3, val=2, size=40, seed=5, void=1)


def write_folder(root: Path, names: tuple[str, ...] = ("a", "b"), classes: str | None = "sky\nground\n") -> Path:
    for below in ("images", "labels"):
        (root / below).mkdir(parents=True)
    for n, name in enumerate(names):
        Image.new("RGB", (7, 5), (n, 20, 30)).save(root / "images" / f"{name}.png")
        Image.new("L", (7, 5), n % 2).save(root / "labels" / f"{name}.png")
    if classes is not None:
        (root / "classes.txt").write_text(classes)
    return root


# The generated dataset


def test_what_is_written_is_what_is_drawn(voc):
    dataset, drawn = PascalVOC(voc, "val"), generated_dataset("val", length=2, size=40, seed=5)
    assert dataset.class_names == CLASS_NAMES
    assert dataset.palette == tuple(tuple(int(v) for v in c) for c in voc_palette()[: len(CLASS_NAMES)])
    assert dataset.names == ["val_000000", "val_000001"]
    assert len(PascalVOC(voc, "train")) == 3
    assert PascalVOC(voc, "trainval").names == PascalVOC(voc, "train").names + dataset.names
    for index in range(2):
        read, scene = dataset[index], drawn[index]
        kept = read.labels != IGNORE
        assert np.array_equal(read.labels[kept], scene.labels[kept])
        assert 0 < (~kept).mean() < 0.5
        assert np.abs(read.image.astype(int) - scene.image).mean() < 4  # JPEG
        assert read.labels.dtype == read.image.dtype == np.uint8
    assert Image.open(voc / "SegmentationClass" / "val_000000.png").mode == "P"


def test_void_pixels_lie_along_boundaries(tmp_path):
    write_generated_dataset(tmp_path / "none", train=1, val=1, size=30)
    assert not (PascalVOC(tmp_path / "none")[0].labels == IGNORE).any()
    write_generated_dataset(tmp_path / "two", train=1, val=1, size=30, void=2)
    whole, cut = PascalVOC(tmp_path / "none")[0].labels, PascalVOC(tmp_path / "two")[0].labels
    rows, columns = np.nonzero(cut == IGNORE)
    for y, x in zip(rows, columns, strict=True):
        assert len(np.unique(whole[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3])) > 1


def test_splits_of_the_generated_dataset_differ():
    train, val, other = generated_dataset("train"), generated_dataset("val"), generated_dataset("train", seed=1)
    assert (len(train), len(val)) == (400, 60)
    assert len({train.seed, val.seed, other.seed, generated_dataset("val", seed=1).seed}) == 4
    with pytest.raises(UserError, match="must be one of train, val, got 'test'"):
        generated_dataset("test")


def test_writing_refuses_what_it_would_destroy(tmp_path):
    (tmp_path / "x").write_text("")
    for root in (tmp_path, tmp_path / "x"):
        with pytest.raises(UserError, match="exists and is not an empty folder"):
            write_generated_dataset(root, train=1, val=1)
    with pytest.raises(ValueError, match="train=0"):
        write_generated_dataset(tmp_path / "new", train=0)
    assert not (tmp_path / "new").exists()


# PASCAL VOC


def test_voc_is_found_where_the_archive_was_unpacked(voc):
    for root in (voc, voc.parent, voc.parent.parent):
        assert len(PascalVOC(root, "val")) == 2


def test_voc_names_the_papers_classes(voc):
    (voc / "classes.txt").unlink()
    dataset = PascalVOC(voc)
    assert len(dataset.class_names) == 21
    assert dataset.class_names[0] == "background"
    assert dataset.class_names[15] == "person"
    assert dataset.palette[15] == (192, 128, 128)


@pytest.mark.parametrize("file", ["train_aug.txt", "trainaug.txt"])
@pytest.mark.parametrize("line", ["{}", "/JPEGImages/{}.jpg /SegmentationClassAug/{}.png"])
def test_train_aug_takes_its_own_labels(voc, file, line):
    names = ["train_000001", "val_000000"]
    (voc / "ImageSets/Segmentation" / file).write_text("\n".join(line.format(n, n) for n in names) + "\n\n")
    (voc / "SegmentationClassAug").mkdir()
    for n in names:
        Image.new("L", (40, 40), 3).save(voc / "SegmentationClassAug" / f"{n}.png")
    dataset = PascalVOC(voc, "train_aug")
    assert dataset.names == names
    assert (dataset[1].labels == 3).all()


def test_voc_says_what_is_missing(voc):
    for index in range(3):
        (voc / "JPEGImages" / f"train_{index:06d}.jpg").unlink()
    with pytest.raises(UserError, match=r"train.txt: 3 images are missing: .*train_000000.jpg, .*train_000001.jpg"):
        PascalVOC(voc)
    (voc / "SegmentationClass" / "val_000001.png").unlink()
    with pytest.raises(UserError, match=r"1 label maps are missing: .*val_000001.png"):
        PascalVOC(voc, "val")
    with pytest.raises(UserError, match=r"there is no list .*train_aug.txt; it comes with SBD"):
        PascalVOC(voc, "train_aug")
    (voc / "ImageSets/Segmentation/val.txt").write_text("\n \n")
    with pytest.raises(UserError, match=r"val.txt: lists no images"):
        PascalVOC(voc, "val")
    (voc / "ImageSets/Segmentation/val.txt").write_text("a b c\n")
    with pytest.raises(UserError, match="a line is a name, or"):
        PascalVOC(voc, "val")
    (voc / "ImageSets/Segmentation/val.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        PascalVOC(voc, "val")
    with pytest.raises(UserError, match="must be one of train, val, trainval, train_aug, got 'test'"):
        PascalVOC(voc, "test")
    with pytest.raises(UserError, match="not PASCAL VOC's layout: there is no folder JPEGImages"):
        PascalVOC(voc / "JPEGImages")


# What is read is checked


def test_labels_out_of_range_are_named_with_their_file(voc):
    path = voc / "SegmentationClass" / "train_000002.png"
    Image.new("L", (40, 40), 7).save(path)
    dataset = PascalVOC(voc)
    dataset[0]
    with pytest.raises(UserError, match=r"train_000002.png: has label 7; .* 7 classes, so that labels are 0 to 6"):
        dataset[2]
    Image.fromarray(np.full((40, 40), 300, np.uint16)).save(path)
    with pytest.raises(UserError, match=r"train_000002.png: has label 300"):
        dataset[2]


def test_a_label_map_of_another_size_is_named(voc):
    Image.new("P", (40, 39)).save(voc / "SegmentationClass" / "train_000001.png")
    with pytest.raises(UserError, match=r"train_000001.png: 40 x 39 pixels, but its image .*1.jpg has 40 x 40"):
        PascalVOC(voc)[1]


def test_damaged_files_are_named(voc):
    image, label = voc / "JPEGImages" / "train_000000.jpg", voc / "SegmentationClass" / "train_000001.png"
    image.write_bytes(image.read_bytes()[:200])
    Image.new("RGB", (40, 40)).save(label)
    dataset = PascalVOC(voc)
    with pytest.raises(UserError, match=r"train_000000.jpg: the image is damaged"):
        dataset[0]
    with pytest.raises(UserError, match=r"train_000001.png: a label map holds one number per pixel"):
        dataset[1]


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_out_of_range(voc, index):
    with pytest.raises(IndexError, match=f"index {index} of a dataset of 3"):
        PascalVOC(voc)[index]


# Cityscapes


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    root = tmp_path / "cityscapes"
    ids = np.arange(34, dtype=np.uint8).reshape(2, 17)
    for city, frame in (("ulm", "ulm_000000_000019"), ("aachen", "aachen_000001_000019")):
        for kind in ("leftImg8bit", "gtFine"):
            (root / kind / "train" / city).mkdir(parents=True)
        Image.new("RGB", (17, 2)).save(root / "leftImg8bit/train" / city / f"{frame}_leftImg8bit.png")
        Image.fromarray(ids).save(root / "gtFine/train" / city / f"{frame}_gtFine_labelIds.png")
        Image.fromarray(ids).save(root / "gtFine/train" / city / f"{frame}_gtFine_instanceIds.png")
    return root


def test_cityscapes_maps_label_ids_to_train_ids(cityscapes):
    dataset = Cityscapes(cityscapes)
    assert dataset.names == ["aachen_000001_000019", "ulm_000000_000019"]
    labels = dataset[1].labels.ravel()
    evaluated = [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]
    assert [int(labels[i]) for i in evaluated] == list(range(19))
    assert all(labels[i] == IGNORE for i in range(34) if i not in evaluated)
    assert dataset.class_names[13] == "car"
    assert dataset.palette[13] == (0, 0, 142)
    assert len(dataset.class_names) == 19


def test_cityscapes_says_what_is_wrong(cityscapes):
    with pytest.raises(UserError, match="must be one of train, val, got 'test'"):
        Cityscapes(cityscapes, "test")
    with pytest.raises(UserError, match="there is no folder leftImg8bit/val"):
        Cityscapes(cityscapes, "val")
    label = cityscapes / "gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png"
    Image.new("L", (17, 2), 34).save(label)
    with pytest.raises(UserError, match=r"ulm_000000_000019_gtFine_labelIds.png: has label id 34"):
        Cityscapes(cityscapes)[1]
    label.unlink()
    with pytest.raises(UserError, match=r"1 label maps are missing: .*ulm_000000_000019_gtFine_labelIds.png"):
        Cityscapes(cityscapes)


# A folder


def test_a_folder_pairs_by_name(tmp_path):
    root = write_folder(tmp_path / "d", ("b", "a"))
    (root / "images" / ".hidden.png").write_text("")
    (root / "images" / "notes.txt").write_text("")
    dataset = FolderDataset(root)
    assert dataset.names == ["a", "b"]
    assert dataset.class_names == ("sky", "ground")
    assert dataset[0].image[0, 0, 0] == 1
    assert (dataset[0].labels == 1).all()
    assert FolderDataset(root, class_names=("x", "y", "z")).class_names == ("x", "y", "z")


def test_a_folder_says_what_is_unpaired_or_missing(tmp_path):
    root = write_folder(tmp_path / "d", tuple("abcdefgh"))
    for name in "abcdefg":
        (root / "labels" / f"{name}.png").unlink()
    with pytest.raises(UserError, match=r"7 images without a label map: a.png, b.png, .*e.png and 2 more"):
        FolderDataset(root)
    for name in "abcdefgh":
        (root / "images" / f"{name}.png").unlink()
    with pytest.raises(UserError, match=r"1 label maps without an image: h.png"):
        FolderDataset(root)
    (root / "labels" / "h.png").unlink()
    with pytest.raises(UserError, match="has no images"):
        FolderDataset(root)
    with pytest.raises(UserError, match=r"there is no folder .*images"):
        FolderDataset(root / "labels")


def test_a_folder_with_two_files_of_one_name(tmp_path):
    root = write_folder(tmp_path / "d")
    Image.new("RGB", (7, 5)).save(root / "images" / "a.jpg")
    with pytest.raises(UserError, match=r"a.jpg and a.png have one name"):
        FolderDataset(root)


@pytest.mark.parametrize(("classes", "message"), [(None, "write their names into .*classes.txt"), ("\n", "no classes")])
def test_a_folder_without_class_names(tmp_path, classes, message):
    with pytest.raises(UserError, match=message):
        FolderDataset(write_folder(tmp_path / "d", classes=classes))


def test_too_many_classes(tmp_path):
    root = write_folder(tmp_path / "d", classes="\n".join(map(str, range(256))))
    with pytest.raises(UserError, match="1 to 255 classes, got 256"):
        FolderDataset(root)


def test_parts_of_a_folder(tmp_path):
    root = write_folder(tmp_path / "d", ("a", "b", "c"))
    assert len(open_dataset(f"folder:{root}", "train")) == 3
    with pytest.raises(UserError, match="has no split 'val'"):
        open_dataset(f"folder:{root}", "val")
    (root / "val.txt").write_text("c\na\n")
    assert open_dataset(f"folder:{root}", "val").names == ["c", "a"]
    assert len(open_dataset(f"folder:{root}", "all")) == 3
    with pytest.raises(UserError, match="has no split 'train'"):  # would train on what validates
        open_dataset(f"folder:{root}", "train")
    (root / "train.txt").write_text("b\nnone\n")
    with pytest.raises(UserError, match="1 of the listed names are missing: none"):
        open_dataset(f"folder:{root}", "train")
    for part in ("train", "val"):
        write_folder(tmp_path / "e" / part, (part,), classes=None)
    (tmp_path / "e" / "classes.txt").write_text("one\ntwo\n")
    assert open_dataset(tmp_path / "e", "val").names == ["val"]


# By a word


def test_a_path_is_recognised_by_its_layout(voc, cityscapes, tmp_path):
    folder = write_folder(tmp_path / "d")
    assert isinstance(open_dataset(voc.parent, "val"), PascalVOC)
    assert isinstance(open_dataset(str(cityscapes)), Cityscapes)
    assert isinstance(open_dataset(folder), FolderDataset)
    assert isinstance(open_dataset(f"voc:{voc}", "val"), PascalVOC)
    assert isinstance(open_dataset(f"cityscapes:{cityscapes}"), Cityscapes)


def test_the_generated_dataset_takes_settings():
    dataset = open_dataset("generated:length=3,size=20,seed=4", "val")
    assert isinstance(dataset, SceneDataset)
    assert (len(dataset), dataset.height, dataset.seed) == (3, 20, 9)
    assert len(open_dataset("generated")) == 400


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", "a dataset is generated, voc:PATH, .* got 'nowhere', which is no folder"),
        ("voc:nowhere", "there is no folder nowhere"),
        ("voc:", "no folder named after the colon"),
        ("generated:length=x", "length=N, size=N and seed=N, got 'length=x'"),
        ("generated:count=3", "got 'count=3'"),
        ("generated:size=0", "at least 1"),
    ],
)
def test_words_that_name_no_dataset(spec, message):
    with pytest.raises(UserError, match=message):
        open_dataset(spec)


def test_a_folder_without_a_layout(tmp_path):
    with pytest.raises(UserError, match="has no layout of a dataset"):
        open_dataset(tmp_path)


def test_memory_does_not_grow_with_the_dataset(tmp_path):
    """Reading every image of 150 x 750 kB must not cost more than a few of them."""
    root = tmp_path / "d"
    write_folder(root, ())
    Image.new("RGB", (500, 500)).save(root / "images" / "0.bmp")
    Image.new("L", (500, 500)).save(root / "labels" / "0.png")
    for n in range(1, 150):
        (root / "images" / f"{n}.bmp").hardlink_to(root / "images" / "0.bmp")
        (root / "labels" / f"{n}.png").hardlink_to(root / "labels" / "0.png")
    code = (
        "import json, resource, sys\n"
        "from deeplab_kernels.models.data import FolderDataset\n"
        "dataset = FolderDataset(sys.argv[1])\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "for i in range(10): dataset[i]\n"
        "before = peak()\n"
        "for i in range(150): dataset[i]\n"
        "print(json.dumps(peak() - before))\n"
    )
    assert json.loads(run_python(code, root)) < 20
