"""A whole run in a folder: datasets, model, training, validation, logs, checkpoints, the best weights."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from deeplab_kernels.errors import UserError

from ..data import Scene, Scenes, open_dataset
from ..evaluation import ConfusionMatrix, evaluate
from ..registry import build
from ..system import SegmentationModel
from ..weights import load_weights, save_weights_file
from .checkpoint import read_checkpoint, restore, write_checkpoint
from .distributed import process_group, rank_and_size, summed
from .logs import Log
from .optimiser import start_near_identity
from .settings import RunConfig, differences, read_toml, run_config, to_toml
from .trainer import Trainer

CONFIG, CHECKPOINT, WEIGHTS = "config.toml", "checkpoint.pt", "weights.pt"


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop, wrote a checkpoint, and stopped."""

    def __init__(self, signal_number: int, step: int, checkpoint: Path) -> None:
        super().__init__(f"interrupted after step {step}; {checkpoint} is written, --resume continues from there")
        self.signal_number = signal_number


def run(config: RunConfig, *, resume: bool = False) -> dict[str, Any]:
    """Trains as ``config`` says. Under torchrun every process calls it.

    Writes into the folder ``config.output``: config.toml, log.csv, checkpoint.pt, and weights.pt, a weights file of the
    best validation (of the last step where nothing validates).

    Args:
        resume: continue from the folder's checkpoint.

    Returns:
        A summary: plain values.

    Raises:
        UserError: a dataset, model, setting or checkpoint that does not go; a loss that is no longer finite.
        Interrupted: by SIGINT or SIGTERM, after the step under way; a second SIGINT interrupts at once.
        OSError: a file cannot be written.
    """
    with process_group(_device(config.device)) as device:
        try:
            return _Run(config, resume, device).go()
        except FloatingPointError as error:
            raise UserError(f"{error}; --resume continues from the last checkpoint, if there is one") from None
        except torch.OutOfMemoryError:
            raise UserError(
                f"out of memory on {device}: lower batch_size {config.training.batch_size} (and raise accumulation "
                "alike), or crop"
            ) from None


class _Run:
    def __init__(self, config: RunConfig, resume: bool, device: torch.device) -> None:
        self.config, self.device = config, device
        self.rank, self.processes = rank_and_size()
        if config.threads:
            torch.set_num_threads(config.threads)
        self.folder = Path(config.output)
        self.train_set = open_dataset(config.data, config.train_split)
        self.val_set = open_dataset(config.data, config.val_split) if config.val_split else None
        self.classes = len(self.train_set.class_names)
        self._check_folder(resume)
        content = read_checkpoint(self.folder / CHECKPOINT, self.classes) if resume else None
        self.init: str | None = None
        self.model = self._model(weights=content is None)
        self.trainer = Trainer(
            self.model, self.train_set, config.training, workers=config.workers, compile=config.compile
        )
        self.best: dict[str, Any] | None = None
        self.measured: dict[str, Any] = {}
        if content is not None:
            restore(self.folder / CHECKPOINT, content, self.trainer)
            self.best = content["best"]
        self.first_step = self.trainer.step
        self.loss = math.nan

    def _check_folder(self, resume: bool) -> None:
        checkpoint, config = self.folder / CHECKPOINT, self.folder / CONFIG
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"output: {self.folder} is a file, not a folder")
        if not resume and checkpoint.exists():
            raise UserError(f"{checkpoint} exists: --resume continues that run; or give another output")
        if resume:
            if not checkpoint.exists():
                raise UserError(f"there is no {checkpoint} to resume from")
            if config.exists() and (changed := differences(run_config(read_toml(config)), self.config)):
                raise UserError(f"{self.folder} was trained with other settings: {'; '.join(changed)}")

    def _model(self, weights: bool) -> SegmentationModel:
        config, training = self.config, self.config.training
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            try:
                stride = training.all_stages()[0].output_stride
                model = build(config.model, self.classes, stride, **config.model_options())
            except (ValueError, TypeError) as error:
                raise UserError(str(error)) from None
        if weights:
            if config.near_identity:
                start_near_identity(model)
            if config.init:
                self._load_init(model)
        memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        return model.to(self.device, memory_format=memory_format)  # type: ignore[call-overload,no-any-return]

    def _load_init(self, model: SegmentationModel) -> None:
        config = self.config
        report = load_weights(model, config.init, skip_classifier=config.skip_classifier or None)
        afresh = report.untouched()
        self.init = f"{report}; {', '.join(afresh) if afresh else 'nothing'} starts afresh"
        if self.rank == 0:
            print(f"init: {self.init}", file=sys.stderr)

    def go(self) -> dict[str, Any]:
        start = time.perf_counter()
        trainer, main = self.trainer, self.rank == 0
        if main:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / CONFIG).write_text(to_toml(self.config.flat()), encoding="utf-8")
        with (
            _Signals() as signals,
            Log(self.folder, step=trainer.step, tensorboard=self.config.tensorboard) if main else _NoLog() as log,
            tqdm(
                desc="training",
                unit="step",
                total=trainer.planned_steps,
                initial=trainer.step,
                disable=None if main else True,
                dynamic_ncols=True,
            ) as bar,
        ):
            before = log.seconds

            def on_step(step: int, steps: int, loss: float) -> None:
                self.loss = loss
                bar.total = steps
                bar.update(step - bar.n)
                last = step == steps
                self._validate_if(last or _due(step, self.config.validate_every), step, bar)
                row = {"step": step, "learning_rate": trainer.learning_rate(step - 1), "loss": loss}
                seconds = round(before + time.perf_counter() - start, 3)
                log.write({**row, "seconds": seconds, **self.measured})
                bar.set_postfix(loss=f"{loss:.3f}", **self._shown(), refresh=False)
                number = self._agreed(signals.received)
                if number or last or _due(step, self.config.checkpoint_every):
                    self._write_checkpoint()
                if number and not last:
                    raise Interrupted(number, step, self.folder / CHECKPOINT)

            trainer.run(on_step)
        return self._summary(time.perf_counter() - start)

    def _validate_if(self, due: bool, step: int, bar: Any) -> None:
        self.measured = {}
        if not due:
            return
        if self.val_set is not None:
            bar.set_description("validating")
            with self.trainer.evaluated() as model:
                matrix = validate(model, self.val_set, self.classes)
            bar.set_description("training")
            self.measured = {"mean_iou": matrix.mean_iou(), "pixel_accuracy": matrix.pixel_accuracy()}
        # NaN, where no pixel of the validation images counts, is worse than any value.
        better = self.best is None or not self.measured or not self.measured["mean_iou"] <= self.best["mean_iou"]
        if better:
            self.best = {"step": step, **self.measured}
            self._write_weights()

    def _write_weights(self) -> None:
        if self.rank == 0:
            config = self.config
            options = dict(config.model_options())
            if (stride := self.config.training.all_stages()[-1].output_stride) is not None:
                options["output_stride"] = stride
            with self.trainer.evaluated() as model:
                save_weights_file(
                    self.folder / WEIGHTS,
                    model,
                    name=config.model,
                    class_names=self.train_set.class_names,
                    palette=self.train_set.palette,
                    options=options,
                    notes={**(self.best or {}), "data": config.data, "seed": config.training.seed},
                )

    def _write_checkpoint(self) -> None:
        if self.rank == 0:
            write_checkpoint(self.folder / CHECKPOINT, self.trainer, classes=self.classes, best=self.best)

    def _agreed(self, signal_number: int) -> int:
        """The signal that any of the processes got: all stop after the same step."""
        if self.processes == 1:
            return signal_number
        value = torch.tensor(signal_number, device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def _shown(self) -> dict[str, str]:
        return {} if not self.best or "mean_iou" not in self.best else {"mIoU": f"{self.best['mean_iou']:.3f}"}

    def _summary(self, seconds: float) -> dict[str, Any]:
        config = self.config
        return {
            "model": config.model,
            "data": config.data,
            "init": self.init,
            "classes": self.classes,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "images": len(self.train_set),
            "steps": self.trainer.step,
            "steps_of_this_call": self.trainer.step - self.first_step,
            "processes": self.processes,
            "loss": None if math.isnan(self.loss) else self.loss,
            "best": {k: None if math.isnan(v) else v for k, v in (self.best or {}).items()},
            "seconds": round(seconds, 3),
            "output": str(self.folder),
            "weights": str(self.folder / WEIGHTS),
        }


def validate(model: nn.Module, scenes: Scenes, num_classes: int) -> ConfusionMatrix:
    """Segments the scenes at their own size, divided among the processes; the matrix is that of all."""
    part = _Part(scenes, *rank_and_size())
    matrix = evaluate(model, part, num_classes).matrix if len(part) else ConfusionMatrix(num_classes)
    device = next(model.parameters()).device
    matrix.counts = summed(torch.from_numpy(matrix.counts).to(device)).cpu().numpy()
    return matrix


@dataclass(frozen=True)
class _Part:
    """Every ``processes``-th scene, from ``rank`` on."""

    scenes: Scenes
    rank: int
    processes: int

    def __len__(self) -> int:
        return len(range(self.rank, len(self.scenes), self.processes))

    def __getitem__(self, index: int, /) -> Scene:
        return self.scenes[self.rank + index * self.processes]


class _Signals:
    """Within it SIGINT and SIGTERM are only noted in ``received``; a second SIGINT interrupts at once. In another
    thread than the main one nothing changes."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _NoLog:
    """The log of the processes that write none."""

    seconds = 0.0

    def write(self, row: dict[str, Any]) -> None:
        pass

    def __enter__(self) -> _NoLog:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _device(name: str) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
