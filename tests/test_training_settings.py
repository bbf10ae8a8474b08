"""Settings of train: from files and flags, their defaults, wrong ones."""

from __future__ import annotations

import dataclasses

import pytest
from _training import fails, flags

from deeplab_kernels.commands import train as command
from deeplab_kernels.models.training import TrainingConfig, settings


def test_every_setting_has_a_flag_and_a_type():
    table = {name.replace("-", "_"): kind for group in command.SETTINGS.values() for name, kind, _ in group}
    assert sorted(table) == sorted(settings.NAMES)
    types = {f.name: f.type for kind in (settings.RunConfig, TrainingConfig) for f in dataclasses.fields(kind)}
    for name, kind in table.items():
        word = str(types[name]).removesuffix(" | None")
        assert kind == (word if word in ("int", "float", "bool", "str") else "toml"), name


def test_settings_survive_the_file():
    config = settings.run_config(
        {"data": 'voc:/a "b" \\ ü😀', "model": "deeplabv3plus_small", "options": {"atrous_rates": [1, 2]}, "crf": True}
        | {"stages": [{"steps": 2, "learning_rate": 1e-5}, {"steps": 3}], "class_weights": [1.5], "time_limit": 3}
    )
    text = settings.to_toml(config.flat())
    assert settings.run_config(settings._parsed(text, "x")) == config
    assert settings.differences(config, config) == []


def test_defaults_follow_the_model():
    paper = settings.run_config({"data": "x", "model": "deeplabv3plus_xception65"})
    assert (paper.training.crop, paper.training.learning_rate, paper.training.max_scale) == (513, 0.007, 2.0)
    assert not paper.near_identity
    small = settings.run_config({"data": "x", "crop": 65})
    assert (small.training.crop, small.training.learning_rate) == (65, settings.SMALL.learning_rate)
    assert small.near_identity
    assert not settings.run_config({"data": "x", "init": "w.pt"}).near_identity


# Wrong input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nowhere"}, "got 'nowhere', which is no folder"),
        ({"data": None}, "data is missing"),
        ({"model": "deeplabv3plus_smal"}, "did you mean 'deeplabv3plus_small'"),
        ({"options": "{decoders = 1}"}, "has no option 'decoders'"),
        ({"options": "{decoder"}, "--options {decoder: no TOML"),
        ({"stages": "[{steps = 1}]"}, "steps and stages exclude each other"),
        ({"steps": None, "stages": "[{lr = 1}]"}, "a stage is a table with steps"),
        ({"crop": 16}, "crop must exceed the output stride 16, got 16"),
        ({"batch_size": 1}, "at least 2 images in a batch, got 1"),
        ({"class_weights": "[1, 2]"}, "one value for each of the 7 classes, got 2"),
        ({"learning_rate": 1e30}, r"the loss is (nan|inf) at step \d: lower the learning rate"),
        ({"device": "abacus"}, "--device must be cpu, cuda or cuda:N, got"),
        ({"workers": -1}, "workers must not be negative, got -1"),
        ({"init": "nowhere.pt"}, "nowhere.pt"),
        ({"head_multiplier": 0}, "head_multiplier must be positive, got 0.0"),
        ({"val_split": "test"}, "split of the generated dataset must be one of"),
    ],
)
def test_wrong_settings(tmp_path, capsys, changes, message):
    fails(flags(tmp_path / "run", **changes), message, capsys)


def test_wrong_files_of_settings(tmp_path, capsys):
    file = tmp_path / "a.toml"
    fails(["train", str(file)], r"a.toml: No such file", capsys)
    file.write_text("data = generated\n")
    fails(["train", str(file)], r"a.toml: no TOML", capsys)
    file.write_text('data = "generated"\nlearning_rates = 0.1\n')
    fails(["train", str(file)], "there is no setting 'learning_rates'; did you mean learning_rate", capsys)
    file.write_text('data = "generated"\nsteps = "many"\n')
    fails(["train", str(file)], "steps must be an int, got 'many'", capsys)
    file.write_text('data = "generated"\ncrf = 1\n')
    fails(["train", str(file)], "crf must be a bool, got 1", capsys)
    (tmp_path / "out").write_text("")
    fails(flags(tmp_path / "out"), "is a file, not a folder", capsys)
