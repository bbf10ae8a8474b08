"""Registers, shared memory, spills, widest global access and theoretical occupancy of every Triton kernel, compiled
without a GPU.

    python benchmarks/triton_resources.py          # sm_80, 90, 100, 120; writes results/compile/triton_resources.*
    python benchmarks/triton_resources.py --arch 90 --shapes A12 --dtype bf16 --no-write
    python benchmarks/triton_resources.py --kernels 'pyramid|sum_slices'     # others' figures are kept

The operators run on meta tensors of a layer's real shape; every launch is caught and compiled as Triton would on that
GPU, with the tiles chosen for the shape. ptxas reports the resources; the widths come from the machine code.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import layers
import tables
import torch
import triton
from occupancy import occupancy
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deeplab_kernels.triton import (
    atrous_depthwise,
    atrous_separable,
    atrous_spatial_pyramid,
    gaussian_filter,
    local_gaussian_filter,
    permutohedral,
)

ARCHITECTURES = (80, 90, 100, 120)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FILE = Path(__file__).parent / "results" / "compile" / "triton_resources.json"
# Where DeepLab v3+ Xception-65 spends its depthwise time: middle flow and ASPP. Other layers differ in tile sizes only.
SHAPES = ("M8", "A12")
# Rates of the spatial pyramid on these layers.
PYRAMIDS = {"A12": (6, 12, 18), "A24": (12, 24, 36)}
# Results of the whole block around these layers; elsewhere as many as channels.
SEPARABLE = {"A6": 256, "A12": 256, "A18": 256, "A24": 256, "D304": 256, "X4": 2048}

_POINTER = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One kernel with the arguments that decide its code; hashable, so that equal ones are compiled once."""

    operator: str
    kernel: Any
    signature: tuple[tuple[str, Any], ...]  # a type, or the types of a tuple
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    num_warps: int
    grid: tuple[int, ...]

    @property
    def code(self) -> tuple[Any, ...]:
        return (self.kernel, self.signature, self.constants, self.divisible, self.num_warps)


@dataclass(frozen=True)
class Resources:
    """What one kernel needs on one architecture."""

    operator: str
    kernel: str
    variant: str
    shape: str
    dtype: str
    layout: str
    arch: int
    warps: int
    programs: int
    registers: int
    shared_bytes: int
    spill_bytes: int
    widest_load_bits: int
    widest_store_bits: int
    occupancy_percent: int


def _specialise(operator: str, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], warps: int) -> Launch:
    """The rules by which Triton specialises at a launch: 1 is a constant, multiples of 16 are known as such."""
    signature, constants, divisible = [], [], []
    for parameter in kernel.params:
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature.append((name, "constexpr"))
            constants.append((name, value))
        elif isinstance(value, torch.Tensor):
            signature.append((name, _POINTER[value.dtype]))
            divisible.append(name)
        elif isinstance(value, tuple):
            signature.append((name, tuple(_POINTER[v.dtype] for v in value)))
            divisible.append(name)
        elif isinstance(value, int):
            signature.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0:
                divisible.append(name)
        else:
            signature.append((name, "fp32"))
    return Launch(operator, kernel, tuple(signature), tuple(constants), tuple(divisible), warps, grid)


class Caught:
    """Launches in the order of their first appearance, equal code once."""

    def __init__(self, operator: str = "") -> None:
        self.operator = operator
        self.by_code: dict[tuple[Any, ...], Launch] = {}

    def __call__(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], warps: int, device: Any) -> None:
        launch = _specialise(self.operator, kernel, grid, arguments, warps)
        self.by_code.setdefault(launch.code, launch)

    @property
    def launches(self) -> list[Launch]:
        return list(self.by_code.values())


@contextmanager
def catching(module: Any, operator: str = "") -> Iterator[Caught]:
    """Within, kernels of ``module`` are not started but recorded."""
    caught = Caught(operator)
    with mock.patch.object(module, "_launch", caught):
        yield caught


def launches(
    batch: int,
    channels: int,
    size: int,
    *,
    stride: int = 1,
    rate: int = 1,
    kernel: int = 3,
    multiplier: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    channels_last: bool = True,
) -> list[Launch]:
    """Every launch of the five operators on (batch, channels, size, size), equal code once."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(batch, channels, size, size, dtype=dtype, device="meta", memory_format=memory_format)
    weight = torch.empty(channels * multiplier, 1, kernel, kernel, dtype=dtype, device="meta")
    vector = torch.empty(channels * multiplier, device="meta")
    padding = rate * (kernel - 1) // 2
    geometry = ((stride, stride), (padding,) * 4, (rate, rate))
    norm = (vector, vector, 1e-3, 1)
    with catching(atrous_depthwise) as caught:
        caught.operator = "conv2d"
        y = atrous_depthwise.atrous_depthwise_conv2d(x, weight, *geometry)
        caught.operator = "bn_act_inference"
        atrous_depthwise.atrous_depthwise_bn_act_inference(x, weight, vector, vector, *norm, *geometry)
        caught.operator = "bn_act_training"
        for save_conv in (True, False):
            atrous_depthwise.atrous_depthwise_bn_act_training(x, weight, *norm, *geometry, save_conv)
        caught.operator = "conv2d_backward"
        for needs in ((True, True), (True, False), (False, True)):
            atrous_depthwise.atrous_depthwise_conv2d_backward(y, x, weight, *geometry, *needs)
        caught.operator = "bn_act_backward"
        atrous_depthwise.atrous_depthwise_bn_act_backward(
            y, x, weight, y, vector, vector, vector, vector, 1e-3, 1, True, *geometry, True, True
        )
    return caught.launches


def pyramid_launches(
    batch: int,
    channels: int,
    size: int,
    rates: tuple[int, ...] = (6, 12, 18),
    *,
    kernel: int = 3,
    dtype: torch.dtype = torch.bfloat16,
    channels_last: bool = True,
) -> list[Launch]:
    """Every launch of the spatial pyramid's three operators."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(batch, channels, size, size, dtype=dtype, device="meta", memory_format=memory_format)
    weight = torch.empty(len(rates), channels, 1, kernel, kernel, dtype=dtype, device="meta")
    vectors = [torch.empty(len(rates), channels, device="meta") for _ in range(4)]
    dilation = [rate for rate in rates for _ in range(2)]
    images, pooled = [x] * len(rates), torch.empty(batch, channels, 1, 1, dtype=dtype, device="meta")
    with catching(atrous_depthwise, "pyramid") as caught:
        atrous_spatial_pyramid.atrous_spatial_pyramid(x, weight, *vectors, 1e-3, 1, dilation, True)
        caught.operator = "pyramid_training"
        for save_conv in (True, False):
            atrous_spatial_pyramid.atrous_spatial_pyramid_training(
                x, weight, *vectors[:2], 1e-3, 1, dilation, True, save_conv
            )
        caught.operator = "pyramid_backward"
        atrous_spatial_pyramid.atrous_spatial_pyramid_backward(
            images, pooled, x, weight, images, *vectors, 1e-3, 1, True, dilation, True, True
        )
    return caught.launches


def filter_launches(values: torch.Tensor, features: torch.Tensor, *radius: tuple[int, int]) -> list[Launch]:
    """Forward and backward of the exact Gaussian filter, local with a ``radius``, on meta tensors."""
    name, module = ("local_gaussian_filter", local_gaussian_filter) if radius else ("gaussian_filter", gaussian_filter)
    with catching(module, name) as caught:
        grad = torch.empty_like(getattr(module, name)(values, features, *radius))
        getattr(module, f"{name}_backward")(grad, values, features, *radius, True, True)
    return caught.launches


def permutohedral_launches(dtype: torch.dtype) -> list[Launch]:
    values, features = torch.randn(1, 21, 9, dtype=dtype), torch.randn(1, 5, 9, dtype=dtype)
    with catching(permutohedral, "permutohedral_filter") as caught:
        permutohedral.permutohedral_filter(values, features, None, 3, False)
    return caught.launches


def separable_launches(
    batch: int,
    channels: int,
    size: int,
    out_channels: int,
    *,
    stride: int = 1,
    rate: int = 1,
    kernel: int = 3,
    dtype: torch.dtype = torch.bfloat16,
    channels_last: bool = True,
) -> list[Launch]:
    """The launch of a whole separable block with both norms, all activations and a residual."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def tensor(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    padding = rate * (kernel - 1) // 2
    out_size = (size + 2 * padding - rate * (kernel - 1) - 1) // stride + 1
    x, residual = (
        tensor(batch, c, n, n).contiguous(memory_format=memory_format)
        for c, n in ((channels, size), (out_channels, out_size))
    )
    weights = tensor(channels, 1, kernel, kernel), tensor(out_channels, channels, 1, 1)
    vectors = [torch.empty(c, device="meta") for c in (channels, out_channels) for _ in range(4)]
    geometry = ((stride, stride), (padding,) * 4, (rate, rate))
    with catching(atrous_separable, "separable") as caught:
        atrous_separable.atrous_separable_conv2d(x, *weights, residual, *vectors, 1e-3, 1e-3, 1, 1, 1, *geometry)
    return caught.launches


def compile_launch(launch: Launch, arch: int) -> Any:
    """Triton's compiled kernel for ``sm_<arch>``."""
    signature = dict(launch.signature)
    places = {name: (i,) for i, name in enumerate(signature)}
    divisible: list[tuple[int, ...]] = []
    for name in launch.divisible:
        kind = signature[name]
        divisible += [(*places[name], k) for k in range(len(kind))] if isinstance(kind, tuple) else [places[name]]
    source = ASTSource(
        fn=launch.kernel,
        signature=signature,
        constexprs={places[name]: value for name, value in launch.constants},
        attrs={place: [["tt.divisibility", 16]] for place in divisible},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": launch.num_warps})


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def inspect(compiled: Any) -> dict[str, int]:
    """Registers, shared memory, spills and access widths of a compiled kernel's machine code."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run(_tool("cuobjdump"), "-res-usage", str(cubin))
        code = _run(_tool("nvdisasm"), "-c", str(cubin))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage:\n{usage}")
    registers, stack, _, local = map(int, found.groups())
    # Spilled values are in the stack frame; a kernel of ours has no other use for one.
    return {
        "registers": registers,
        "shared_bytes": compiled.metadata.shared,
        "spill_bytes": stack + local,
        "widest_load_bits": _widest(code, "LDG"),
        "widest_store_bits": _widest(code, "STG"),
    }


def _widest(code: str, instruction: str) -> int:
    bits = [0]
    for modifiers in re.findall(rf"\b{instruction}((?:\.\w+)*)", code):
        named = re.search(r"\.(?:[US]?(8|16)|(64|128|256))\b", modifiers)
        bits.append(int(next(filter(None, named.groups()))) if named else 32)
    return max(bits)


def _variant(launch: Launch) -> str:
    constants = dict(launch.constants)
    parts = []
    if "partials" in dict(launch.signature) and launch.kernel is atrous_depthwise._forward_kernel:
        parts.append("plain" if "mean" in constants else "normalised")
        if "partials" not in constants:
            parts[-1] = "statistics" + ("" if "y" in constants else ", stored")
    if launch.kernel is atrous_depthwise._grad_weight_kernel:
        parts.append("alone" if "grad_x" in constants else "with grad_x")
    if launch.kernel is atrous_depthwise._sum_slices_kernel:
        parts.append("weight" if "second" in constants else "gamma, beta")
    if launch.kernel is atrous_spatial_pyramid._pyramid_forward_kernel:
        parts.append(
            "inference" if "partials" in constants else "statistics" + ("" if "ys" in constants else ", stored")
        )
        if "pool" not in constants:
            parts.append("mean")
    if launch.kernel is atrous_separable._separable_kernel:
        precision = {"tf32": "TF32", "ieee": "float32"}[constants["PRECISION"]]
        parts.append(precision if dict(launch.signature)["x"] == "*fp32" else "16 bits")
        pixels = f"{constants['TILE_H']}x{constants['TILE_W']} px"
        parts.append(f"{pixels} x {constants['BLOCK_C']} results, {constants['BLOCK_K']} ch a step")
    elif "BLOCK_C" in constants and "TILE_W" in constants:
        parts.append(f"{constants['TILE_H']}x{constants['TILE_W']} px x {constants['BLOCK_C']} ch")
    return "; ".join(parts)


def _filters() -> Iterator[tuple[str, str, str, list[Launch]]]:
    """(shape, dtype, layout, launches) of the filters: 21 labels, colour and position, a picture of 375 x 500."""
    for dtype in (torch.float32, torch.float16):
        name = next(key for key, value in DTYPES.items() if value == dtype)
        values, features = (
            torch.empty(1, 21, 375, 500, dtype=dtype, device="meta"),
            torch.empty(1, 5, 375, 500, device="meta"),
        )
        yield "21x375x500", name, "-", filter_launches(values.flatten(2), features.flatten(2))
        yield "21x375x500", name, "nchw", filter_launches(values, features, (5, 5))
    for dtype in (torch.float32, torch.float64):
        yield "21 labels", "fp32" if dtype == torch.float32 else "fp64", "-", permutohedral_launches(dtype)


def _layers(shapes: list[str], dtypes: list[str]) -> Iterator[tuple[str, str, str, list[Launch]]]:
    for name, dtype, layout in itertools.product(shapes, dtypes, ("nchw", "nhwc")):
        layer = layers.NAMED[name]
        options: dict[str, Any] = {"dtype": DTYPES[dtype], "channels_last": layout == "nhwc"}
        tapped: dict[str, Any] = {"stride": layer.stride, "rate": layer.rate, **options}
        found = launches(8, layer.channels, layer.size, **tapped)
        out_channels = SEPARABLE.get(name, layer.channels)
        found += separable_launches(8, layer.channels, layer.size, out_channels, **tapped)
        if name in PYRAMIDS:
            found += pyramid_launches(8, layer.channels, layer.size, PYRAMIDS[name], **options)
        yield f"{layer.name}/N8", dtype, layout, found


def measure(shapes: list[str], dtypes: list[str], architectures: list[int], kernels: str = "") -> Iterator[Resources]:
    """One row per distinct machine code; what several shapes share is listed under the first. ``kernels``: a regular
    expression for their names."""
    seen: set[tuple[Any, ...]] = set()
    for shape, dtype, layout, found in itertools.chain(_layers(shapes, dtypes), _filters()):
        for launch in found:
            if launch.code in seen or not re.search(kernels, launch.kernel.__name__):
                continue
            seen.add(launch.code)
            for arch in architectures:
                usage = inspect(compile_launch(launch, arch))
                yield Resources(
                    operator=launch.operator, kernel=launch.kernel.__name__.strip("_"), variant=_variant(launch),
                    shape=shape, dtype=dtype, layout=layout, arch=arch, warps=launch.num_warps,
                    programs=launch.grid[0], **usage, occupancy_percent=occupancy(
                        arch, launch.num_warps, usage["registers"], usage["shared_bytes"]
                    ),
                )  # fmt: skip


def _kept(kernels: str) -> list[Resources]:
    """Rows of the file whose kernels do not match."""
    stored = json.loads(FILE.read_text())["kernels"] if FILE.exists() else []
    return [Resources(**row) for row in stored if not re.search(kernels, f"_{row['kernel']}")]


def table(rows: list[Resources]) -> str:
    """Markdown, one line per kernel variant; figures of several architectures side by side where they differ."""
    grouped: dict[tuple[Any, ...], list[Resources]] = {}
    for row in rows:
        key = (row.shape, row.dtype, row.layout, row.kernel, row.variant, row.warps, row.programs)
        grouped.setdefault(key, []).append(row)

    def figures(group: list[Resources], field: str) -> str:
        values = [getattr(r, field) for r in group]
        return str(values[0]) if len(set(values)) == 1 else " / ".join(map(str, values))

    fields = ("registers", "shared_bytes", "spill_bytes", "widest_load_bits", "widest_store_bits", "occupancy_percent")
    header = ("shape", "dtype", "layout", "kernel", "variant", "warps", "programs", "registers", "shared memory, B",
              "spills, B", "widest load, bit", "widest store, bit", "occupancy, %")  # fmt: skip
    lines = ([*map(str, key), *(figures(group, f) for f in fields)] for key, group in grouped.items())
    return tables.markdown(header, lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), help="compute capabilities")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=sorted(layers.NAMED))
    parser.add_argument("--dtype", nargs="+", default=["bf16", "fp32"], choices=sorted(DTYPES))
    parser.add_argument("--kernels", default="", help="compile only kernels that match; others' figures are kept")
    parser.add_argument("--no-write", action="store_true", help=f"print only; do not write {FILE.name} and its table")
    options = parser.parse_args(arguments)
    rows = _kept(options.kernels) if options.kernels else []
    for row in measure(options.shapes, options.dtype, options.arch, options.kernels):
        rows.append(row)
        if row.spill_bytes:
            print(f"SPILL: {row}", file=sys.stderr)
    text = table(rows)
    print(text)
    if not options.no_write:
        FILE.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(asdict(r)) for r in rows)
        FILE.write_text(f'{{"triton": "{triton.__version__}", "kernels": [\n{lines}\n]}}\n')
        architectures = ", ".join(f"sm_{a}" for a in options.arch)
        FILE.with_suffix(".md").write_text(
            f"# Triton kernels, compiled by Triton {triton.__version__} for {architectures} (not run)\n\n"
            "Written by `python benchmarks/triton_resources.py`. Where the architectures differ, in the order above;\n"
            "code that several shapes share is listed once.\n\n" + text
        )
    return int(any(r.spill_bytes for r in rows))


if __name__ == "__main__":
    sys.exit(main())
