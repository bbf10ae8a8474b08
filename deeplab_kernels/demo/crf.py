"""The CRF's part of the demo: coarse annotations of photographs refined, and the network's scores with no CRF, with a
short-range one and with the fully connected one, parameters chosen on scenes of their own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ..models.data import VOID, Scene, read_image, voc_palette
from ..models.evaluation import ConfusionMatrix, trimap_miou
from ..models.refinement import CRFParameters, energy_of_labels, energy_of_scores, refine
from ..models.segmenter import Segmenter, overlay
from .photographs import Photograph
from .pictures import probability, side_by_side

WIDTHS = (1, 2, 3, 5, 10, 20, 40)
_SHORT = 2  # pixels to each side that a short-range CRF sees

# Candidates by kind; "as in pydensecrf's example" has nothing to choose.
Candidates = dict[str, tuple[CRFParameters, ...]]
FULL: Candidates = {
    "short-range CRF, positions only": tuple(
        CRFParameters(appearance_weight=0, smoothness_weight=w, smoothness_sigma=2, filter="local", window=_SHORT)
        for w in (1, 3, 10, 30)
    ),
    "short-range CRF, positions and colours": tuple(
        CRFParameters(w, 20, color, 3, 2, filter="local", window=_SHORT)
        for w, color in itertools.product((5, 10, 20), (8, 13, 20))
    ),
    "fully connected CRF": tuple(
        CRFParameters(w, sigma, color, 3, 2)
        for w, sigma, color in itertools.product((5, 10, 20), (15, 30, 60), (8, 13))
    ),
    "fully connected CRF, parameters of pydensecrf's example": (CRFParameters(),),
}
QUICK: Candidates = {kind: candidates[:2] for kind, candidates in FULL.items()}


@dataclass(frozen=True)
class Row:
    """One way to get labels from the scores. trimap: mean IoU within each of WIDTHS. tried: candidates compared on the
    validation scenes; validation: the mean IoU there of the one chosen."""

    name: str
    parameters: CRFParameters | None
    mean_iou: float
    trimap: Sequence[float]
    tried: int = 0
    validation: float = float("nan")


@dataclass
class Comparison:
    """rows: the first is the network alone. pictures: name -> PNG and caption, in the order to be shown."""

    validation_scenes: int
    rows: list[Row] = field(default_factory=list)

    @property
    def chosen(self) -> CRFParameters:
        """Of the fully connected CRF."""
        rows = [row for row in self.rows if row.parameters is not None and row.tried > 1]
        parameters = rows[-1].parameters
        assert parameters is not None
        return parameters


Labels = NDArray[np.integer[Any]]


def compare(
    segmenter: Segmenter,
    scenes: Sequence[Scene],
    validation: Sequence[Scene],
    candidates: Candidates,
    on_refined: Callable[[int], object] = lambda images: None,
) -> Comparison:
    """Chooses each kind's parameters by the mean IoU on ``validation`` and measures them on ``scenes``."""
    result = Comparison(len(validation))
    energies = [_energy(segmenter, scene) for scene in validation]
    test_energies = [_energy(segmenter, scene) for scene in scenes]
    classes = len(segmenter.class_names)
    plain = [energy.argmin(0) for energy in test_energies]
    before = _mean_iou([energy.argmin(0) for energy in energies], validation, classes)
    result.rows.append(_row("network alone", None, plain, scenes, classes, 0, before))
    for name, tried in candidates.items():
        parameters, best = choose(tried, validation, energies, classes, on_refined)
        labels = [_labels(scene, energy, parameters) for scene, energy in zip(scenes, test_energies, strict=True)]
        on_refined(len(scenes))
        result.rows.append(_row(name, parameters, labels, scenes, classes, len(tried), best))
    return result


def choose(
    tried: Sequence[CRFParameters],
    scenes: Sequence[Scene],
    energies: Sequence[NDArray[np.float32]],
    classes: int,
    on_refined: Callable[[int], object] = lambda images: None,
) -> tuple[CRFParameters, float]:
    """The parameters with the best mean IoU on ``scenes``, whose unary energies (L, H, W) are given; that mean IoU."""
    scores = []
    for parameters in tried:
        refined = [_labels(scene, energy, parameters) for scene, energy in zip(scenes, energies, strict=True)]
        scores.append(_mean_iou(refined, scenes, classes))
        on_refined(len(scenes))
    best = int(np.argmax(scores))
    return tried[best], scores[best]


def refinements(candidates: Candidates, scenes: int, validation: int) -> int:
    """How many images :func:`compare` refines."""
    return sum(len(tried) * validation + scenes for tried in candidates.values())


def _energy(segmenter: Segmenter, scene: Scene) -> NDArray[np.float32]:
    return energy_of_scores(segmenter.scores(scene.image), kind="probabilities")


def _labels(scene: Scene, energy: NDArray[np.float32], parameters: CRFParameters) -> Labels:
    return refine(scene.image, energy, parameters).argmax(0)


def _mean_iou(labels: Sequence[Labels], scenes: Sequence[Scene], classes: int) -> float:
    matrix = ConfusionMatrix(classes)
    for prediction, scene in zip(labels, scenes, strict=True):
        matrix.update(prediction, scene.labels)
    return matrix.mean_iou()


def _row(
    name: str,
    parameters: CRFParameters | None,
    labels: Sequence[Labels],
    scenes: Sequence[Scene],
    classes: int,
    tried: int,
    validation: float,
) -> Row:
    trimap = trimap_miou(labels, [scene.labels for scene in scenes], WIDTHS, classes)
    return Row(name, parameters, _mean_iou(labels, scenes, classes), trimap, tried, validation)


def scene_pictures(
    segmenter: Segmenter, scene: Scene, short: CRFParameters, connected: CRFParameters
) -> tuple[bytes, bytes]:
    """PNGs of (input, labels, network, short-range, fully connected): once the labels, and once, from the third on,
    the probability that a pixel is not background."""
    energy = _energy(segmenter, scene)
    q = np.exp(-energy)
    maps = [q / q.sum(0), refine(scene.image, energy, short), refine(scene.image, energy, connected)]
    palette = segmenter.palette
    first = [scene.image, palette[scene.labels]]
    beliefs = [probability(1 - q[0]) for q in maps]
    return (
        side_by_side([*first, *(palette[q.argmax(0)] for q in maps)]),
        side_by_side([scene.image, probability(scene.labels > 0), *beliefs]),
    )


def photograph_picture(segmenter: Segmenter, photograph: Photograph, max_side: int, crf: CRFParameters) -> bytes:
    """PNG of (photograph, network, network and CRF at the photograph's resolution, overlay of the latter)."""
    image = read_image(photograph.path)
    before = segmenter(image, max_side=max_side)
    after = segmenter(image, max_side=max_side, crf=crf)
    palette = segmenter.palette
    return side_by_side([image, palette[before], palette[after], np.asarray(overlay(image, after, palette))])


# Coarse annotations of photographs


@dataclass(frozen=True)
class CoarseAnnotation:
    """shapes: (label, corners x0, y0, x1, y1, ... in pixels, width of the line or 0 for a filled polygon), one drawn
    over the other. base: the label of what no shape covers."""

    caption: str
    shapes: tuple[tuple[int, tuple[int, ...], int], ...]
    base: int
    confidence: float
    parameters: CRFParameters

    def draw(self, width: int, height: int) -> NDArray[np.uint8]:
        image = Image.new("L", (width, height), self.base)
        canvas = ImageDraw.Draw(image)
        for label, corners, line in self.shapes:
            if line:
                canvas.line(corners, fill=label, width=line)
            else:
                canvas.polygon(corners, fill=label)
        return np.array(image)


COARSE = {
    "astronaut": CoarseAnnotation(
        caption="An astronaut (scikit-image): person, helmet, shuttle and flag as four polygons of 5 to 10 corners.",
        base=0,
        confidence=0.7,
        parameters=CRFParameters(appearance_weight=8, appearance_sigma=60, color_sigma=8),
        shapes=(
            (1, (150, 20, 300, 30, 290, 140, 310, 230, 350, 300, 365, 512, 10, 512, 40, 260, 130, 170, 150, 110), 0),
            (2, (290, 370, 400, 340, 480, 400, 500, 512, 280, 512), 0),
            (3, (355, 40, 385, 0, 450, 0, 465, 270, 350, 270), 0),
            (4, (0, 0, 50, 0, 90, 200, 30, 500, 0, 512), 0),
        ),
    ),
    "coffee": CoarseAnnotation(
        caption="A cup of coffee (scikit-image): a few strokes for table, red crockery, white crockery, coffee and "
        "spoon; all grey pixels are unknown.",
        base=VOID,
        confidence=0.9,
        parameters=CRFParameters(appearance_weight=8, appearance_sigma=60, color_sigma=10),
        shapes=(
            (0, (10, 110, 60, 200, 40, 330, 130, 390), 8),
            (0, (150, 60, 230, 10, 420, 20, 570, 60, 560, 200, 520, 330, 440, 390, 300, 397), 8),
            (0, (20, 20, 90, 20), 8),
            (1, (120, 120, 95, 210, 150, 300, 300, 360, 420, 310, 460, 220, 430, 140), 8),
            (1, (240, 275, 290, 265, 310, 215, 210, 200), 8),
            (2, (210, 40, 300, 30, 385, 80, 390, 130, 340, 190, 270, 198, 200, 150, 187, 100, 210, 40), 8),
            (2, (250, 60, 340, 75, 375, 120), 8),
            (3, (250, 150, 300, 170, 340, 150, 290, 125), 8),
            (3, (228, 118, 270, 104, 320, 106, 350, 128), 6),
            (4, (360, 250, 350, 300, 390, 290), 8),
            (4, (415, 75, 405, 120, 380, 220), 4),
        ),
    ),
}


def refine_annotation(photograph: Photograph) -> tuple[bytes, float]:
    """PNG of (photograph, coarse annotation, refined, overlay) of one of COARSE, and the share of the annotated pixels
    that changed."""
    coarse = COARSE[photograph.path.stem]
    image = read_image(photograph.path)
    before = coarse.draw(image.shape[1], image.shape[0])
    values = [int(value) for value in np.unique(before) if value != VOID]
    energy = energy_of_labels(before, values, VOID, coarse.confidence)
    after = np.asarray(values)[refine(image, energy, coarse.parameters).argmax(0)]
    palette = voc_palette()
    palette[VOID] = 128
    png = side_by_side([image, palette[before], palette[after], np.asarray(overlay(image, after, palette))])
    known = before != VOID
    return png, float((before != after)[known].mean())
