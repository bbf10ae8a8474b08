"""Writes densecrf.npz: what pydensecrf gives for the models of ../densecrf_cases.py. It has to be installed:

    pip install pydensecrf2==1.1        # a fork that builds; the modules are pydensecrf's
    python tests/data/record_densecrf.py

Probabilities are kept as 16-bit fractions: 8e-6 from what they were.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pydensecrf.densecrf as dcrf

FILE = Path(__file__).parent / "densecrf.npz"
sys.path.insert(0, str(Path(__file__).parent.parent))

from densecrf_cases import cases  # noqa: E402


def main() -> None:
    recorded = {}
    for name, case in cases().items():
        for key, values in case(dcrf).items():
            probabilities = key != "kl"
            recorded[f"{name}|{key}"] = np.round(values * 65535).astype(np.uint16) if probabilities else values
    np.savez_compressed(FILE, **recorded)
    print(f"{len(recorded)} arrays, {FILE.stat().st_size / 1e3:.0f} kB: {FILE}")


if __name__ == "__main__":
    main()
