"""The fully connected CRF as the last stage of a segmentation network (DeepLab v1: arXiv:1412.7062, v2: 1606.00915)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deeplab_kernels.nn import DenseCRF

from .system import Normalization, SegmentationModel

# What v2's authors used on PASCAL VOC (v1: smoothness_sigma 1), found by a search on the validation set.
DEEPLAB_CRF: dict[str, Any] = {
    "appearance_weight": 4.0,
    "appearance_sigma": 67.0,
    "color_sigma": 3.0,
    "smoothness_weight": 3.0,
    "smoothness_sigma": 3.0,
    "iterations": 10,
}


class DenseCRFStage(SegmentationModel):
    """``model`` followed by ``crf``. forward: (N, 3, H, W) -> refined logits (N, num_classes, H, W).

    The CRF's guide image is the network's input with the normalisation of ``model`` undone. Gradients reach the
    network, and the parameters of the CRF that require one. ``stage.model`` and ``stage.crf`` are the parts; a
    state_dict of the model alone loads as well, and leaves the CRF as it is.
    """

    def __init__(self, model: SegmentationModel, crf: DenseCRF) -> None:
        super().__init__()
        if crf.num_classes != model.num_classes:
            raise ValueError(f"crf must have the {model.num_classes} classes of the model, got {crf.num_classes}")
        self.num_classes = model.num_classes
        self.model = model
        self.crf = crf
        self.register_load_state_dict_pre_hook(_adopt_state_of_the_model)

    @property
    def normalization(self) -> Normalization:  # type: ignore[override]
        """That of the model; setting it sets the model's."""
        return self.model.normalization

    @normalization.setter
    def normalization(self, value: Normalization) -> None:
        self.model.normalization = value

    @property
    def output_stride(self) -> int:
        return self.model.output_stride

    def set_output_stride(self, output_stride: int) -> None:
        self.model.set_output_stride(output_stride)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        logits = self.model(x)
        image = self.normalization.invert(x)
        if isinstance(logits, tuple):  # in training, with the logits of an auxiliary classifier
            return self.crf(logits[0], image), *logits[1:]
        return self.crf(logits, image)


def _adopt_state_of_the_model(stage: Any, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    own = {f"{prefix}crf.{name}": value for name, value in stage.crf.state_dict().items()}
    if any(name in state_dict for name in own):
        return
    for name in [name for name in state_dict if name.startswith(prefix)]:
        state_dict[f"{prefix}model.{name.removeprefix(prefix)}"] = state_dict.pop(name)
    state_dict.update(own)


def with_crf(
    model: SegmentationModel, crf: DenseCRF | bool | Mapping[str, Any] | None = None, **options: Any
) -> SegmentationModel:
    """``model`` with a CRF as its last stage.

    Args:
        crf: the CRF; or options of :class:`deeplab_kernels.nn.DenseCRF` (iterations, filter, trainable ...), given as a
            mapping here or as keyword arguments, which replace those of :data:`DEEPLAB_CRF`. Unless ``trainable`` says
            so, none of its parameters is trained. False returns ``model`` itself.

    Raises:
        TypeError: ``crf`` is none of these, or options are given to a CRF that is already built.
    """
    if crf is False:
        return model
    if isinstance(crf, DenseCRF):
        if options:
            raise TypeError(f"options of a CRF that is already built: {', '.join(sorted(options))}")
        return DenseCRFStage(model, crf)
    if not isinstance(crf, (Mapping, bool, type(None))):
        raise TypeError(f"crf must be a DenseCRF, its options, or a bool, got {crf!r}")
    given = {**crf, **options} if isinstance(crf, Mapping) else options
    return DenseCRFStage(model, DenseCRF(model.num_classes, **{"trainable": False, **DEEPLAB_CRF, **given}))
