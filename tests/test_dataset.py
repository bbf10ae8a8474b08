"""The command ``dataset``: the generated dataset in files, what a dataset holds, and SBD's annotations."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deeplab_kernels import cli
from deeplab_kernels.errors import UserError
from deeplab_kernels.models.data import PascalVOC, add_sbd, generated_dataset, write_generated_dataset


def test_write_and_check(tmp_path, capsys):
    root = tmp_path / "voc"
    assert cli.main(["dataset", "write", str(root), "--train=3", "--val=2", "--size=30", "--void=1", "--seed=4"]) == 0
    assert "3 scenes to train on" in capsys.readouterr().out
    assert cli.main(["dataset", "check", str(root), "--split=val", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    scenes = generated_dataset("val", length=2, size=30, seed=4)
    assert result["images"] == 2
    assert sum(c["share"] for c in result["classes"].values()) == pytest.approx(1)
    assert result["classes"]["background"]["images"] == 2
    assert result["smallest"] == result["largest"] == [30, 30]
    assert result["ignored"] == pytest.approx(np.mean([PascalVOC(root, "val")[i].labels == 255 for i in range(2)]))
    assert {n for n, c in result["classes"].items() if c["images"]} <= {
        scenes.class_names[k] for i in range(2) for k in np.unique(scenes[i].labels)
    }


def test_check_lists_every_error(tmp_path, capsys):
    root = write_generated_dataset(tmp_path / "voc", train=3, val=1, size=20)
    Image.new("L", (20, 20), 7).save(root / "SegmentationClass" / "train_000000.png")
    (root / "JPEGImages" / "train_000002.jpg").write_bytes(b"no image")
    assert cli.main(["dataset", "check", str(root)]) == 2
    out = capsys.readouterr().out
    assert "3 images of 20 x 20 to 20 x 20 pixels" in out
    assert "2 images cannot be used:" in out
    assert "train_000000.png: has label 7" in out
    assert "train_000002.jpg: not an image" in out


def test_wrong_arguments(tmp_path, capsys):
    for arguments, message in (
        (["write", str(tmp_path)], None),
        (["write", str(tmp_path / "a"), "--val=0"], "train and val must be at least 1"),
        (["write", str(tmp_path / "a"), "--size=0"], "size"),
        (["check", "nowhere"], "which is no folder"),
        (["add-sbd", "nowhere", "nowhere"], "nowhere: not PASCAL VOC's layout"),
    ):
        (tmp_path / "file").write_text("")
        assert cli.main(["dataset", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert (message or "not an empty folder") in error


# SBD


@pytest.fixture
def voc_and_sbd(tmp_path: Path) -> tuple[Path, Path]:
    """VOC: train a, val b. SBD: train b c, val a d; it has images of its own, too."""
    io = pytest.importorskip("scipy.io", reason="reads SBD")
    voc, sbd = tmp_path / "VOC2012", tmp_path / "benchmark_RELEASE" / "dataset"
    for folder in (voc / "JPEGImages", voc / "SegmentationClass", voc / "ImageSets/Segmentation", sbd / "cls"):
        folder.mkdir(parents=True)
    for n, name in enumerate("abcd"):
        Image.new("RGB", (4, 3)).save(voc / "JPEGImages" / f"{name}.jpg")
        labels = np.full((3, 4), n + 1, np.uint8)
        io.savemat(sbd / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": labels, "Boundaries": np.zeros(3)}})
    for name in "ab":
        Image.new("L", (4, 3), 20).save(voc / "SegmentationClass" / f"{name}.png")
    lists = {voc / "ImageSets/Segmentation": ("a", "b"), sbd: ("b\nc", "a\nd")}
    for folder, (train, val) in lists.items():
        (folder / "train.txt").write_text(f"{train}\n")
        (folder / "val.txt").write_text(f"{val}\n")
    return voc, sbd


def test_train_aug_is_everything_but_vocs_val(voc_and_sbd, capsys):
    voc, sbd = voc_and_sbd
    assert cli.main(["dataset", "add-sbd", str(voc), str(sbd.parent.parent)]) == 0
    assert "3 images in train_aug" in capsys.readouterr().out
    dataset = PascalVOC(voc, "train_aug")
    assert dataset.names == ["a", "c", "d"]
    assert [int(dataset[i].labels[0, 0]) for i in range(3)] == [20, 3, 4]  # VOC's own label map where there is one
    with pytest.raises(UserError, match=r"train_aug.txt exists already"):
        add_sbd(voc, sbd)


def test_sbd_says_what_is_wrong(voc_and_sbd, tmp_path, monkeypatch):
    voc, sbd = voc_and_sbd
    with pytest.raises(UserError, match="not SBD's layout: there is no folder cls"):
        add_sbd(voc, tmp_path / "nowhere")
    good = (sbd / "cls" / "c.mat").read_bytes()
    (sbd / "cls" / "c.mat").write_bytes(good[:100])
    with pytest.raises(UserError, match=r"c.mat: not an annotation of SBD, or a damaged one"):
        add_sbd(voc, sbd)
    assert not (voc / "ImageSets/Segmentation/train_aug.txt").exists()
    (sbd / "cls" / "c.mat").unlink()
    with pytest.raises(UserError, match=r"1 annotations are missing: .*c.mat"):
        add_sbd(voc, sbd)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        add_sbd(voc, sbd)
