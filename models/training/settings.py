"""The settings of a whole run: from a TOML file and the command line, and back into a file."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from deeplab_kernels.errors import UserError
from deeplab_kernels.nn.dense_crf import TRAINABLE

from .config import Stage, TrainingConfig, is_a

# The v3+ paper's training on PASCAL VOC (arXiv:1802.02611, section 4), and one that takes a CPU about a minute on the
# generated dataset, for the models whose names end in _small.
PAPER = TrainingConfig(
    steps=30_000,
    batch_size=16,
    crop=513,
    min_scale=0.5,
    max_scale=2.0,
    learning_rate=0.007,
    warmup_steps=0,
    weight_decay=4e-5,
)
SMALL = TrainingConfig(steps=400, batch_size=8, crop=97, learning_rate=0.2)


@dataclass(frozen=True)
class RunConfig:
    """What to train on what, how, and where to.

    Attributes:
        data, train_split, val_split: see :func:`deeplab_kernels.models.data.open_dataset`; val_split "" validates
            nothing.
        model, options: ``models.build(model, ..., **options)``.
        skip_classifier: start the last layer afresh even where that of ``init`` is for as many classes.
        near_identity: see :func:`deeplab_kernels.models.training.start_near_identity`.
        init: source of pretrained weights for :func:`deeplab_kernels.models.load_weights`; "" for none.
        crf: a fully connected CRF as the last stage, whose weights and compatibility are trained, too.
        crf_sigmas: train its standard deviations as well: their gradients, through the lattice, make a step slower.
        output: folder to write into.
        validate_every, checkpoint_every: steps; 0 only at the end.
        device: "auto" is cuda where there is one.
        workers: processes that prepare samples.
        threads: CPU threads; 0 for torch's choice.
        tensorboard: a log for TensorBoard beside log.csv.
    """

    data: str
    model: str = "deeplabv3plus_small"
    options: dict[str, Any] = field(default_factory=dict)
    train_split: str = "train"
    val_split: str = "val"
    output: str = "training"
    init: str = ""
    skip_classifier: bool = False
    near_identity: bool = False
    crf: bool = False
    crf_sigmas: bool = False
    validate_every: int = 0
    checkpoint_every: int = 500
    device: str = "auto"
    workers: int = 2
    threads: int = 0
    channels_last: bool = True
    compile: bool = False
    tensorboard: bool = False
    training: TrainingConfig = PAPER

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if str(item.type) in ("str", "int", "bool") and not is_a(value, str(item.type)):
                raise TypeError(f"{item.name} must be {'an' if item.type == 'int' else 'a'} {item.type}, got {value!r}")
        if not isinstance(self.options, dict):
            raise TypeError(f"options must be a table, got {self.options!r}")
        if self.crf_sigmas and not self.crf:
            raise ValueError("crf_sigmas needs crf: without it there is no CRF to train")
        for name in ("validate_every", "checkpoint_every", "workers", "threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def model_options(self) -> dict[str, Any]:
        """``options``, and with ``crf`` what of the CRF is trained; options of the CRF itself stand in ``options``."""
        if not self.crf:
            return self.options
        given = self.options.get("crf")
        chosen = [name for name in TRAINABLE if self.crf_sigmas or not name.endswith("sigma")]
        return {**self.options, "crf": {"trainable": chosen, **(given if isinstance(given, dict) else {})}}

    def flat(self) -> dict[str, Any]:
        """Every setting by its name; what is None is left out, and ``steps`` where there are stages."""
        values = {**asdict(self), **asdict(self.training)}
        del values["training"]
        values["stages"] = [_given(stage) for stage in values["stages"]]
        del values["steps" if self.training.stages else "stages"]
        return _given(values)


# What a continued run may have otherwise: nothing of it changes the weights.
HOW_NOT_WHAT = frozenset(("output", "workers", "validate_every", "checkpoint_every", "tensorboard"))
_TRAINING = tuple(item.name for item in fields(TrainingConfig))
_RUN = tuple(item.name for item in fields(RunConfig) if item.name != "training")
NAMES = (*_RUN, *_TRAINING)


def run_config(values: Mapping[str, Any]) -> RunConfig:
    """The settings by their names; the others have the values of :data:`SMALL` for a model ..._small, and of
    :data:`PAPER` otherwise.

    Raises:
        UserError: an unknown name (the message gives close ones), ``data`` is missing, or a value is not allowed.
    """
    for name in values:
        if name not in NAMES:
            close = difflib.get_close_matches(name, NAMES, n=3, cutoff=0.5)
            raise UserError(
                f"there is no setting {name!r}; " + (f"did you mean {' or '.join(close)}?" if close else "")
            )
    if "data" not in values:
        raise UserError("data is missing: what to train on, such as generated or voc:PATH")
    if "steps" in values and values.get("stages"):
        raise UserError("steps and stages exclude each other: every stage has its own steps")
    small = str(values.get("model", "deeplabv3plus_small")).endswith("_small")
    training = dict(_shallow(SMALL if small else PAPER))
    training.update({name: value for name, value in values.items() if name in _TRAINING})
    run = {name: value for name, value in values.items() if name in _RUN}
    try:
        training["stages"] = tuple(_stage(stage) for stage in training["stages"])
        return RunConfig(
            **{"near_identity": small and not values.get("init"), **run}, training=TrainingConfig(**training)
        )
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from None


def _shallow(config: TrainingConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _TRAINING}


def _stage(value: object) -> Stage:
    names = [item.name for item in fields(Stage)]
    if not isinstance(value, dict) or "steps" not in value or any(name not in names for name in value):
        raise UserError(f"a stage is a table with steps, and {', '.join(names[1:])} where they differ; got {value!r}")
    return Stage(**value)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """ "name: old, now new" for the settings that change what a run gives."""
    before, now = old.flat(), new.flat()
    names = [name for name in NAMES if name not in HOW_NOT_WHAT and before.get(name) != now.get(name)]
    return [f"{name} was {before.get(name, 'not given')}, now {now.get(name, 'not given')}" for name in names]


def read_toml(path: Path) -> dict[str, Any]:
    """The settings in a TOML file.

    Raises:
        UserError: it is no TOML.
        OSError: there is no such file.
    """
    return _parsed(path.read_bytes().decode("utf-8", errors="replace"), str(path))


def parse_value(name: str, text: str) -> Any:
    """A list or table as TOML writes it on one line."""
    return _parsed(f"value = {text}", f"{name} {text}")["value"]


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:
        raise ImportError("settings in TOML need Python 3.11 or newer") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{where}: no TOML ({error})") from None


def to_toml(values: Mapping[str, Any]) -> str:
    return "".join(f"{name} = {_toml(value)}\n" for name, value in values.items())


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k, ensure_ascii=False)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)  # of strings, numbers and bools both write the same
