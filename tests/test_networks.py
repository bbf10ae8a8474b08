"""The networks to time: PyTorch's side is the same network as ours, without an operator of ours."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import measure  # noqa: E402
import networks  # noqa: E402

from deeplab_kernels import models  # noqa: E402
from deeplab_kernels.nn import AtrousSeparableConv2d  # noqa: E402

NO_DECODER = replace(networks.QUICK[0], decoder=False, separable=False)


@pytest.mark.parametrize("case", [*networks.QUICK, NO_DECODER], ids=lambda case: case.key)
def test_the_plain_network_is_the_same_network(case: networks.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert networks.check(case) < 1e-9
    plain = networks.build(case, networks.EAGER)
    assert not any(isinstance(m, AtrousSeparableConv2d) for m in plain.modules())
    norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in plain.modules())
    assert (norms > 0) == (case.mode == "training")
    if case.mode == "training":
        return
    monkeypatch.setattr(networks, "fold", lambda model: model.apply(shift_bias))
    with pytest.raises(measure.CheckFailed, match="differs from the plain network"):
        networks.check(case)


def test_the_plain_network_must_not_call_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    training = next(case for case in networks.QUICK if case.mode == "training")
    monkeypatch.setattr(networks, "PlainConvNormAct", networks.ConvNormAct)
    with pytest.raises(measure.CheckFailed, match=r"calls deeplab_kernels\.batch_norm_act"):
        networks.check(training)


def test_table_5_is_measured_in_all_its_rows() -> None:
    cases = [case for case in (*networks.CASES, *networks.TABLE_5) if case.mode == "inference"]
    rows = {
        (row["eval_output_stride"], row["decoder"], row["separable"]) for row in models.paper_table(multi_scale=False)
    }
    assert {(case.output_stride, case.decoder, case.separable) for case in cases} == rows
    assert len({case.key for case in cases}) == len({case.name for case in cases}) == len(rows) == 6
    assert cases[2].key == "inference16-no-decoder-no-SC"
    assert "output stride 16, no decoder, no SC, 513 x 513" in cases[2].name


def shift_bias(module: torch.nn.Module) -> None:
    if isinstance(module, torch.nn.BatchNorm2d):
        torch.nn.init.constant_(module.bias, 1e-3)
