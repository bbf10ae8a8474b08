"""Modules on top of the operators."""

from .atrous_separable import AtrousDepthwiseConv2d, AtrousSeparableConv2d

__all__ = ["AtrousDepthwiseConv2d", "AtrousSeparableConv2d"]
