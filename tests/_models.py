"""What the model tests share: random batch statistics, and weights carried over from the peers' models."""

from __future__ import annotations

from torch import Tensor, nn


def randomise(model: nn.Module) -> nn.Module:
    """Random affine parameters and statistics in every batch normalisation, so that a swapped or forgotten one shows,
    and He-initialised convolutions, so that activations keep their size through 70 layers."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias)
    return model


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, in units of the largest expected value."""
    assert actual.shape == expected.shape
    assert expected.std() > 0
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """Copies parameters and buffers pairwise in the order of definition; shapes must agree."""
    pairs = list(zip(source.state_dict().values(), target.state_dict().values(), strict=True))
    for old, new in pairs:
        assert old.shape == new.shape
        new.copy_(old)


def assert_same_gradients(actual: nn.Module, expected: nn.Module, tolerance: float) -> None:
    """Of every parameter, relative to its largest value. The betas between two normalisations have the gradient 0, of
    which only round-off is left: hence the floor."""
    largest = max(p.grad.abs().max() for p in expected.parameters())
    for (name, ours), theirs in zip(actual.named_parameters(), expected.parameters(), strict=True):
        scale = theirs.grad.abs().max().clamp(min=1e-3 * largest)
        assert (ours.grad - theirs.grad).abs().max() < tolerance * scale, name


def copy_backbone(theirs: nn.Module, ours: nn.Module) -> None:
    """A ResNet has everybody's names here, a MobileNetV2 everybody's order."""
    if hasattr(theirs, "layer1"):
        ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    else:
        copy_parameters(theirs, ours)


def copy_aspp(theirs: nn.Module, ours: nn.Module) -> None:
    """The ASPP of torchvision and segmentation_models_pytorch: 1x1, the rates, pooling; project."""
    first, *atrous, pooling = theirs.convs
    for source, target in zip((first, *atrous, pooling), (ours.pointwise, *ours.atrous, ours.pooling), strict=True):
        copy_parameters(source, target)
    copy_parameters(theirs.project, ours.project)
    # Theirs concatenates the pooled feature last, the official code and ours first.
    weight = ours.project.conv.weight.data
    weight.copy_(weight.roll(ours.pooling.norm.num_features, 1))
