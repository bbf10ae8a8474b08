"""The photographs that scikit-image brings in its wheel, so that nothing is downloaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..models.data import read_image


@dataclass(frozen=True)
class Photograph:
    path: Path
    caption: str


_CAPTIONS = {
    "coins": "Greek coins (scikit-image): the one photograph here that shows something like a generated class, flat "
    "discs with a relief. The network has never seen a real coin.",
    "coffee": "A cup of coffee on a saucer (scikit-image). None of the classes is in it; seen from above, cup and "
    "saucer come closest to disc and ring.",
    "chelsea": "A cat (scikit-image). None of the classes is in it: every coloured pixel is a mistake, and tells what "
    "the network takes for its own.",
}


def bundled(names: Sequence[str] = tuple(_CAPTIONS)) -> list[Photograph]:
    """The photographs of these names that there are; an empty list where scikit-image is not installed."""
    spec = importlib.util.find_spec("skimage")  # located, not imported: that takes a second
    if spec is None or not spec.submodule_search_locations:
        return []
    folder = Path(next(iter(spec.submodule_search_locations))) / "data"
    paths = [(folder / f"{name}.png", _CAPTIONS.get(name, "")) for name in names]
    return [Photograph(path, caption) for path, caption in paths if path.is_file()]


def given(path: Path) -> Photograph:
    """A photograph of the user's own."""
    if not path.is_file():
        raise UserError(f"--photo: there is no file {path}")
    read_image(path)  # before anything is trained: an error if it is none
    return Photograph(path, f"{path.name}, a photograph of yours.")
