"""The command ``train``: what it writes, interruptions, wrong data."""

from __future__ import annotations

import csv
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from _processes import run_python
from _training import TINY, fails, flags
from PIL import Image

from deeplab_kernels import cli
from deeplab_kernels.models import Segmenter, build
from deeplab_kernels.models.data import IGNORE, SceneDataset, write_generated_dataset
from deeplab_kernels.models.training import Stage, Trainer, TrainingConfig, checkpoint, run, settings
from deeplab_kernels.models.training.logs import COLUMNS, Log
from deeplab_kernels.models.weights import build_from_file


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["trainer"]


def same_tensors(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same_tensors(x, y) for x, y in zip(a, b, strict=True))
    return a == b


# What it writes


def test_a_run_from_flags(tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main([*flags(out, validate_every=2), "--tensorboard", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["steps"] == summary["steps_of_this_call"] == 3
    assert summary["images"] == 4
    assert summary["best"]["step"] in (2, 3)
    log = rows(out)
    assert [row["step"] for row in log] == ["1", "2", "3"]
    assert tuple(log[0]) == COLUMNS
    assert float(log[2]["loss"]) == pytest.approx(summary["loss"], rel=1e-4)
    assert [bool(row["mean_iou"]) for row in log] == [False, True, True]
    assert max(float(row["mean_iou"]) for row in log[1:]) == pytest.approx(summary["best"]["mean_iou"], rel=1e-4)
    assert float(log[1]["seconds"]) > float(log[0]["seconds"]) > 0
    assert list((out / "tensorboard").glob("events.*"))

    segmenter = Segmenter.from_file(summary["weights"])
    assert segmenter.class_names == SceneDataset.class_names
    assert segmenter(SceneDataset(1, 40)[0].image).shape == (40, 40)


def test_a_file_of_settings_and_flags_over_it(tmp_path, capsys):
    file = tmp_path / "a.toml"
    values = {**{k: v for k, v in TINY.items() if k != "steps"}, "output": str(tmp_path / "run"), "seed": 3}
    file.write_text(
        settings.to_toml(values)
        + "options = {decoder = false}\nclass_weights = [1, 2, 1, 1, 1, 1, 0.5]\n"
        + "[[stages]]\nsteps = 1\n[[stages]]\nsteps = 1\noutput_stride = 8\nfreeze_batch_norm = true\n"
    )
    assert cli.main(["train", str(file), "--seed", "4", "--no-channels-last", "--val-split="]) == 0
    assert "weights:" in capsys.readouterr().out
    config = settings.run_config(settings.read_toml(tmp_path / "run" / "config.toml"))
    assert config.training.seed == 4
    assert config.training.class_weights == (1, 2, 1, 1, 1, 1, 0.5)
    assert config.training.stages == (Stage(1), Stage(1, output_stride=8, freeze_batch_norm=True))
    assert config.options == {"decoder": False}
    assert not config.channels_last
    model, content = build_from_file(tmp_path / "run" / "weights.pt")
    assert model.decoder is None
    assert model.output_stride == 8  # that of the last stage
    assert content["notes"]["seed"] == 4
    assert cli.main(["train", str(file), "--steps", "1", "--output", str(tmp_path / "other")]) == 0  # replaces stages
    assert state(tmp_path / "other")["step"] == 1


def test_a_crf_is_trained_as_the_last_stage(tmp_path):
    assert cli.main([*flags(tmp_path / "run", steps=2, learning_rate=0.2), "--crf"]) == 0
    model, _ = build_from_file(tmp_path / "run" / "weights.pt")
    torch.manual_seed(0)
    fresh = build("deeplabv3plus_small", 7, crf=True)
    assert not torch.equal(model.crf.appearance_weight, fresh.crf.appearance_weight)
    assert torch.equal(model.crf.log_appearance_sigma, fresh.crf.log_appearance_sigma)
    assert model.crf.compatibility is None  # Potts
    assert Segmenter.from_file(tmp_path / "run" / "weights.pt")(SceneDataset(1, 40)[0].image).shape == (40, 40)


def test_the_whole_crf_is_trained(tmp_path):
    options = ["--crf", "--crf-sigmas", "--options", "{crf = {iterations = 2, compatibility = 'full'}}"]
    assert cli.main([*flags(tmp_path / "run", steps=2, learning_rate=0.2), *options]) == 0
    crf = build_from_file(tmp_path / "run" / "weights.pt")[0].crf
    fresh = build("deeplabv3plus_small", 7, crf={"iterations": 2, "compatibility": "full"}).crf
    assert crf.iterations == 2
    parameters = dict(crf.named_parameters())
    assert len(parameters) == 6
    for name, value in fresh.named_parameters():
        assert parameters[name].requires_grad, name
        assert not torch.equal(parameters[name], value), name


def test_the_whole_crf_needs_a_crf(capsys):
    fails(["train", "--data", "generated", "--crf-sigmas"], "crf_sigmas needs crf", capsys)


def test_the_weights_are_the_best_ones(tmp_path, monkeypatch):
    qualities = iter([0.5, 0.7, 0.7, 0.6])

    class Matrix:
        def mean_iou(self) -> float:
            return next(qualities)

        def pixel_accuracy(self) -> float:
            return 0.9

    monkeypatch.setattr(run, "validate", lambda *arguments: Matrix())
    assert cli.main(flags(tmp_path / "run", steps=4, validate_every=1)) == 0
    notes = build_from_file(tmp_path / "run" / "weights.pt")[1]["notes"]
    assert (notes["step"], notes["mean_iou"]) == (2, 0.7)


@pytest.mark.parametrize(
    ("model", "classes", "skip", "afresh"),
    [
        ("deeplabv3plus_small", 7, False, "nothing"),
        ("deeplabv3plus_small", 3, False, "classifier"),
        ("deeplabv3plus_small", 7, True, "classifier"),
        ("deeplabv1_small", 3, False, "head.branches.0.fc8"),
        ("deeplabv1_small", 7, True, "head.branches.0.fc8"),
    ],
)
def test_pretrained_weights(tmp_path, capsys, model, classes, skip, afresh):
    """The generated dataset has 7 classes."""
    torch.manual_seed(1)
    first = build(model, classes).state_dict()
    torch.save(first, tmp_path / "init.pt")
    arguments = flags(tmp_path / "run", model=model, steps=1, learning_rate=1e-9, init=tmp_path / "init.pt")
    assert cli.main([*arguments, *(["--skip-classifier"] if skip else []), "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["init"].endswith(f"; {afresh} starts afresh")
    assert f"; {afresh} starts afresh\n" in output.err
    second = build_from_file(tmp_path / "run" / "weights.pt")[0].state_dict()
    for name in first:
        if name == f"{afresh}.weight":
            assert first[name].shape != second[name].shape or not torch.allclose(first[name], second[name])
        elif name != f"{afresh}.bias" and not re.search("running|num_batches", name):
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-6)


# Interruptions


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_an_interrupted_run_continues_with_the_same_bits(tmp_path, monkeypatch, capsys, number, workers):
    """Averaged weights, random scales and a validation included; the second part uses another number of workers."""
    changes = {"steps": 6, "ema_decay": 0.9, "max_scale": 1.5, "validate_every": 2}
    write = Log.write

    def interrupt(log: Log, row: dict[str, Any]) -> None:
        write(log, row)
        if row["step"] == 3:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        patched.setattr(Log, "write", interrupt)
        assert cli.main(flags(tmp_path / "parts", **changes)) == 128 + number
    assert signal.getsignal(number) == before
    assert "interrupted after step 3; " in capsys.readouterr().err
    assert state(tmp_path / "parts")["step"] == 3
    with (tmp_path / "parts" / "log.csv").open("a") as file:  # of steps after the checkpoint, which were lost
        file.write("4,0.1,9.9,1,,\n5,0.")

    assert cli.main([*flags(tmp_path / "parts", **changes, workers=workers), "--resume"]) == 0
    assert cli.main(flags(tmp_path / "whole", **changes)) == 0
    for name in ("checkpoint.pt", "weights.pt"):
        parts, whole = (torch.load(tmp_path / n / name, weights_only=True) for n in ("parts", "whole"))
        assert same_tensors(parts, whole)
    parts, whole = ([{**r, "seconds": ""} for r in rows(tmp_path / n)] for n in ("parts", "whole"))
    assert parts == whole
    assert [int(row["step"]) for row in parts] == list(range(1, 7))


def test_a_process_group_that_is_told_to_end_ends_well(tmp_path):
    """The signal reaches the workers, too, as those of timeout(1) and of schedulers do."""
    out = tmp_path / "run"
    arguments = flags(out, steps=1000, workers=1, threads=1, data="generated:length=9,size=40")
    command = [sys.executable, "-m", "deeplab_kernels", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 100
        while process.poll() is None and time.monotonic() < deadline:
            if (out / "log.csv").exists() and (out / "log.csv").read_text().count("\n") >= 3:
                os.killpg(process.pid, signal.SIGTERM)
                break
            time.sleep(0.02)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, error
    assert error.splitlines()[-1].endswith("--resume continues from there")
    assert state(out)["step"] == len(rows(out)) >= 2


def test_resume_needs_only_the_folder(tmp_path, capsys):
    assert cli.main(flags(tmp_path / "run")) == 0
    capsys.readouterr()
    assert cli.main(["train", "--resume", "--output", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps_of_this_call"] == 0


def test_resume_of_no_run(tmp_path, capsys):
    fails(["train", "--resume", "--output", str(tmp_path)], "--resume: there is no", capsys)


def test_a_failing_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    trainer = Trainer(build("deeplabv3plus_small", 7), SceneDataset(2, 40), TrainingConfig(steps=2, crop=33))
    path = tmp_path / "checkpoint.pt"
    checkpoint.write_checkpoint(path, trainer, classes=7, best=None)
    before = path.read_bytes()

    def full(content: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device"):
        checkpoint.write_checkpoint(path, trainer, classes=7, best=None)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_full_disk_ends_the_run_and_leaves_the_old_checkpoint(tmp_path, capsys):
    """A limit on the size of files stands for the disk: the checkpoint of step 1 is there, that of 2 does not fit."""
    out = tmp_path / "run"
    assert cli.main(flags(out, steps=1)) == 0
    config = out / "config.toml"
    config.write_text(config.read_text().replace("steps = 1\n", "steps = 3\n"))  # as if it had been interrupted
    content = torch.load(out / "checkpoint.pt", weights_only=True)
    content["trainer"]["lengths"] = [3]
    torch.save(content, out / "checkpoint.pt")
    before = (out / "checkpoint.pt").read_bytes()

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    process = subprocess.run(
        [sys.executable, "-m", "deeplab_kernels", *flags(out, checkpoint_every=1), "--resume"],
        capture_output=True,
        text=True,
        preexec_fn=limited,
    )
    assert process.returncode == 2
    assert "File too large" in process.stderr.splitlines()[-1]
    assert (out / "checkpoint.pt").read_bytes() == before
    assert not list(out.glob("*.part"))


# Wrong data


def test_wrong_data(tmp_path, capsys, monkeypatch):
    root = write_generated_dataset(tmp_path / "voc", train=2, val=1, size=40)
    label = root / "SegmentationClass" / "train_000001.png"
    Image.new("L", (40, 40), 9).save(label)
    fails(flags(tmp_path / "a", data=root), r"train_000001.png: has label 9; the dataset has 7 classes", capsys)
    fails(flags(tmp_path / "b", data=root, workers=1), r"train_000001.png: has label 9", capsys)
    Image.new("L", (40, 41), 0).save(label)
    fails(flags(tmp_path / "c", data=root), r"train_000001.png: 40 x 41 pixels, but its image", capsys)
    opened = run.open_dataset

    def gone(spec: str, split: str) -> Any:
        dataset = opened(spec, split)
        (root / "JPEGImages" / "train_000001.jpg").unlink(missing_ok=True)
        return dataset

    with monkeypatch.context() as patched:
        patched.setattr(run, "open_dataset", gone)
        fails(flags(tmp_path / "c", data=root, workers=1), r"train_000001.jpg: No such file", capsys)
    Image.new("RGB", (40, 40)).save(root / "JPEGImages" / "train_000001.jpg")
    label.unlink()
    fails(flags(tmp_path / "d", data=root), r"1 label maps are missing: .*train_000001.png", capsys)
    (root / "ImageSets/Segmentation/train.txt").write_text("")
    fails(flags(tmp_path / "e", data=root), r"train.txt: lists no images", capsys)


def test_resume_refuses_what_would_be_another_run(tmp_path, capsys):
    out = tmp_path / "run"
    fails([*flags(out), "--resume"], "there is no .*checkpoint.pt to resume from", capsys)
    assert cli.main(flags(out)) == 0
    capsys.readouterr()
    fails(flags(out), "checkpoint.pt exists: --resume continues that run; or give another output", capsys)
    fails(
        [*flags(out, learning_rate=0.5, ema_decay=0.5), "--resume"],
        "trained with other settings: learning_rate was 0.02, now 0.5; ema_decay was 0.0, now 0.5",
        capsys,
    )
    assert cli.main([*flags(out, workers=1, checkpoint_every=7), "--resume"]) == 0
    capsys.readouterr()

    root = write_generated_dataset(tmp_path / "voc", train=2, val=1, size=40)
    (root / "classes.txt").write_text("\n".join(f"class {n}" for n in range(9)))
    config = out / "config.toml"
    config.write_text(config.read_text().replace(TINY["data"], str(root)))
    fails(
        ["train", "--resume", "--output", str(out)],
        "of a model with 7 classes, but the dataset has 9 classes|9",
        capsys,
    )


def test_damaged_checkpoints_are_refused(tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(flags(out)) == 0
    capsys.readouterr()
    path = out / "checkpoint.pt"
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    fails([*flags(out), "--resume"], "checkpoint.pt: not a checkpoint, or", capsys)
    torch.save({"a": 1}, path)
    fails([*flags(out), "--resume"], "checkpoint.pt: not a checkpoint of a training run", capsys)
    path.write_bytes(good)
    content = torch.load(path, weights_only=True)
    del content["trainer"]["model"]["classifier.weight"]
    torch.save(content, path)
    fails([*flags(out), "--resume"], r"does not fit the model \(.*classifier.weight", capsys)
    content["processes"] = 2
    torch.save(content, path)
    fails([*flags(out), "--resume"], r"of a run in 2 processes, but this one has 1", capsys)
    content["version"] = 99
    torch.save(content, path)
    fails([*flags(out), "--resume"], "checkpoint of version 99; this package reads 1", capsys)


# Parts


def test_validation_counts_images_of_any_size():
    sizes = ((40, 33), (33, 50), (20, 20))
    scenes = [SceneDataset(1, size, seed=n)[0] for n, size in enumerate(sizes)]
    scenes[1].labels[:10] = IGNORE
    model = build("deeplabv3plus_small", 7).eval()
    matrix = run.validate(model, scenes, 7)
    assert matrix.counts.sum() == sum((s.labels != IGNORE).sum() for s in scenes)


def test_the_log_needs_tensorboard_only_if_asked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    Log(tmp_path)
    with pytest.raises(ImportError, match="pip install tensorboardX"):
        Log(tmp_path, tensorboard=True)


def test_memory_does_not_grow_with_the_dataset():
    """The same steps on 4 and on 100000 images of 640 kB, which are made when they are asked for."""
    code = (
        "import resource, sys, numpy, torch\n"
        "from deeplab_kernels.models.data import Scene\n"
        "from deeplab_kernels.models.training import TrainingConfig, train\n"
        "class Scenes:\n"
        "    __len__ = lambda self: int(sys.argv[1])\n"
        "    __getitem__ = lambda self, n: Scene(numpy.full((400, 400, 3), n % 255, numpy.uint8),\n"
        "                                        numpy.full((400, 400), n % 7, numpy.uint8))\n"
        "torch.set_num_threads(1)\n"
        "train(torch.nn.Conv2d(3, 7, 1), Scenes(), TrainingConfig(steps=40, batch_size=4, crop=33))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)\n"
    )
    peaks = [float(run_python(code, images)) for images in (4, 100000)]
    assert abs(peaks[1] - peaks[0]) < 15  # the 160 images of the 40 steps take 100 MB
