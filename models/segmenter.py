"""Segmentation of any image or video with trained weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from .data import read_image, to_rgb
from .data.classes import named_classes
from .data.video import read_video
from .inference import Inference, batches_of_one_size, device_of, inferred_scores, predict_labels, refined
from .refinement import CRFParameters, check_memory, most_probable
from .weights import build_from_file, known_weights
from .weights.adopt import adopt, check_complete, class_names_of

ImageLike = str | os.PathLike[str] | Image.Image | NDArray[np.generic]
Progress = Callable[[int, int], object]


class Segmenter:
    """A trained network, ready for images of any size::

        segmenter = Segmenter.from_file("demo/weights.pt")
        labels = segmenter("photo.jpg")              # (H, W) uint8, indices into segmenter.class_names
        segmenter.colourise(labels).save("labels.png")

    Images larger than ``tile`` are cut into tiles that see ``margin`` more pixels on every side, so that memory does
    not grow with the image; the network's context (the image pooling of the ASPP, too) then ends at that margin.

    Args:
        model: (N, 3, H, W), normalised as ``model.normalization`` says, -> logits (N, K, H, W).
        class_names: K names, K at most 256.
        palette: K colours (red, green, blue) in 0..255.
        tile: side, in pixels, of what the network sees at once, ``2 * margin`` included.
        scales, flip, output_stride, batch_size: see :class:`deeplab_kernels.models.inference.Inference`.
    """

    def __init__(
        self,
        model: nn.Module,
        class_names: Sequence[str],
        palette: Sequence[Sequence[int]],
        *,
        tile: int = 769,
        margin: int = 96,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        output_stride: int | None = None,
        batch_size: int = 1,
    ) -> None:
        if not 0 < len(class_names) <= 256 or len(class_names) != len(palette):
            raise ValueError(
                f"class_names and palette must have one length from 1 to 256, got {len(class_names)} and {len(palette)}"
            )
        classes = getattr(model, "num_classes", len(class_names))
        if classes != len(class_names):
            raise ValueError(f"class_names must be the {classes} classes of the model, got {len(class_names)} names")
        self.model = model.eval()
        self.class_names = tuple(class_names)
        self.palette = np.array(palette, np.uint8).reshape(-1, 3)
        self.inference = Inference(tuple(scales), flip, tile, margin, output_stride, batch_size=batch_size)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu", **options: Any) -> Segmenter:
        """Builds the model that the weights file names and loads the weights. ``options``: those of the class.

        Raises:
            UserError: see :func:`deeplab_kernels.models.weights.build_from_file`.
        """
        model, content = build_from_file(path, device)
        return cls(model, content["class_names"], content["palette"], **options)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        model: str | None = None,
        *,
        classes: str | os.PathLike[str] | Sequence[str] = "",
        model_options: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> Segmenter:
        """A segmenter with weights of another library, or of this package::

            Segmenter.from_pretrained("torchvision/deeplabv3_resnet101")

        Args:
            source: what :func:`deeplab_kernels.models.load_weights` takes: a name, a file or a URL.
            model: its name, see :func:`deeplab_kernels.models.list_models`; by default the one that fits the weights.
            classes: "voc", "cityscapes", "ade20k", a text file with one name a line, or the names; by default those
                that are known of the weights, or else "class 0" ...
            model_options: of the model's builder.
            options: those of the class.

        Raises:
            UserError: the weights do not fit the model or the number of classes, or are of a backbone alone; see
                ``load_weights``.
        """
        known = known_weights().get(os.fspath(source))
        classes = classes or (known.classes if known else "")
        number = len(named_classes(classes)[0]) if classes else None
        adopted = adopt(source, model, number, options=model_options)
        check_complete(adopted)
        names, palette = class_names_of(adopted, classes)
        return cls(adopted.model.to(device), names, palette, **options)

    def __call__(
        self,
        image: ImageLike,
        *,
        max_side: int | None = None,
        crf: CRFParameters | None = None,
        on_tile: Progress = lambda done, total: None,
        on_iteration: Progress = lambda done, total: None,
    ) -> NDArray[np.uint8]:
        """The label map (H, W) uint8 of ``image``: a file, a Pillow image, or an array as in ``data.to_rgb``.

        Args:
            max_side: an image with a longer side is shrunk to it first, and its labels are enlarged again (nearest
                neighbour; with ``crf`` its scores, bilinear): faster, and better where things are much larger than in
                the training images.
            crf: refine the scores by a dense CRF at the resolution of ``image``
                (:func:`deeplab_kernels.models.refinement.refine`); it takes memory in proportion to classes and pixels.
            on_tile, on_iteration: called with (tiles, or the CRF's iterations, done; the same in all).

        Raises:
            UserError: what is given is no image; too little memory for ``crf``.
        """
        rgb = as_rgb(image)[None]
        return self.segment_batch(rgb, max_side=max_side, crf=crf, on_tile=on_tile, on_iteration=on_iteration)[0]

    def stream(
        self, images: Iterable[ImageLike], *, max_side: int | None = None, crf: CRFParameters | None = None
    ) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        """(image (H, W, 3), label map (H, W)) of each of ``images``, in their order. Up to ``batch_size`` consecutive
        ones of one size go through the network together; no more than these are in memory."""
        size = self.inference.batch_size
        for batch in batches_of_one_size(map(as_rgb, images), size, lambda rgb: rgb.shape):
            stacked = np.stack(batch)
            batch.clear()
            yield from zip(stacked, self.segment_batch(stacked, max_side=max_side, crf=crf), strict=True)

    def video(
        self, path: str | os.PathLike[str], *, max_side: int | None = None, crf: CRFParameters | None = None
    ) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        """(frame, label map) of every frame of a video; each frame is segmented by itself.

        Raises:
            UserError: no video, or one without frames.
            ImportError: PyAV is not installed.
        """
        with read_video(path) as frames:
            yield from self.stream((frame.image for frame in frames), max_side=max_side, crf=crf)

    def segment_batch(
        self,
        images: NDArray[np.uint8],
        *,
        max_side: int | None = None,
        crf: CRFParameters | None = None,
        on_tile: Progress = lambda done, total: None,
        on_iteration: Progress = lambda done, total: None,
    ) -> NDArray[np.uint8]:
        """Label maps (N, H, W) of images (N, H, W, 3) uint8; see :meth:`__call__`."""
        height, width = images.shape[1:3]
        small = np.stack([shrunk(image, max_side) for image in images])
        if crf is None:
            labels = predict_labels(self.model, small, self.inference, on_tile).final
            if labels.shape == images.shape[:3]:
                return labels
            nearest = Image.Resampling.NEAREST
            return np.stack([np.asarray(Image.fromarray(one).resize((width, height), nearest)) for one in labels])
        check_memory(len(self.class_names), height, width, crf)
        scores = inferred_scores(self.model, small, self.inference, on_tile)
        device = device_of(self.model)
        maps = [
            most_probable(refined(image, score, crf, device, on_iteration))
            for image, score in zip(images, scores, strict=True)
        ]
        return np.stack(maps).astype(np.uint8)

    def scores(
        self,
        image: ImageLike,
        *,
        max_side: int | None = None,
        on_tile: Progress = lambda done, total: None,
    ) -> NDArray[np.float32]:
        """The class probabilities (K, H, W) of ``image``, all of them in memory; K, h, w where ``max_side`` shrinks
        it."""
        return inferred_scores(self.model, shrunk(as_rgb(image), max_side), self.inference, on_tile)[0]

    def shares(self, labels: NDArray[np.uint8]) -> dict[str, float]:
        """Class name -> share of the pixels, 0..1."""
        counts = np.bincount(labels.ravel(), minlength=len(self.class_names))
        return {name: int(count) / labels.size for name, count in zip(self.class_names, counts, strict=True)}

    def colourise(self, labels: NDArray[np.uint8]) -> Image.Image:
        """The label map as a palette image: pixel values are class indices, shown in the classes' colours."""
        return colourise(labels, self.palette)

    def overlay(self, image: ImageLike, labels: NDArray[np.uint8]) -> Image.Image:
        """The image with each class but the first tinted in its colour."""
        return overlay(as_rgb(image), labels, self.palette)


def as_rgb(image: ImageLike) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 of a file, a Pillow image or an array.

    Raises:
        UserError: it is no image.
    """
    return to_rgb(image) if isinstance(image, (Image.Image, np.ndarray)) else read_image(image)


def colourise(labels: NDArray[np.uint8], palette: NDArray[np.uint8]) -> Image.Image:
    """A palette image: pixel values are ``labels`` (H, W), shown in the colours of ``palette`` (K, 3)."""
    image = Image.fromarray(np.ascontiguousarray(labels, np.uint8))
    image.putpalette(np.ascontiguousarray(palette, np.uint8).tobytes())
    return image


def overlay(rgb: NDArray[np.uint8], labels: NDArray[np.uint8], palette: NDArray[np.uint8]) -> Image.Image:
    """``rgb`` (H, W, 3) with every pixel whose label in ``labels`` (H, W) is not 0 tinted in the colour of its class,
    a row of ``palette`` (labels, 3).

    Raises:
        ValueError: ``rgb`` and ``labels`` are of different sizes.
    """
    if rgb.shape[:2] != labels.shape:
        raise ValueError(f"image {rgb.shape[:2]} and labels {labels.shape} must have the same size")
    out = rgb.copy()
    for top in range(0, out.shape[0], 256):  # in strips, so that the mixture takes little memory
        strip = out[top : top + 256]
        marked = labels[top : top + 256] > 0
        colours = palette[labels[top : top + 256][marked]].astype(np.uint16)
        strip[marked] = (2 * strip[marked].astype(np.uint16) + 3 * colours) // 5
    return Image.fromarray(out)


def legend(class_names: Sequence[str], palette: NDArray[np.uint8]) -> Image.Image:
    """A picture with the colour and the name of every class."""
    font = ImageFont.load_default(14)
    line, gap = 22, 6
    width = max(round(font.getlength(name)) for name in class_names)
    picture = Image.new("RGB", (line + width + 3 * gap, line * len(class_names) + gap), "white")
    draw = ImageDraw.Draw(picture)
    for n, (name, colour) in enumerate(zip(class_names, palette, strict=True)):
        top = n * line + gap
        draw.rectangle((gap, top, gap + line - gap, top + line - gap), fill=tuple(map(int, colour)), outline="black")
        draw.text((line + 2 * gap, top), name, fill="black", font=font)
    return picture


def shrunk(rgb: NDArray[np.uint8], max_side: int | None) -> NDArray[np.uint8]:
    """``rgb`` (H, W, 3), or a smaller copy whose longer side is ``max_side``; None leaves it as it is.

    Raises:
        ValueError: ``max_side`` is below 1.
    """
    if max_side is not None and max_side < 1:
        raise ValueError(f"max_side must be at least 1, got {max_side}")
    height, width = rgb.shape[:2]
    if max_side is None or max(height, width) <= max_side:
        return rgb
    scale = max_side / max(height, width)
    small = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(rgb).resize(small, Image.Resampling.BOX))
