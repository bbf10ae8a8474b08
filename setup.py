"""Builds the package's native libraries with ninja. See docs/building.md.

deeplab_kernels/_C          C++ operators for the CPU, always
deeplab_kernels/_C_cuda     CUDA operators, where nvcc is found
deeplab_kernels/_densecrf   the numpy module, always

The first two use only PyTorch's stable ABI: one file serves torch >= 2.10 and any Python.

Environment: DEEPLAB_KERNELS_CUDA = auto (default: where nvcc is found) | 1 (fail without nvcc) | 0
             DEEPLAB_KERNELS_CUDA_ARCHITECTURES = "80;90;100;120"   MAX_JOBS   CXX   CUDA_HOME
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
TORCH_ABI = "0x020a000000000000"  # 2.10
CUDA_ARCHITECTURES = ("80", "90", "100", "120")
# Instruction sets chosen at run time: the same source compiled once for each.
ISA_FLAGS = {"avx2": ["-mavx2", "-mfma", "-mf16c"], "avx512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"]}


def find_torch() -> Path | None:
    """The torch package directory of the environment that is installed into, also from within an isolated build."""
    candidates = [Path(p) / "torch" for p in (*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))]
    for path in candidates:
        if (path / "include" / "torch" / "csrc" / "stable").is_dir():
            return path
    return None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    found = shutil.which("nvcc")
    return found or ("/usr/local/cuda/bin/nvcc" if Path("/usr/local/cuda/bin/nvcc").exists() else None)


def cuda_choice() -> tuple[str | None, str]:
    """(path of nvcc or None, why)."""
    mode = os.environ.get("DEEPLAB_KERNELS_CUDA", "auto").lower()
    if mode not in ("0", "1", "auto"):
        raise SystemExit(f"DEEPLAB_KERNELS_CUDA={mode!r}: allowed are 0, 1 and auto")
    if mode == "0":
        return None, "built with DEEPLAB_KERNELS_CUDA=0"
    nvcc = find_nvcc()
    if nvcc is None and mode == "1":
        raise SystemExit("DEEPLAB_KERNELS_CUDA=1, but no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda")
    return nvcc, "" if nvcc else "no nvcc was found when the package was built"


def cuda_architectures() -> list[str]:
    value = os.environ.get("DEEPLAB_KERNELS_CUDA_ARCHITECTURES", ";".join(CUDA_ARCHITECTURES))
    return [a for a in re.split(r"[;, ]+", value) if a]


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in CSRC.glob(pattern))


def source_isa(source: str) -> str | None:
    """csrc/cpu/x_avx2.cpp is compiled for AVX2; files without such a suffix for any CPU."""
    return next((isa for isa in ISA_FLAGS if Path(source).stem.endswith(f"_{isa}")), None)


def cpu_sources() -> list[str]:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return [s for s in sources("torch/schema.cpp", "torch/*_cpu.cpp", "cpu/*.cpp") if x86 or source_isa(s) is None]


class BuildNative(build_ext):
    """Writes one build.ninja for all libraries and runs it."""

    def build_extensions(self) -> None:
        torch_dir = find_torch()
        if torch_dir is None:
            raise SystemExit("torch >= 2.10 is needed to build deeplab_kernels: pip install torch, then try again")
        import pybind11

        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        cxx = os.environ.get("CXX", "g++")
        nvcc, _ = cuda_choice()
        common = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter", "-DNDEBUG"]
        torch_flags = [f"-DTORCH_TARGET_VERSION={TORCH_ABI}", f"-isystem{torch_dir / 'include'}"]
        torch_libs = [f"-L{torch_dir / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
        numpy_flags = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
        lines = [
            "ninja_required_version = 1.5",
            "rule cxx",
            f"  command = {cxx} $flags -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc\n  description = CXX $in",
            "rule link",
            f"  command = {cxx} -shared -o $out $in $libs",
            "  description = LINK $out",
        ]
        if nvcc:
            lines += [
                "rule nvcc",
                f"  command = {nvcc} $flags -MD -MF $out.d -c $in -o $out",
                "  depfile = $out.d\n  deps = gcc\n  description = NVCC $in",
            ]
        for ext in self.extensions:
            output = Path(self.get_ext_fullpath(ext.name)).resolve()
            output.parent.mkdir(parents=True, exist_ok=True)
            is_cuda = ext.name.endswith("_C_cuda")
            is_numpy = ext.name.endswith("_densecrf")
            objects = []
            for source in ext.sources:
                obj = build_dir / ext.name.rsplit(".", 1)[1] / (source.replace("/", "_") + ".o")
                if source.endswith(".cu"):
                    rule = "nvcc"
                    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in cuda_architectures()]
                    newest = cuda_architectures()[-1]
                    codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
                    flags = ["-std=c++20", "-O3", "-DNDEBUG", "-DUSE_CUDA", "--expt-relaxed-constexpr", "--threads=4",
                             "-Xcompiler=-fPIC,-fvisibility=hidden", *codes, *torch_flags]
                    flags = [f.replace("-isystem", "-isystem ", 1) if f.startswith("-isystem") else f for f in flags]
                else:
                    rule = "cxx"
                    flags = list(common)
                    flags += numpy_flags if is_numpy else torch_flags
                    if is_cuda:
                        flags += ["-DUSE_CUDA", f"-isystem{Path(nvcc).resolve().parent.parent / 'include'}"]
                    isa = source_isa(source)
                    flags += ISA_FLAGS.get(isa, []) if isa else []
                    if is_numpy:
                        flags.append("-pthread")
                lines += [f"build {obj}: {rule} {ROOT / source}", f"  flags = {' '.join(flags)}"]
                objects.append(str(obj))
            libs = [] if is_numpy else list(torch_libs)
            if is_cuda:
                cuda_root = Path(nvcc).resolve().parent.parent
                libs += [f"-L{cuda_root / 'lib64'}", f"-L{cuda_root / 'targets/x86_64-linux/lib'}", "-lcudart_static", "-ldl", "-lrt", "-pthread"]
            lines += [f"build {output}: link {' '.join(objects)}", f"  libs = {' '.join(libs)}", f"default {output}"]
        (build_dir / "build.ninja").write_text("\n".join(lines) + "\n")
        ninja = shutil.which("ninja")
        if ninja is None:
            import ninja as ninja_package

            ninja = str(Path(ninja_package.BIN_DIR) / "ninja")
        command = [ninja, "-C", str(build_dir)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        subprocess.run(command, check=True)
        self.write_build_info(torch_dir, cxx, nvcc)

    def write_build_info(self, torch_dir: Path, cxx: str, nvcc: str | None) -> None:
        """What `python -m deeplab_kernels info` tells about the build."""

        def first_line(*command: str, index: int = 0) -> str:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[index]

        version = re.search(r"__version__ = ['\"]([^'\"]+)", (torch_dir / "version.py").read_text())
        info = {
            "torch": version.group(1) if version else "unknown",
            "python": platform.python_version(),
            "machine": platform.machine(),
            "compiler": first_line(cxx, "--version"),
            "cpu_instruction_sets": ["portable", *sorted({i for s in cpu_sources() if (i := source_isa(s))})],
            "cuda": None,
            "cuda_missing_because": cuda_choice()[1],
        }
        if nvcc:
            info["cuda"] = {"nvcc": first_line(nvcc, "--version", index=-2), "architectures": cuda_architectures()}
        target = Path(self.get_ext_fullpath("deeplab_kernels._C")).parent / "_build_info.json"
        target.write_text(json.dumps(info, indent=2) + "\n")


extensions = [
    Extension("deeplab_kernels._C", cpu_sources(), py_limited_api=True),
    Extension("deeplab_kernels._densecrf", sources("numpy/*.cpp")),
]
if cuda_choice()[0] and sources("cuda/*.cu"):
    extensions.append(
        Extension("deeplab_kernels._C_cuda", sources("torch/*_cuda.cpp", "cuda/*.cu"), py_limited_api=True)
    )

model_packages = {
    "deeplab_kernels." + ".".join(p.parent.relative_to(ROOT).parts): str(p.parent.relative_to(ROOT))
    for p in sorted((ROOT / "models").rglob("__init__.py"))
}

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildNative},
    packages=["deeplab_kernels", *(f"deeplab_kernels.{s}" for s in ("densecrf", "nn", "ops", "reference", "triton")), *model_packages],
    package_dir=model_packages,
    setup_requires=[] if find_torch() else ["torch>=2.10"],
)
