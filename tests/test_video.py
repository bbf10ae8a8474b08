"""Reading and writing videos, and segmenting them."""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from _commands import small_weights
from PIL import Image

from deeplab_kernels import cli
from deeplab_kernels.errors import UserError
from deeplab_kernels.models.data.video import Frame, VideoWriter, read_video
from deeplab_kernels.models.segmenter import Segmenter

av = pytest.importorskip("av")

RATE = Fraction(30000, 1001)


def frames(count: int = 6, size: tuple[int, int] = (48, 64)) -> list[Frame]:
    """A red field that grows to the right, below a blue bar."""
    out = []
    for n in range(count):
        image = np.zeros((*size, 3), np.uint8)
        image[:, : 8 * (n + 1)] = 200, 0, 0
        image[:16] = 0, 0, 200
        out.append(Frame(image, n / RATE))
    return out


@pytest.fixture
def video(tmp_path) -> Path:
    path = tmp_path / "clip.mp4"
    with VideoWriter(path) as writer:
        for frame in frames():
            writer.write(frame)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return small_weights(tmp_path_factory.mktemp("weights"))


def test_what_is_written_is_read_again(video):
    with read_video(video) as found:
        assert found.length == 6
        read = list(found)
    assert len(read) == 6
    for actual, expected in zip(read, frames(), strict=True):
        assert actual.image.shape == expected.image.shape
        assert actual.image.dtype == np.uint8
        assert abs(actual.time - expected.time) < Fraction(1, 1000)
        difference = np.abs(actual.image.astype(int) - expected.image).mean()
        assert difference < 12  # lossy, and colours are stored at half the resolution
    assert found.damaged == 0
    assert [path.name for path in video.parent.iterdir()] == ["clip.mp4"]


def test_odd_sides_are_continued(tmp_path):
    with VideoWriter(tmp_path / "odd.mp4") as writer:
        writer.write(frames(1, (33, 35))[0])
    with read_video(tmp_path / "odd.mp4") as found:
        assert next(found).image.shape == (34, 36, 3)


def test_a_video_is_turned_upright(video):
    data = video.read_bytes()
    one, zero = (1 << 16).to_bytes(4, "big"), bytes(4)
    start = data.index(one + 3 * zero + one, data.index(b"tkhd"))  # the track's matrix, the identity
    quarter = zero + one + zero + (-(1 << 16)).to_bytes(4, "big", signed=True) + zero  # shown turned clockwise
    video.write_bytes(data[:start] + quarter + data[start + 20 :])
    with read_video(video) as found:
        image = next(found).image
    assert image.shape == (64, 48, 3)
    assert image[30, -3, 2] > 150  # the blue bar on top is now at the right
    assert image[30, 3, 2] < 50


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    one, other = frames(1)[0], frames(1, (32, 32))[0]

    def written(*given: Frame | RuntimeError) -> None:
        with VideoWriter(path) as writer:
            for frame in given:
                if isinstance(frame, RuntimeError):
                    raise frame
                writer.write(frame)

    for given, error in (
        ([one, RuntimeError("stop")], RuntimeError),
        ([RuntimeError("stop")], RuntimeError),
        ([one, other], ValueError),
    ):
        with pytest.raises(error, match=r"stop|one size"):
            written(*given)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]
    with pytest.raises(OSError, match="No such file"), VideoWriter(tmp_path / "no" / "clip.mp4"):
        pass


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "sound"])
def test_no_video(kind, video, tmp_path):
    path = tmp_path / "bad.mp4"
    path.write_bytes({"empty": b"", "text": b"hello", "truncated": video.read_bytes()[:1500], "sound": b""}[kind])
    if kind == "sound":
        with av.open(str(path), "w", format="mp4") as container:
            stream = container.add_stream("aac", rate=16000)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            sound.rate = 16000
            container.mux(stream.encode(sound))
            container.mux(stream.encode(None))
    with pytest.raises(UserError, match=r"bad\.mp4: (not a video|has no video)"), read_video(path) as found:
        list(found)
    with pytest.raises(FileNotFoundError), read_video(tmp_path / "none.mp4"):
        pass


def _damage(path: Path, keep: int) -> None:
    """Overwrites the packets from the ``keep``-th on."""
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    for position, size in packets[keep:]:
        data[position : position + size] = bytes([255]) * size
    path.write_bytes(data)


def test_damaged_packets_are_skipped_and_counted(video):
    _damage(video, 3)
    with read_video(video) as found:
        assert len(list(found)) == 3
        assert found.damaged == 3


def test_no_frame_that_can_be_read(video):
    _damage(video, 0)
    with pytest.raises(UserError, match="no frame of the video can be read"), read_video(video) as found:
        list(found)


def test_segmenter(video, weights):
    segmenter = Segmenter.from_file(weights, batch_size=4)
    with read_video(video) as found:
        expected = [segmenter(frame.image) for frame in found]
    out = list(segmenter.video(video))
    assert len(out) == 6
    for (image, labels), one in zip(out, expected, strict=True):
        assert image.shape == (48, 64, 3)
        assert (labels == one).mean() > 0.99  # a batch may sum in another order


def test_command(video, weights, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["segment", str(video), "--weights", weights, "-o", str(out), "--frames", "--batch", "4"]) == 0
    assert "6 frames of 64 x 48 pixels" in capsys.readouterr().out
    maps = sorted((out / "clip-labels").iterdir())
    assert [path.name for path in maps] == [f"{n:06d}.png" for n in range(6)]
    segmenter = Segmenter.from_file(weights)
    with read_video(video) as original, read_video(out / "clip-overlay.mp4") as shown:
        for path, frame, seen in zip(maps, original, shown, strict=True):
            labels = np.asarray(Image.open(path))
            assert labels.shape == (48, 64)
            assert abs(frame.time - seen.time) < Fraction(1, 1000)
            overlay = np.asarray(segmenter.overlay(frame.image, labels)).astype(int)
            assert np.abs(seen.image - overlay).mean() < 12


def test_command_on_a_folder_with_a_damaged_video(video, weights, tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "good.mp4").write_bytes(video.read_bytes())
    (folder / "none.mp4").write_bytes(b"no video")
    _damage(video, 3)
    (folder / "part.mp4").write_bytes(video.read_bytes())
    Image.new("RGB", (40, 40)).save(folder / "image.png")
    assert cli.main(["segment", str(folder), "--weights", weights, "-o", str(tmp_path / "out"), "--json"]) == 1
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert {Path(item.get("video") or item["photo"]).name for item in result["files"]} == {
        "good.mp4",
        "part.mp4",
        "image.png",
    }
    assert sum(result["files"][0]["classes"].values()) == pytest.approx(1)
    assert [Path(item["file"]).name for item in result["errors"]] == ["none.mp4", "part.mp4"]
    assert captured.err.count("\n") == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "good-overlay.mp4",
        "image-labels.png",
        "image-overlay.png",
        "part-overlay.mp4",
    ]
    assert cli.main(["segment", str(folder / "none.mp4"), "--weights", weights]) == 2
    assert "not a video" in capsys.readouterr().err


def test_without_pyav(video, weights, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert cli.main(["segment", str(video), "--weights", weights]) == 2
    assert "pip install 'deeplab_kernels[video]'" in capsys.readouterr().err
