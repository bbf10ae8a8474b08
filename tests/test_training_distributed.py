"""Two processes on the CPU (gloo): batch normalisation over both, and the loss curve of one process with the double
batch."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from deeplab_kernels.models import build
from deeplab_kernels.models.data import SceneDataset
from deeplab_kernels.models.training import Trainer, TrainingConfig
from deeplab_kernels.models.training.distributed import SyncBatchNorm2d, process_group, synchronised_batch_norm

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

CONFIG = TrainingConfig(
    steps=3, batch_size=2, accumulation=2, crop=33, learning_rate=0.02, min_scale=0.7, max_scale=1.4, ema_decay=0.9
)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _environment(rank: int, size: int, port: int) -> dict[str, str]:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in own.items()}


def _in_two_processes(worker: Any, tmp_path: Path) -> list[Any]:
    """What ``worker()`` returns in each."""
    mp.start_processes(_start, (worker, _free_port(), tmp_path), nprocs=2, start_method="spawn")
    return [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _start(rank: int, worker: Any, port: int, folder: Path) -> None:
    os.environ.update(_environment(rank, 2, port))
    torch.set_num_threads(1)
    with process_group(torch.device("cpu")):
        torch.save(worker(rank), folder / f"{rank}.pt")


def _norm(kind: type[nn.BatchNorm2d], momentum: float | None, affine: bool) -> nn.BatchNorm2d:
    norm = kind(5, momentum=momentum, affine=affine, dtype=torch.float64)
    if affine:
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 1.5, 5))
            norm.bias.copy_(torch.linspace(-1, 1, 5))
    return norm


NORMS = ((0.1, True), (None, True), (0.3, False))


def _data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 6, 5, 3, 4, generator=generator, dtype=torch.float64) * 2 + 7
    return x, torch.randn(2, 6, 5, 3, 4, generator=generator, dtype=torch.float64)


def _steps(norm: nn.BatchNorm2d, part: slice) -> list[torch.Tensor]:
    """Outputs, gradients and buffers of two training steps."""
    out: list[torch.Tensor] = []
    for x, g in zip(*_data(), strict=True):
        x = x[part].clone().requires_grad_()
        y = norm(x)
        y.backward(g[part])
        out += [y.detach(), x.grad]
    out += [p.grad for p in norm.parameters()]
    return [*out, *norm.state_dict().values(), norm.eval()(_data()[0][0])]


def _norm_worker(rank: int) -> list[list[torch.Tensor]]:
    part = slice(0, 2) if rank == 0 else slice(2, 6)  # batches of different sizes
    return [_steps(_norm(SyncBatchNorm2d, *options), part) for options in NORMS]


def test_synchronised_batch_norm_is_that_of_the_whole_batch(tmp_path):
    parts = _in_two_processes(_norm_worker, tmp_path)
    for n, options in enumerate(NORMS):
        expected = _steps(_norm(nn.BatchNorm2d, *options), slice(None))
        own = [part[n] for part in parts]
        for i in range(4):  # outputs and gradients of the inputs: those of each process's images
            torch.testing.assert_close(torch.cat([o[i] for o in own]), expected[i], rtol=1e-10, atol=1e-12)
        parameters = 2 if options[1] else 0
        for i in range(4, 4 + parameters):  # gradients of the parameters: DistributedDataParallel adds them
            torch.testing.assert_close(own[0][i] + own[1][i], expected[i], rtol=1e-10, atol=1e-12)
        for i in range(4 + parameters, len(expected)):
            for values in own:
                torch.testing.assert_close(values[i].detach(), expected[i].detach(), rtol=1e-10, atol=1e-12)


def _errors_worker(rank: int) -> list[str]:
    norm = SyncBatchNorm2d(3)
    norm(torch.zeros(1, 3, 1, 1))  # one value in each process: two in all
    halves = SyncBatchNorm2d(3)(torch.randn(4, 3, 2, 2, dtype=torch.bfloat16) + 100)
    assert halves.dtype == torch.bfloat16
    assert halves.abs().max() < 10
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    kinds = []
    with synchronised_batch_norm(model):
        kinds.append(type(model[0]).__name__)
    return [*kinds, type(model[0]).__name__]


def test_modules_change_for_the_training_only(tmp_path):
    assert _in_two_processes(_errors_worker, tmp_path) == [["SyncBatchNorm2d", "BatchNorm2d"]] * 2
    model = nn.Sequential(nn.BatchNorm2d(3))
    with synchronised_batch_norm(model):  # one process
        assert type(model[0]) is nn.BatchNorm2d


def _train(batch_size: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = build("deeplabv3plus_small", 7, 16)
    trainer = Trainer(model, SceneDataset(9, 40, seed=1), dataclasses.replace(CONFIG, batch_size=batch_size))
    losses = trainer.run().losses
    with trainer.evaluated() as averaged:
        return {"losses": losses, "state": {k: v.clone() for k, v in averaged.state_dict().items()}}


def _training_worker(rank: int) -> dict[str, Any]:
    return _train(2)


def test_two_processes_learn_like_one_with_the_double_batch(tmp_path):
    """With batch normalisation in training mode, random scales, accumulation and averaged weights."""
    first, second = _in_two_processes(_training_worker, tmp_path)
    one = _train(4)
    assert first["losses"] == second["losses"]
    assert first["losses"] == pytest.approx(one["losses"], rel=2e-4)
    for name, value in one["state"].items():
        assert torch.equal(first["state"][name], second["state"][name])
        torch.testing.assert_close(first["state"][name], value, rtol=0.02, atol=2e-3, msg=name)


def test_the_command_under_torchrun(tmp_path):
    """One folder, written by one process; the validation of both together."""
    flags = {"data": "generated:length=5,size=40", "crop": 33, "batch-size": 1, "steps": 2, "learning-rate": 0.02}
    flags |= {"workers": 0, "device": "cpu", "threads": 1}
    command = [sys.executable, "-m", "deeplab_kernels", "train", "--json", "--output", str(tmp_path / "two")]
    command += [f"--{name}={value}" for name, value in flags.items()]
    port = _free_port()
    running = [
        subprocess.Popen(
            command, env={**os.environ, **_environment(rank, 2, port)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    summary = json.loads(outputs[0][0])
    assert outputs[1][0] == b""
    assert summary["processes"] == 2
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == [
        "checkpoint.pt",
        "config.toml",
        "log.csv",
        "weights.pt",
    ]
    from deeplab_kernels.models.training.run import validate
    from deeplab_kernels.models.weights import build_from_file

    model, _ = build_from_file(summary["weights"])
    matrix = validate(model.eval(), SceneDataset(5, 40, seed=1), 7)
    assert summary["best"]["mean_iou"] == pytest.approx(matrix.mean_iou(), abs=1e-9)
