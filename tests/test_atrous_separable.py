"""nn.AtrousSeparableConv2d against the same block written with nn.Conv2d and nn.BatchNorm2d."""

from __future__ import annotations

import copy
import io
import pickle
import re
import runpy
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _plain_block import FULL, VARIANTS, Stack, X, assert_same, make, randomise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import deeplab_kernels
from deeplab_kernels.nn import AtrousDepthwiseConv2d, AtrousSeparableConv2d


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_plain_layers(variant: str, training: bool, channels_last: bool) -> None:
    block = make(4, 6, 3, padding=2, dilation=2, **VARIANTS[variant]).train(training)
    stack = Stack(block)
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    assert_same(block, stack, x)
    with torch.no_grad():
        out = block(x)
        torch.testing.assert_close(out, stack(x), rtol=1e-11, atol=1e-11)
    assert out.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize(
    ("size", "geometry"),
    [
        ((1, 1), {"padding": 1}),
        ((1, 5), {"padding": 18, "dilation": 18}),
        ((33, 5), {"padding": "same", "dilation": 12}),
        ((33, 33), {"padding": "same", "stride": 2}),
        ((32, 17), {"padding": "same", "stride": 2, "dilation": 2}),
        ((127, 1), {"padding": (1, 0), "kernel_size": (3, 1), "stride": (2, 1)}),
        ((9, 8), {"padding": (0, 3, 2, 1), "dilation": (1, 2)}),
        ((7, 7), {"kernel_size": 5, "padding": "valid"}),
        ((6, 6), {"kernel_size": 1}),
        ((5, 6), {"kernel_size": 4, "padding": "same"}),
        ((11, 10), {"kernel_size": 7, "padding": 3, "stride": 3}),
    ],
)
def test_odd_sizes(size: tuple[int, int], geometry: dict[str, Any]) -> None:
    block = make(3, 5, **geometry, **FULL)
    assert_same(block, Stack(block), torch.randn(3, 3, *size, dtype=torch.float64))


def test_gradcheck() -> None:
    block = make(2, 3, 3, padding=2, dilation=2, **FULL)
    x = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*block.named_parameters(), strict=True)

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(names, values, strict=True)), x)

    for training in (True, False):
        block.train(training)
        assert torch.autograd.gradcheck(function, (x, *parameters))


def test_defaults_are_linear_and_shaped_as_conv2d() -> None:
    arguments = (8, 12, 3, 2, 6, 6)
    block, conv = AtrousSeparableConv2d(*arguments), nn.Conv2d(*arguments, bias=False)
    x, y = torch.randn(2, 8, 33, 31), torch.randn(2, 8, 33, 31)
    assert block(x).shape == conv(x).shape
    torch.testing.assert_close(block(2 * x - y), 2 * block(x) - block(y), rtol=1e-4, atol=1e-4)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"):
        assert getattr(block, name) == getattr(conv, name)
    assert AtrousSeparableConv2d(3, 16)(torch.randn(1, 3, 8, 8)).shape == (1, 16, 6, 6)
    assert sum(p.numel() for p in AtrousSeparableConv2d(3, 16).parameters()) == 27 + 48  # the seeds' example
    assert [n for n, _ in AtrousSeparableConv2d(3, 16, bias=True).named_parameters() if "bias" in n] == [
        "pointwise.bias"
    ]
    assert deeplab_kernels.AtrousSeparableConv2d is AtrousSeparableConv2d


def test_initialisation() -> None:
    torch.manual_seed(0)
    block = AtrousSeparableConv2d(512, 512, bias=True, **FULL)
    for weight, std in ((block.depthwise.weight, 0.33), (block.pointwise.weight, 0.06)):
        assert weight.abs().max() <= 2 * std
        # A normal distribution cut at two deviations has 0.8796 of its deviation.
        assert abs(weight.std().item() / (0.8796 * std) - 1) < 0.05
    assert block.pointwise.bias.abs().max() == 0
    assert block.depthwise_norm.eps == 1e-3
    block = AtrousSeparableConv2d(64, 64, weight_std=(0.09, 0.09))
    assert block.depthwise.weight.abs().max() <= 0.18
    randomise(AtrousSeparableConv2d(4, 4, **FULL)).reset_parameters()
    block = randomise(AtrousSeparableConv2d(4, 4, **FULL))
    block.reset_parameters()
    assert block.depthwise_norm.weight.eq(1).all()
    assert block.depthwise_norm.running_mean.eq(0).all()


@pytest.mark.parametrize(
    "norm",
    [
        lambda n: nn.BatchNorm2d(n, momentum=None),
        lambda n: nn.BatchNorm2d(n, affine=False),
        lambda n: nn.BatchNorm2d(n, track_running_stats=False),
        lambda n: nn.BatchNorm2d(n, momentum=0.3, eps=0.1),
    ],
    ids=["cumulative", "not affine", "no running statistics", "momentum"],
)
def test_batch_norm_semantics(norm: Callable[[int], nn.Module]) -> None:
    block = make(4, 5, padding=1, depthwise_norm=norm, depthwise_activation="relu", pointwise_norm=norm)
    stack = Stack(block)
    for step in range(4):
        torch.manual_seed(step)
        x = torch.randn(2, 4, 5, 6, dtype=torch.float64) * (step + 1)
        assert_same(block, stack, x)
    block.eval(), stack.eval()
    assert_same(block, stack, x)
    if block.depthwise_norm.track_running_stats:
        assert block.depthwise_norm.num_batches_tracked == 4


def test_frozen_norm_in_a_training_block() -> None:
    block = make(4, 5, padding=1, **FULL)
    block.depthwise_norm.eval()
    for parameter in block.depthwise_norm.parameters():
        parameter.requires_grad_(False)
    stack = Stack(block)
    stack.depthwise_norm.eval()
    before = block.depthwise_norm.running_mean.clone()
    assert_same(block, stack, torch.randn(2, 4, 5, 6, dtype=torch.float64))
    assert torch.equal(before, block.depthwise_norm.running_mean)
    assert block.pointwise_norm.num_batches_tracked == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "frozen", [("depthwise.weight",), ("pointwise.weight", "pointwise_norm.bias"), ("depthwise_norm.weight",)]
)
def test_requires_grad_on_some(frozen: tuple[str, ...], training: bool) -> None:
    block = make(3, 4, padding=1, **FULL).train(training)
    stack = Stack(block)
    for module in (block, stack):
        for name in frozen:
            module.get_parameter(name).requires_grad_(False)
    assert_same(block, stack, torch.randn(2, 3, 6, 5, dtype=torch.float64))


def test_two_backward_passes_and_checkpointing() -> None:
    block = make(3, 4, padding=1, **FULL)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(block(x).square().sum(), x)[0]
    again = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).square().sum(), x)[0]
    torch.testing.assert_close(plain, again)


# What a module is put through.


def test_copies_pickles_and_files() -> None:
    block = make(4, 5, padding="same", dilation=3, **FULL)
    expected = Stack(block)
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(block),
        pickle.loads(pickle.dumps(block)),
        torch.load(file, weights_only=False),
    ):
        assert repr(copied) == repr(block)
        assert_same(copied, copy.deepcopy(expected), X)


def test_repr_names_what_is_not_default() -> None:
    text = repr(AtrousSeparableConv2d(4, 6, 3, padding=2, dilation=2, pre_activation="relu", depthwise_norm=True))
    assert "4, 6, kernel_size=(3, 3), stride=(1, 1), padding=(2, 2), dilation=(2, 2), pre_activation='relu'" in text
    assert "depthwise_activation" not in text
    assert "(depthwise_norm): BatchNorm2d(4, eps=0.001" in text


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, training: bool) -> None:
    block = make(16, 8, padding=2, dilation=2, **FULL).to(dtype).train(training)
    exact = copy.deepcopy(block).double()
    plain = Stack(block)
    x = torch.randn(2, 16, 9, 9).to(dtype)
    expected = Stack(exact)(x.double())
    out = block(x)
    assert out.dtype == dtype
    ours, theirs = ((o.double() - expected).abs().max().item() for o in (out, plain(x)))
    assert ours <= 2 * theirs
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in block.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_autocast(training: bool) -> None:
    block = make(16, 8, padding=2, dilation=2, dtype=torch.float32, **FULL).train(training)
    stack = Stack(block)
    x = torch.randn(2, 16, 9, 9)
    exact = Stack(copy.deepcopy(block).double())(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        out, plain = block(x), stack(x)
    assert out.dtype == plain.dtype == torch.bfloat16
    assert (out.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max()
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in block.parameters())
    assert block.depthwise_norm.running_mean.dtype == torch.float32


def test_inference_in_single_precision_is_as_exact_as_plain_layers() -> None:
    block = make(64, 32, padding=12, dilation=12, dtype=torch.float32, **FULL).eval()
    x = torch.randn(2, 64, 33, 33)
    with torch.no_grad():
        exact = Stack(copy.deepcopy(block).double())(x.double())
        ours, theirs = block(x), Stack(block)(x)
        for error in (lambda out: (out - exact).abs().max(), lambda out: (out - exact).square().mean().sqrt()):
            assert error(ours) <= 1.5 * error(theirs)
        block.to(memory_format=torch.channels_last)
        out = block(x.to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, ours, rtol=1e-4, atol=1e-4)


def test_meta_device_then_real_weights() -> None:
    block = AtrousSeparableConv2d(4, 5, **FULL, device="meta")
    for training in (True, False):
        assert block.train(training)(torch.empty(2, 4, 9, 9, device="meta")).shape == (2, 5, 7, 7)
    source = make(4, 5, **FULL, dtype=torch.float32)
    block.load_state_dict(sequential_names(source.state_dict()), assign=True)
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(block(x), source.eval()(x))
    empty = AtrousSeparableConv2d(4, 5, **FULL, device="meta").to_empty(device="cpu")
    empty.reset_parameters()
    assert empty(x).isfinite().all()


def sequential_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    number = {"depthwise": "0", "depthwise_norm": "1", "pointwise": "3", "pointwise_norm": "4"}
    return {f"{number[name.partition('.')[0]]}.{name.partition('.')[2]}": value for name, value in state.items()}


@pytest.mark.parametrize("training", [True, False])
def test_compile(training: bool) -> None:
    torch._dynamo.reset()
    block = make(4, 5, padding=1, **FULL).train(training)
    stack = Stack(block)
    assert_same(torch.compile(block, fullgraph=True, backend="aot_eager")._orig_mod, stack, X)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for size in (6, 7):
        x = torch.randn(2, 4, size, size, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), stack(x))
        torch.testing.assert_close(block.depthwise_norm.running_var, stack.depthwise_norm.running_var)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), stack(X))


def test_export() -> None:
    block = make(4, 5, padding=1, **FULL).eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(block, (X,), dynamic_shapes=({0: batch},))
    assert "atrous_depthwise_bn_act_inference" in str(program.graph)
    x = torch.cat([X, X + 1])
    torch.testing.assert_close(program.module()(x), block(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_and_under_torch_func() -> None:
    block = make(4, 5, padding=1, **FULL).eval()
    expected = Stack(block)(X)
    torch.testing.assert_close(torch.jit.trace(block, X)(X), expected)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(block)(X[None])[0], expected)


def test_flops_are_those_of_the_convolutions() -> None:
    block = make(4, 5, padding=1, **FULL).eval()
    with FlopCounterMode(display=False) as counter:
        block(X)
    assert counter.get_total_flops() == 2 * X.numel() * (9 + 5)


def test_distributed_data_parallel(tmp_path: Any) -> None:
    script = textwrap.dedent("""
        import sys
        import torch, torch.distributed as dist
        from torch import nn
        from torch.nn.parallel import DistributedDataParallel
        from deeplab_kernels import AtrousSeparableConv2d

        torch.set_num_threads(1)
        rank = int(sys.argv[1])
        dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
        torch.manual_seed(rank)  # other weights, buffers and data on each rank; DDP makes weights and buffers one
        block = AtrousSeparableConv2d(4, 5, padding=1, depthwise_norm=True, depthwise_activation="relu",
                                      pointwise_norm=True, dtype=torch.float64)
        model = DistributedDataParallel(block)
        state = {"0": "depthwise", "1": "depthwise_norm", "3": "pointwise", "4": "pointwise_norm"}
        stack = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(4, eps=1e-3),
                              nn.ReLU(), nn.Conv2d(4, 5, 1, bias=False), nn.BatchNorm2d(5, eps=1e-3)).double()
        for number, name in state.items():
            stack[int(number)].load_state_dict(block.get_submodule(name).state_dict())
        reference = DistributedDataParallel(stack)
        for _ in range(3):
            x = torch.randn(2, 4, 7, 5, dtype=torch.float64)
            for module in (model, reference):
                module.zero_grad()
                module(x).square().sum().backward()
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter -= 0.01 * parameter.grad
        for ours, theirs in zip(block.state_dict().values(), stack.state_dict().values(), strict=True):
            torch.testing.assert_close(ours, theirs)
        weights = torch.cat([p.detach().flatten() for p in block.parameters()])
        other = [torch.empty_like(weights) for _ in range(2)]
        dist.all_gather(other, weights)
        assert torch.equal(other[0], other[1])
        dist.destroy_process_group()
    """)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(tmp_path / "rendezvous")], stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"padding_mode": "reflect"}, ValueError, "padding_mode must be \"zeros\", got 'reflect'"),
        ({"in_channels": 0}, ValueError, "in_channels must be at least 1, got 0"),
        ({"out_channels": -2}, ValueError, "out_channels must be at least 1, got -2"),
        ({"in_channels": 4.0}, TypeError, "in_channels must be an int, got 4.0"),
        ({"channel_multiplier": 0}, ValueError, "channel_multiplier must be at least 1, got 0"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1"),
        ({"kernel_size": (3, 3, 3)}, ValueError, "kernel_size must be an int or"),
        ({"stride": 0}, ValueError, "stride must be at least 1"),
        ({"dilation": -1}, ValueError, "dilation must be at least 1"),
        ({"padding": -1}, ValueError, "padding must be at least 0"),
        ({"padding": "full"}, ValueError, "padding must be"),
        ({"padding": (1, 1, 1)}, ValueError, "padding must be"),
        ({"depthwise_activation": "gelu"}, ValueError, "depthwise_activation must be .*'gelu'"),
        ({"pre_activation": F.relu}, ValueError, "pre_activation must be"),
        ({"pointwise_activation": []}, ValueError, "pointwise_activation must be"),
        ({"depthwise_norm": "batch"}, TypeError, "depthwise_norm must be True, False, None or a function"),
        ({"pointwise_norm": nn.BatchNorm2d(5)}, TypeError, "pointwise_norm must be True, False, None or a function"),
        ({"pointwise_norm": lambda n: n}, TypeError, "pointwise_norm must return an nn.Module, got int"),
    ],
)
def test_constructor_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AtrousSeparableConv2d(**{"in_channels": 4, "out_channels": 5, **arguments})


@pytest.mark.parametrize("variant", ["linear", "activation between", "both biases"])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(4, 9, 9), ValueError, r"input must have shape \(N, 4, H, W\), got \(4, 9, 9\)"),
        (torch.ones(2, 2, 9, 9), ValueError, r"input must have shape \(N, 4, H, W\), got \(2, 2, 9, 9\)"),
        (torch.ones(2, 8, 9, 9), ValueError, r"input must have shape \(N, 4, H, W\), got \(2, 8, 9, 9\)"),
        (torch.ones(2, 4, 2, 9), ValueError, "kernel is larger than the padded input: height 2"),
        (torch.ones(2, 4, 9, 9, dtype=torch.int64), TypeError, "int64"),
        (torch.ones(2, 4, 9, 9, dtype=torch.float64), TypeError, "weight must have x's dtype torch.float64"),
        (torch.ones(2, 4, 9, 9, device="meta"), ValueError, "weight must be on x's device meta, got cpu"),
    ],
)
def test_forward_refuses(variant: str, x: Tensor, error: type[Exception], message: str) -> None:
    block = AtrousSeparableConv2d(4, 5, **VARIANTS[variant])
    with pytest.raises(error, match=message):
        block(x)


def test_failed_step_counts_no_batch() -> None:
    block = AtrousSeparableConv2d(4, 5, **FULL)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(torch.ones(1, 4, 3, 3))
    assert block.depthwise_norm.num_batches_tracked == 0


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch_and_non_finite(training: bool) -> None:
    block = make(4, 5, padding=1, **FULL).train(training)
    stack = Stack(block)
    empty = torch.empty(0, 4, 7, 5, dtype=torch.float64, requires_grad=True)
    assert block(empty).shape == stack(empty).shape == (0, 5, 7, 5)
    block(empty).sum().backward()
    x = X.clone()
    x[0, 1, 2, 3], x[1, 0, 0, 0] = float("nan"), float("inf")
    torch.testing.assert_close(block(x), stack(x), equal_nan=True)


def test_views_are_read_as_they_are() -> None:
    block = make(4, 5, padding=1, **FULL)
    wide = torch.randn(2, 8, 12, 11, dtype=torch.float64)
    for view in (wide[:, ::2, 1::2, 2:], wide[:, :4].transpose(2, 3), wide[:1, :4].expand(3, -1, -1, -1)):
        assert_same(block, Stack(block), view)


def test_depthwise_module_is_a_conv2d() -> None:
    for bias in (True, False):
        ours = AtrousDepthwiseConv2d(4, 8, (3, 5), 2, (1, 2), 2, bias, dtype=torch.float64)
        theirs = nn.Conv2d(4, 8, (3, 5), 2, (1, 2), 2, 4, bias, dtype=torch.float64)
        theirs.load_state_dict(ours.state_dict())
        assert_same(ours, theirs, torch.randn(2, 4, 11, 13, dtype=torch.float64))
    with pytest.raises(ValueError, match="out_channels must be a multiple of in_channels=4, got 6"):
        AtrousDepthwiseConv2d(4, 6)


def test_documentation_and_example_run(capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parent.parent
    text = (root / "docs" / "atrous_separable.md").read_text()
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), {})
    runpy.run_path(str(root / "examples" / "atrous_separable.py"), run_name="__main__")
    differences = re.findall(r"largest difference (\S+);", capsys.readouterr().out)
    assert len(differences) == 3
    assert max(map(float, differences)) < 1e-4
