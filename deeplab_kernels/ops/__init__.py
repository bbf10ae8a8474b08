"""The operators, as functions. Each is a ``torch.library`` operator underneath: it works under autograd, autocast,
``torch.compile(fullgraph=True)`` and ``torch.export``, and has a FLOP formula for ``torch.utils.flop_counter``."""

from .atrous_depthwise import atrous_depthwise_bn_act, atrous_depthwise_conv2d
from .atrous_separable import BatchNorm, atrous_separable_conv2d
from .atrous_spatial_pyramid import atrous_spatial_pyramid
from .batch_norm_act import batch_norm_act
from .dense_crf import dense_crf_mean_field
from .gaussian_filter import gaussian_filter
from .local_gaussian_filter import local_gaussian_filter
from .permutohedral import PermutohedralLattice, permutohedral_filter

__all__ = [
    "BatchNorm",
    "PermutohedralLattice",
    "atrous_depthwise_bn_act",
    "atrous_depthwise_conv2d",
    "atrous_separable_conv2d",
    "atrous_spatial_pyramid",
    "batch_norm_act",
    "dense_crf_mean_field",
    "gaussian_filter",
    "local_gaussian_filter",
    "permutohedral_filter",
]
