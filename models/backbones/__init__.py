"""Feature extractors: image -> feature maps of ascending stride, the last one at the output stride."""

from .features import Backbone, Features
from .mobilenetv2 import MobileNetV2, mobilenetv2
from .resnet import ResNet, resnet18, resnet34, resnet50, resnet101, resnet_small
from .vgg import VGG, vgg16, vgg16_bn, vgg_small
from .xception import Xception, xception41, xception65, xception71, xception_small

__all__ = [
    "VGG",
    "Backbone",
    "Features",
    "MobileNetV2",
    "ResNet",
    "Xception",
    "mobilenetv2",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet_small",
    "vgg16",
    "vgg16_bn",
    "vgg_small",
    "xception41",
    "xception65",
    "xception71",
    "xception_small",
]
