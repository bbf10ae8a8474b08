"""The spatial pyramid's benchmark: its check, its contenders, and results that survive a cut; no speed is tested."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import bench_atrous_spatial_pyramid as pyramid  # noqa: E402
import measure  # noqa: E402


def test_spatial_pyramid() -> None:
    """Its check passes, and every contender of the operator and the stage runs."""
    shape = pyramid.Shape(16, 9, (1, 2), 2)
    pyramid.check(shape)
    assert shape.madds == 2 * (81 * (16 * (18 + 3 * 256) + 4 * 256 * 256) + 16 * 256)
    args = pyramid.parse(["--threads", "1", "--cpu-time", "--rounds", "1"])
    records = [
        pyramid.measure_case(shape, what, mode, args, 1e9) for what in ("operator", "stage") for mode in pyramid.MODES
    ]
    lines = pyramid.table(records, "min_ms").splitlines()
    assert len(lines) == 2 + len(records)
    assert [line.count("|") for line in lines] == [len(pyramid.HEAD) + 1] * len(lines)
    with pytest.raises(SystemExit, match="weather"):
        pyramid.chosen(pyramid.parse(["--shapes", "weather"]))


def test_spatial_pyramid_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut run leaves its cases in both files, beside those of earlier runs; the table can be written again."""
    shapes = [pyramid.Shape(16, size, (1, 2), 2) for size in (9, 5)]
    monkeypatch.setattr(pyramid, "SHAPES", shapes)
    monkeypatch.setattr(measure, "use_tuned_allocator", lambda: None)
    monkeypatch.setattr(measure, "matrix_rate", lambda *args, **kwargs: 1e9)
    monkeypatch.setattr(measure, "machine", lambda: {"cpu": "made up", "threads": 1})
    monkeypatch.setenv("DEEPLAB_KERNELS_RESULTS", str(tmp_path))
    options = ["--rounds", "1", "--seconds", "0.01"]
    assert pyramid.main([*options, "--shapes", shapes[1].name]) == 0

    def cut(shape: pyramid.Shape, what: str, *args: object) -> dict[str, Any]:
        if what == "stage":
            raise KeyboardInterrupt
        return whole(shape, what, *args)

    whole = pyramid.measure_case
    monkeypatch.setattr(pyramid, "measure_case", cut)
    with pytest.raises(KeyboardInterrupt):
        pyramid.main([*options, "--quick"])
    page = tmp_path / "atrous_spatial_pyramid.md"
    text = page.read_text()
    assert [line.split(" | ")[:3] for line in text.splitlines()[4:]] == [
        [f"| {shapes[0].name}", "operator", "inference"],
        [f"| {shapes[0].name}", "operator", "training"],
        [f"| {shapes[1].name}", "operator", "inference"],
        [f"| {shapes[1].name}", "operator", "training"],
        [f"| {shapes[1].name}", "stage", "inference"],
        [f"| {shapes[1].name}", "stage", "training"],
    ]
    page.unlink()
    assert pyramid.main(["--table"]) == 0
    assert page.read_text() == text
