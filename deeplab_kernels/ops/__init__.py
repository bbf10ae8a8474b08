"""The operators, as functions. Each is a ``torch.library`` operator underneath: it works under autograd, autocast,
``torch.compile(fullgraph=True)`` and ``torch.export``, and has a FLOP formula for ``torch.utils.flop_counter``."""

from .atrous_depthwise import atrous_depthwise_bn_act, atrous_depthwise_conv2d
from .gaussian_filter import gaussian_filter
from .local_gaussian_filter import local_gaussian_filter

__all__ = ["atrous_depthwise_bn_act", "atrous_depthwise_conv2d", "gaussian_filter", "local_gaussian_filter"]
