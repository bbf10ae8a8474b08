"""Image files and arrays -> 8-bit RGB -> the networks' input."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from deeplab_kernels.errors import UserError

from ..system import SYMMETRIC, Normalization

Result = TypeVar("Result")


def read_image(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """An image file of any kind that Pillow reads, as it is meant to be looked at: (H, W, 3) uint8.

    The EXIF orientation is applied, the first frame of an animation is taken, and transparency is laid over white.

    Raises:
        UserError: the file is no image, is damaged, or is so large that Pillow refuses it.
        OSError: there is no such file, or it may not be read.
    """
    return decode(path, to_rgb)


def decode(path: str | os.PathLike[str], convert: Callable[[Image.Image], Result]) -> Result:
    """``convert(image)`` of an image file; errors as in :func:`read_image`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice that size is an error, caught below
            with Image.open(path) as image:
                image.load()
                return convert(image)
    except UnidentifiedImageError:
        raise UserError(f"{os.fspath(path)}: not an image, or of a kind that Pillow cannot read") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{os.fspath(path)}: {error}") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise UserError(f"{os.fspath(path)}: the image is damaged ({error})") from None
    except UserError as error:
        raise UserError(f"{os.fspath(path)}: {error}") from None
    except (
        SyntaxError,
        ValueError,
        EOFError,
        TypeError,
        IndexError,
        KeyError,
        AttributeError,
        ArithmeticError,
    ) as error:
        # What Pillow's decoders raise on damaged files besides OSError.
        raise UserError(f"{os.fspath(path)}: the image is damaged ({error})") from None


def to_rgb(image: Image.Image | NDArray[np.generic]) -> NDArray[np.uint8]:
    """A Pillow image or an array -> (H, W, 3) uint8.

    uint16 values are taken as 0..65535, other integers as 0..255, floating-point values as 0..1 (or 0..255 if some
    exceed 1); where values leave that range, the one from the smallest to the largest is used. Arrays are (H, W), or
    (H, W, C) with C = 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA). Transparency is laid over white.
    """
    if isinstance(image, Image.Image):
        with contextlib.suppress(Exception):  # damaged EXIF data make no damaged image: leave it as stored
            image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            return to_rgb(np.array(image))
        if image.mode.startswith("I"):  # "I" is 32 bits wide, but mostly what a 16-bit file is read into
            values = np.array(image)
            fits = values.min() >= 0 and values.max() <= 65535
            return to_rgb(values.astype(np.uint16) if fits else values)
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            image = image.convert("RGBA")
        elif image.mode != "RGB":
            image = image.convert("RGB")
        return to_rgb(np.array(image))
    array = np.asarray(image)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 2, 3, 4) or array.size == 0:
        raise UserError(f"an image is (H, W) or (H, W, C) with C from 1 to 4 and no empty side, got {image.shape}")
    if array.dtype.kind not in "buif":
        raise UserError(f"an image holds numbers, got {array.dtype}")
    values = _eight_bits(array)
    if values.shape[2] in (2, 4):
        alpha = values[..., -1:].astype(np.uint16)
        values = ((values[..., :-1] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(values, (*values.shape[:2], 3)))


def _eight_bits(array: NDArray[np.generic]) -> NDArray[np.uint8]:
    if array.dtype == np.uint8:
        return array  # type: ignore[return-value]
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    values = np.nan_to_num(array.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    top = 65535.0 if array.dtype == np.uint16 else 1.0 if array.dtype.kind == "f" and high <= 1 else 255.0
    if low < 0 or high > top:
        values -= low
        top = max(high - low, 1e-30)
    return np.round(values * np.float32(255 / top)).astype(np.uint8)


def to_input(images: NDArray[np.uint8], normalization: Normalization = SYMMETRIC) -> Tensor:
    """(H, W, 3) or (N, H, W, 3) uint8 RGB -> (1 or N, 3, H, W) float32, by default in [-1, 1]."""
    tensor = torch.from_numpy(np.require(images, requirements=["C", "W"]))
    tensor = tensor[None] if tensor.ndim == 3 else tensor
    return normalization.apply(tensor.permute(0, 3, 1, 2).float())
