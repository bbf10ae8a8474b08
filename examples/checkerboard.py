"""Draws the checkerboard that a transposed convolution leaves where its stride does not divide its kernel, and what
resizing followed by a convolution leaves: nothing.

python examples/checkerboard.py [checkerboard.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

from deeplab_kernels.demo.checkerboard import figure


def main(output: str = "checkerboard.png") -> None:
    result = figure()
    Path(output).write_bytes(result.png)
    print(f"{output}: {result.caption}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
