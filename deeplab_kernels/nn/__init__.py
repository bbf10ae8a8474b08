"""Modules on top of the operators."""

from .atrous_separable import AtrousDepthwiseConv2d, AtrousSeparableConv2d
from .atrous_spatial_pyramid import AtrousSpatialPyramid
from .dense_crf import DenseCRF

__all__ = ["AtrousDepthwiseConv2d", "AtrousSeparableConv2d", "AtrousSpatialPyramid", "DenseCRF"]
