"""What is trained: networks, scenes, schedule; and how each trained network is evaluated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from deeplab_kernels.models.inference import PAPER_SCALES


@dataclass(frozen=True)
class Settings:
    """Scenes in pixels; the same train, test and validation scenes serve every network and seed.

    test_scenes: what every figure is of. validation_scenes: the CRFs' parameters are chosen on them. clutter: of the
    first, second ... scene, and again from the start: larger objects, and smaller ones with more boundaries.
    """

    steps: int = 1500
    batch_size: int = 6
    crop: int = 81
    learning_rate: float = 0.1
    train_scenes: int = 300
    test_scenes: int = 48
    validation_scenes: int = 9
    scene_size: int = 193
    clutter: tuple[float, ...] = (1.0, 2.0, 4.0)
    all_candidates: bool = True
    """Of the CRFs' parameters; False: two of each kind."""

    def scaled(self, scale: float) -> Settings:
        """Trains ``scale`` times as long; below 1 there are fewer scenes, too, down to some that merely exercise it."""
        less = min(scale, 1.0)
        values = asdict(self) | {
            "steps": max(2, round(self.steps * scale)),
            "train_scenes": max(9, round(self.train_scenes * less)),
            "test_scenes": max(3, round(self.test_scenes * less)),
            "validation_scenes": max(3, round(self.validation_scenes * less)),
            "all_candidates": scale >= 0.2,
        }
        return Settings(**values)


@dataclass(frozen=True)
class Variant:
    """A way to get labels from one trained network. crf: a kind of :data:`CRF_KINDS`, after the network."""

    output_stride: int | None = None
    """None: that of the training."""
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    crf: str | None = None


PLAIN = {"plain": Variant()}
# Rows of the v3+ paper's table 5.
_FLIPPED = {"MS + flip": Variant(scales=PAPER_SCALES, flip=True), "OS 8": Variant(8)}
INFERENCE = {**PLAIN, "MS": Variant(scales=PAPER_SCALES), **_FLIPPED}
INFERENCE_SC = {**PLAIN, **_FLIPPED, "OS 8, MS + flip": Variant(8, PAPER_SCALES, flip=True)}
CRF_KINDS = {
    "CRF": "fully connected CRF",
    "short-range CRF": "short-range CRF, positions and colours",
    "short-range CRF without colours": "short-range CRF, positions only",
}
CRF = {**PLAIN, "CRF": Variant(crf=CRF_KINDS["CRF"])}
CRFS = {**PLAIN, **{name: Variant(crf=kind) for name, kind in CRF_KINDS.items()}}


@dataclass(frozen=True)
class Network:
    """A model of the registry, and what it is evaluated by. cost: CPU time of a step, relative to the cheapest."""

    title: str
    model: str
    variants: Mapping[str, Variant]
    output_stride: int = 16
    options: Mapping[str, Any] = field(default_factory=dict)
    cost: float = 1.0


def _v3plus(title: str, variants: Mapping[str, Variant] = PLAIN, *, cost: float = 1.2, **options: Any) -> Network:
    # The paper's 256 channels are 64 here: its 48, 32 and 64 low-level channels become 12, 8 and 16.
    return Network(title, "deeplabv3plus_small", variants, options={"low_level_channels": 12} | options, cost=cost)


NETWORKS: dict[str, Network] = {
    "large_fov": Network("DeepLab v1, LargeFOV", "deeplabv1_small", CRFS, 8),
    "aspp_s": Network("DeepLab v2, ASPP-S", "deeplabv2_aspp_s_small", CRF, 8),
    "aspp_l": Network("DeepLab v2, ASPP-L", "deeplabv2_aspp_l_small", CRF, 8),
    "v3": _v3plus("v3: no decoder, no SC", INFERENCE, decoder=False, separable=False, cost=1.4),
    "v3plus_dense": _v3plus("v3+: decoder, no SC", INFERENCE, separable=False, cost=1.7),
    "v3plus": _v3plus("v3+: decoder, SC", INFERENCE_SC | CRFS),
    "channels_32": _v3plus("v3+, 32 low-level channels", low_level_channels=8),
    "channels_64": _v3plus("v3+, 64 low-level channels", low_level_channels=16),
    "convs_1": _v3plus("v3+, one 3x3 convolution", decoder_convs=1),
    "convs_3": _v3plus("v3+, three 3x3 convolutions", decoder_convs=3),
}


@dataclass(frozen=True)
class Job:
    """One network trained with one seed."""

    network: str
    seed: int
    settings: Settings

    def training(self) -> dict[str, Any]:
        """All that decides the trained weights."""
        network, settings = NETWORKS[self.network], asdict(self.settings)
        for name in ("test_scenes", "validation_scenes", "all_candidates"):
            del settings[name]
        what = {"model": network.model, "options": dict(network.options), "output_stride": network.output_stride}
        return {**what, "seed": self.seed, **settings}

    def evaluation(self) -> dict[str, Any]:
        """All that decides the record."""
        variants = {name: asdict(variant) for name, variant in NETWORKS[self.network].variants.items()}
        return {"training": self.training(), "settings": asdict(self.settings), "variants": variants}

    @property
    def weights_name(self) -> str:
        return f"{self.network}-{self.seed}-{_digest(self.training())}.pt"

    @property
    def record_name(self) -> str:
        return f"{self.network}-{self.seed}-{_digest(self.evaluation())}.json"

    @property
    def cost(self) -> float:
        return NETWORKS[self.network].cost


def jobs(settings: Settings, seeds: int) -> list[Job]:
    """Every network with the first seed, then with the second, so that a study that is cut has whole seeds; the longest
    first, so that no processor waits for the last ones."""
    longest_first = sorted(NETWORKS, key=lambda name: -NETWORKS[name].cost)
    return [Job(name, seed, settings) for seed in range(seeds) for name in longest_first]


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
