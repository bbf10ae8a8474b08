"""What is installed and shipped: packages, files, metadata, the libraries' ABI."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
from _processes import run_python

import deeplab_kernels
from deeplab_kernels import _artefacts

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements(name: str) -> dict[str, str]:
    """name -> pinned version, of one file without those that it includes."""
    pins = {}
    for line in (ROOT / "requirements" / name).read_text().splitlines():
        if line and not line.startswith(("#", "-r ")):
            package, _, version = line.partition("==")
            assert version, f"{name}: {line!r} is not pinned"
            pins[package] = version
    return pins


def test_version_in_one_place():
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", deeplab_kernels.__version__)
    assert importlib.metadata.version("deeplab_kernels") == deeplab_kernels.__version__


def test_metadata():
    metadata = importlib.metadata.metadata("deeplab_kernels")
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    required = [r for r in metadata.get_all("Requires-Dist") if "extra" not in r]
    # torchvision, timm and the like are for tests only; Triton is optional.
    assert {re.match(r"[\w-]+", r).group() for r in required} == {"torch", "numpy", "pillow", "tqdm"}
    scripts = importlib.metadata.entry_points(group="console_scripts", name="deeplab_kernels")
    assert [script.value for script in scripts] == ["deeplab_kernels.cli:main"]


@pytest.mark.parametrize("top", ["deeplab_kernels", "models"])
def test_every_folder_with_python_files_is_a_package(top):
    """setup.py finds packages by their __init__.py: a folder without one would be missing from an installation."""
    folders = {p.parent for p in (ROOT / top).rglob("*.py")}
    assert folders
    assert [str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").exists()] == []


def test_torch_libraries_and_record_are_there():
    assert _artefacts.find_library("_C").name == "_C.abi3.so"
    assert _artefacts.find_library("_densecrf") is not None
    record = _artefacts.build_info()
    assert {"torch", "python", "machine", "compiler", "cpu_instruction_sets", "cuda", "cuda_missing_because"} == set(
        record
    )
    # Either there is a CUDA library or a reason.
    assert (_artefacts.find_library("_C_cuda") is not None) == bool(record["cuda"])
    assert bool(record["cuda"]) != bool(record["cuda_missing_because"])
    assert (_artefacts.HERE / "py.typed").exists()


@pytest.mark.skipif(not shutil.which("torch-abi-audit", path=str(Path(sys.executable).parent)), reason="not installed")
@pytest.mark.parametrize("name", ["_C", "_C_cuda"])
def test_stable_abi(name):
    library = _artefacts.find_library(name)
    if library is None:
        pytest.skip(f"{name} was not built")
    audit = [Path(sys.executable).parent / "torch-abi-audit", "--check", "both", "-v", library]
    result = subprocess.run(audit, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout
    assert re.search(r"Min torch: +2\.10\.0", result.stdout), result.stdout


def test_import_is_lazy():
    """`import deeplab_kernels` costs nothing, and what needs no torch imports none."""
    code = (
        "import sys, deeplab_kernels\n"
        "loaded = [m for m in ('torch', 'numpy', 'triton', 'PIL') if m in sys.modules]\n"
        "assert not loaded, loaded\n"
        "import deeplab_kernels.densecrf\n"
        "assert 'torch' not in sys.modules\n"
        "import deeplab_kernels.ops, deeplab_kernels.nn, deeplab_kernels.models\n"
        "heavy = 'torchvision', 'timm', 'kornia', 'skimage', 'transformers', 'PIL', 'matplotlib', 'torch._dynamo', \\\n"
        "    'triton', 'torch.utils.flop_counter'\n"
        "unwanted = [m for m in heavy if m in sys.modules]\n"
        "assert not unwanted, unwanted\n"
    )
    run_python(code)


def test_flop_formulas_are_there_when_the_counter_is():
    """Registered by its import, whichever of both is imported first, and not lost by a look for it."""
    for first in ("import deeplab_kernels.ops", "import torch.utils.flop_counter"):
        code = (
            "import importlib.util, sys, torch\n"
            f"{first}\n"
            "importlib.util.find_spec('torch.utils.flop_counter')\n"
            "import deeplab_kernels.ops\n"
            "from torch.utils.flop_counter import FlopCounterMode, flop_registry\n"
            "assert torch.ops.deeplab_kernels.atrous_depthwise_conv2d in flop_registry\n"
            "assert torch.ops.deeplab_kernels.permutohedral_filter in flop_registry\n"
            "assert not any(type(f).__module__.startswith('deeplab_kernels') for f in sys.meta_path)\n"
            "with FlopCounterMode(display=False) as counter:\n"
            "    deeplab_kernels.ops.atrous_depthwise_conv2d(torch.ones(1, 2, 5, 5), torch.ones(2, 1, 3, 3))\n"
            "assert counter.get_total_flops() == 2 * 2 * 9 * 9\n"
        )
        run_python(code)


def test_public_names():
    for name in deeplab_kernels.__all__:
        assert getattr(deeplab_kernels, name) is not None
        assert name in dir(deeplab_kernels)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        deeplab_kernels.nonsense  # noqa: B018


def test_requirements_are_pinned_and_agree():
    pins: dict[str, str] = {}
    for file in sorted((ROOT / "requirements").glob("*.txt")):
        for name, version in requirements(file.name).items():
            assert pins.setdefault(name, version) == version, f"{file.name} pins {name} to another version"
    assert pins["torch"] == "2.13.0"
    for dependency in PROJECT["project"]["dependencies"] + PROJECT["build-system"]["requires"]:
        assert re.match(r"[\w-]+", dependency).group() in pins
    assert set(requirements("peers.txt")) == {
        "torchvision",
        "timm",
        "segmentation_models_pytorch",
        "transformers",
        "torchmetrics",
        "lightning-utilities",
    }


def test_source_distribution_has_what_a_build_needs():
    grafted = re.findall(r"^graft (\S+)", (ROOT / "MANIFEST.in").read_text(), re.MULTILINE)
    assert {"csrc", "models"} <= set(grafted)
    for folder in grafted:
        assert (ROOT / folder).is_dir(), f"MANIFEST.in names {folder}"


@pytest.mark.parametrize("target", ["demo", "test", "lint", "bench", "install"])
def test_make_targets(target):
    if not shutil.which("make"):
        pytest.skip("no make")
    result = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_continuous_integration_runs_the_tests():
    script = ROOT / ".ci" / "run"
    assert "make test" in script.read_text()
    assert script.stat().st_mode & 0o111


def test_readme():
    text = (ROOT / "README.md").read_text()
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    assert len(example.strip().splitlines()) <= 10
    assert "513" in example
    names: dict[str, object] = {}
    exec(example.replace("513", "65").replace("xception65", "xception41"), names)  # quicker
    assert names["y"].shape == (1, 256, 33, 33)
    assert names["logits"].shape == (1, 21, 65, 65)
