"""Where weights come from: names, URLs, files of several kinds, state_dicts. All become tensors by name."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import tempfile
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deeplab_kernels.errors import UserError

from ..system import Normalization
from .file import check_weights_file, is_weights_file, read_pickle

_NESTED = ("state_dict", "model_state_dict", "model", "model_state", "net", "ema_state_dict")


class Known(NamedTuple):
    """sha256: of the file, or its beginning as the publisher writes it into the file's name; None where none is
    published. classes: of the last layer: "voc", "cityscapes", "ade20k", or "" for weights of a backbone."""

    url: str
    sha256: str | None
    classes: str = ""


def _torchvision(name: str, classes: str = "") -> Known:
    # torchvision writes the first digits of the checksum into the name.
    return Known(f"https://download.pytorch.org/models/{name}.pth", name.rpartition("-")[2], classes)


def _timm(name: str) -> Known:
    return Known(f"https://huggingface.co/timm/{name}/resolve/main/model.safetensors", None)


def _tensorflow(name: str, classes: str = "") -> Known:
    return Known(f"https://download.tensorflow.org/models/{name}.tar.gz", None, classes)


KNOWN: dict[str, Known] = {
    "torchvision/deeplabv3_resnet50": _torchvision("deeplabv3_resnet50_coco-cd0a2569", "voc"),
    "torchvision/deeplabv3_resnet101": _torchvision("deeplabv3_resnet101_coco-586e9e4e", "voc"),
    "torchvision/fcn_resnet50": _torchvision("fcn_resnet50_coco-1167a1af", "voc"),
    "torchvision/fcn_resnet101": _torchvision("fcn_resnet101_coco-7ecb50ca", "voc"),
    "torchvision/resnet50.v1": _torchvision("resnet50-0676ba61"),
    "torchvision/resnet50": _torchvision("resnet50-11ad3fa6"),
    "torchvision/resnet101.v1": _torchvision("resnet101-63fe2227"),
    "torchvision/resnet101": _torchvision("resnet101-cd907fc2"),
    "torchvision/vgg16": _torchvision("vgg16-397923af"),
    "torchvision/mobilenet_v2.v1": _torchvision("mobilenet_v2-b0353104"),
    "torchvision/mobilenet_v2": _torchvision("mobilenet_v2-7ebf99e0"),
    **{
        f"timm/{name}": _timm(name)
        for name in (
            "xception41.tf_in1k",
            "xception65.tf_in1k",
            "xception65.ra3_in1k",
            "xception71.tf_in1k",
            "resnet50.a1_in1k",
            "resnet50.tv_in1k",
            "resnet101.a1_in1k",
            "resnet101.tv_in1k",
            "mobilenetv2_100.ra_in1k",
        )
    },
    "hf/google/deeplabv3_mobilenet_v2_1.0_513": Known(
        "https://huggingface.co/google/deeplabv3_mobilenet_v2_1.0_513/resolve/main/pytorch_model.bin", None, "voc"
    ),
    "tf/xception65_coco_voc_trainaug": _tensorflow("deeplabv3_pascal_train_aug_2018_01_04", "voc"),
    "tf/xception65_coco_voc_trainval": _tensorflow("deeplabv3_pascal_trainval_2018_01_04", "voc"),
    "tf/xception65_cityscapes_trainfine": _tensorflow("deeplabv3_cityscapes_train_2018_02_06", "cityscapes"),
    "tf/xception65_ade20k_train": _tensorflow("deeplabv3_xception_ade20k_train_2018_05_29", "ade20k"),
    "tf/mobilenetv2_coco_voc_trainaug": _tensorflow("deeplabv3_mnv2_pascal_train_aug_2018_01_29", "voc"),
    "tf/mobilenetv2_coco_voc_trainval": _tensorflow("deeplabv3_mnv2_pascal_trainval_2018_01_29", "voc"),
    "tf/mobilenetv2_coco_cityscapes_trainfine": _tensorflow("deeplabv3_mnv2_cityscapes_train_2018_02_05", "cityscapes"),
    "tf/xception41_imagenet": _tensorflow("xception_41_2018_05_09"),
    "tf/xception65_imagenet": _tensorflow("deeplabv3_xception_2018_01_04"),
    "tf/xception71_imagenet": _tensorflow("xception_71_2018_05_09"),
    "tf/resnet50_beta_imagenet": _tensorflow("resnet_v1_50_2018_05_04"),
    "tf/resnet101_beta_imagenet": _tensorflow("resnet_v1_101_2018_05_04"),
}


@dataclass
class Loaded:
    """Tensors by name, on the CPU, as the file has them.

    where: for messages. own: it was written by this package. content: what else the package's own file holds.
    """

    where: str
    state: dict[str, Tensor]
    own: bool = False
    content: dict[str, Any] | None = None

    @property
    def normalization(self) -> Normalization | None:
        return self.content["normalization"] if self.content else None

    @property
    def norm_eps(self) -> dict[str, float]:
        return self.content["norm_eps"] if self.content else {}


def known_weights() -> dict[str, Known]:
    """The names that ``load_weights`` takes, with URL, checksum and classes. Also allowed:
    "hf/OWNER/REPOSITORY" and "timm/NAME" for any other repository that has a model.safetensors."""
    return dict(KNOWN)


def read_source(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
    sha256: str | None = None,
) -> Loaded:
    """See :func:`deeplab_kernels.models.load_weights`."""
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{8,64}", sha256):
        raise ValueError(f"sha256 must be 8 to 64 hexadecimal digits, got {sha256!r}")
    if isinstance(source, Mapping):
        return _state_of(dict(source), "the state_dict")
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source must be a name, path, URL or state_dict, got {type(source).__name__}")
    text = os.fspath(source)
    path = Path(text)
    if not _exists(path):
        known = KNOWN.get(text) or _on_the_hub(text)
        if known is not None:
            return read_file(download(known.url, cache, progress, sha256 or known.sha256), text)
        if re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE):
            return read_file(download(text, cache, progress, sha256), text)
        if re.match(r"(torchvision|timm|hf|tf)/", text):
            raise UserError(f"{text}: no such file, and no such name; there are {', '.join(KNOWN)}")
        raise FileNotFoundError(2, "No such file or directory", text)
    if sha256 is not None:
        _check_sum(path, sha256)
    return read_file(path, text)


def _exists(path: Path) -> bool:
    return path.exists() or path.with_name(path.name + ".index").exists()


def _on_the_hub(name: str) -> Known | None:
    match = re.fullmatch(r"hf/([\w.-]+/[\w.-]+)|(timm/[\w.-]+\.[\w.-]+)", name)
    if match is None:
        return None
    return Known(f"https://huggingface.co/{match[1] or match[2]}/resolve/main/model.safetensors", None)


def download(url: str, cache: str | os.PathLike[str] | None, progress: bool, sha256: str | None) -> Path:
    """The file behind ``url`` in the cache, downloaded unless it is there. A file is complete or absent.

    torch.hub does the work: it is there wherever torch is, shows a progress bar, checks the sum and renames last.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme.lower() != "https" or not parts.netloc:
        raise UserError(f"{url}: only https URLs are downloaded")
    folder = Path(cache) if cache is not None else Path(torch.hub.get_dir()) / "checkpoints" / "deeplab_kernels"
    # Many repositories call their file model.safetensors.
    stem = re.sub(r"[^\w.-]+", "_", parts.path.strip("/"))[-100:]
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{stem}"
    if path.exists():
        if sha256 is not None:
            _check_sum(path, sha256)
        return path
    folder.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), sha256.lower() if sha256 else None, progress)
    except (OSError, ValueError) as error:
        raise UserError(f"{url}: the download failed ({error})") from None
    except RuntimeError as error:
        raise UserError(f"{url}: the downloaded file is not the one expected ({error})") from None
    return path


def _check_sum(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise ValueError(f"sha256 is for a file, and {path} is none")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)
    if not digest.startswith(sha256.lower()):
        raise UserError(f"{path}: its sha256 is {digest}, expected {sha256}")


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def read_file(path: Path, where: str) -> Loaded:
    """What a file of any known kind holds."""
    if path.with_name(path.name + ".index").is_file():
        return Loaded(where, read_tensorflow(path, where))
    if path.is_dir():
        return Loaded(where, read_tensorflow(_prefix_in(path, where), where))
    with path.open("rb") as file:
        head = file.read(512)
    if head[:2] == b"\x1f\x8b":
        return Loaded(where, _read_archive(path, where))
    if head.lstrip()[:1] == b"<":
        raise UserError(f"{where}: an HTML or XML page, not a weights file; the download probably went wrong")
    if path.suffix == ".safetensors" or _looks_like_safetensors(head):
        return Loaded(where, _read_safetensors(path, where))
    if path.suffix == ".index":
        return read_file(path.with_suffix(""), where)
    content = read_pickle(path)
    if is_weights_file(content):
        checked = check_weights_file(content, where)
        return Loaded(where, checked["state_dict"], own=True, content=checked)
    return _state_of(content, where)


def _state_of(content: Any, where: str) -> Loaded:
    """The tensors of what torch.save wrote: a state_dict, or one inside a checkpoint."""
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{where}: no state_dict in it, but {type(content).__name__}")
    others = [key for key, value in content.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if others:
        raise UserError(
            f"{where}: not a state_dict: {others[0]!r} is {type(content[others[0]]).__name__}, not a tensor"
        )
    for prefix in ("module.", "model."):  # of DistributedDataParallel and Lightning
        if all(name.startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): value for name, value in content.items()}
    return Loaded(where, dict(content))


def _looks_like_safetensors(head: bytes) -> bool:
    return len(head) > 9 and head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") < 1 << 27


def _read_safetensors(path: Path, where: str) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ImportError(f"{where}: reading it needs safetensors; pip install 'deeplab_kernels[weights]'") from None
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{where}: a damaged safetensors file ({error})") from None


def _read_archive(path: Path, where: str) -> dict[str, Tensor]:
    """The checkpoint inside an official .tar.gz."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with tarfile.open(path) as archive:
                for member in archive:
                    if member.isfile() and re.search(r"\.(index|data-\d+-of-\d+)$", member.name):
                        member.name = Path(member.name).name  # whatever folders it names, it lands in this one
                        archive.extract(member, folder, filter="data")
        except (tarfile.TarError, EOFError, OSError) as error:
            raise UserError(f"{where}: not a .tar.gz, or a damaged one ({error})") from None
        return read_tensorflow(_prefix_in(Path(folder), where), where)


def _prefix_in(folder: Path, where: str) -> Path:
    found = sorted(folder.glob("*.index"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(f"{where}: a TensorFlow checkpoint has one .index file, found {names}")
    return found[0].with_suffix("")


def read_tensorflow(prefix: Path, where: str) -> dict[str, Tensor]:
    """The floating-point variables of a checkpoint, in TensorFlow's names and layouts."""
    try:
        import tensorflow  # after Triton, which importing this package loads: the other order crashes
    except ImportError:
        raise ImportError(
            f"{where}: reading a TensorFlow checkpoint needs tensorflow; pip install 'deeplab_kernels[tensorflow]'"
        ) from None
    try:
        reader = tensorflow.train.load_checkpoint(str(prefix))
        types = reader.get_variable_to_dtype_map()
        names = sorted(name for name, kind in types.items() if kind.is_floating)
        return {name: torch.from_numpy(reader.get_tensor(name)) for name in names}
    except (tensorflow.errors.OpError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: not a TensorFlow checkpoint, or a damaged one ({reason[:160]})") from None
