"""Scenes drawn by a formula, with labels that are exact at every pixel.

A scene is a cluttered background and a few textured objects that occlude each other, with cast shadows, uneven light
and noise. Every object is a signed distance ``d`` (in pixels, negative inside) on a small window: the label map takes
the pixels with ``d < 0``, and the colours are mixed with the coverage ``clip(1/2 - d, 0, 1)``, so that edges are smooth
while labels stay exact. The same ``(seed, index)`` always gives the same scene.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Generator = np.random.Generator

CLASS_NAMES: tuple[str, ...] = ("background", "disc", "ring", "bricks", "triangle", "zebra", "leaf")
PALETTE: tuple[tuple[int, int, int], ...] = (
    (38, 42, 54),
    (238, 180, 34),
    (214, 64, 160),
    (204, 84, 44),
    (52, 120, 246),
    (230, 230, 230),
    (64, 176, 84),
)

IGNORE = 255  # label of pixels that neither training nor evaluation counts; drawn scenes have none
_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True)
class Scene:
    """image: (H, W, 3) uint8; labels: (H, W) uint8, indices into :data:`CLASS_NAMES`."""

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]


class Scenes(Protocol):
    """What is trained on and evaluated: any sequence of scenes, which are asked for one at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Scene: ...


class SceneDataset:
    """``length`` scenes of ``size`` x ``size`` pixels (or (height, width)). Item ``i`` depends on ``seed`` and ``i``
    alone, so any part of a dataset can be drawn again, in any order.

    ``clutter`` multiplies the number of objects and divides their areas: 4 gives four times the objects at half the
    size, with twice the length of boundaries, and smaller things between and inside others.
    """

    class_names = CLASS_NAMES
    palette = PALETTE

    def __init__(self, length: int, size: int | tuple[int, int] = 193, seed: int = 0, *, clutter: float = 1.0) -> None:
        height, width = (size, size) if isinstance(size, int) else size
        if length < 0 or height < 1 or width < 1 or seed < 0:
            raise ValueError(f"length and seed must be >= 0 and size >= 1, got {length=}, {size=}, {seed=}")
        if not 0 < clutter < float("inf"):
            raise ValueError(f"clutter must be positive and finite, got {clutter}")
        self.length, self.height, self.width, self.seed, self.clutter = length, height, width, seed, clutter

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} of a dataset of {self.length} scenes")
        return draw_scene(self.height, self.width, np.random.default_rng([self.seed, index]), self.clutter)


def draw_scene(height: int, width: int, rng: Generator, clutter: float = 1.0) -> Scene:
    """One scene; everything random comes from ``rng``. For ``clutter`` see :class:`SceneDataset`."""
    image = _background(height, width, rng)
    labels = np.zeros((height, width), np.uint8)
    side = float(np.sqrt(height * width))
    light = rng.uniform(0, 2 * np.pi)
    repeated = int(rng.integers(1, len(CLASS_NAMES))) if rng.random() < 0.15 else 0  # a heap of one kind
    for _ in range(max(1, round(int(rng.integers(5, 13)) * clutter))):
        kind = repeated or int(rng.integers(1, len(CLASS_NAMES)))
        radius = side * float(np.exp(rng.uniform(np.log(0.09), np.log(0.2)))) / clutter**0.5
        centre = rng.uniform(0, height), rng.uniform(0, width)
        _draw_object(image, labels, kind, centre, max(radius, 3.0), light, rng)
    return Scene(_photograph(image, rng), labels)


# Building blocks. Coordinates u (down) and v (right) are in pixels, relative to the object's centre and axes.


def _smooth_noise(height: int, width: int, cell: float, rng: Generator) -> Array:
    """Values in [-1, 1] that vary over ``cell`` pixels: a coarse random grid, smoothed between its nodes."""
    rows, columns = int(height / cell) + 2, int(width / cell) + 2
    grid = rng.uniform(-1, 1, (rows, columns)).astype(np.float32)
    return _hat_weights(height, rows, cell) @ grid @ _hat_weights(width, columns, cell).T


def _hat_weights(size: int, nodes: int, cell: float) -> Array:
    """(size, nodes): weights of the two nodes next to each pixel."""
    position = np.arange(size, dtype=np.float32) / np.float32(cell)
    lower = np.minimum(position.astype(np.int64), nodes - 2)
    t = position - lower
    t = t * t * (3 - 2 * t)
    weights = np.zeros((size, nodes), np.float32)
    weights[np.arange(size), lower] = 1 - t
    weights[np.arange(size), lower + 1] = t
    return weights


def _fractal_noise(height: int, width: int, cell: float, rng: Generator, octaves: int = 3) -> Array:
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        total += _smooth_noise(height, width, max(cell / 2**octave, 1.0), rng) / 2**octave
    return total


def _colour(rng: Generator, low: float = 0.05, high: float = 0.95) -> Array:
    return rng.uniform(low, high, 3).astype(np.float32)


def _near(rng: Generator, *colours: tuple[float, float, float], free: float = 0.08) -> Array:
    """A colour close to one of ``colours``; with probability ``free`` any colour."""
    if rng.random() < free:
        return _colour(rng, 0.15)
    chosen = np.array(colours[int(rng.integers(len(colours)))], np.float32)
    return np.clip(chosen * np.float32(rng.uniform(0.75, 1.2)) + rng.normal(0, 0.06, 3).astype(np.float32), 0, 1.1)


def _muted(rng: Generator) -> Array:
    """A colour of low saturation, as most of the background has."""
    return np.float32(rng.uniform(0.1, 0.85)) + rng.normal(0, 0.06, 3).astype(np.float32)


def _coverage(distance: Array) -> Array:
    return np.clip(0.5 - distance, 0, 1)


def _mix(a: Array, b: Array, weight: Array) -> Array:
    """(1 - weight) a + weight b; a and b are colours (3,) or images (h, w, 3), weight is (h, w)."""
    return a + (b - a) * weight[..., None]


def _background(height: int, width: int, rng: Generator) -> Array:
    """Two to four textured regions with straight or wavy borders, none of which has the shape of a class."""
    image = _ground(height, width, rng)
    rows = np.arange(height, dtype=np.float32)[:, None]
    columns = np.arange(width, dtype=np.float32)[None, :]
    for _ in range(int(rng.integers(0, 4))):
        angle = rng.uniform(0, 2 * np.pi)
        row, column = rng.uniform(0, height), rng.uniform(0, width)
        border = np.float32(np.sin(angle)) * (rows - row) + np.float32(np.cos(angle)) * (columns - column)
        border = border + rng.uniform(0, 12) * _smooth_noise(height, width, rng.uniform(10, 60), rng)
        image = _mix(image, _ground(height, width, rng), _coverage(border.astype(np.float32)))
    return image


def _ground(height: int, width: int, rng: Generator) -> Array:
    """A plain, cloudy, grainy or gently graded surface."""
    first, second = (_muted(rng) if rng.random() < 0.92 else _colour(rng) for _ in range(2))
    style = rng.integers(4)
    if style == 0:  # plain
        second = first + rng.normal(0, 0.04, 3).astype(np.float32)
    if style == 1:  # grain along one axis, as wood has
        cell = rng.uniform(2, 6)
        field = _smooth_noise(height, width // 8 + 2, cell, rng).repeat(8, axis=1)[:, :width]
        field = field if rng.random() < 0.5 else _smooth_noise(height // 8 + 2, width, cell, rng).repeat(8, 0)[:height]
        if rng.random() < 0.5:
            first = _near(rng, (0.6, 0.4, 0.2), (0.4, 0.2, 0.12), free=0)
        second = first + rng.normal(0, 0.12, 3).astype(np.float32)
    else:
        field = _fractal_noise(height, width, rng.uniform(8, 80), rng)
    return _mix(first, second, np.clip(0.5 + 0.5 * field, 0, 1))


def _draw_object(
    image: Array,
    labels: NDArray[np.uint8],
    kind: int,
    centre: tuple[float, float],
    radius: float,
    light: float,
    rng: Generator,
) -> None:
    """Draws one object and its shadow into ``image`` and ``labels``, in place."""
    height, width = labels.shape
    reach = int(np.ceil(radius * 1.45)) + 4
    top, left = max(0, int(centre[0]) - reach), max(0, int(centre[1]) - reach)
    bottom, right = min(height, int(centre[0]) + reach), min(width, int(centre[1]) + reach)
    y = (np.arange(top, bottom, dtype=np.float32) - np.float32(centre[0]))[:, None]
    x = (np.arange(left, right, dtype=np.float32) - np.float32(centre[1]))[None, :]
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = cos * y + sin * x, cos * x - sin * y
    distance, colour = _OBJECTS[kind](u, v, radius, rng)
    distance, colour = distance.astype(np.float32), colour.astype(np.float32)

    window = image[top:bottom, left:right]
    if rng.random() < 0.7:  # shadow: the outline moved away from the light, with a soft edge
        shift, softness = rng.uniform(1, 0.25 * radius + 1), rng.uniform(2, 8)
        dy, dx = (round(float(shift * f(light))) for f in (np.sin, np.cos))
        shadow = np.clip(0.5 - _shifted(distance, dy, dx) / np.float32(softness), 0, 1)
        window *= 1 - np.float32(rng.uniform(0.2, 0.6)) * shadow[..., None]
    side = (np.float32(np.sin(light)) * y + np.float32(np.cos(light)) * x) / np.float32(radius)
    colour = colour * (1 - np.float32(rng.uniform(0, 0.35)) * side)[..., None]
    window[:] = _mix(window, colour, _coverage(distance))
    labels[top:bottom, left:right][distance < 0] = kind


def _shifted(a: Array, down: int, right: int) -> Array:
    """``a`` moved by whole pixels; what comes in at the border repeats the border."""
    rows = np.clip(np.arange(a.shape[0]) - down, 0, a.shape[0] - 1)
    columns = np.clip(np.arange(a.shape[1]) - right, 0, a.shape[1] - 1)
    return a[rows[:, None], columns]


def _disc(u: Array, v: Array, radius: float, rng: Generator) -> tuple[Array, Array]:
    """A ball or a coin: a filled ellipse, shaded as a sphere, or flat with a rim and a relief."""
    short = radius * rng.uniform(0.75, 1)
    q = np.sqrt((u / radius) ** 2 + (v / short) ** 2)
    if rng.random() < 0.5:
        base = _near(rng, (0.95, 0.6, 0.1), (0.95, 0.8, 0.2))
        height = np.sqrt(np.clip(1 - q * q, 0, 1))
        shade = 0.45 + 0.6 * height + 0.35 * np.clip(height - 0.8, 0, 1)
    else:
        base = _near(rng, (0.75, 0.6, 0.3), (0.65, 0.65, 0.65), (0.8, 0.8, 0.8))
        relief = _fractal_noise(q.shape[0], q.shape[1], max(radius / 2.5, 2.0), rng, octaves=2)
        emboss = np.diff(relief, axis=0, append=relief[-1:]) + np.diff(relief, axis=1, append=relief[:, -1:])
        rim = np.exp(-(((q - 0.9) / 0.07) ** 2)) * rng.uniform(-0.35, 0.35)
        shade = 0.9 + rng.uniform(0.2, 0.6) * emboss * np.float32(radius / 12) + rim
    return (q - 1) * short, base * np.clip(shade, 0.1, 1.6)[..., None]


def _ring(u: Array, v: Array, radius: float, rng: Generator) -> tuple[Array, Array]:
    """A tyre or a bangle: what is seen through the hole keeps its own label."""
    q = np.sqrt(u * u + v * v)
    thickness = radius * rng.uniform(0.16, 0.26)
    middle = radius - thickness
    across = (q - middle) / thickness
    shade = 0.5 + 0.6 * np.sqrt(np.clip(1 - across * across, 0, 1))
    marks = 1 + rng.uniform(0, 0.3) * np.sign(np.sin(np.arctan2(u, v) * int(rng.integers(4, 12))))
    base = _near(rng, (0.75, 0.2, 0.55), (0.45, 0.2, 0.6))
    return np.abs(q - middle) - thickness, base * (shade * marks)[..., None]


def _bricks(u: Array, v: Array, radius: float, rng: Generator) -> tuple[Array, Array]:
    """A piece of wall: a rectangle of bricks in rows, with mortar between them."""
    half = np.array([rng.uniform(0.55, 0.95), rng.uniform(0.7, 1.0)]) * radius
    outside = np.maximum(np.abs(u) - half[0], np.abs(v) - half[1])
    course = max(radius / rng.uniform(2.5, 4.5), 3.0)
    row = np.floor(u / course)
    along = v / (course * rng.uniform(1.8, 2.4)) + 0.5 * (row % 2)
    joint = 0.5 - np.maximum(np.abs(u / course - row - 0.5), np.abs(along - np.floor(along) - 0.5))
    tint = (np.sin(row * 12.9898 + np.floor(along) * 78.233) * 43758.5453) % 1.0  # a value of its own for every brick
    clay = _near(rng, (0.65, 0.28, 0.2), (0.55, 0.35, 0.28))
    mortar = _colour(rng, 0.5, 0.95) if rng.random() < 0.8 else clay * np.float32(0.4)
    wall = clay * (0.75 + 0.5 * tint)[..., None]
    return outside, _mix(mortar, wall, np.clip((joint - 0.03) * 12, 0, 1))


def _triangle(u: Array, v: Array, radius: float, rng: Generator) -> tuple[Array, Array]:
    """A warning sign: a plain triangle with a border of another colour."""
    stretch = rng.uniform(0.8, 1.2)
    height = u * stretch
    root = np.float32(np.sqrt(3) / 2)
    distance = np.maximum(-height, np.maximum(0.5 * height + root * v, 0.5 * height - root * v)) - 0.6 * radius
    border = _coverage(-(distance + rng.uniform(0.12, 0.22) * radius))
    inner, outer = _near(rng, (0.15, 0.35, 0.85), (0.1, 0.5, 0.8)), _near(rng, (0.9, 0.9, 0.9))
    return distance, _mix(inner, outer, border)


def _zebra(u: Array, v: Array, radius: float, rng: Generator) -> tuple[Array, Array]:
    """An irregular smooth blob with wavy stripes, dark on light."""
    angle = np.arctan2(u, v)
    outline = np.ones_like(angle)
    for lobes in (2, 3, 4):
        outline += rng.uniform(0, 0.13) * np.sin(lobes * angle + rng.uniform(0, 2 * np.pi))
    outline *= radius * 0.85
    period = max(radius / rng.uniform(2.0, 4.0), 3.5)
    wave = v + rng.uniform(0.05, 0.25) * radius * np.sin(u / radius * rng.uniform(2, 5))
    stripes = 1 / (1 + np.exp(-3 * np.sin(2 * np.pi * wave / period)))
    dark, light = _colour(rng, 0.0, 0.35), _colour(rng, 0.65, 1.0)
    return np.sqrt(u * u + v * v) - outline, _mix(dark, light, stripes.astype(np.float32))


def _leaf(u: Array, v: Array, radius: float, rng: Generator) -> tuple[Array, Array]:
    """A pointed leaf: where two circles overlap, with a midrib and veins."""
    slim = rng.uniform(0.4, 0.7)  # half width / half length
    big = radius * (slim * slim + 1) / (2 * slim)
    distance = np.sqrt(u * u + (np.abs(v) + (big - slim * radius)) ** 2) - big
    veins = np.cos(2 * np.pi * (u - np.abs(v) * 0.8) / max(radius / 3, 4.0)) > 0.8
    midrib = np.clip(1.5 - np.abs(v) / max(0.05 * radius, 0.7), 0, 1)
    green = _near(rng, (0.25, 0.6, 0.15), (0.35, 0.5, 0.1))
    shade = 0.85 + 0.3 * np.clip(v / radius, -1, 1) + 0.18 * veins + 0.3 * midrib
    return distance, green * shade[..., None]


_OBJECTS: dict[int, Callable[[Array, Array, float, Generator], tuple[Array, Array]]] = {
    CLASS_NAMES.index("disc"): _disc,
    CLASS_NAMES.index("ring"): _ring,
    CLASS_NAMES.index("bricks"): _bricks,
    CLASS_NAMES.index("triangle"): _triangle,
    CLASS_NAMES.index("zebra"): _zebra,
    CLASS_NAMES.index("leaf"): _leaf,
}


def _photograph(image: Array, rng: Generator) -> NDArray[np.uint8]:
    """What a camera adds: uneven light, exposure, weak or no colour, noise, 8 bits."""
    height, width, _ = image.shape
    light = 1 + rng.uniform(0, 0.35) * _smooth_noise(height, width, max(height, width) / 1.5, rng)
    image = image * (light * rng.uniform(0.7, 1.15))[..., None].astype(np.float32)
    if rng.random() < 0.08:
        saturation = np.float32(max(0, rng.uniform(-0.4, 0.6)))
        grey = image @ _GREY
        image = _mix(np.repeat(grey[..., None], 3, axis=2), image, np.full(grey.shape, saturation, np.float32))
    image = image + rng.normal(0, rng.uniform(0.0, 0.04), image.shape).astype(np.float32)
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
