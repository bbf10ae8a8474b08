"""Multiply-Adds: the paper's table, single layers by hand, and the command."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from deeplab_kernels import models
from deeplab_kernels.cli import main
from deeplab_kernels.models.madds import PAPER_SCALED_SIZES
from deeplab_kernels.nn import AtrousSeparableConv2d

# (eval output stride, decoder, SC): billions in the paper and by independent arithmetic: recomputed, true, then six
# scales with flips in the paper and recomputed.
EXPECTED = {
    (16, False, False): (68.00, 67.86, 64.92, 1203.34, 1203.13),
    (8, False, False): (240.85, 240.71, 227.04, 4299.68, 4299.37),
    (16, True, False): (89.76, 89.62, 86.68, 1580.10, 1579.88),
    (8, True, False): (262.59, 262.45, 248.78, 4676.16, 4675.84),
    (16, True, True): (54.17, 54.06, 54.04, 928.81, 928.63),
    (8, True, True): (177.10, 177.00, 176.85, 3055.35, 3055.07),
}
MULTI_SCALE_PAPER = {
    (16, False, False): 601.74,
    (8, False, False): 2149.91,
    (16, True, False): 790.12,
    (8, True, False): 2338.15,
}


@pytest.fixture(scope="module")
def table() -> list[dict]:
    return models.paper_table()


def billions(count: int) -> float:
    return round(count / 1e9, 2)


def test_paper_table(table: list[dict]) -> None:
    keys = [(row["eval_output_stride"], row["decoder"], row["separable"]) for row in table]
    assert keys == list(EXPECTED)
    for key, row in zip(keys, table, strict=True):
        paper, recomputed, true, flip_paper, flip_recomputed = EXPECTED[key]
        assert (billions(row["paper"]), billions(row["multi_scale_flip_paper"])) == (paper, flip_paper)
        assert billions(row["madds_paper_convention"]) == recomputed
        assert billions(row["madds_true"]) == true
        assert billions(row["multi_scale_flip_madds_paper_convention"]) == flip_recomputed
        assert row["multi_scale_flip_madds_true"] == 2 * row["multi_scale_madds_true"]
        assert row["model"] == "deeplabv3plus_xception65"
        if key in MULTI_SCALE_PAPER:
            assert billions(row["multi_scale_paper"]) == MULTI_SCALE_PAPER[key]
        else:
            assert row["multi_scale_paper"] is None


def test_every_number_is_within_a_quarter_of_a_percent_of_the_paper(table: list[dict]) -> None:
    pairs = [
        (row[f"{prefix}madds_paper_convention"], row[f"{prefix}paper"])
        for row in table
        for prefix in ("", "multi_scale_", "multi_scale_flip_")
        if row[f"{prefix}paper"] is not None
    ]
    assert len(pairs) == 16
    assert max(abs(ours / paper - 1) for ours, paper in pairs) < 0.0025


def test_paper_scales() -> None:
    assert [int(512 * scale + 1) for scale in (0.5, 0.75, 1, 1.25, 1.5, 1.75)] == list(PAPER_SCALED_SIZES)


@pytest.mark.parametrize(
    ("layer", "true", "paper"),
    [
        # kernel entries x in / groups x out x output pixels of a 33 x 33 image
        (nn.Conv2d(3, 8, 3, padding=1), 9 * 3 * 8 * 33 * 33, 9 * 3 * 8 * 33 * 33),
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), 9 * 3 * 8 * 17 * 17, 9 * 3 * 8 * 17 * 17),
        (nn.Conv2d(3, 8, 3, padding=18, dilation=18), 9 * 3 * 8 * 33 * 33, 9 * 3 * 8 * 36 * 36),
        (nn.Conv2d(3, 8, 3, padding=(6, 5), dilation=(6, 5)), 9 * 3 * 8 * 33 * 33, 9 * 3 * 8 * 36 * 35),
        (nn.Conv2d(3, 8, 1, dilation=6), 3 * 8 * 33 * 33, 3 * 8 * 33 * 33),
        (nn.Conv2d(3, 6, (1, 3), padding=(0, 1), groups=3), 3 * 6 * 33 * 33, 3 * 6 * 33 * 33),
        (nn.ConvTranspose2d(3, 8, 4, stride=2), 16 * 3 * 8 * 33 * 33, 16 * 3 * 8 * 33 * 33),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 8, 1)), 3 * 8, 3 * 8),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 33 * 33, 5)), 3 * 33 * 33 * 5, 3 * 33 * 33 * 5),
        (
            AtrousSeparableConv2d(3, 8, padding="same", dilation=6),
            (9 + 8) * 3 * 33 * 33,
            9 * 3 * 36 * 36 + 3 * 8 * 33 * 33,
        ),
        (
            AtrousSeparableConv2d(3, 8, padding="same", stride=2, depthwise_norm=True, pointwise_norm=True),
            (9 + 8) * 3 * 17 * 17,
            (9 + 8) * 3 * 17 * 17,
        ),
    ],
)
def test_single_layers(layer: nn.Module, true: int, paper: int) -> None:
    assert models.madds(layer, 33, "true") == true
    assert models.madds(layer, 33) == models.madds(layer, (33, 33), convention="paper") == paper


def test_separable_example_of_the_lecture() -> None:
    # 8 x 8 x 3 input, 16 filters of 3 x 3: 432 weights against 27 + 48.
    assert models.madds(nn.Conv2d(3, 16, 3, padding=1), 8, "true") == 432 * 64
    assert models.madds(AtrousSeparableConv2d(3, 16, padding="same"), 8, "true") == (27 + 48) * 64


def test_layers_sum_up_and_carry_the_names_of_their_weights() -> None:
    model = models.build("deeplabv3plus_small", output_stride=8)
    for convention in ("paper", "true"):
        layers = models.madds(model, (65, 97), convention, per_layer=True)
        assert sum(layer.madds for layer in layers) == models.madds(model, (65, 97), convention)
    weights = {name.removesuffix(".weight") for name, p in model.named_parameters() if p.dim() == 4}
    assert {layer.name for layer in layers} == weights
    assert len(layers) == len(weights)
    by_name = {layer.name: layer for layer in layers}
    layer = by_name["aspp.atrous.2.depthwise"]
    assert (layer.output_shape, layer.kernel, layer.rate) == ((1, 256, 9, 13), (3, 3), (12, 12))
    assert by_name["aspp.pooling.conv"].output_shape == (1, 64, 1, 1)
    assert by_name["backbone.stem.0.conv"].stride == (2, 2)
    assert by_name["backbone.blocks.0.convs.2.depthwise"].groups == 32


def test_model_is_left_as_it_was() -> None:
    model = models.build("deeplabv3plus_small")
    model.backbone.eval()
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    models.madds(model, 65)
    assert [m.training for m in model.modules()] == modes
    after = model.state_dict()
    assert all(v.device.type == "cpu" and torch.equal(v, before[k]) for k, v in after.items())
    assert all(p.grad is None for p in model.parameters())


def test_counts_do_not_depend_on_device_dtype_or_grid_of_the_weights() -> None:
    expected = models.madds(models.build("deeplabv3plus_small", device="meta"), 65)
    for dtype in (torch.float64, torch.bfloat16):
        assert models.madds(models.build("deeplabv3plus_small", dtype=dtype), 65) == expected


def test_agrees_with_torchs_flop_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = models.build("deeplabv3plus_small", device="meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 97, 65, device="meta"))
    assert counter.get_total_flops() == 2 * models.madds(model, (97, 65), "true")


@pytest.mark.parametrize(
    ("size", "convention", "message"),
    [
        (0, "paper", "input_size must be a positive int or"),
        ((3, 3, 3), "paper", r"got \(3, 3, 3\)"),
        ((3, 2.5), "paper", "input_size must be"),
        (True, "paper", "got True"),
        (33, "papers", "convention must be"),
    ],
)
def test_bad_arguments(size: object, convention: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.madds(nn.Conv2d(3, 3, 1), size, convention)  # type: ignore[call-overload]


def test_an_operator_without_a_rule_is_refused() -> None:
    class Backward(nn.Module):
        def forward(self, x):
            weight = x.new_empty(3, 1, 3, 3)
            return torch.ops.deeplab_kernels.atrous_depthwise_conv2d_backward(
                x, x, weight, [1, 1], [1, 1, 1, 1], [1, 1], True, False
            )[0]

    with pytest.raises(NotImplementedError, match="no rule for the operator atrous_depthwise_conv2d_backward"):
        models.madds(Backward(), 9)


def test_command_json(capsys: pytest.CaptureFixture[str], table: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "paper_table", lambda: table)
    assert main(["madds", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == table
    names = ("model", "eval_output_stride", "decoder", "separable", "madds_paper_convention", "madds_true", "paper")
    assert all(set(names) <= set(row) for row in rows)


def test_command_table(capsys: pytest.CaptureFixture[str], table: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "paper_table", lambda: table)
    assert main(["madds"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line[:2].strip() in ("8", "16")]
    assert rows[0][:7] == ["16", "-", "-", "68.00", "67.86", "-0.20", "%"]
    assert rows[5][-4:] == ["3055.35", "3055.07", "-0.01", "%"]
    assert len(rows) == 6
    assert max(map(len, out.splitlines())) <= 140


def test_command_for_one_model(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["madds", "--model", "deeplabv3plus_small", "--size", "65", "97", "--output-stride", "8"]
    assert main([*arguments, "--num-classes", "3", "--per-layer", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    model = models.build("deeplabv3plus_small", 3, 8, device="meta")
    assert row["madds_true"] == models.madds(model, (65, 97), "true")
    assert row["madds_true"] == sum(layer["madds_true"] for layer in row["layers"])
    assert (row["eval_output_stride"], row["input_size"], row["paper"]) == (8, [65, 97], None)
    assert (row["decoder"], row["separable"]) == (True, True)
    assert main([*arguments, "--per-layer"]) == 0
    out = capsys.readouterr().out
    assert "deeplabv3plus_small, output stride 8, 65 x 97: " in out
    assert "aspp.atrous.2.depthwise" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "65"], "--size needs --model"),
        (["--model", "deeplabv3plus_smal"], "did you mean 'deeplabv3plus_small'"),
        (["--model", "deeplabv3plus_small", "--size", "1", "2", "3"], "--size takes one number or two"),
        (["--model", "deeplabv3plus_small", "--size", "0"], "--size must be at least 1, got 0"),
        (["--model", "deeplabv3plus_small", "--num-classes", "0"], "--num-classes must be at least 1, got 0"),
        (["--model", "deeplabv3plus_small", "--output-stride", "4"], "output_stride must be 8, 16 or 32, got 4"),
    ],
)
def test_command_errors_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["madds", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
