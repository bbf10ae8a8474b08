"""The dense CRF's benchmarks compare the right things, refuse wrong results and judge by the right arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("skimage", reason="the benchmarks' photographs come with scikit-image")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import bench_dense_crf as bench  # noqa: E402
import crf_accuracy  # noqa: E402
import crf_inputs  # noqa: E402

import deeplab_kernels.densecrf as dcrf  # noqa: E402

TINY = bench.Case(13, 17, 3, (10, 20, 13), (3, 3), iterations=3)


def record(ours: float, one: float, theirs: float, memory: tuple[float, float], **bars: float) -> dict[str, Any]:
    times = {"ours, 4 threads": ours, "ours, 1 thread": one, "pydensecrf": theirs}
    return {
        "name": "made up",
        "case": {"faster": None, "faster_with_one": None, "memory_share": None, **bars},
        "timings": {name: {"median_ms": ms, "iqr_ms": 0.1 * ms} for name, ms in times.items()},
        "memory": {
            name: {"above_inputs_bytes": 1e6 * mb, "peak_bytes": 2e6 * mb}
            for name, mb in zip(("ours", "pydensecrf"), memory, strict=True)
        },
    }


def test_bars() -> None:
    assert bench.ratios(record(2, 5, 20, (3, 12))) == {"faster": 10, "faster_with_one": 4, "memory_share": 0.25}
    assert bench.failures(record(2, 5, 20, (3, 12), faster=10, faster_with_one=4, memory_share=0.25)) == []
    missed = bench.failures(record(2, 5, 20, (3, 12), faster=10.1, faster_with_one=4.1, memory_share=0.2))
    assert [line.split(",")[0] for line in missed] == ["faster 10.00", "faster with one 4.00", "memory share 0.25"]
    (row,) = bench.rows([record(2, 5, 20, (3, 12), faster=10)])
    assert (row["x, all"], row["x, one"], row["one thread: spread"], row["bars"]) == ("10.0", "4.0", "10 %", "met")


@pytest.mark.parametrize("damage", [2e-3, np.nan])
def test_a_wrong_result_is_not_timed(damage: float) -> None:
    q = np.random.default_rng(0).dirichlet(np.ones(3), 50).T.astype(np.float32)
    assert bench.check("right", q, q.copy())["other_labels"] == 0
    wrong = q.copy()
    wrong[0, 7] += damage
    with pytest.raises(bench.CheckFailed, match="wrong: Q differs"):
        bench.check("wrong", wrong, q)


def test_measure_a_tiny_case() -> None:
    found = bench.measure(TINY, threads=2, rounds=2, seconds=1)
    json.dumps(found)
    expected = {"ours, 2 threads", "ours, 1 thread"}
    memory = {"ours"}
    if crf_inputs.pydensecrf():
        expected, memory = {*expected, "pydensecrf"}, {*memory, "pydensecrf"}
        assert found["check"]["largest_difference"] <= 1e-3
    assert set(found["timings"]) == expected
    assert set(found["memory"]) == memory
    results = {"machine": {"cpu": "made up"}, "monai": found["monai"], "records": [found]}
    assert "13x17x3 20/13 + 3" in bench.document(results)


@pytest.mark.parametrize("works", [True, False])
def test_monai_takes_part_where_its_extension_is(works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that stands for MONAI: what its CRF is given, and what becomes of one that fails."""
    import torch

    given: dict[str, Any] = {}

    class CRF:
        def __init__(self, **parameters: float) -> None:
            given.update(parameters)

        def __call__(self, logits: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
            if not works:
                raise RuntimeError("not compiled for 3 labels")
            assert (logits.shape, guide.shape) == ((1, 3, 13, 17), (1, 3, 13, 17))
            return logits.softmax(1)

    for name in ("monai", "monai._C", "monai.networks", "monai.networks.blocks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["monai"].__version__ = "0"
    sys.modules["monai.networks.blocks"].CRF = CRF
    found = bench.measure(TINY, threads=1, rounds=1, seconds=1, memory=False)
    assert given == {
        "bilateral_weight": 10, "gaussian_weight": 3, "bilateral_spatial_sigma": 20, "bilateral_color_sigma": 13,
        "gaussian_spatial_sigma": 3, "iterations": 3,
    }  # fmt: skip
    assert ("MONAI" in found["timings"]) == works
    assert found["monai"] == ("" if works else "fails on 13x17x3 20/13 + 3: RuntimeError: not compiled for 3 labels")
    assert ("MONAI" in bench.rows([found])[0]) == works


def test_commands_as_scripts(tmp_path: Path) -> None:
    for name in ("bench_dense_crf.py", "crf_accuracy.py"):
        command = [sys.executable, str(BENCHMARKS / name), "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, timeout=100)
        assert "--quick" in done.stdout


def test_the_filter_behind_a_step() -> None:
    """What crf_accuracy reads off a step of inference is the filter: its errors shrink with a kernel the lattice is
    good at, and a kernel so narrow that it reaches nobody changes nothing."""
    values = np.random.default_rng(0).random((2, 200)).astype(np.float32)
    apart = np.arange(200, dtype=np.float32)[None] * 50
    np.testing.assert_allclose(crf_accuracy.lattice_filter(dcrf, values, apart), values, atol=1e-4)
    np.testing.assert_allclose(crf_accuracy.exact_filter(values, apart), values, atol=1e-5)
    smooth = np.sin(np.arange(200) / 40)[None].astype(np.float32) / 2 + 0.5
    line = np.arange(200, dtype=np.float32)[None] / 5
    error = crf_accuracy.lattice_filter(dcrf, smooth, line) - crf_accuracy.exact_filter(smooth, line)
    assert np.abs(error).max() < 0.02


def test_accuracy_of_a_small_photograph() -> None:
    image = crf_inputs.photograph("coffee", 16, 20)
    errors = crf_accuracy.compare(image, 20, 13, {"ours": dcrf})["ours"]
    assert 1e-3 < errors["relative_l2"] < 0.3
    assert errors["labels"] < 0.3
    entry = {"photograph": "coffee", "sxy": 20, "srgb": 13, "height": 16, "width": 20, "ours": errors}
    better = {key: value / 2 for key, value in errors.items()}
    assert crf_accuracy.worse({**entry, "pydensecrf": errors}) == []
    assert len(crf_accuracy.worse({**entry, "pydensecrf": better})) >= 3
    page = crf_accuracy.document({"commit": "0", "date": "today", "height": 16, "width": 20, "records": [entry]})
    assert "| coffee | 20/13 |" in page
