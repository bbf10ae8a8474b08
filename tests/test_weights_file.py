"""The package's own weights file: what it keeps, damaged ones, and interrupted writing."""

from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from deeplab_kernels.errors import UserError
from deeplab_kernels.models import build
from deeplab_kernels.models.data import CLASS_NAMES, PALETTE
from deeplab_kernels.models.system import IMAGENET, SYMMETRIC, Normalization
from deeplab_kernels.models.weights import build_from_file, read_weights_file, save_weights_file

NAME = "deeplabv3plus_small"
CLASSES = {"name": NAME, "class_names": CLASS_NAMES, "palette": PALETTE}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    model = build(NAME, num_classes=7)
    model.normalization = IMAGENET
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    save_weights_file(path, model, **CLASSES, options={"output_stride": 8}, notes={"steps": 0})
    return str(path)


def test_round_trip(weights):
    model, content = build_from_file(weights)
    assert (content["notes"], content["class_names"]) == ({"steps": 0}, list(CLASS_NAMES))
    assert (model.num_classes, model.output_stride) == (7, 8)
    assert model.normalization == content["normalization"] == IMAGENET
    for name, value in torch.load(weights, weights_only=True)["state_dict"].items():
        assert torch.equal(model.state_dict()[name], value), name


def test_files_without_normalization_are_symmetric(weights, tmp_path):
    content = torch.load(weights, weights_only=True)
    del content["normalization"]
    torch.save(content, tmp_path / "old.pt")
    assert read_weights_file(tmp_path / "old.pt")["normalization"] == SYMMETRIC
    assert build_from_file(tmp_path / "old.pt")[0].normalization == SYMMETRIC


def test_own_normalization_is_kept(tmp_path):
    model = build(NAME, num_classes=7)
    model.normalization = Normalization((0, 0.1, 0.2), (1, 2, 3))
    save_weights_file(tmp_path / "w.pt", model, **CLASSES)
    assert read_weights_file(tmp_path / "w.pt")["normalization"] == model.normalization


class _Evil:
    def __reduce__(self):
        return (print, ("code in a weights file was run",))


def _bad_weights(kind: str, good: str, path) -> None:
    if kind == "code":
        torch.save({"format": "deeplab_kernels weights", "x": _Evil()}, path)
    elif kind == "bare pickle with code":
        path.write_bytes(pickle.dumps(_Evil()))
    elif kind == "text":
        path.write_text("hello")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        data = Path(good).read_bytes()
        path.write_bytes(data[: len(data) // 2])
    elif kind == "other zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "a")
    elif kind == "plain state_dict":
        torch.save(build(NAME, num_classes=7, device="meta").state_dict(), path)
    elif kind == "a tensor":
        torch.save(torch.zeros(3), path)
    else:
        content = torch.load(good, weights_only=True)
        changes = {
            "unknown model": {"model": "deeplabv9"},
            "other classes": {"class_names": ["a", "b"], "palette": [[0, 0, 0], [1, 1, 1]]},
            "bad palette": {"palette": [[0, 0, 300]] * 7},
            "newer": {"version": 99},
            "bad option": {"options": {"wings": 2}},
            "bad normalization": {"normalization": {"mean": [0, 0, 0], "std": [1, 0, 1]}},
        }
        torch.save({**content, **changes[kind]}, path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("code", "never run"),
        ("bare pickle with code", "not a weights file"),
        ("text", "not a weights file"),
        ("empty", "not a weights file"),
        ("truncated", "not a weights file|damaged"),
        ("other zip", "not a weights file|damaged"),
        ("plain state_dict", "not a weights file of this package"),
        ("a tensor", "not a weights file of this package"),
        ("unknown model", "do not fit deeplabv9"),
        ("other classes", "do not fit"),
        ("bad palette", "palette"),
        ("newer", "version 99"),
        ("bad option", "no option 'wings'"),
        ("bad normalization", "normalization is wrong .*std must be positive"),
    ],
)
def test_bad_weights_files(kind, message, weights, tmp_path, capsys):
    path = tmp_path / "w.pt"
    _bad_weights(kind, weights, path)
    warnings.simplefilter("error")  # nothing but the error is to be seen; pytest puts the filters back
    with pytest.raises(UserError, match=message) as caught:
        build_from_file(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "was run" not in capsys.readouterr().out


def test_interrupted_writing_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "w.pt"
    target.write_bytes(b"old")
    for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):

        def save(_content, file, error=error):
            file.write(b"half")
            raise error

        monkeypatch.setattr(torch, "save", save)
        with pytest.raises(type(error)):
            save_weights_file(target, nn.Conv2d(1, 1, 1), **CLASSES)
        assert [p.name for p in tmp_path.iterdir()] == ["w.pt"]
        assert target.read_bytes() == b"old"


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files through the operating system")
def test_full_disk_is_an_os_error_and_leaves_the_old_file(tmp_path):
    target = tmp_path / "w.pt"
    target.write_bytes(b"old")
    program = """
        import resource, signal, sys
        from torch import nn
        from deeplab_kernels.models.weights import save_weights_file
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            save_weights_file(sys.argv[1], nn.Linear(100, 100), name="x", class_names=["a"], palette=[(0, 0, 0)])
        except OSError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(target)], capture_output=True, text=True, check=True
    )
    assert "File too large" in done.stdout
    assert str(target) in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["w.pt"]
    assert target.read_bytes() == b"old"
