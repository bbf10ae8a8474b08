"""Unpooling, transposed convolution, and resize followed by convolution."""

from __future__ import annotations

import pytest
import torch
from _models import relative_error
from torch import Tensor, nn
from torch.nn import functional as F

from deeplab_kernels.models.upsampling import MODES, BilinearDeconvolution, Upsampling, resize_centred


def identity(mode: str, factor: int = 2) -> Upsampling:
    """With a convolution that does nothing: what is left is the upsampling itself."""
    module = Upsampling(1, 1, mode, factor, bias=False)
    with torch.no_grad():
        module.conv.weight.zero_()
        centre = 0 if mode == "transposed" else 1
        module.conv.weight[:, :, centre, centre] = 1
    return module


def grid(*size: int) -> Tensor:
    return torch.arange(1.0, 1 + size[0] * size[1]).view(1, 1, *size)


def test_each_mode_on_two_by_two() -> None:
    x = grid(2, 2)  # 1 2 / 3 4
    nails = torch.tensor([[1.0, 0, 2, 0], [0, 0, 0, 0], [3, 0, 4, 0], [0, 0, 0, 0]])
    repeated = x[0, 0].repeat_interleave(2, 0).repeat_interleave(2, 1)
    with torch.no_grad():
        assert torch.equal(identity("bed_of_nails")(x)[0, 0], nails)
        assert torch.equal(identity("transposed")(x)[0, 0], nails)  # its kernel here is 1 at one corner
        assert torch.equal(identity("nearest")(x)[0, 0], repeated)
        assert torch.allclose(identity("bilinear")(x)[0, 0, 0], torch.tensor([1.0, 1.25, 1.75, 2.0]))


@pytest.mark.parametrize("size", [(8, 6), (7, 5), (1, 1)])
def test_max_unpooling_puts_values_back(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size)
    pooled, indices = F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
    module = Upsampling(3, 3, "max_unpooling", bias=False)
    with torch.no_grad():
        module.conv.weight.copy_(F.pad(torch.eye(3)[:, :, None, None], (1, 1, 1, 1)))
        restored = module(pooled, size, indices)
    assert torch.equal(restored, torch.where(restored != 0, x, 0))
    assert (restored != 0).sum() == pooled.numel()
    with pytest.raises(TypeError, match="indices of the pooling must be given"):
        module(pooled, size)


@pytest.mark.parametrize("mode", [m for m in MODES if m != "max_unpooling"])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_size(mode: str, factor: int) -> None:
    module = Upsampling(4, 6, mode, factor)
    x = torch.randn(2, 4, 5, 3)
    assert module(x).shape == (2, 6, 5 * factor, 3 * factor)
    assert module(x, (5 * factor, 3 * factor - factor + 1)).shape == (2, 6, 5 * factor, 3 * factor - factor + 1)
    assert torch.equal(module(x, (4 * factor + 1, 3 * factor)), module(x)[:, :, : 4 * factor + 1]) or mode in (
        "nearest",
        "bilinear",
    )
    with pytest.raises(ValueError, match="size must be up to"):
        module(x, (5 * factor + 1, 3 * factor))


@pytest.mark.parametrize(("kernel", "factor"), [(2, 2), (3, 2), (4, 2), (5, 3), (3, 3)])
def test_transposed_keeps_its_size_for_any_kernel(kernel: int, factor: int) -> None:
    module = Upsampling(2, 1, "transposed", factor, kernel)
    assert module(torch.randn(1, 2, 7, 4)).shape == (1, 1, 7 * factor, 4 * factor)
    # Coverage of the output is even, away from the border, exactly where the stride divides the kernel.
    with torch.no_grad():
        module.conv.weight.fill_(1)
        module.conv.bias.zero_()
        cover = module(torch.ones(1, 2, 9, 9))[0, 0, factor * 2 : -factor * 2, factor * 2 : -factor * 2]
    assert (cover.std() == 0) == (kernel % factor == 0)


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 8])
def test_deconvolution_starts_as_bilinear_resize(factor: int) -> None:
    module = BilinearDeconvolution(3, factor)
    for size in ((5, 7), (1, 4), (1, 1)):
        x = torch.randn(2, 3, *size)
        expected = resize_centred(x, [factor * n for n in size])
        assert relative_error(module(x), expected) < 1e-6
    x = torch.randn(1, 3, 4, 4)
    module(x).square().sum().backward()
    assert module.weight.grad.abs().sum() > 0
    with torch.no_grad():  # channels do not mix
        module.weight[0] = 0
        assert not module(x)[:, 0].any()
        assert module(x)[:, 1].all()


@pytest.mark.parametrize("mode", MODES)
def test_compile_and_gradients(mode: str) -> None:
    module = Upsampling(3, 2, mode)
    x = torch.randn(1, 3, 3, 4, requires_grad=True)
    indices = F.max_pool2d(torch.randn(1, 2, 5, 8), 2, ceil_mode=True, return_indices=True)[1]
    results = []
    for call in (module, torch.compile(module, backend="aot_eager", fullgraph=True)):
        y = call(x, (5, 8), indices)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])])
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 1e-5


def test_bad_arguments_are_named() -> None:
    for args, message in (
        ((1, 1, "unpool"), "mode must be one of 'transposed', .*, got 'unpool'"),
        ((1, 1, "nearest", 0), "factor must be a positive int, got 0"),
        ((1, 1, "transposed", 3, 2), "kernel_size must be at least factor = 3, got 2"),
        ((1, 1, "bilinear", 2, 4), "kernel_size must be odd for mode 'bilinear', got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            Upsampling(*args)
    with pytest.raises(ValueError, match=r"factor must be a positive int, got 2\.0"):
        BilinearDeconvolution(1, 2.0)  # type: ignore[arg-type]


def test_is_a_module_of_one_convolution() -> None:
    for mode in MODES:
        assert [type(m) for m in Upsampling(2, 3, mode).children()] == [
            nn.ConvTranspose2d if mode == "transposed" else nn.Conv2d
        ]
