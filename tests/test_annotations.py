"""models.data: annotations as label maps, read and written."""

from __future__ import annotations

import io

import numpy as np
from _refine import coarse_labels, save_palette
from PIL import Image

from deeplab_kernels.models.data import LabelMap, read_annotation, voc_palette


def test_palette_grey_bit_and_numpy_label_maps(tmp_path):
    labels = coarse_labels()
    save_palette(tmp_path / "p.png", labels)
    read = read_annotation(tmp_path / "p.png")
    assert np.array_equal(read.labels, labels)
    assert read.palette[:3].tolist() == [[0, 0, 0], [9, 9, 9], [1, 200, 77]]
    Image.fromarray(labels).save(tmp_path / "l.png")
    assert np.array_equal(read_annotation(tmp_path / "l.png").labels, labels)
    assert read_annotation(tmp_path / "l.png").palette is None
    Image.fromarray(labels == 2).save(tmp_path / "bit.png")
    assert np.array_equal(read_annotation(tmp_path / "bit.png").labels, labels == 2)
    wide = labels.astype(np.uint16) * 100
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert np.array_equal(read_annotation(tmp_path / "wide.png").labels, wide)
    np.save(tmp_path / "n.npy", labels.astype(np.int64))
    assert np.array_equal(read_annotation(tmp_path / "n.npy").labels, labels)
    np.save(tmp_path / "bool.npy", labels == 2)
    assert np.array_equal(read_annotation(tmp_path / "bool.npy").labels, labels == 2)


def test_annotations_are_turned_as_their_exif_data_say(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    labels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    Image.fromarray(labels).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(read_annotation(tmp_path / "x.png").labels, np.rot90(labels, -1))


def test_label_maps_as_images():
    labels = np.array([[0, 1, 255]], np.uint8)
    assert LabelMap(labels).to_image().mode == "L"
    assert LabelMap(labels, voc_palette()).to_image().mode == "P"
    short = LabelMap(labels, np.array([[7, 8, 9]], np.uint8))
    file = io.BytesIO()
    short.to_image().save(file, "PNG")
    assert np.asarray(Image.open(file)).tolist() == labels.tolist()  # a short palette cuts no label off
    wide = LabelMap(np.array([[0, 300]])).to_image()
    assert np.asarray(wide).tolist() == [[0, 300]]
    colours = LabelMap(labels, np.array([[7, 8, 9]], np.uint8)).colours()
    assert colours[0].tolist() == [7, 8, 9]
    assert colours[1].tolist() == voc_palette()[1].tolist()


def test_voc_palette():
    palette = voc_palette()
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 7: (128, 128, 128), 8: (64, 0, 0), 20: (0, 64, 128)}
    assert {k: tuple(palette[k].tolist()) for k in known} == known
    assert palette[255].tolist() == [224, 224, 192]
    assert len(np.unique(palette, axis=0)) == 256
