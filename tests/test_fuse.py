"""fuse: other libraries' and hand-written models keep their results, gradients, names and abilities."""

from __future__ import annotations

import copy
import io
import json
import pickle
import re
import runpy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _fusable import ALONE, INFERENCE, Block, X, assert_same, block, operators, output
from _models import randomise, relative_error
from _peers import peer
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import deeplab_kernels
from deeplab_kernels import fuse, unfuse
from deeplab_kernels.fusion import modules


def timm(name: str) -> nn.Module:
    return peer("timm").create_model(name)


def torchvision(name: str) -> nn.Module:
    return getattr(peer("torchvision").models, name)()


def torchvision_deeplab() -> nn.Module:
    builder = peer("torchvision").models.segmentation.deeplabv3_mobilenet_v3_large
    return builder(weights_backbone=None)


def smp(encoder: str) -> nn.Module:
    return peer("segmentation_models_pytorch").DeepLabV3Plus(encoder, encoder_weights=None)


# architecture -> (builder, its name, depthwise convolutions fused, of these with a batch norm)
ARCHITECTURES: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...], int, int]] = {
    "timm xception65": (timm, ("xception65",), 63, 63),
    "timm xception41": (timm, ("xception41",), 39, 39),
    "timm mobilenetv2_100": (timm, ("mobilenetv2_100",), 17, 17),
    "timm mobilenetv3_large_100": (timm, ("mobilenetv3_large_100",), 15, 15),
    "timm efficientnet_b0": (timm, ("efficientnet_b0",), 16, 16),
    "timm tf_efficientnet_b0": (timm, ("tf_efficientnet_b0",), 16, 16),
    "timm convnext_tiny": (timm, ("convnext_tiny",), 18, 0),
    "timm mixnet_s": (timm, ("mixnet_s",), 43, 3),
    "torchvision mobilenet_v2": (torchvision, ("mobilenet_v2",), 17, 17),
    "torchvision mobilenet_v3_small": (torchvision, ("mobilenet_v3_small",), 11, 11),
    "torchvision deeplabv3_mobilenet_v3_large": (torchvision_deeplab, (), 15, 15),
    "smp DeepLabV3Plus resnet34": (smp, ("resnet34",), 5, 0),
    "smp DeepLabV3Plus mobilenet_v2": (smp, ("mobilenet_v2",), 22, 17),
    "smp DeepLabV3Plus efficientnet-b0": (smp, ("efficientnet-b0",), 21, 16),
    "smp DeepLabV3Plus timm-efficientnet-b0": (smp, ("timm-efficientnet-b0",), 21, 16),
    "smp DeepLabV3Plus tu-xception41": (smp, ("tu-xception41",), 44, 39),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_public_architectures(name: str) -> None:
    builder, arguments, count, with_norm = ARCHITECTURES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = randomise(builder(*arguments)).eval()
    fused = copy.deepcopy(plain)
    report = fuse(fused, always=True)
    assert len(report.fused) == count
    assert report.skipped == []
    assert sum(len(entry.fused) > 1 for entry in report.fused) == with_norm
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in plain.named_modules()]
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        ours, theirs = output(fused, x), output(plain, x)
    plain.double(), fused.double()
    x = x.double()
    with torch.inference_mode():
        exact = output(plain, x)
        assert relative_error(output(fused, x), exact) < 1e-12
    assert relative_error(ours, exact) < 2 * relative_error(theirs, exact) + 1e-6
    assert_same(fused.train(), plain.train(), x[:, :, :48, :48], 1e-6)
    fused.load_state_dict(plain.state_dict())
    plain.load_state_dict(fused.state_dict())


# What people do with models afterwards.


def test_idempotent_and_undone() -> None:
    plain = block()
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    assert type(fused).__name__ == "FusedBlock"
    types = [type(m) for m in fused.modules()]
    assert fuse(fused) == report
    assert [type(m) for m in fused.modules()] == types
    unfuse(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in plain.modules()]
    assert [m.__dict__.keys() for m in fused.modules()] == [m.__dict__.keys() for m in plain.modules()]
    assert operators(fused, X) == []


def test_report() -> None:
    report = fuse(nn.Sequential(Block(), nn.Conv2d(12, 24, 3, groups=12, padding_mode="circular")))
    text = str(report)
    assert "2 of 3 depthwise convolutions fused" in text
    for expected in ("0.first", "first + norm1 + relu", "3x5", "6 -> 12", "circular"):
        assert expected in text
    data = json.loads(json.dumps(report.to_dict()))
    assert data["fused"][0]["rate"] == [2, 2]
    assert data["skipped"][0]["name"] == "1"


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how: str) -> None:
    plain = block()
    fused = copy.deepcopy(plain)
    fuse(fused, always=True)
    if how == "deepcopy":
        twin = copy.deepcopy(fused)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(fused))
    else:
        buffer = io.BytesIO()
        torch.save(fused, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert type(twin) is type(fused)
    assert twin.norm1 is not fused.norm1
    assert_same(twin, plain, X)
    assert operators(twin.eval(), X) == [INFERENCE] * 2
    unfuse(twin)
    assert operators(fused.eval(), X) == [INFERENCE] * 2


@pytest.mark.parametrize("training", [True, False])
def test_compile_export_and_trace(training: bool) -> None:
    plain = block().train(training)
    fused = copy.deepcopy(plain)
    fuse(fused)
    torch._dynamo.reset()
    assert_same(torch.compile(fused, fullgraph=True, backend="aot_eager"), torch.compile(plain, backend="eager"), X)
    torch._dynamo.reset()
    if not training:
        expected = plain(X)
        program = torch.export.export(fused, (X,))
        assert sum("deeplab_kernels" in str(node.target) for node in program.graph.nodes) == 2
        torch.testing.assert_close(program.module()(X), expected)
        torch.testing.assert_close(torch.fx.symbolic_trace(fused)(X), expected)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.testing.assert_close(torch.jit.trace(fused, X)(X), expected)


def test_functional_transforms() -> None:
    plain = block().eval()
    fused = copy.deepcopy(plain)
    fuse(fused, always=True)
    parameters = {name: p.detach() * 1.5 for name, p in plain.named_parameters()}
    results = []
    for model in (fused, plain):

        def loss(values: dict[str, Tensor], x: Tensor, model: nn.Module = model) -> Tensor:
            return torch.func.functional_call(model, values, (x[None],)).square().mean()

        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, X)
        results.append({**per_sample, "loss": loss(parameters, X[0])})
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


def test_hooks_see_what_they_saw() -> None:
    seen: dict[nn.Module, list[tuple[str, Tensor]]] = {}
    plain = block().eval()
    fused = copy.deepcopy(plain)
    fuse(fused, always=True)
    for model in (plain, fused):
        seen[model] = []
        for name in ("first", "norm1", "relu", "second"):

            def hook(m: Any, i: Any, o: Tensor, name: str = name, model: nn.Module = model) -> None:
                seen[model].append((name, o.clone()))

            model.get_submodule(name).register_forward_hook(hook)
        model(X)
    assert len(seen[plain]) == 6
    for (name, value), (expected_name, expected) in zip(seen[fused], seen[plain], strict=True):
        assert name == expected_name
        torch.testing.assert_close(value, expected)


def test_global_hooks() -> None:
    fused, seen = block().eval(), []
    fuse(fused)
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(m))
    try:
        fused(X)
    finally:
        handle.remove()
    assert [m for m in (fused.first, fused.norm1, fused.second, fused.norm2) if m not in seen] == []


def test_changed_afterwards() -> None:
    plain = block().eval()
    fused = copy.deepcopy(plain)
    fuse(fused, always=True)
    for model in (plain, fused):
        prune.l1_unstructured(model.first, "weight", amount=0.4)
        parametrizations.weight_norm(model.second)
        model.norm2 = nn.Identity()
        model.first.dilation = model.first.padding = (3, 3)
    assert_same(fused, plain, X)
    unfuse(fused)
    assert_same(fused, plain, X)


def test_changed_data_flow_is_an_error() -> None:
    fused = block().eval()
    fuse(fused, always=True)
    fused.use_norm = False
    with pytest.raises(RuntimeError, match="calls first, norm1, relu in turn, and no longer does"):
        fused(X)
    fuse(fused, always=True)
    fused(X)


def test_tied_weights_and_shared_modules() -> None:
    plain = nn.ModuleList([block(), block()])
    plain[1].first.weight = plain[0].first.weight
    plain = nn.Sequential(plain[0].first, plain[0].norm1, plain[1].first, plain[0].norm1, plain[1].first, nn.ReLU())
    fused = copy.deepcopy(plain)
    report = fuse(fused, always=True)
    assert [e.fused for e in report.fused] == [("0", "1"), ("2", "3")]
    assert fused[0].weight is fused[2].weight
    assert_same(fused, plain, X)
    assert plain[1].num_batches_tracked == 2


def test_inputs_that_the_operators_do_not_take() -> None:
    plain = block().eval()
    fused = copy.deepcopy(plain)
    fuse(fused, always=True)
    conv = fused.first
    torch.testing.assert_close(conv(X[0]), plain.first(X[0]))  # without a batch
    with pytest.raises(RuntimeError, match="channels"):
        conv(X[:, :5])
    with pytest.raises(RuntimeError, match="same"):
        conv(X.float())
    meta = copy.deepcopy(fused).to("meta")
    assert meta(X.to("meta")).shape == plain(X).shape
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(fused.float()(X.float()).float(), plain.float()(X.float()).float()) < 0.05


def test_wrapped_models() -> None:
    plain = block()
    wrapped = nn.DataParallel(copy.deepcopy(plain))
    assert [e.name for e in fuse(wrapped, always=True).fused] == ["module.first", "module.second"]
    assert_same(wrapped.module, plain, X)
    replica = wrapped.module._replicate_for_data_parallel()
    replica.norm1 = copy.deepcopy(plain.norm1)
    assert type(replica) is type(wrapped.module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.ReLU())
    with pytest.raises(TypeError, match="TorchScript"):
        fuse(scripted)
    with pytest.raises(TypeError, match="must be a torch"):
        fuse("model")  # type: ignore[arg-type]


def test_distributed(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        plain = block()
        fused = copy.deepcopy(plain)
        fuse(fused, always=True)
        assert_same(nn.parallel.DistributedDataParallel(fused), nn.parallel.DistributedDataParallel(plain), X)
    finally:
        torch.distributed.destroy_process_group()


class OptionalRate(nn.Module):
    """As EfficientNet's ports: an optional number that decides about something else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor, rate: float | None = None) -> Tensor:
        y = self.norm(self.conv(x))
        if rate is not None and rate > 0:
            y = rate * y
        return y


def test_optional_arguments() -> None:
    plain = randomise(OptionalRate()).double().eval()
    fused = copy.deepcopy(plain)
    fuse(fused, always=True)
    for arguments, operator in ((), INFERENCE), ((0.0,), INFERENCE), ((3.0,), INFERENCE), ((None,), ALONE):
        torch.testing.assert_close(fused(X, *arguments), plain(X, *arguments))
        assert operators(fused, X, *arguments) == [operator]
    torch.testing.assert_close(fused(X, rate=2.0), plain(X, rate=2.0))


def test_single_convolution() -> None:
    plain = nn.Conv2d(6, 12, 3, groups=6, bias=True).double()
    fused = copy.deepcopy(plain)
    assert fuse(fused).fused[0].name == ""
    assert_same(fused, plain, X)


def test_names() -> None:
    assert deeplab_kernels.fuse is fuse
    assert {"fuse", "unfuse"} <= set(dir(deeplab_kernels))
    assert modules.fused_class(modules.FusedOwner, Block) is modules.fused_class(modules.FusedOwner, Block)


def test_documentation_and_example(capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parent.parent
    namespace: dict[str, Any] = {"timm": peer("timm")}
    for code in re.findall(r"```python\n(.*?)```", (root / "docs" / "fuse.md").read_text(), re.DOTALL):
        exec(code.replace("import timm\n", ""), namespace)
    shown = capsys.readouterr().out
    assert "11 of 11 depthwise convolutions fused" in shown
    for line in shown.splitlines()[:4]:
        assert line.rstrip() in (root / "docs" / "fuse.md").read_text()
    runpy.run_path(str(root / "examples" / "fuse.py"), run_name="__main__")
    assert "2 of 2 depthwise convolutions fused" in capsys.readouterr().out
