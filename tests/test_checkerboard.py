"""The checkerboard of transposed convolutions, which resizing and then convolving does not have."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deeplab_kernels.demo.checkerboard import CASES, panels, pattern_energy

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "checkerboard.py"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_only_the_transposed_convolution_leaves_a_pattern(seed: int) -> None:
    uneven, even, nearest, bilinear = (panel.energy for panel in panels(seed))
    assert uneven > 0.2
    assert even < 0.5 * uneven
    assert max(nearest, bilinear) < 1e-3
    assert bilinear < nearest < even


def test_energy_is_the_share_of_a_periodic_pattern() -> None:
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(48.0), indexing="ij")
    ramp = (x + 2 * y)[None]
    pattern = (x % 2 + y % 2)[None]
    assert pattern_energy(ramp, 2) == pytest.approx(0, abs=1e-9)
    assert pattern_energy(pattern, 2) == pytest.approx(1, rel=1e-3)
    assert pattern_energy(pattern, 4) == pytest.approx(1, rel=1e-3)
    assert pattern_energy(torch.sin(x * 2 * torch.pi / 3)[None], 4) < 0.01
    mixed = ramp / ramp.std() + pattern / pattern.std()
    assert pattern_energy(mixed, 2) == pytest.approx(0.5, rel=0.05)


def test_example_draws_the_panels(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    output = tmp_path / "board.png"
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(output)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    assert all(name in printed for name, _, _ in CASES)
    picture = np.asarray(Image.open(output))
    assert picture.shape[0] == 4 * panels()[0].image.shape[0]
    assert len(np.unique(picture[..., 3])) == 2  # panels and the gaps between them
