"""Triton kernels of the atrous depthwise operators: exact in the interpreter, and they compile for real GPUs.

Whether Triton interprets or compiles is fixed for a process when its kernels are defined. So the interpreted cases
(triton_cases.py) run in a pytest of their own with TRITON_INTERPRET=1, in parts that pytest-xdist can spread, and no
test here or elsewhere sees the variable. On a machine with a GPU the same cases also run there, compiled.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from _processes import run_python
from _triton import compiled_here, needs_interpreter, run_cases

TESTS = Path(__file__).parent
sys.path.append(str(TESTS.parent / "benchmarks"))

# Substrings of the names in triton_cases.py; together they select everything.
PARTS = {
    "convolution": "test_convolution",
    "block": "test_block",
    "other": "not test_convolution and not test_block",
}


@needs_interpreter
@pytest.mark.parametrize("part", PARTS)
def test_in_the_interpreter(part: str) -> None:
    run_cases("triton_cases.py", interpreted=True, selection=PARTS[part])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu() -> None:
    run_cases("triton_cases.py", interpreted=False)


def resources(operators: set[str], **layer: Any) -> dict[str, list[dict[str, int]]]:
    """Kernel name -> what each of its variants needs on sm_90."""
    import triton_resources

    found: dict[str, list[dict[str, int]]] = {}
    for launch in triton_resources.launches(**layer):
        if launch.operator in operators:
            usage = triton_resources.inspect(triton_resources.compile_launch(launch, 90))
            found.setdefault(launch.kernel.__name__.strip("_"), []).append(usage)
    return found


@compiled_here
def test_hot_kernels_use_full_width_and_do_not_spill() -> None:
    usage = resources({"bn_act_inference", "bn_act_backward"}, batch=1, channels=728, size=65, rate=2)
    for name in ("forward_kernel", "norm_sums_kernel", "norm_grad_kernel"):
        for variant in usage[name]:
            assert variant["spill_bytes"] == 0, name
            assert variant["widest_load_bits"] == 128, name


@compiled_here
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_general_kernels_compile(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large kernel, a channel multiplier, a stride, 64-bit offsets: every path that the named layers do not take."""
    from deeplab_kernels.triton import _tiling

    monkeypatch.setattr(_tiling, "_WIDE_FROM", 0)
    usage = resources(
        {"conv2d", "conv2d_backward"}, batch=2, channels=24, size=33, stride=2, kernel=9, multiplier=2,
        dtype=torch.float16, channels_last=layout == "nhwc",
    )  # fmt: skip
    assert set(usage) == {"forward_kernel", "grad_input_kernel", "grad_weight_kernel", "sum_slices_kernel"}
    assert all(variant["registers"] > 0 for variants in usage.values() for variant in variants)


@compiled_here
def test_sizes_of_one_compile() -> None:
    """Triton turns arguments that are 1 into constants, which have fewer methods than values."""
    usage = resources(
        {"conv2d", "bn_act_training", "conv2d_backward"}, batch=1, channels=1, size=1, kernel=1, dtype=torch.float32
    )  # fmt: skip
    assert {"forward_kernel", "merge_statistics_kernel", "normalise_kernel", "grad_weight_kernel"} <= set(usage)


def test_a_launch_is_compiled_as_triton_specialises_it() -> None:
    import triton_resources

    launch = triton_resources.launches(1, 48, 5)[0]
    assert launch.kernel.__name__ == "_forward_kernel"
    signature, constants = dict(launch.signature), dict(launch.constants)
    assert (signature["x"], signature["height"], signature["eps"]) == ("*bf16", "i32", "fp32")
    assert signature["rate_h"] == signature["mean"] == "constexpr"
    assert (constants["rate_h"], constants["mean"], constants["UNIT"]) == (1, None, 16)
    assert "in_channels" in launch.divisible
    assert "height" not in launch.divisible


@pytest.mark.parametrize(("wanted", "serving"), [("triton", "triton"), ("reference", "reference")])
def test_backend_of_cuda_devices_can_be_chosen(wanted: str, serving: str) -> None:
    script = (
        "from deeplab_kernels import _library; from deeplab_kernels.ops import _backends;"
        "print(_backends.cuda_backend(), _library.missing()['cuda'])"
    )
    printed = run_python(script, DEEPLAB_KERNELS_CUDA_BACKEND=wanted)
    assert printed.split() == [serving, f"DEEPLAB_KERNELS_CUDA_BACKEND={wanted}"]


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(AssertionError, match="must be one of cuda, triton, reference, got 'metal'"):
        run_python("import deeplab_kernels.ops", DEEPLAB_KERNELS_CUDA_BACKEND="metal")


def test_one_backend_can_be_called() -> None:
    from deeplab_kernels.ops import _backends
    from deeplab_kernels.triton import atrous_depthwise

    x, weight = torch.randn(1, 2, 5, 5, dtype=torch.float64), torch.randn(2, 1, 3, 3, dtype=torch.float64)
    arguments = (x, weight, (1, 1), (1, 1, 1, 1), (1, 1))
    served = [_backends.implementation("atrous_depthwise_conv2d", b)(*arguments) for b in ("triton", "reference")]
    assert torch.equal(*served)
    with pytest.raises(ValueError, match="backend must be"):
        _backends.implementation("atrous_depthwise_conv2d", "metal")
    own = {name for name, stem in _backends.OPERATORS.items() if stem == "atrous_depthwise"}
    assert own <= set(dir(atrous_depthwise))
