"""The definition of each operator in plain torch, for any dtype and device.

Every backend is tested against these functions; they also serve where no kernel does, and as the export decomposition.
"""

from . import dense_crf, permutohedral
from .atrous_depthwise import (
    atrous_depthwise_bn_act_backward,
    atrous_depthwise_bn_act_inference,
    atrous_depthwise_bn_act_training,
    atrous_depthwise_conv2d,
    atrous_depthwise_conv2d_backward,
)
from .atrous_separable import atrous_separable_conv2d
from .atrous_spatial_pyramid import (
    atrous_spatial_pyramid,
    atrous_spatial_pyramid_backward,
    atrous_spatial_pyramid_training,
)
from .batch_norm_act import batch_norm_act_backward, batch_norm_act_training
from .dense_crf import dense_crf_mean_field, dense_crf_mean_field_backward
from .gaussian_filter import gaussian_filter, gaussian_filter_backward
from .local_gaussian_filter import local_gaussian_filter, local_gaussian_filter_backward
from .permutohedral import permutohedral_filter, permutohedral_filter_backward, permutohedral_lattice
from .pointwise import pointwise_bn_act_training, pointwise_conv2d, pointwise_conv2d_backward

__all__ = [
    "atrous_depthwise_bn_act_backward",
    "atrous_depthwise_bn_act_inference",
    "atrous_depthwise_bn_act_training",
    "atrous_depthwise_conv2d",
    "atrous_depthwise_conv2d_backward",
    "atrous_separable_conv2d",
    "atrous_spatial_pyramid",
    "atrous_spatial_pyramid_backward",
    "atrous_spatial_pyramid_training",
    "batch_norm_act_backward",
    "batch_norm_act_training",
    "dense_crf",
    "dense_crf_mean_field",
    "dense_crf_mean_field_backward",
    "gaussian_filter",
    "gaussian_filter_backward",
    "local_gaussian_filter",
    "local_gaussian_filter_backward",
    "permutohedral",
    "permutohedral_filter",
    "permutohedral_filter_backward",
    "permutohedral_lattice",
    "pointwise_bn_act_training",
    "pointwise_conv2d",
    "pointwise_conv2d_backward",
]
