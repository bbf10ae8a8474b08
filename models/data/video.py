"""Video files, frame by frame, through PyAV (the extra "video")."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deeplab_kernels.errors import UserError

VIDEO_SUFFIXES = frozenset((".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv"))
_TICKS = 60000  # per second, of written videos: whole numbers for the usual rates


class Frame(NamedTuple):
    """image: (H, W, 3) uint8. time: seconds from the first frame."""

    image: NDArray[np.uint8]
    time: Fraction


class Frames(Iterator[Frame]):
    """The frames of a video, decoded when asked for; see :func:`read_video`.

    Attributes:
        length: number of frames by the file's own account, 0 where it gives none.
        damaged: packets so far that could not be decoded.
    """

    def __init__(self, container: Any, where: str) -> None:
        self._container, self._where = container, where
        self._stream = container.streams.video[0]
        self._stream.thread_type = "SLICE"  # threads that decode whole frames lose errors, and sound frames with them
        self.length = int(self._stream.frames)
        self.damaged = 0
        self._frames = self._decoded()

    def __next__(self) -> Frame:
        return next(self._frames)

    def _decoded(self) -> Iterator[Frame]:
        rate = self._stream.average_rate or Fraction(25)
        count, start, last = 0, None, Fraction(-1)
        for picture in self._pictures():
            image = np.rot90(picture.to_ndarray(format="rgb24"), round(picture.rotation / 90))
            known = picture.pts is not None and picture.time_base is not None
            time = picture.pts * picture.time_base if known else (start or Fraction(0)) + count / rate
            start = time if start is None else start
            if time - start <= last:  # times that do not grow
                time = start + last + 1 / rate
            last = time - start
            count += 1
            yield Frame(np.ascontiguousarray(image), last)
        if count == 0:
            raise UserError(f"{self._where}: no frame of the video can be read")

    def _pictures(self) -> Iterator[Any]:
        import av

        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
            except av.FFmpegError:
                self.damaged += 1
                return
            if packet is None:
                return
            try:
                yield from packet.decode()
            except av.FFmpegError:
                self.damaged += 1


@contextlib.contextmanager
def read_video(path: str | os.PathLike[str]) -> Iterator[Frames]:
    """The frames of a video as they are meant to be looked at, turned upright. What cannot be decoded is skipped and
    counted.

    Raises:
        UserError: the file is no video, or has no frame that can be read (this one when frames are asked for).
        OSError: there is no such file, or it may not be read.
        ImportError: PyAV is not installed.
    """
    av, where = require_av("reading a video"), os.fspath(path)
    with open(path, "rb"):  # the system's own errors first
        pass
    try:
        container = av.open(where)
    except (av.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{where}: not a video, or a damaged one ({reason})") from None
    with container:
        if not container.streams.video:
            raise UserError(f"{where}: has no video in it")
        yield Frames(container, where)


class VideoWriter:
    """Writes frames of one size into an MP4 file, with their times. Use as a context manager: the file is there when
    it ends without an error, and else what was there before.

    H.264 where PyAV has an encoder for it, else MPEG-4. Both need even sides: an odd one is continued by a pixel.

    Raises:
        OSError: the file cannot be written.
        ImportError: PyAV is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._av = require_av("writing a video")
        self._target = Path(path)
        self._partial = self._target.with_name(f"{self._target.name}.{os.getpid()}.part")
        self._stream: Any = None

    def __enter__(self) -> VideoWriter:
        with self._partial.open("wb"):
            pass
        self._container = self._av.open(os.fspath(self._partial), "w", format="mp4")
        return self

    def write(self, frame: Frame) -> None:
        """Appends a frame, at its time.

        Raises:
            ValueError: it is of another size than the first.
        """
        image = frame.image
        odd = [n % 2 for n in image.shape[:2]]
        image = np.pad(image, ((0, odd[0]), (0, odd[1]), (0, 0)), mode="edge") if any(odd) else image
        if self._stream is None:
            codec = "libx264" if "libx264" in self._av.codecs_available else "mpeg4"
            self._stream = self._container.add_stream(codec, rate=Fraction(25))
            self._stream.height, self._stream.width = image.shape[:2]
            self._stream.pix_fmt = "yuv420p"
            self._stream.codec_context.time_base = Fraction(1, _TICKS)
        if image.shape[:2] != (self._stream.height, self._stream.width):
            raise ValueError(f"the frames of a video must be of one size, got {image.shape[1]} x {image.shape[0]}")
        picture = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        picture.pts, picture.time_base = round(frame.time * _TICKS), Fraction(1, _TICKS)
        self._container.mux(self._stream.encode(picture))

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            with self._container:
                if kind is None and self._stream is not None:
                    self._container.mux(self._stream.encode(None))
            if kind is None:
                self._partial.replace(self._target)
        finally:
            self._partial.unlink(missing_ok=True)


def require_av(what: str) -> ModuleType:
    """PyAV; ImportError that says what needs it and how to get it."""
    try:
        import av
    except ImportError:
        raise ImportError(f"{what} needs PyAV; pip install 'deeplab_kernels[video]'") from None
    av.logging.set_level(av.logging.PANIC)  # FFmpeg's own messages; errors are raised all the same
    return av
