"""Which scene, cut and mirrored how, is which part of which step: it depends on the seed and its number alone."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deeplab_kernels.errors import UserError

from ..data import Scene, Scenes
from .config import TrainingConfig

_ORDER, _AUGMENTATION = 1, 2  # streams of random numbers that must not coincide


Failure = UserError | OSError


class Samples(Dataset[Scene | Failure]):
    """Augmented scenes by their number in the run, from 0 without end: every scene once, in random order, then every
    scene again in another order. A number's sample is the same in every process, worker and continued run.

    What a file is to blame for (damaged, gone, a label out of range) is returned, not raised: a worker process would
    wrap it.
    """

    def __init__(self, scenes: Scenes, config: TrainingConfig) -> None:
        self.scenes, self.seed, self.augmentation = scenes, config.seed, config.augmentation()
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __getitem__(self, number: int) -> Scene | Failure:
        epoch, position = divmod(number, len(self.scenes))
        if epoch != self._epoch:
            order = np.random.default_rng([self.seed, _ORDER, epoch]).permutation(len(self.scenes))
            self._epoch, self._order = epoch, order
        try:
            scene = self.scenes[int(self._order[position])]
        except (UserError, OSError) as error:
            return error
        return self.augmentation(scene, np.random.default_rng([self.seed, _AUGMENTATION, number]))


def numbers(config: TrainingConfig, step: int, rank: int, processes: int) -> Iterator[list[int]]:
    """The samples of each pass of this process, from ``step`` on. Together the processes take what one process with
    their number times the batch size would."""
    for batch in range(step * config.accumulation, 2**62):
        first = (batch * processes + rank) * config.batch_size
        yield list(range(first, first + config.batch_size))


def batches(
    scenes: Scenes,
    config: TrainingConfig,
    *,
    step: int = 0,
    rank: int = 0,
    processes: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> Generator[tuple[Tensor, Tensor]]:
    """Images (N, crop, crop, 3) and labels (N, crop, crop), both uint8, of one pass after another, without end.

    Args:
        workers: processes that read and augment ahead; the batches are the same for any number.

    Raises:
        UserError, OSError: of the dataset; or a worker was killed.
    """
    loader = DataLoader(
        Samples(scenes, config),
        batch_sampler=_Numbers(config, step, rank, processes),
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_parent,
    )
    try:
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            yield batch
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise UserError(
            f"a process that prepares samples was ended ({error}); if memory is short, lower workers"
        ) from None


class _Numbers:
    """:func:`numbers` as DataLoader takes it, and sends it to workers."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __iter__(self) -> Iterator[list[int]]:
        return numbers(*self.arguments)  # type: ignore[arg-type]


def _collate(samples: list[Scene | Failure]) -> tuple[Tensor, Tensor] | Failure:
    good: list[Scene] = []
    for sample in samples:
        if isinstance(sample, Exception):
            return sample
        good.append(sample)
    return _stacked([s.image for s in good]), _stacked([s.labels for s in good])


def _stacked(arrays: list[NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))


def _leave_signals_to_the_parent(worker: int) -> None:
    # A terminal's Ctrl-C, a scheduler's or timeout's SIGTERM reach the workers, too; the parent finishes its step, for
    # which it may need them, and then tells them to end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
