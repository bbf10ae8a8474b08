"""load_weights: sources of every kind, what does not fit, and what must never be loaded."""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import shlex
import sys
import tarfile
import urllib.error
from email.message import Message
from pathlib import Path

import pytest
import torch
from torch import nn

from deeplab_kernels import cli
from deeplab_kernels.errors import UserError
from deeplab_kernels.models import build, known_weights, list_models, load_weights
from deeplab_kernels.models.crf_stage import with_crf
from deeplab_kernels.models.system import IMAGENET, SYMMETRIC
from deeplab_kernels.models.weights import load, origins, save_weights_file
from deeplab_kernels.nn import DenseCRF

NAME = "deeplabv3plus_small"


def small(num_classes: int = 3) -> nn.Module:
    return build(NAME, num_classes)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return {name: torch.rand_like(value, dtype=torch.float32) for name, value in small().state_dict().items()}


def assert_loaded(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name].to(value.dtype)), name


# What a state_dict may be wrapped in


@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "module.", "checkpoint and module."])
def test_own_state_dicts(wrap, state, tmp_path) -> None:
    content = {f"module.{k}": v for k, v in state.items()} if wrap and "module." in wrap else dict(state)
    if wrap == "checkpoint and module.":
        content = {"state_dict": content, "epoch": 3, "best": 0.5}
    elif wrap in ("state_dict", "model"):
        content = {wrap: content, "epoch": 3}
    path = tmp_path / "w.pth"
    torch.save(content, path)
    for source in (content, path, str(path)):
        model = small()
        report = load_weights(model, source)
        assert report.origin == "deeplab_kernels"
        assert sorted(report.matched) == sorted(state)
        assert (report.missing, report.surplus, report.renamed) == ([], [], {})
        assert model.normalization == SYMMETRIC
        assert_loaded(model, state)


def test_own_weights_file_keeps_normalization_and_epsilons(tmp_path) -> None:
    model = small()
    model.normalization = IMAGENET
    model.backbone.stem[0].norm.eps = 0.25
    save_weights_file(
        tmp_path / "w.pt", model, name=NAME, class_names=["a", "b", "c"], palette=[(0, 0, 0), (1, 1, 1), (2, 2, 2)]
    )
    other = small()
    report = load_weights(other, tmp_path / "w.pt")
    assert report.normalization == other.normalization == IMAGENET
    assert other.backbone.stem[0].norm.eps == 0.25
    assert other.backbone.stem[1].norm.eps == model.backbone.stem[1].norm.eps
    assert_loaded(other, model.state_dict())


def test_safetensors(state, tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    for name in ("w.safetensors", "w.bin"):  # known by its content, too
        safetensors.save_file(state, tmp_path / name)
        model = small()
        load_weights(model, tmp_path / name)
        assert_loaded(model, state)
    whole = (tmp_path / "w.bin").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged safetensors"):
        load_weights(small(), tmp_path / "w.safetensors")


# What does not fit


def test_missing_and_surplus_names_are_listed(state) -> None:
    given = dict(state)
    value = given.pop("aspp.pooling.norm.bias")
    given["aspp.pooling.norm.shift"] = value
    model = small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match=r"missing: aspp\.pooling\.norm\.bias; surplus: aspp\.pooling\.norm\.shift"):
        load_weights(model, given)
    assert_loaded(model, before)
    report = load_weights(model, given, strict=False)
    assert (report.missing, report.surplus) == (["aspp.pooling.norm.bias"], ["aspp.pooling.norm.shift"])
    assert_loaded(model, {**state, "aspp.pooling.norm.bias": before["aspp.pooling.norm.bias"]})


def test_long_lists_are_cut(state) -> None:
    given = {name: value for name, value in state.items() if not name.startswith("backbone.blocks.")}
    lacking = sum(not n.endswith("num_batches_tracked") for n in state) - sum(
        not n.endswith("num_batches_tracked") for n in given
    )
    with pytest.raises(UserError) as caught:
        load_weights(small(), given)
    assert f"and {lacking - 20} more ({lacking})" in str(caught.value)
    assert str(caught.value).count("backbone.blocks.") == 20


def test_another_number_of_classes(state) -> None:
    model = small(5)
    with pytest.raises(UserError, match=r"for 3 classes, the model has 5; .*num_classes=3.*skip_classifier"):
        load_weights(model, state)
    before = model.classifier.weight.detach().clone()
    report = load_weights(model, state, skip_classifier=True)
    assert report.missing == ["classifier.weight", "classifier.bias"]
    assert report.ignored == ["classifier.weight", "classifier.bias"]
    assert torch.equal(model.classifier.weight, before)
    assert torch.equal(model.aspp.project.norm.bias, state["aspp.project.norm.bias"])


@pytest.mark.parametrize("name", ["fcn8s_small", "deeplabv2_aspp_s_small"])
def test_every_layer_of_another_number_of_classes(name) -> None:
    state = build(name, 3).state_dict()
    model = build(name, 5)
    with pytest.raises(UserError, match="for 3 classes, the model has 5"):
        load_weights(model, state)
    report = load_weights(model, state, skip_classifier=True)
    assert report.ignored == report.missing != []
    assert all(3 in state[name].shape for name in report.missing)
    for name in report.matched:
        assert torch.equal(model.state_dict()[name], state[name]), name


@pytest.mark.parametrize("name", list_models())
def test_last_layers_are_known_by_name(name) -> None:
    options = {"auxiliary": True} if name.startswith(("deeplabv3", "fcn_", "pspnet")) else {}
    state, other = (build(name, classes, device="meta", **options).state_dict() for classes in (7, 9))
    assert {n for n in state if load._LAST.fullmatch(n)} == {n for n in state if state[n].shape != other[n].shape}


def test_a_last_layer_that_fits_is_taken(state) -> None:
    report = load_weights(model := small(), state, skip_classifier=None)
    assert report.missing == report.ignored == report.untouched() == []
    assert torch.equal(model.classifier.weight, state["classifier.weight"])
    report = load_weights(small(5), state, skip_classifier=None)
    assert report.missing == report.ignored == ["classifier.weight", "classifier.bias"]
    assert report.untouched() == ["classifier"]
    given = {name: value for name, value in state.items() if not name.startswith("classifier.")}
    assert load_weights(small(), given, skip_classifier=None).untouched() == ["classifier"]
    given = {name: value for name, value in state.items() if name.startswith("backbone.")}
    with pytest.raises(UserError, match="missing"):
        load_weights(small(), given, skip_classifier=None)


def test_a_crf_as_last_stage_stays(state) -> None:
    crf = DenseCRF(3)
    model = with_crf(small(), crf)
    report = load_weights(model, state)
    assert report.missing == []
    assert_loaded(model.model, state)
    assert model.crf is crf
    whole = {**{f"model.{k}": v for k, v in state.items()}, **{f"crf.{k}": v for k, v in crf.state_dict().items()}}
    other = with_crf(small(), DenseCRF(3))
    assert load_weights(other, whole).missing == []
    assert_loaded(other.model, state)


def test_other_shapes_are_named(state) -> None:
    given = {**state, "aspp.project.norm.bias": torch.zeros(7)}
    with pytest.raises(UserError, match=r"aspp\.project\.norm\.bias \(7,\) for aspp\.project\.norm\.bias \(64,\)"):
        load_weights(small(), given, strict=False)


def test_weights_of_nothing_known() -> None:
    with pytest.raises(UserError, match=r"no names of any known library, but encoder\.w"):
        load_weights(small(), {"encoder.w": torch.zeros(3)})
    with pytest.raises(UserError, match="no names of timm"):
        load_weights(small(), {"encoder.w": torch.zeros(3)}, origin="timm")
    with pytest.raises(ValueError, match=r"origin must be one of deeplab_kernels, .*timm.*, got 'caffe'"):
        load_weights(small(), {"encoder.w": torch.zeros(3)}, origin="caffe")
    assert "tensorflow" in origins()


def test_bad_arguments(state) -> None:
    with pytest.raises(ValueError, match="meta device"):
        load_weights(build(NAME, 3, device="meta"), state)
    with pytest.raises(TypeError, match=r"source must be .*, got int"):
        load_weights(small(), 3)
    with pytest.raises(ValueError, match="sha256 must be 8 to 64 hexadecimal digits"):
        load_weights(small(), state, sha256="xyz")


# Files that are none


class _Evil:
    def __reduce__(self):
        return (print, ("code in a checkpoint was run",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>404</html>", "an HTML or XML page"),
        (b"\n <?xml version='1.0'?><Error/>", "an HTML or XML page"),
        (b"", "not a weights file"),
        (b"hello", "not a weights file"),
        (pickle.dumps(_Evil()), "not a weights file"),
        (b"\x1f\x8bnot gzip", "not a .tar.gz, or a damaged one"),
    ],
)
def test_files_that_are_no_checkpoints(content, message, tmp_path, capsys) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_weights(small(), path)
    assert str(path) in str(caught.value)
    assert "was run" not in capsys.readouterr().out


def test_code_in_a_checkpoint_is_refused(state, tmp_path, capsys) -> None:
    torch.save({**state, "x": _Evil()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="never run"):
        load_weights(small(), tmp_path / "w.pth")
    assert "was run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "no state_dict in it, but Tensor"),
        ({}, "no state_dict in it"),
        ({"epoch": 3}, "'epoch' is int, not a tensor"),
        ([1, 2], "no state_dict in it, but list"),
    ],
)
def test_checkpoints_without_weights(content, message, tmp_path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=message):
        load_weights(small(), tmp_path / "w.pth")


def test_truncated_checkpoints(state, tmp_path) -> None:
    torch.save(state, tmp_path / "w.pth")
    whole = (tmp_path / "w.pth").read_bytes()
    for share in (0.1, 0.5, 0.999):
        (tmp_path / "w.pth").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UserError, match="damaged"):
            load_weights(small(), tmp_path / "w.pth")


def test_archives_without_a_checkpoint(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with tarfile.open(tmp_path / "w.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "a.txt", "a.txt")
    for source in (tmp_path / "w.tar.gz", tmp_path):
        with pytest.raises(UserError, match=r"one \.index file, found none"):
            load_weights(small(), source)


def test_missing_libraries_are_named(state, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (tmp_path / "model.ckpt.index").write_bytes(b"")
    with pytest.raises(ImportError, match=r"needs tensorflow; pip install 'deeplab_kernels\[tensorflow\]'"):
        load_weights(small(), tmp_path / "model.ckpt")
    (tmp_path / "w.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(ImportError, match=r"needs safetensors; pip install 'deeplab_kernels\[weights\]'"):
        load_weights(small(), tmp_path / "w.safetensors")


def test_no_such_file_or_name() -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        load_weights(small(), "nothing.pth")
    with pytest.raises(UserError, match=r"no such name; there are .*torchvision/resnet50"):
        load_weights(small(), "torchvision/resnet9000")


# Downloads


class _Site:
    """Answers in urlopen's place with ``files``; counts the requests."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.requests = files, []

    def __call__(self, request):
        self.requests.append(request.full_url)
        if request.full_url not in self.files:
            raise urllib.error.HTTPError(request.full_url, 404, "Not Found", Message(), None)
        body = self.files[request.full_url]
        response = io.BytesIO(body)
        response.info = lambda: Message()
        return response


@pytest.fixture
def site(state, monkeypatch) -> _Site:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    served = _Site({"https://example.org/a/w.pth?x=1": buffer.getvalue()})
    monkeypatch.setattr(torch.hub, "urlopen", served)
    return served


def test_download_is_cached_and_checked(site, state, tmp_path, capfd) -> None:
    (url,) = site.files
    digest = hashlib.sha256(site.files[url]).hexdigest()
    for sha256 in (digest, digest[:8].upper(), None):
        model = small()
        report = load_weights(model, url, cache=tmp_path, sha256=sha256)
        assert report.source == url
        assert_loaded(model, state)
    assert site.requests == [url]
    assert "B/s" in capfd.readouterr().err  # the progress bar
    with pytest.raises(UserError, match=rf"its sha256 is {digest}, expected 00000000"):
        load_weights(small(), url, cache=tmp_path, sha256="00000000")
    with pytest.raises(UserError, match=r"not the one expected .*invalid hash"):
        load_weights(small(), url, cache=tmp_path / "other", sha256="00000000", progress=False)
    assert list((tmp_path / "other").iterdir()) == []
    assert capfd.readouterr().err == ""


def test_sha256_of_a_file(state, tmp_path) -> None:
    torch.save(state, tmp_path / "w.pth")
    digest = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    load_weights(small(), tmp_path / "w.pth", sha256=digest)
    with pytest.raises(UserError, match="expected 12345678"):
        load_weights(small(), tmp_path / "w.pth", sha256="12345678")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://example.org/none.pth", "the download failed .*404"),
        ("http://example.org/a/w.pth", "only https"),
        ("ftp://example.org/a/w.pth", "only https"),
        ("file:///etc/passwd", "only https"),
        ("https://", "only https"),
    ],
)
def test_bad_urls(url, message, site, tmp_path) -> None:
    with pytest.raises(UserError, match=message):
        load_weights(small(), url, cache=tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_names(site, monkeypatch, tmp_path) -> None:
    known = known_weights()
    for name, entry in known.items():
        assert entry.url.startswith("https://"), name
        assert entry.sha256 is None or len(entry.sha256) >= 8, name
        assert bool(entry.sha256) == name.startswith("torchvision/"), name
    (body,) = site.files.values()
    url = known["torchvision/resnet50"].url
    site.files[url] = body
    with pytest.raises(UserError, match="not the one expected"):  # the checksum of the table
        load_weights(small(), "torchvision/resnet50", cache=tmp_path, progress=False)
    site.files["https://huggingface.co/someone/net/resolve/main/model.safetensors"] = b"<html>"
    with pytest.raises(UserError, match="hf/someone/net: an HTML"):
        load_weights(small(), "hf/someone/net", cache=tmp_path, progress=False)
    assert site.requests[-1] == "https://huggingface.co/someone/net/resolve/main/model.safetensors"


def test_known_urls_are_those_of_the_libraries() -> None:
    from _peers import peer

    torchvision = peer("torchvision")
    theirs = {
        weights.url
        for enum in map(torchvision.models.get_model_weights, torchvision.models.list_models())
        for weights in enum
    }
    ours = {entry.url for name, entry in known_weights().items() if name.startswith("torchvision/")}
    assert ours <= theirs
    timm = peer("timm")
    pretrained = set(timm.list_pretrained())
    assert {n.removeprefix("timm/") for n in known_weights() if n.startswith("timm/")} <= pretrained


def test_the_page_s_table_names_models_that_exist() -> None:
    text = (Path(__file__).parent.parent / "docs" / "weights.md").read_text(encoding="utf-8")
    for name in ("deeplabv3_mobilenetv2", "deeplabv3plus_xception65", "unet_resnet50", "pspnet_resnet50"):
        assert name in list_models()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code) == 1
    assert "torchvision/deeplabv3_resnet101" in known_weights()
    for line in re.findall(r"^python -m deeplab_kernels (.*)$", text, re.MULTILINE):
        arguments = cli.build_parser().parse_args(shlex.split(line, comments=True))
        assert arguments.command in ("convert", "segment")
