"""Annotations of photographs: label maps from image files, and score maps from numpy's .npy files."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from deeplab_kernels.errors import UserError

from .images import decode

VOID = 255  # label of unknown pixels, as in PASCAL VOC
_NPY_MAGIC = b"\x93NUMPY"


@dataclass(frozen=True)
class LabelMap:
    """labels: (H, W) integers. palette: (K, 3) uint8, the colours of the labels, or None for a grey image."""

    labels: NDArray[np.integer[Any]]
    palette: NDArray[np.uint8] | None = None

    def colours(self) -> NDArray[np.uint8]:
        """(65536, 3): a colour for every label; those that the palette lacks are PASCAL VOC's."""
        colours = np.resize(voc_palette(), (65536, 3))
        if self.palette is not None:
            colours[: len(self.palette)] = self.palette
        return colours

    def with_labels(self, labels: NDArray[np.integer[Any]]) -> LabelMap:
        """Other labels (H, W) with the same palette."""
        return replace(self, labels=labels)

    def to_image(self) -> Image.Image:
        """Pixel values are the labels: with the palette, or else grey of 8 bits, of 16 if a label exceeds 255."""
        if self.palette is None and self.labels.size and self.labels.max() > 255:
            return Image.fromarray(np.ascontiguousarray(self.labels, np.uint16))
        image = Image.fromarray(np.ascontiguousarray(self.labels, np.uint8))
        if self.palette is not None:
            # A label without a colour must get one: Pillow stores only as many bits as the palette needs.
            image.putpalette(self.colours()[: max(len(self.palette), int(self.labels.max()) + 1)].tobytes())
        return image


def voc_palette() -> NDArray[np.uint8]:
    """(256, 3): the colours of PASCAL VOC's label maps: the bits of the label, three at a time from the lowest, fill
    red, green and blue from the highest bit down."""
    labels = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for position in range(8):
        for channel in range(3):
            palette[:, channel] |= (((labels >> (3 * position + channel)) & 1) << (7 - position)).astype(np.uint8)
    return palette


def read_annotation(path: str | os.PathLike[str]) -> LabelMap | NDArray[np.floating[Any]]:
    """What an annotation file holds: a label map, or scores (L, H, W).

    An image file is a label map whose pixel values are the labels: palette, grey of 8 or 16 bits, or black and white
    (labels 0 and 1). A .npy file (told by its content) is a label map if it holds integers (H, W), and scores if it
    holds floating-point numbers (L, H, W), which are mapped, not read, so that only what is used costs memory.

    Raises:
        UserError: the file is damaged or holds something else; the message says what.
        OSError: there is no such file, or it may not be read.
    """
    with open(path, "rb") as file:
        is_npy = file.read(len(_NPY_MAGIC)) == _NPY_MAGIC
    return _read_npy(path) if is_npy else decode(path, _labels_of)


def _labels_of(image: Image.Image) -> LabelMap:
    if image.format in ("JPEG", "MPO", "JPEG2000"):
        raise UserError(f"a label map cannot be a {image.format} file, whose compression changes labels: use PNG")
    mode, palette = image.mode, None
    if mode in ("P", "PA"):
        colours = image.getpalette("RGB") or []
        palette = np.array(colours, np.uint8).reshape(-1, 3)
    with contextlib.suppress(Exception):  # damaged EXIF data make no damaged image
        image = ImageOps.exif_transpose(image)
    if mode == "PA":
        return LabelMap(np.array(image.getchannel("P")), palette)
    if mode == "1":
        return LabelMap(np.array(image).astype(np.uint8))
    if mode not in ("P", "L") and not mode.startswith("I"):
        raise UserError(
            f"a label map holds one number per pixel (a palette or grey image), but this image is {mode}; "
            "Pillow's convert('P') or quantize() makes a palette image of a picture in few colours"
        )
    return LabelMap(_checked(np.array(image)), palette)


def _checked(labels: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
    if labels.min() < 0 or labels.max() > 65535:
        raise UserError(f"labels must be 0 to 65535, got {labels.min()} to {labels.max()}")
    return labels


def _read_npy(path: str | os.PathLike[str]) -> LabelMap | NDArray[np.floating[Any]]:
    where = os.fspath(path)
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        if error.errno is not None:
            raise
        raise UserError(f"{where}: the .npy file is damaged ({error})") from None
    except (ValueError, EOFError, SyntaxError, TypeError, OverflowError) as error:
        if "Python objects" in str(error):
            raise UserError(f"{where}: holds Python objects, which are never loaded; save plain numbers") from None
        raise UserError(f"{where}: the .npy file is damaged ({str(error).splitlines()[0][:160]})") from None
    if array.size == 0 or array.ndim not in (2, 3) or array.dtype.kind not in "biuf":
        raise UserError(
            f"{where}: holds {array.dtype} of shape {array.shape}; allowed are scores, floating-point numbers "
            "(L, H, W), and labels, integers (H, W)"
        )
    if array.ndim == 2 and array.dtype.kind in "biu":
        try:
            return LabelMap(_checked(np.array(array).astype(np.int64)))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    if array.ndim == 2 or array.dtype.kind != "f":
        raise UserError(
            f"{where}: {array.dtype} of shape {array.shape} are neither scores, floating-point numbers (L, H, W), nor "
            "labels, integers (H, W)"
        )
    return array
