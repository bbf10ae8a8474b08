"""``python -m deeplab_kernels segment``: label maps and overlays of images and videos."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .._files import written_whole
from ..errors import UserError
from . import _inference_options
from ._inputs import Input, collect, stems

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from ..models.refinement import CRFParameters
    from ..models.segmenter import Segmenter

HELP = "segment images and videos with trained weights: label map, overlay and the share of each class"

EXIT_SOME_FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="an image of any kind that Pillow reads, a video, a folder of them, or a pattern such as 'photos/*.jpg'",
    )
    parser.add_argument("-r", "--recursive", action="store_true", help="look into the folders of folders, too")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help="folder to write into, or for one image the label map's .png file (default: the current folder, "
        "FILE-labels.png and FILE-overlay.png; FILE-overlay.mp4 of a video)",
    )
    parser.add_argument("--skip-existing", action="store_true", help="leave out what has its results already")
    parser.add_argument("--frames", action="store_true", help="of a video, write every label map, too: FILE-labels/")
    parser.add_argument("--legend", action="store_true", help="write legend.png, the colours of the classes")
    parser.add_argument(
        "--max-side", type=int, metavar="N", help="shrink a larger image to N pixels before it is segmented"
    )
    parser.add_argument(
        "--window", type=int, default=769, metavar="N", help="side of the tiles that larger images are cut into"
    )
    parser.add_argument(
        "--classes",
        metavar="NAMES",
        help="names of the classes, where the weights do not have them: voc, cityscapes, ade20k, or a text file with a "
        "name on each line",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    _inference_options.add_inference_arguments(parser)


def run(args: argparse.Namespace) -> int:
    _inference_options.check(args)
    if args.max_side is not None and args.max_side < 1:
        raise UserError(f"--max-side must be at least 1, got {args.max_side}")
    inputs = collect(args.inputs, args.recursive)
    single = len(args.inputs) == len(inputs) == 1 and inputs[0].path == args.inputs[0]
    folder, targets = _targets(args, inputs, single)
    if any(item.is_video for item in inputs):
        from ..models.data.video import require_av

        require_av("reading a video")

    crf = _inference_options.crf(args)
    segmenter = _segmenter(args)
    job = Job(segmenter, args, crf, single)
    if args.legend:
        from ..models.segmenter import legend

        save_png(legend(segmenter.class_names, segmenter.palette), folder / "legend.png")
    tasks = [Task(item.path, target) for item, target in zip(inputs, targets, strict=True)]
    wanted = [task for task in tasks if not (args.skip_existing and task.target.exists())]
    job.videos([task for task, item in zip(tasks, inputs, strict=True) if item.is_video and task in wanted])
    job.images([task for task, item in zip(tasks, inputs, strict=True) if not item.is_video and task in wanted])
    return job.report(skipped=len(tasks) - len(wanted))


def _segmenter(args: argparse.Namespace) -> Segmenter:
    from ..models.segmenter import Segmenter

    options = {"tile": args.window, "margin": args.window // 8, **_inference_options.settings(args)}
    where = {"classes": args.classes or "", "device": device(args.device)}
    return Segmenter.from_pretrained(args.weights, _inference_options.model(args), **where, **options)


class Target(NamedTuple):
    """What is written: of an image the label map and the overlay, of a video the folder of label maps and the video."""

    labels: Path
    overlay: Path

    def exists(self) -> bool:
        return self.overlay.exists() and (self.overlay.suffix == ".mp4" or self.labels.exists())


class Task(NamedTuple):
    path: Path
    target: Target


class Read(NamedTuple):
    """A task whose image was read."""

    task: Task
    image: NDArray[np.uint8]


class Job:
    """Segments one file after the other. What is wrong with one of several does not keep the others from being done; of
    a single file it is raised."""

    def __init__(self, segmenter: Segmenter, args: argparse.Namespace, crf: CRFParameters | None, single: bool) -> None:
        self.segmenter, self.args, self.crf, self.single = segmenter, args, crf, single
        self.results: list[dict[str, Any]] = []
        self.failures: list[tuple[Path, str]] = []

    def images(self, tasks: Sequence[Task]) -> None:
        from tqdm import tqdm

        from ..models.inference import batches_of_one_size

        size = self.segmenter.inference.batch_size
        with tqdm(total=len(tasks), desc="segmenting", unit="image", disable=_hidden(not self.single)) as bar:
            for batch in batches_of_one_size(self._read(tasks), size, lambda read: read.image.shape):
                self._segment(batch)
                bar.update(len(self.results) + len(self.failures) - bar.n)

    def _read(self, tasks: Sequence[Task]) -> Iterator[Read]:
        from ..models.data import read_image

        for task in tasks:
            with self._reported(task.path):
                yield Read(task, read_image(task.path))

    def _segment(self, batch: list[Read]) -> None:
        import numpy as np
        from tqdm import tqdm

        start = time.perf_counter()
        images = np.stack([read.image for read in batch])
        with (
            self._reported(*(read.task.path for read in batch)),
            tqdm(desc="segmenting", unit="tile", disable=_hidden(self.single), leave=False) as tiles,
            tqdm(
                desc="refining", unit="iteration", disable=_hidden(self.single and self.crf is not None), leave=False
            ) as iterations,
        ):
            maps = self.segmenter.segment_batch(
                images,
                max_side=self.args.max_side,
                crf=self.crf,
                on_tile=shown_by(tiles),
                on_iteration=shown_by(iterations),
            )
            seconds = (time.perf_counter() - start) / len(batch)
            for read, labels in zip(batch, maps, strict=True):
                with self._reported(read.task.path):
                    self._write(read, labels, seconds)

    def _write(self, read: Read, labels: NDArray[np.uint8], seconds: float) -> None:
        path, target = read.task
        target.labels.parent.mkdir(parents=True, exist_ok=True)
        save_png(self.segmenter.colourise(labels), target.labels)
        save_png(self.segmenter.overlay(read.image, labels), target.overlay)
        self.results.append(
            {
                "photo": str(path),
                "width": labels.shape[1],
                "height": labels.shape[0],
                "seconds": round(seconds, 3),
                "labels": str(target.labels),
                "overlay": str(target.overlay),
                "classes": self.segmenter.shares(labels),
                "crf": dataclasses.asdict(self.crf) if self.crf else None,
            }
        )

    def videos(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            with self._reported(task.path):
                self._video(task)

    def _video(self, task: Task) -> None:
        import numpy as np
        from tqdm import tqdm

        from ..models.data.video import Frame, VideoWriter, read_video
        from ..models.inference import batches_of_one_size

        path, target = task
        segmenter, size = self.segmenter, self.segmenter.inference.batch_size
        (target.labels if self.args.frames else target.overlay.parent).mkdir(parents=True, exist_ok=True)
        start, count, shape = time.perf_counter(), 0, (0, 0)
        pixels = np.zeros(len(segmenter.class_names), np.int64)
        with (
            read_video(path) as frames,
            VideoWriter(target.overlay) as writer,
            tqdm(total=frames.length or None, desc=path.name, unit="frame", disable=None, leave=False) as bar,
        ):
            for batch in batches_of_one_size(frames, size, lambda frame: frame.image.shape):
                images = np.stack([frame.image for frame in batch])
                maps = segmenter.segment_batch(images, max_side=self.args.max_side, crf=self.crf)
                for frame, labels in zip(batch, maps, strict=True):
                    writer.write(Frame(np.asarray(segmenter.overlay(frame.image, labels)), frame.time))
                    if self.args.frames:
                        save_png(segmenter.colourise(labels), target.labels / f"{count:06d}.png")
                    pixels += np.bincount(labels.ravel(), minlength=len(pixels))
                    count, shape = count + 1, labels.shape
                bar.update(len(batch))
        shares = zip(segmenter.class_names, pixels / pixels.sum(), strict=True)
        self.results.append(
            {
                "video": str(path),
                "frames": count,
                "width": shape[1],
                "height": shape[0],
                "seconds": round(time.perf_counter() - start, 3),
                "labels": str(target.labels) if self.args.frames else None,
                "overlay": str(target.overlay),
                "classes": {name: float(share) for name, share in shares},
                "crf": dataclasses.asdict(self.crf) if self.crf else None,
            }
        )
        if frames.damaged:
            self.failures.append((path, f"{path}: the video is damaged; {count} frames could be read and are done"))

    @contextlib.contextmanager
    def _reported(self, *paths: Path) -> Iterator[None]:
        """Notes an error of one of several files and goes on."""
        from ..cli import describe

        try:
            yield
        except (UserError, OSError, ValueError, MemoryError) as error:
            if self.single:
                raise
            text = describe(error)
            self.failures += [(path, text if str(path) in text else f"{path}: {text}") for path in paths]

    def report(self, skipped: int) -> int:
        """Prints what was done, and on stderr what was not; the exit code."""
        if self.args.json:
            errors = [{"file": str(path), "error": text} for path, text in self.failures]
            summary: dict[str, Any] = {"files": self.results, "skipped": skipped, "errors": errors}
            print(json.dumps(self.results[0] if self.single and self.results else summary, indent=2))
        elif self.single and self.results:
            print(_text(self.results[0]))
        else:
            for result in self.results:
                print(f"{_title(result)}: {result['overlay']}")
            print(f"{len(self.results)} done, {skipped} skipped, {len(self.failures)} with errors")
        for _, text in self.failures:
            print(f"deeplab_kernels segment: error: {text}", file=sys.stderr)
        return EXIT_SOME_FAILED if self.failures else 0


def save_png(picture: Image.Image, path: Path) -> None:
    """Writes the file whole or not at all: --skip-existing takes what is there for done."""
    try:
        with written_whole(path) as partial:
            picture.save(partial, "PNG")
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def _title(result: dict[str, Any]) -> str:
    what = f"{result['frames']} frames of " if "frames" in result else ""
    name = result.get("photo") or result["video"]
    return f"{name}: {what}{result['width']} x {result['height']} pixels, segmented in {result['seconds']:.1f} s"


def _text(result: dict[str, Any]) -> str:
    lines = [_title(result)]
    for name, share in sorted(result["classes"].items(), key=lambda item: -item[1]):
        if share > 0:
            lines.append(f"  {name:<12} {100 * share:6.2f} %")
    lines += [f"labels:  {result['labels']}"] if result["labels"] else []
    return "\n".join([*lines, f"overlay: {result['overlay']}"])


def _hidden(shown: bool) -> bool | None:
    """tqdm's ``disable``: None hides a bar where stderr is no terminal."""
    return None if shown else True


def shown_by(bar: Any) -> Callable[[int, int], None]:
    """A callback (done, total) that moves the progress bar."""

    def on_progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return on_progress


def device(name: str) -> str:
    """``name`` if torch can use it here; a UserError otherwise."""
    import torch

    try:
        kind = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from None
    try:
        torch.empty(1, device=kind)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name


def _targets(args: argparse.Namespace, inputs: Sequence[Input], single: bool) -> tuple[Path, list[Target]]:
    """The folder, and where in it the results of each input go; none of them is an input."""
    output: Path | None = args.output
    if single and not inputs[0].is_video and output is not None and output.suffix.lower() == ".png":
        folder, targets = output.parent, [_beside(output)]
        if not folder.is_dir():
            raise UserError(f"--output: there is no folder {folder}")
    else:
        folder = output or Path()
        if folder.suffix and not folder.is_dir():
            what = "a .png file or a folder" if single and not inputs[0].is_video else "a folder"
            raise UserError(f"--output must be {what}, got {output}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"--output: {folder} is, or lies in, a file, not a folder") from None
        targets = [
            Target(folder / f"{stem}-labels", folder / f"{stem}-overlay.mp4")
            if item.is_video
            else Target(folder / f"{stem}-labels.png", folder / f"{stem}-overlay.png")
            for item, stem in zip(inputs, stems(inputs), strict=True)
        ]
    given = {item.path.resolve() for item in inputs}
    for path in (path for target in targets for path in target):
        if path.resolve() in given:
            raise UserError(f"--output: {path} is the photo itself" if single else f"--output: {path} is an input")
    return folder, targets


def _beside(labels: Path) -> Target:
    return Target(labels, labels.with_name(f"{labels.stem.removesuffix('-labels')}-overlay.png"))
