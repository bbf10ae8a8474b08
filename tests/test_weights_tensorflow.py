"""The official TensorFlow checkpoints: every name of theirs finds its place, every layout is turned, and files are read
(with tensorflow, where it is installed)."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from _peers import peer
from torch import nn

from deeplab_kernels.errors import UserError
from deeplab_kernels.models import build, load_weights
from deeplab_kernels.models.system import SYMMETRIC
from deeplab_kernels.models.weights.file import norm_eps

TABLE = Path(__file__).parent / "data" / "tensorflow_deeplab_layers.txt"
NORM = ("gamma", "beta", "moving_mean", "moving_variance")


def layers(title: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """(scope, kind, shape of the weights) of the checkpoint ``title``."""
    section = TABLE.read_text().split(f"# {title}\n")[1].split("\n# ")[0]
    rows = [line.split() for line in section.splitlines()]
    return [(scope, kind, tuple(map(int, shape.split(",")))) for scope, kind, shape in rows]


def variables(title: str, scale: float = 0.1) -> dict[str, np.ndarray]:
    """Random values of every variable of the checkpoint ``title``; positive variances."""
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {}
    for scope, kind, shape in layers(title):
        shapes[f"{scope}/{'depthwise_weights' if kind == 'depthwise' else 'weights'}"] = shape
        outputs = shape[2] * shape[3] if kind == "depthwise" else shape[3]
        names = ("biases",) if kind == "conv+bias" else tuple(f"BatchNorm/{leaf}" for leaf in NORM)
        shapes.update({f"{scope}/{name}": (outputs,) for name in names})
    values = {name: scale * random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return {name: abs(v) + 0.5 if name.endswith("moving_variance") else v for name, v in values.items()}


def as_state(values: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in values.items()}


def empty(name: str, **options: object) -> nn.Module:
    model = build(name, device="meta", **options).to_empty(device="cpu").eval()
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    return model


def test_xception_65_with_all_heads() -> None:
    values = variables("xception_65 v3+ voc")
    extra = {
        "global_step": np.float32([90000]),
        "aspp0/weights/Momentum": np.zeros((1, 1, 2048, 256), np.float32),
        "logits/semantic/biases/ExponentialMovingAverage": np.full(21, 7, np.float32),
    }
    model = empty("deeplabv3plus_xception65", num_classes=21, multi_grid=(1, 1, 1))
    report = load_weights(model, as_state({**values, **extra}))
    assert (report.origin, report.network) == ("tensorflow", "DeepLab v3+ with Xception-65")
    assert (report.missing, report.surplus, report.ignored, report.matched) == ([], [], [], [])
    assert len(report.renamed) == len(values)
    assert report.normalization == model.normalization == SYMMETRIC
    state = model.state_dict()
    entry, middle = "xception_65/entry_flow", "xception_65/middle_flow/block1/unit_16/xception_module"
    for ours, theirs in {
        "backbone.stem.1.conv.weight": f"{entry}/conv1_2/weights",
        "backbone.blocks.2.shortcut.conv.weight": f"{entry}/block3/unit_1/xception_module/shortcut/weights",
        "backbone.blocks.18.convs.1.pointwise.weight": f"{middle}/separable_conv2_pointwise/weights",
        "aspp.project.conv.weight": "concat_projection/weights",
        "decoder.reduce.conv.weight": "decoder/feature_projection0/weights",
        "decoder.convs.1.pointwise.weight": "decoder/decoder_conv1_pointwise/weights",
        "classifier.weight": "logits/semantic/weights",
    }.items():
        weight = state[ours].numpy()
        assert report.renamed[ours] == theirs
        for index in ((0, 1, 0, 0), (3, 2, -1, -1), (-1, -1, 0, -1)):
            o, i, h, w = index
            assert weight[index] == values[theirs][h, w, i, o]
    theirs = "xception_65/exit_flow/block2/unit_1/xception_module/separable_conv3_depthwise"
    weight = state["backbone.blocks.20.convs.2.depthwise.weight"].numpy()
    assert weight.shape == (1536, 1, 3, 3)
    assert weight[7, 0, 0, 2] == values[f"{theirs}/depthwise_weights"][0, 2, 7, 0]
    for ours, leaf in zip(("weight", "bias", "running_mean", "running_var"), NORM, strict=True):
        norm = state[f"backbone.blocks.20.convs.2.depthwise_norm.{ours}"].numpy()
        assert np.array_equal(norm, values[f"{theirs}/BatchNorm/{leaf}"])
    assert report.differences == []
    assert (state["classifier.bias"] == 7).all()  # the moving average is what the authors evaluate
    norms = norm_eps(model)
    assert {eps for name, eps in norms.items() if name.startswith("backbone.")} == {1e-3}
    assert {eps for name, eps in norms.items() if not name.startswith("backbone.")} == {1e-5}
    with torch.no_grad():
        assert model(torch.randn(1, 3, 33, 33)).isfinite().all()


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("xception_41 imagenet", "deeplabv3plus_xception41"),
        ("xception_71 imagenet", "deeplabv3plus_xception71"),
        ("resnet_v1_50 imagenet", "deeplabv3plus_resnet50"),
    ],
)
def test_backbones(title: str, name: str) -> None:
    values = variables(title)
    model = empty(name, **({"variant": "official"} if "resnet" in name else {}))
    report = load_weights(model, as_state(values))
    scope = title.split()[0]
    assert report.ignored == [f"{scope}/logits/weights", f"{scope}/logits/biases"]
    assert report.surplus == []
    assert {name.partition(".")[0] for name in report.missing} == {"aspp", "decoder", "classifier"}
    assert len(report.renamed) == len(values) - 2
    assert all(value.isfinite().all() for value in model.backbone.state_dict().values())


def test_resnet_beta_is_wired_as_slim_s() -> None:
    values = variables("resnet_v1_50 imagenet")
    model = empty("deeplabv3_resnet50", variant="official")
    report = load_weights(model, as_state(values))
    for ours, theirs in {
        "conv1.0.weight": "conv1_1/weights",
        "conv1.3.weight": "conv1_2/weights",
        "conv1.6.weight": "conv1_3/weights",
        "conv1.4.running_var": "conv1_2/BatchNorm/moving_variance",
        "bn1.bias": "conv1_3/BatchNorm/beta",
        "layer1.0.downsample.1.weight": "block1/unit_1/bottleneck_v1/shortcut/BatchNorm/gamma",
        "layer3.5.conv2.weight": "block3/unit_6/bottleneck_v1/conv2/weights",
        "layer4.2.bn3.running_mean": "block4/unit_3/bottleneck_v1/conv3/BatchNorm/moving_mean",
    }.items():
        assert report.renamed[f"backbone.{ours}"] == f"resnet_v1_50/{theirs}"
    # 0..255 less the mean, not divided.
    red = model.normalization.apply(torch.full((3, 1, 1), 200.0))[0].item()
    assert red == pytest.approx(200 - 123.15, abs=1e-4)


def test_mobilenetv2_as_transformers_maps_it() -> None:
    # transformers has its own map from the official names to its modules; ours from there is tested by outputs.
    transformers = peer("transformers")
    from transformers.models.mobilenet_v2 import modeling_mobilenet_v2

    values = variables("mobilenet_v2 v3 voc")
    config = transformers.MobileNetV2Config(num_labels=21)
    theirs = transformers.MobileNetV2ForSemanticSegmentation(config)
    places = modeling_mobilenet_v2._build_tf_to_pytorch_map(theirs, config, values)
    assert set(values) <= set(places)
    with torch.no_grad():
        for name, value in values.items():
            order = (2, 3, 0, 1) if "depthwise_weights" in name else (3, 2, 0, 1)
            places[name].copy_(torch.from_numpy(value.transpose(order) if value.ndim == 4 else value))
    direct, through = (empty("deeplabv3_mobilenetv2", num_classes=21, variant="official") for _ in range(2))
    report = load_weights(direct, as_state(values))
    assert (report.network, report.missing, report.surplus) == ("DeepLab v3 with MobileNetV2", [], [])
    load_weights(through, theirs.state_dict())
    assert direct.normalization == through.normalization
    for name, value in direct.state_dict().items():
        assert torch.equal(value, through.state_dict()[name]), name
    assert norm_eps(direct) == norm_eps(through)


def test_a_checkpoint_without_decoder_and_with_plain_convolutions() -> None:
    values = {k: v for k, v in variables("xception_65 v3+ voc").items() if not k.startswith(("aspp1_", "decoder/"))}
    values = {k: v for k, v in values.items() if not k.startswith(("aspp2_", "aspp3_"))}
    for i in (1, 2, 3):
        values[f"aspp{i}/weights"] = np.zeros((3, 3, 2048, 256), np.float32)
        values.update({f"aspp{i}/BatchNorm/{leaf}": np.ones(256, np.float32) for leaf in NORM})
    model = empty("deeplabv3plus_xception65", decoder=False, separable=False)
    with pytest.warns(UserWarning, match="build.*multi_grid.*would"):
        report = load_weights(model, as_state(values))
    # The default multi-grid is that of the paper's table, which the checkpoints were not trained with.
    assert "dilation of backbone.blocks.20.convs.2: (8, 8), (2, 2)" in report.differences
    assert len(report.differences) == 2
    assert (report.missing, report.surplus) == ([], [])
    with pytest.raises(UserError, match=r"missing: .*decoder\.reduce\.conv\.weight"):
        load_weights(empty("deeplabv3plus_xception65", separable=False), as_state(values))
    del values["aspp2/BatchNorm/beta"]
    with pytest.raises(UserError, match=r"missing: aspp\.atrous\.1\.norm\.bias"):
        load_weights(model, as_state(values))


# Real files


@pytest.fixture
def tensorflow():
    return pytest.importorskip("tensorflow")


def write_checkpoint(tensorflow, prefix: Path, values: dict[str, np.ndarray]) -> None:
    """As TensorFlow 1's Saver writes it: the variables under their own names."""
    names = list(values)
    tensorflow.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[tensorflow.constant(values[name]) for name in names],
    )


def test_checkpoint_files(tensorflow, tmp_path) -> None:
    values = {**variables("xception_41 imagenet"), "global_step": np.int64(7)}
    folder = tmp_path / "xception_41"
    folder.mkdir()
    write_checkpoint(tensorflow, folder / "model.ckpt", values)
    assert (folder / "model.ckpt.index").exists()
    archive = tmp_path / "xception_41.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "xception_41")
    for source in (folder / "model.ckpt", folder, folder / "model.ckpt.index", archive):
        model = empty("deeplabv3plus_xception41")
        report = load_weights(model, source)
        assert report.source == str(source)
        assert len(report.renamed) == len(values) - 3
        expected = values["xception_41/entry_flow/conv1_1/weights"]
        assert np.array_equal(model.backbone.stem[0].conv.weight.detach().numpy(), expected.transpose(3, 2, 0, 1))
    index = folder / "model.ckpt.index"
    index.write_bytes(index.read_bytes()[:100])
    with pytest.raises(UserError, match="not a TensorFlow checkpoint, or a damaged one"):
        load_weights(model, folder)
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(UserError, match="damaged"):
        load_weights(model, archive)


def test_layers_compute_what_tensorflows_do(tensorflow) -> None:
    values = variables("xception_65 v3+ voc")
    model = empty("deeplabv3plus_xception65", num_classes=21, multi_grid=(1, 1, 1))
    load_weights(model, as_state(values))
    random = np.random.default_rng(1)
    x = random.standard_normal((1, 17, 19, 2048), np.float32)

    def normalised(y, scope: str, eps: float) -> np.ndarray:
        gamma, beta, mean, variance = (values[f"{scope}/BatchNorm/{leaf}"] for leaf in NORM)
        return tensorflow.nn.relu(tensorflow.nn.batch_normalization(y, mean, variance, beta, gamma, eps))

    y = tensorflow.nn.depthwise_conv2d(
        x, values["aspp2_depthwise/depthwise_weights"], [1, 1, 1, 1], "SAME", dilations=[12, 12]
    )
    y = normalised(y, "aspp2_depthwise", 1e-5)
    y = tensorflow.nn.conv2d(y, values["aspp2_pointwise/weights"], 1, "SAME")
    expected = normalised(y, "aspp2_pointwise", 1e-5).numpy().transpose(0, 3, 1, 2)
    with torch.no_grad():
        actual = model.aspp.atrous[1](torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    assert abs(actual - expected).max() < 1e-4 * abs(expected).max()

    x = random.standard_normal((1, 33, 35, 32), np.float32)
    scope = "xception_65/entry_flow/conv1_2"
    expected = normalised(tensorflow.nn.conv2d(x, values[f"{scope}/weights"], 1, "SAME"), scope, 1e-3)
    with torch.no_grad():
        actual = model.backbone.stem[1](torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    assert abs(actual - expected.numpy().transpose(0, 3, 1, 2)).max() < 1e-4 * abs(expected.numpy()).max()
