"""Where the compiled libraries lie and what setup.py recorded about them. Imports no torch."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def find_library(name: str) -> Path | None:
    """The compiled library ``name`` ("_C", "_C_cuda", "_densecrf") that this Python can load."""
    suffixes = (".abi3.so", sysconfig.get_config_var("EXT_SUFFIX") or ".so", ".so")
    return next((path for suffix in suffixes if (path := HERE / f"{name}{suffix}").exists()), None)


def build_info() -> dict[str, Any]:
    """What setup.py recorded when the package was built; empty if it was not."""
    path = HERE / "_build_info.json"
    return json.loads(path.read_text()) if path.exists() else {}


def no_record_hint() -> str:
    """Why `build_info` is empty."""
    if find_library("_C") is None:
        return not_built_hint()
    return "the libraries are there, but _build_info.json beside them is missing: reinstall to write it"


def not_built_hint() -> str:
    """What to do where a compiled library is missing."""
    if (HERE.parent / "setup.py").exists():
        return (
            f"this is the source tree ({HERE.parent}), which hides an installed package when Python runs from here: "
            "use `pip install -e .`, or run from another directory"
        )
    return "reinstall it with `pip install .`"
