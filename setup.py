"""Builds the package's native libraries with ninja. docs/building.md explains the choices.

deeplab_kernels/_C          C++ operators for the CPU, always
deeplab_kernels/_C_cuda     CUDA operators, where nvcc is found
deeplab_kernels/_densecrf   the numpy module, always

The first two use only PyTorch's stable ABI: one file serves torch >= 2.10 and any Python.

Environment: DEEPLAB_KERNELS_CUDA = auto (default: where nvcc is found) | 1 (fail without nvcc) | 0
             DEEPLAB_KERNELS_CUDA_ARCHITECTURES = "80;90;100;120"
             DEEPLAB_KERNELS_PORTABLE = 1 leaves out the sources for particular x86 instruction sets
             MAX_JOBS   CXX   CUDA_HOME
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
OLDEST_TORCH = (2, 10)
TORCH_ABI = f"0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"
CUDA_ARCHITECTURES = ("80", "90", "100", "120")
# Instruction sets chosen at run time: csrc/cpu/*/*kernels.cpp are compiled once for each, the other files for any CPU.
ISA_FLAGS: dict[str, list[str]] = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}


def torch_version(directory: Path) -> str:
    match = re.search(r"__version__ = ['\"]([^'\"]+)", (directory / "version.py").read_text())
    return match.group(1) if match else "0.0"


def find_torch() -> Path | None:
    """Directory of a new enough torch, in the environment that is installed into even from within an isolated build."""
    for path in (*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        directory = Path(path) / "torch"
        if not (directory / "include" / "torch" / "csrc" / "stable").is_dir():
            continue
        if tuple(int(n) for n in re.findall(r"\d+", torch_version(directory))[:2]) >= OLDEST_TORCH:
            return directory
    return None


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((str(path) for path in candidates if path.exists()), None)


def cuda_root(nvcc: str) -> Path:
    """Where nvcc's toolkit lies. Asked of nvcc itself, because the file on PATH may be a link or a script."""
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    match = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    return Path(match.group(1)).resolve() if match else Path(nvcc).resolve().parent.parent


def cuda_choice() -> tuple[str | None, str]:
    """(path of nvcc or None, why None)."""
    mode = os.environ.get("DEEPLAB_KERNELS_CUDA", "auto").lower()
    if mode not in ("0", "1", "auto"):
        raise SystemExit(f"DEEPLAB_KERNELS_CUDA={mode!r}: allowed are 0, 1 and auto")
    if mode == "0":
        return None, "the package was built with DEEPLAB_KERNELS_CUDA=0"
    nvcc = find_nvcc()
    if nvcc is None and mode == "1":
        raise SystemExit("DEEPLAB_KERNELS_CUDA=1, but no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda")
    if nvcc is not None and not sources("cuda/*.cu"):
        return None, "there were no CUDA sources when the package was built"
    return nvcc, "" if nvcc else "no nvcc was found when the package was built"


def cuda_architectures(nvcc: str) -> list[str]:
    """Those of the environment variable, else the default ones that this nvcc knows."""
    value = os.environ.get("DEEPLAB_KERNELS_CUDA_ARCHITECTURES")
    if value is None:
        known = output_of(nvcc, "--list-gpu-arch").split()
        return [a for a in CUDA_ARCHITECTURES if f"compute_{a}" in known]
    architectures = [a.replace(".", "") for a in re.split(r"[;, ]+", value) if a]
    if not architectures or not all(re.fullmatch(r"\d{2,3}[af]?", a) for a in architectures):
        raise SystemExit(f'DEEPLAB_KERNELS_CUDA_ARCHITECTURES={value!r}: give compute capabilities like "80;90"')
    return architectures


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in CSRC.glob(pattern))


def portable_only() -> bool:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return not x86 or os.environ.get("DEEPLAB_KERNELS_PORTABLE", "0") == "1"


def instruction_sets(source: str) -> list[str | None]:
    """Those that a source is compiled for; [None] if it is no kernel."""
    if not source.endswith("kernels.cpp"):
        return [None]
    if portable_only():
        return ["portable"]
    # The lattice's rows are packs of 8 values, a register of AVX2.
    return [isa for isa in ISA_FLAGS if not ("permutohedral" in source and isa == "avx512")]


def optimisation(source: str) -> str:
    """Where kernels are unrolled by hand, -O3 makes them a third larger and longer to compile, but no faster."""
    return "-O2" if re.search(r"atrous_depthwise/b?float\d+_kernels\.cpp$", source) else "-O3"


def cpu_sources() -> list[str]:
    return sources("torch/schema.cpp", "torch/*_cpu.cpp", "cpu/**/*.cpp")


def numpy_sources() -> list[str]:
    """The CRF needs no torch."""
    shared = sources("cpu/instruction_set.cpp", "cpu/workspace.cpp")
    return sources("numpy/*.cpp", "cpu/permutohedral/*.cpp", "cpu/dense_crf/*.cpp") + shared


def isystem(*directories: str | Path) -> list[str]:
    return [flag for directory in directories for flag in ("-isystem", str(directory))]


def escaped(flags: Iterable[str | Path]) -> str:
    """Command line arguments for the shell, inside a ninja file."""
    return shlex.join(map(str, flags)).replace("$", "$$")


def escaped_path(path: str | Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


class BuildNative(build_ext):
    """Writes one build.ninja for all libraries and runs it."""

    def build_extensions(self) -> None:
        torch_dir = find_torch()
        if torch_dir is None:
            oldest = ".".join(map(str, OLDEST_TORCH))
            raise SystemExit(f"torch >= {oldest} is needed to build deeplab_kernels: pip install torch, then try again")
        # setuptools throws an editable install's build_temp away; with this one the next install compiles what changed.
        build_dir = Path(self.build_temp).resolve()
        if self.editable_mode:
            build_dir = ROOT / "build" / f"editable-{sys.implementation.cache_tag}"
        build_dir.mkdir(parents=True, exist_ok=True)
        cxx = shlex.split(os.environ.get("CXX", "g++"))
        nvcc, _ = cuda_choice()
        (build_dir / "build.ninja").write_text("\n".join(self.ninja_lines(build_dir, torch_dir, cxx, nvcc)) + "\n")
        subprocess.run([*self.ninja_command(), "-C", str(build_dir)], check=True)
        self.remove_stale_cuda(self.build_info_path().parent)
        self.write_build_info(torch_dir, cxx, nvcc)

    def ninja_command(self) -> list[str]:
        ninja = shutil.which("ninja")
        if ninja is None:
            import ninja as ninja_package

            ninja = str(Path(ninja_package.BIN_DIR) / "ninja")
        jobs = os.environ.get("MAX_JOBS")
        return [ninja, "-j", jobs] if jobs else [ninja]

    def ninja_lines(self, build_dir: Path, torch_dir: Path, cxx: list[str], nvcc: str | None) -> list[str]:
        import pybind11

        toolkit = cuda_root(nvcc) if nvcc else Path()
        torch_flags = [f"-DTORCH_TARGET_VERSION={TORCH_ABI}", *isystem(torch_dir / "include")]
        torch_libs = ["-L", torch_dir / "lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
        cuda_libs = [f"-L{path}" for path in (toolkit / "lib64", *sorted(toolkit.glob("targets/*/lib")))]
        cuda_libs += ["-lcudart_static", "-ldl", "-lrt", "-pthread"]
        numpy_flags = [*isystem(pybind11.get_include(), sysconfig.get_path("include")), "-pthread"]
        cxx_flags = ["-DNDEBUG", "-fPIC", "-fvisibility=hidden"]
        cxx_flags += ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]
        if portable_only():
            cxx_flags.append("-DDEEPLAB_KERNELS_PORTABLE")
        nvcc_flags = ["-std=c++20", "-O3", "-DNDEBUG", "-DUSE_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        nvcc_flags += ["--expt-relaxed-constexpr", "--threads=4"]
        if nvcc:
            architectures = cuda_architectures(nvcc)
            nvcc_flags += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
            nvcc_flags.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")

        lines = ["ninja_required_version = 1.5"]
        for rule, compiler in (("cxx", cxx), ("nvcc", [nvcc] if nvcc else None)):
            if compiler:
                lines += [
                    f"rule {rule}",
                    f"  command = {escaped(compiler)} $flags -MD -MF $out.d -c $in -o $out",
                    "  depfile = $out.d\n  deps = gcc",
                    f"  description = {rule} $in",
                ]
        lines += ["rule link", f"  command = {escaped(cxx)} -shared -o $out $in $libs", "  description = link $out"]
        for ext in self.extensions:
            name = ext.name.rsplit(".", 1)[1]
            objects = []
            for source, isa in ((s, isa) for s in ext.sources for isa in instruction_sets(s)):
                if source.endswith(".cu"):
                    rule, flags = "nvcc", [*nvcc_flags, *torch_flags]
                else:
                    rule, flags = "cxx", ["-std=c++20", optimisation(source), *cxx_flags]
                    flags += [f"-DDK_ISA={isa}", *ISA_FLAGS[isa]] if isa else []
                    flags += numpy_flags if name == "_densecrf" else torch_flags
                    if name == "_C_cuda":
                        flags += ["-DUSE_CUDA", *isystem(toolkit / "include")]
                suffix = f".{isa}.o" if isa else ".o"
                objects.append(escaped_path(build_dir / name / (source.replace("/", "_") + suffix)))
                lines += [f"build {objects[-1]}: {rule} {escaped_path(ROOT / source)}", f"  flags = {escaped(flags)}"]
            libs = {"_C": torch_libs, "_C_cuda": [*torch_libs, *cuda_libs], "_densecrf": ["-pthread"]}[name]
            output = Path(self.get_ext_fullpath(ext.name)).resolve()
            output.parent.mkdir(parents=True, exist_ok=True)
            lines += [f"build {escaped_path(output)}: link {' '.join(objects)}", f"  libs = {escaped(libs)}"]
        return lines

    def build_info_path(self) -> Path:
        return Path(self.build_lib) / "deeplab_kernels" / "_build_info.json"

    def write_build_info(self, torch_dir: Path, cxx: list[str], nvcc: str | None) -> None:
        """What `python -m deeplab_kernels info` tells about the build."""
        info = {
            "torch": torch_version(torch_dir),
            "python": platform.python_version(),
            "machine": platform.machine(),
            "compiler": output_of(*cxx, "--version").splitlines()[0],
            "cpu_instruction_sets": ["portable"] if portable_only() else list(ISA_FLAGS),
            "cuda": None,
            "cuda_missing_because": cuda_choice()[1],
        }
        if nvcc:
            release = re.search(r"release .*", output_of(nvcc, "--version"))
            info["cuda"] = {
                "nvcc": f"nvcc {release.group()}" if release else "nvcc",
                "architectures": cuda_architectures(nvcc),
            }
        self.build_info_path().write_text(json.dumps(info, indent=2) + "\n")

    def copy_extensions_to_source(self) -> None:
        """In-place and editable builds: the record goes where the libraries go."""
        super().copy_extensions_to_source()
        self.copy_file(str(self.build_info_path()), str(ROOT / "deeplab_kernels"))
        self.remove_stale_cuda(ROOT / "deeplab_kernels")

    def remove_stale_cuda(self, package: Path) -> None:
        """What an earlier build with CUDA left must not be installed with one without."""
        if not any(ext.name.endswith("._C_cuda") for ext in self.extensions):
            (package / "_C_cuda.abi3.so").unlink(missing_ok=True)


def packages() -> dict[str, str]:
    """Package name -> directory. models/ is installed as deeplab_kernels.models."""
    found = {}
    for top, prefix in (("deeplab_kernels", ""), ("models", "deeplab_kernels.")):
        for init in sorted((ROOT / top).rglob("__init__.py")):
            directory = init.parent.relative_to(ROOT)
            found[prefix + ".".join(directory.parts)] = str(directory)
    return found


extensions = [
    Extension("deeplab_kernels._C", cpu_sources(), py_limited_api=True),
    Extension("deeplab_kernels._densecrf", numpy_sources()),
]
if cuda_choice()[0]:
    extensions.append(
        Extension("deeplab_kernels._C_cuda", sources("torch/*_cuda.cpp", "cuda/*.cu"), py_limited_api=True)
    )

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildNative},
    packages=list(packages()),
    package_dir={name: path for name, path in packages().items() if path.startswith("models")},
    # Only where the environment has no usable torch: an isolated build must not download a second one.
    setup_requires=[] if find_torch() else ["torch>=" + ".".join(map(str, OLDEST_TORCH))],
)
