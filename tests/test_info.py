"""``info``: complete where everything works, and still of use where something is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from deeplab_kernels import _artefacts, cli, info
from deeplab_kernels.ops import _backends


def test_report_is_complete_and_json():
    report = info.collect()
    assert json.loads(json.dumps(report)) == report
    assert report["versions"]["torch"] == torch.__version__
    assert report["build"]["torch"]
    assert "portable" in report["build"]["cpu_instruction_sets"]
    libraries = {library["name"]: library for library in report["libraries"]}
    assert set(libraries) == {"_C", "_C_cuda", "_densecrf"}
    assert libraries["_C"]["missing_because"] is None
    assert libraries["_densecrf"]["missing_because"] is None
    assert report["operators"]["cpu_instruction_set"] in report["build"]["cpu_instruction_sets"]
    assert set(report["operators"]["serving"]) == set(_backends.OPERATORS)
    for serving in report["operators"]["serving"].values():
        assert set(serving) == {"cpu", "cuda", "other"}
        assert serving["cuda"] in {"cuda", "triton", "reference"}
    assert report["operators"]["pyramid_execution"]["cpu"].startswith("one pass")
    assert report["threads"]["torch"] == torch.get_num_threads()


def test_what_is_missing_has_a_reason():
    report = info.collect()
    cuda = next(library for library in report["libraries"] if library["name"] == "_C_cuda")
    assert (cuda["missing_because"] is None) == ("cuda" not in report["operators"]["missing"])
    if torch.version.cuda is None:
        assert cuda["missing_because"]
        assert report["devices"][-1] == {
            "device": "cuda",
            "missing_because": f"torch {torch.__version__} has no CUDA",
        }


def test_text_names_versions_operators_and_reasons(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    report = info.collect()
    for expected in (torch.__version__, report["build"]["compiler"], *_backends.OPERATORS, "_densecrf"):
        assert expected in text
    for reason in report["operators"]["missing"].values():
        assert reason in text


def test_json_option(capsys):
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["python"] == sys.version.split()[0]


def test_library_that_does_not_load(tmp_path):
    """A copy of the package with a damaged library: info says so and exits with 0; the operators' error is plain."""
    copy = tmp_path / "deeplab_kernels"
    for source in _artefacts.HERE.rglob("*.py"):
        target = copy / source.relative_to(_artefacts.HERE)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text())
    (copy / "_C.abi3.so").write_bytes(b"not a library")
    # -S keeps an editable install's import hook out of the way; torch comes from the path.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    command = [sys.executable, "-S", "-m", "deeplab_kernels", "info"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "does not load with torch" in result.stdout
    assert "no record of the build" in result.stdout
    assert str(copy) in result.stdout
    result = subprocess.run(
        [*command[:2], "-c", "import deeplab_kernels.ops"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=120,
    )
    assert "ImportError" in result.stderr
    assert "needs torch >= 2.10" in result.stderr


def test_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in [n for n in sys.modules if n.startswith(("deeplab_kernels.ops", "deeplab_kernels._library"))]:
        monkeypatch.delitem(sys.modules, name)
    report = info.collect()
    assert "missing_because" in report["operators"]
    assert "torch does not import" in report["devices"][-1]["missing_because"]
    assert "torch does not import" in info.render(report)


@pytest.mark.parametrize(
    "record",
    [
        {},
        {
            "compiler": "g++ 12",
            "torch": "2.13.0",
            "python": "3.11.1",
            "machine": "aarch64",
            "cpu_instruction_sets": ["portable"],
            "cuda_missing_because": "",
            "cuda": {"nvcc": "V13.0", "architectures": ["80", "90"]},
        },
    ],
)
def test_build_record(monkeypatch, record):
    monkeypatch.setattr(_artefacts, "build_info", lambda: record)
    text = info.render(info.collect())
    assert ("sm_80, sm_90 and PTX of the last one (V13.0)" in text) if record else ("no record of the build" in text)
