"""The annotations of SBD (Hariharan et al., Semantic Contours from Inverse Detectors, 2011) as PASCAL VOC's label maps:
the "train_aug" set of 10582 images that the DeepLab papers train on."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeplab_kernels.errors import UserError

from .annotations import LabelMap, voc_palette
from .pairs import check_complete, read_lines
from .voc import AUGMENTED_LABELS, CLASS_NAMES, IMAGES, LABELS, LISTS, find_voc

_LISTS = ("train.txt", "val.txt")
_FOLDERS = (".", "dataset", "benchmark_RELEASE/dataset")  # below what is given


def add_sbd(
    voc_root: str | os.PathLike[str],
    sbd_root: str | os.PathLike[str],
    *,
    on_image: Callable[[int, int], object] = lambda done, total: None,
) -> int:
    """Writes SegmentationClassAug and ImageSets/Segmentation/train_aug.txt into PASCAL VOC's folder: the images of
    SBD's train and val lists and of VOC's train list that are not in VOC's val list. Where VOC has a label map of its
    own, that is taken.

    Args:
        sbd_root: the folder with cls/*.mat, train.txt and val.txt (benchmark_RELEASE/dataset), or one above.
        on_image: called with (images done, images in all).

    Returns:
        The number of images in the list.

    Raises:
        UserError: a folder has another layout, files are missing (the first are named) or damaged, or there is a
            train_aug.txt already.
        ImportError: scipy is not installed.
    """
    loadmat = _loadmat()
    voc = find_voc(voc_root)
    if voc is None:
        raise UserError(f"{os.fspath(voc_root)}: not PASCAL VOC's layout: there is no folder {IMAGES}")
    sbd = next((f for f in (Path(sbd_root, below) for below in _FOLDERS) if (f / "cls").is_dir()), None)
    if sbd is None:
        raise UserError(f"{os.fspath(sbd_root)}: not SBD's layout: there is no folder cls")
    target = voc / LISTS / "train_aug.txt"
    if target.exists():
        raise UserError(f"{target} exists already")
    lists = {path: set(read_lines(path)) for path in (*(sbd / n for n in _LISTS), *(voc / LISTS / n for n in _LISTS))}
    sbd_train, sbd_val, voc_train, voc_val = lists.values()
    names = sorted((sbd_train | sbd_val | voc_train) - voc_val)
    from_voc = voc_train & set(names)
    check_complete((voc / IMAGES / f"{name}.jpg" for name in names), "images are", voc)
    check_complete((sbd / "cls" / f"{name}.mat" for name in names if name not in from_voc), "annotations are", sbd)
    (voc / AUGMENTED_LABELS).mkdir(exist_ok=True)
    for number, name in enumerate(names, 1):
        png = f"{name}.png"
        if name in from_voc:
            shutil.copyfile(voc / LABELS / png, voc / AUGMENTED_LABELS / png)
        else:
            labels = _read_mat(sbd / "cls" / f"{name}.mat", loadmat)
            LabelMap(labels, voc_palette()).to_image().save(voc / AUGMENTED_LABELS / png)
        on_image(number, len(names))
    target.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")  # last: the list says it is complete
    return len(names)


def _read_mat(path: Path, loadmat: Callable[..., Any]) -> NDArray[np.uint8]:
    try:
        labels = np.asarray(loadmat(path, variable_names=["GTcls"])["GTcls"]["Segmentation"][0, 0])
    except Exception as error:  # scipy raises nearly anything on damaged files
        raise UserError(f"{path}: not an annotation of SBD, or a damaged one ({str(error).strip()[:160]})") from None
    if labels.ndim != 2 or labels.dtype.kind not in "iu" or labels.max(initial=0) >= len(CLASS_NAMES):
        raise UserError(f"{path}: Segmentation must be labels (H, W) from 0 to {len(CLASS_NAMES) - 1}")
    return labels.astype(np.uint8)


def _loadmat() -> Callable[..., Any]:
    try:
        loadmat: Callable[..., Any] = importlib.import_module("scipy.io").loadmat
    except ImportError:
        raise ImportError("SBD's annotations need scipy: pip install scipy") from None
    return loadmat
