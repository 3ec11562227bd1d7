"""Frames of a video: which, how large, upright, exact by seeking, and errors for what is no video."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from support.clips import coded, decoded, rotate, write_clip
from support.patterns import pattern

from qvl.runtime.errors import Cancelled, VideoError
from qvl.runtime.vision.preprocess import Preprocessor
from qvl.runtime.vision.video import frame_indices, frame_size, load_video
from qvl.runtime.vision.video_options import VideoOptions

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden" / "vision_frames.npz"
SMALL = VideoOptions(min_pixels=3136, max_pixels=64 * 784)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 seconds at 30 frames a second."""
    return write_clip(tmp_path_factory.mktemp("video") / "twenty seconds.mp4", 600)


# Which frames, and how large


def test_indices_and_sizes_equal_qwen_vl_utils() -> None:
    golden = np.load(GOLDEN)
    ends = np.cumsum(golden["counts"])
    assert len(ends) > 300
    for case, size, expected in zip(
        golden["cases"].tolist(),
        golden["sizes"].tolist(),
        np.split(golden["indices"], ends[:-1]),
        strict=True,
    ):
        total, source_fps, fps, least, most, height, width = case
        options = VideoOptions(fps=fps, min_frames=int(least), max_frames=int(most))
        got = frame_indices(int(total), source_fps, options)
        assert got == expected.tolist()
        assert frame_size(int(height), int(width), len(got), Preprocessor(), options) == tuple(size)


@given(st.integers(1, 200_000), st.floats(1, 240), st.floats(0.1, 60))
def test_indices_are_even_in_number_rising_and_within_the_video(total: int, rate: float, fps: float) -> None:
    indices = frame_indices(total, rate, VideoOptions(fps=fps))
    assert indices[0] == 0
    assert len(indices) % 2 == 0 or total == 1
    assert len(indices) <= 768
    assert all(a < b for a, b in pairwise(indices))
    assert indices[-1] == total - 1


@given(st.integers(1, 768), st.integers(20, 4000), st.floats(1, 3))
def test_frames_stay_within_the_budgets(n: int, short: int, ratio: float) -> None:
    options = VideoOptions()
    height, width = frame_size(short, int(short * ratio), n, Preprocessor(), options)
    assert height * width <= options.max_pixels
    # A frame is never smaller than min_pixels, rounded up to whole tokens, even if the total then exceeds.
    assert n / 2 * height * width <= options.total_pixels or height * width <= 1.3 * options.min_pixels


def test_the_bound_of_a_picture_holds_for_frames() -> None:
    small = Preprocessor().with_pixels(max_pixels=32 * 784)
    height, width = frame_size(1080, 1920, 8, small, VideoOptions())
    assert height * width <= 32 * 784


def test_two_frames_a_second(clip: Path) -> None:
    video = load_video(clip, Preprocessor(), SMALL)
    assert len(video.indices) == 40
    assert video.indices[0] == 0 and video.indices[-1] == 599
    assert video.seconds[1] == pytest.approx(video.indices[1] / 30)
    assert video.source_size == (112, 168)
    assert video.frames.dtype == np.uint8 and video.frames.shape == (40, 112, 168, 3)


def test_default_sizes_are_those_of_training(clip: Path) -> None:
    video = load_video(clip, Preprocessor(), VideoOptions(fps=0.1))
    n, height, width, _ = video.frames.shape
    assert n == 4 and 128 * 784 <= height * width <= 768 * 784


# Reading


@pytest.mark.parametrize(
    ("codec", "suffix", "pixels"),
    [
        ("mpeg4", "mp4", "yuv420p"),
        ("mjpeg", "avi", "yuvj420p"),
        ("libvpx", "webm", "yuv420p"),
        ("ffv1", "mkv", "yuv420p"),
    ],
)
@pytest.mark.parametrize("fps", [0.2, 15.0], ids=["seeking", "decoding on"])
def test_the_frames_are_the_ones_asked_for(
    codec: str, suffix: str, pixels: str, fps: float, tmp_path: Path
) -> None:
    path = write_clip(tmp_path / f"clip.{suffix}", 400, codec, pixels=pixels)
    video = load_video(path, Preprocessor(), VideoOptions(fps=fps, min_pixels=3136))
    assert [decoded(frame) for frame in video.frames] == list(video.indices)


def test_colours_are_rgb(clip: Path) -> None:
    frame = load_video(clip, Preprocessor(), SMALL).frames[0]
    np.testing.assert_allclose(frame[10, 84], (220, 10, 10), atol=12)


@pytest.mark.parametrize(
    ("matrix", "shape", "band"),
    [
        ((0, 1, -1, 0), (168, 112), (84, 100)),  # a quarter turn clockwise: the band is at the right
        ((-1, 0, 0, -1), (112, 168), (100, 84)),  # upside down: at the bottom
        ((0, -1, 1, 0), (168, 112), (84, 10)),  # a quarter turn the other way: at the left
    ],
)
def test_rotation_in_the_file_is_honoured(
    matrix: tuple[int, int, int, int], shape: tuple[int, int], band: tuple[int, int], tmp_path: Path
) -> None:
    video = load_video(rotate(write_clip(tmp_path / "phone.mp4", 8), matrix), Preprocessor(), SMALL)
    assert video.source_size == shape
    np.testing.assert_allclose(video.frames[0][band], (220, 10, 10), atol=25)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_very_short_files(n: int, tmp_path: Path) -> None:
    video = load_video(
        write_clip(tmp_path / "short.avi", n, "mjpeg", pixels="yuvj420p"), Preprocessor(), SMALL
    )
    assert len(video.indices) == {1: 1, 2: 2, 3: 2, 5: 4}[n]
    assert Preprocessor().patchify(video.frames).grid_thw[0] == (len(video.indices) + 1) // 2


def test_a_file_cut_short_gives_what_it_has(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "cut.avi", 300, "mjpeg", pixels="yuvj420p")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    video = load_video(path, Preprocessor(), SMALL)
    assert 100 < video.indices[-1] < 299
    assert decoded(video.frames[-1]) == video.indices[-1]


def test_a_length_that_is_not_in_the_header_is_counted(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "live.webm", 90, "libvpx")
    data = bytearray(path.read_bytes())
    at = data.index(b"\x44\x89\x88")  # Matroska's Duration, an 8 byte float; 0xEC is a void element
    data[at : at + 11] = b"\xec\x89" + bytes(9)
    path.write_bytes(data)
    assert load_video(path, Preprocessor(), SMALL).indices[-1] == 89


def test_a_folder_of_frames_in_natural_order(tmp_path: Path) -> None:
    for index in range(11):
        Image.fromarray(coded(index)).save(tmp_path / f"frame{index}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    (tmp_path / ".hidden.png").write_text("nor this")
    video = load_video(tmp_path, Preprocessor(), SMALL)
    assert [decoded(frame) for frame in video.frames] == list(range(11))
    assert Preprocessor().patchify(video.frames).grid_thw[0] == 6
    assert video.seconds[2] == pytest.approx(1.0)


def test_a_folder_with_a_rate_is_sampled_like_a_clip(tmp_path: Path) -> None:
    frames = [coded(index) for index in range(60)]
    options = VideoOptions(min_pixels=3136, source_fps=10.0)
    video = load_video(frames, Preprocessor(), options)
    assert len(video.indices) == 12 and video.indices[-1] == 59
    assert [decoded(frame) for frame in video.frames] == list(video.indices)


def test_more_frames_than_allowed_are_thinned_evenly() -> None:
    frames = np.stack([coded(index) for index in range(30)])
    video = load_video(frames, Preprocessor(), VideoOptions(min_pixels=3136, max_frames=8))
    assert len(video.indices) == 8
    assert [decoded(frame) for frame in video.frames] == list(video.indices)


def test_patches_equal_those_of_the_preprocessor_alone() -> None:
    frames = np.stack([pattern(120, 90, seed) for seed in range(5)])
    options = VideoOptions(min_pixels=3136, max_pixels=16 * 784)
    video = load_video(frames, Preprocessor(), options)
    expected = Preprocessor(max_pixels=16 * 784).video(frames)
    got = Preprocessor().patchify(video.frames)
    assert got.grid_thw == expected.grid_thw
    np.testing.assert_array_equal(got.pixel_values, expected.pixel_values)


def test_progress_and_stopping(clip: Path) -> None:
    seen: list[float] = []
    load_video(clip, Preprocessor(), SMALL, seen.append)
    assert len(seen) == 40 and seen[-1] == 1.0 and seen == sorted(seen)
    with pytest.raises(Cancelled):
        load_video(clip, Preprocessor(), SMALL, lambda done: done < 0.5)


def test_only_the_frames_taken_are_held(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each frame is resized before the next is read."""
    events: list[str] = []
    resize = Preprocessor.resize

    def watched(self: Preprocessor, *args: object) -> NDArray[np.uint8]:
        events.append("resized")
        return resize(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Preprocessor, "resize", watched)
    load_video(clip, Preprocessor(), SMALL, lambda done: events.append("told"))
    assert events == ["resized", "told"] * 40


def test_the_runtime_does_not_import_pyav_by_itself() -> None:
    code = "import sys, qvl.runtime.vision.video; sys.exit('av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# What is refused


def refused(source: object, *words: str, options: VideoOptions = SMALL) -> None:
    with pytest.raises(VideoError) as caught:
        load_video(source, Preprocessor(), options)  # type: ignore[arg-type]
    for word in words:
        assert word in caught.value.message


def test_missing_and_empty(tmp_path: Path) -> None:
    refused(tmp_path / "none.mp4", str(tmp_path / "none.mp4"), "no such file")
    refused(tmp_path, str(tmp_path), "folder without pictures")
    refused([], "without frames")
    refused("nul\0byte.mp4", "cannot be read")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "empty"),
        (b"#EXTM3U\n#EXTINF:1,\nhttp://example.org/x.ts\n", "text"),
        (b"%PDF-1.7\n\x00\x01", "PDF"),
        (b"\x00\x00\x00\x18ftypisom\x00\x00\x02\x00isomiso2" + bytes(200), "MP4"),
        (bytes(range(256)) * 4, "begins with"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, found: str) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    refused(path, str(path), found, "expected a video")


def test_ffmpeg_does_not_write_to_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"\x00\x00\x00\x18ftypisom\x00\x00\x02\x00isomiso2" + bytes(200))
    code = (
        "import sys; from qvl.runtime.vision.frames import open_frames\n"
        "try: open_frames(sys.argv[1])\n"
        "except ValueError as error: print(type(error).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("VideoError\n", "")


def test_a_picture_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    Image.fromarray(coded(1)).save(path)
    refused(path, str(path), "JPEG")


def test_frames_of_several_sizes_and_a_bad_frame(tmp_path: Path) -> None:
    Image.fromarray(pattern(60, 60)).save(tmp_path / "1.png")
    Image.fromarray(pattern(60, 62)).save(tmp_path / "2.png")
    refused(tmp_path, "frame 1 is 62x60", "60x60")
    (tmp_path / "2.png").write_text("no picture")
    refused(tmp_path, str(tmp_path), "2.png", "text")


def test_aspect_ratio_names_the_source() -> None:
    refused(np.zeros((4, 2, 500, 3), np.uint8), "a video of 4 frames", "aspect ratio")


@pytest.mark.parametrize(
    "options",
    [
        VideoOptions(fps=0),
        VideoOptions(fps=float("nan")),
        VideoOptions(source_fps=-1.0),
        VideoOptions(min_frames=0),
        VideoOptions(min_frames=9, max_frames=8),
        VideoOptions(total_pixels=0),
    ],
)
def test_options_out_of_range(options: VideoOptions) -> None:
    refused([coded(0)], options=options)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read anything")
def test_unreadable(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "locked.avi", 2, "mjpeg", pixels="yuvj420p")
    path.chmod(0)
    refused(path, str(path), "cannot be read")
