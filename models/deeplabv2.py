"""DeepLab v2, atrous spatial pyramid pooling by summed scores (Chen et al., arXiv:1606.00915, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable

from .backbones import vgg16, vgg_small
from .deeplabv1 import SMALL, on_resnet101, on_vgg
from .system import SegmentationModel

ASPP_S = (2, 4, 8, 12)
ASPP_L = (6, 12, 18, 24)

BUILDERS: dict[str, Callable[..., SegmentationModel]] = {
    "deeplabv2_aspp_s_vgg16": on_vgg(vgg16, ASPP_S),
    "deeplabv2_aspp_l_vgg16": on_vgg(vgg16, ASPP_L),
    "deeplabv2_aspp_s_resnet101": on_resnet101(ASPP_S),
    "deeplabv2_aspp_l_resnet101": on_resnet101(ASPP_L),
    "deeplabv2_aspp_s_small": on_vgg(vgg_small, (1, 2, 3, 5), **SMALL),
    "deeplabv2_aspp_l_small": on_vgg(vgg_small, (2, 5, 7, 10), **SMALL),
}
