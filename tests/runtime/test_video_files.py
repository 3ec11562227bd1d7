"""Video files as cameras, browsers and recorders leave them: the frames of sequential decoding, always.

Every frame shows its own number, so the truth is in the pixels; ffmpeg, where it is installed, is the second
judge of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from support.clips import coded, decoded, rotate, write_clip

from qvl.runtime.errors import VideoError
from qvl.runtime.vision.clip import Clip
from qvl.runtime.vision.preprocess import Preprocessor
from qvl.runtime.vision.video import VideoFrames, load_video
from qvl.runtime.vision.video_options import VideoOptions

N = 240
H264 = {"bf": "3", "g": "60", "preset": "ultrafast", "x264-params": "scenecut=0:bframes=3:b-adapt=0"}
OPEN_GOP = {"x265-params": "open-gop=1:keyint=40:log-level=none", "preset": "ultrafast"}
FILES: Mapping[str, tuple[str, str | None, Mapping[str, str]]] = {  # name: codec, container, options
    "mp4.mp4": ("libx264", None, H264),
    "fragments.mp4": ("libx264", None, H264),
    "broadcast.ts": ("libx264", "mpegts", H264),
    "camcorder.m2ts": ("libx264", "mpegts", H264),
    "security.h264": ("libx264", "h264", H264),
    "crashed.mkv": ("libx264", "matroska", H264),
    "browser.webm": ("libvpx", "webm", {"deadline": "realtime", "cpu-used": "8"}),
    "hidden.webm": (
        "libvpx",
        "webm",
        {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "60", "cpu-used": "5", "deadline": "good"},
    ),
    "vp9.webm": ("libvpx-vp9", "webm", {"deadline": "realtime", "cpu-used": "8", "g": "60"}),
    "open.mkv": ("libx265", "matroska", OPEN_GOP),
    "open.ts": ("libx265", "mpegts", OPEN_GOP),
    "refresh.ts": ("libx264", "mpegts", {**H264, "x264-params": "intra-refresh=1:keyint=60"}),
    "dvd.mpg": ("mpeg2video", "vob", {"bf": "2", "g": "15"}),
    "mpeg1.mpg": ("mpeg1video", "mpeg", {"g": "12"}),
    "dv.avi": ("mpeg4", "avi", {"bf": "2", "g": "60"}),
    "flash.flv": ("flv", "flv", {"g": "60"}),
    "intra.mov": ("mjpeg", "mov", {}),
}

WRITING: Mapping[str, Mapping[str, str]] = {  # options of the container
    "fragments.mp4": {"movflags": "frag_keyframe+empty_moov"},
    "camcorder.m2ts": {"mpegts_m2ts_mode": "1"},
    "crashed.mkv": {"live": "1"},
    "browser.webm": {"live": "1"},
}


def sampled(path: Path, fps: float = 0.5) -> VideoFrames:
    return load_video(path, Preprocessor(), VideoOptions(fps=fps, min_pixels=3136, max_pixels=64 * 784))


def numbers(video: VideoFrames) -> list[int]:
    return [decoded(frame) for frame in video.frames]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("files")

    def file(name: str) -> Path:
        codec, container, options = FILES[name]
        path = folder / name
        if not path.exists():
            if codec not in av.codecs_available:
                pytest.skip(f"this PyAV has no encoder {codec}")
            pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            write_clip(
                path,
                N,
                codec,
                30,
                pixels=pixels,
                container=container,
                options=options,
                writing=WRITING.get(name),
            )
        return path

    return file


@pytest.mark.parametrize("name", FILES)
def test_frames_are_those_of_sequential_decoding(name: str, files: Callable[[str], Path]) -> None:
    for fps in (0.5, 2.0):
        video = sampled(files(name), fps)
        assert numbers(video) == list(video.indices)
        assert video.indices[-1] == N - 1
    assert len(video.indices) == 16  # eight seconds at two frames a second


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
@pytest.mark.parametrize("name", ["mp4.mp4", "broadcast.ts", "security.h264", "browser.webm", "open.mkv"])
def test_pixels_are_those_of_ffmpeg(name: str, files: Callable[[str], Path]) -> None:
    clip = Clip(files(name), name, "")
    places = [0, 7, 100, 163, N - 1]
    wanted = "+".join(f"eq(n,{place})" for place in places)
    command = ["ffmpeg", "-v", "error", "-i", str(files(name)), "-fps_mode", "passthrough", "-vf"]
    command += [f"select='{wanted}'", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    told = subprocess.run(command, capture_output=True, check=True).stdout
    expected = np.frombuffer(told, np.uint8).reshape(len(places), *coded(0).shape)
    found = np.stack(list(clip.read(places))).astype(int)
    clip.close()
    assert np.abs(found - expected).max() <= 2  # swscale's rounding differs between versions


def test_a_seek_that_lands_late_goes_further_back(
    files: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The container answers each seek with the end of the file, then honestly, then never."""
    container = type(av.open(str(files("mp4.mp4"))))
    assert container is av.container.InputContainer
    asked: list[int] = []
    for lies in (1, 1000):
        clip = Clip(files("mp4.mp4"), "clip", "")
        real = clip._rewind

        def reopened(real: Callable[[], None] = real, clip: Clip = clip, lies: int = lies) -> None:
            real()
            clip._container = _Lying(clip._container, asked, lies)

        monkeypatch.setattr(clip, "_rewind", reopened)
        asked.clear()
        assert [decoded(frame) for frame in clip.read([0, 130, 170])] == [0, 130, 170]
        assert len(asked) >= 2
        clip.close()


class _Lying:
    """A container whose first seeks land at the end."""

    def __init__(self, container: av.container.InputContainer, asked: list[int], lies: int) -> None:
        self._container, self._asked, self._lies = container, asked, lies

    def seek(self, time: int, **options: object) -> None:
        self._asked.append(time)
        self._container.seek(time if len(self._asked) > self._lies else 10**9, **options)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> object:
        return getattr(self._container, name)


# Rates


def test_a_variable_rate_as_phones_record(tmp_path: Path) -> None:
    times = [i / 30 if i < 120 else 4 + (i - 120) / 15 for i in range(N)]
    path = write_clip(tmp_path / "phone.mp4", N, "libx264", times=times, options=H264)
    for fps in (0.5, 2.0):
        video = sampled(path, fps)
        assert numbers(video) == list(video.indices)
    clip = Clip(path, "phone", "")
    assert clip.fps == pytest.approx(20, rel=0.02)
    clip.close()


def test_a_rate_that_is_implausible_comes_from_the_timestamps(tmp_path: Path) -> None:
    """As MediaRecorder writes WebM: milliseconds for a time base, no duration of a frame, uneven times."""
    rng = np.random.default_rng(5)
    times = [round(i / 30 + rng.uniform(0, 0.014), 3) for i in range(N)]
    options = {"deadline": "realtime", "cpu-used": "8"}
    path = write_clip(
        tmp_path / "rec.webm", N, "libvpx", 1000, times=times, options=options, writing={"live": "1"}
    )
    data = path.read_bytes()
    at = data.find(b"\x23\xe3\x83")  # Matroska's DefaultDuration; 0xEC is a void element
    if at >= 0:
        size = 4 + (data[at + 3] & 0x7F)
        path.write_bytes(data[:at] + bytes([0xEC, 0x80 | size - 2]) + bytes(size - 2) + data[at + size :])
    video = sampled(path, 2.0)
    assert len(video.indices) == 16 and video.indices[-1] == N - 1
    assert numbers(video) == list(video.indices)


@pytest.mark.parametrize("rate", [Fraction(30000, 1001), Fraction(24000, 1001), Fraction(25), Fraction(60)])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_plausible_rates_are_the_files_own(rate: Fraction, suffix: str, tmp_path: Path) -> None:
    path = write_clip(tmp_path / f"a.{suffix}", 60, "mpeg4", float(rate))
    clip = Clip(path, "a", "")
    assert clip.fps == pytest.approx(float(rate), rel=1e-3)
    clip.close()


# Tracks


def two_tracks(path: Path, small_first: bool, default: int | None = None, **marks: str) -> Path:
    """A track of numbered frames at 25 a second, and one of grey 64x48 at one a second."""
    with av.open(str(path), "w") as out:
        streams = {}
        for name in ("small", "large") if small_first else ("large", "small"):
            streams[name] = out.add_stream("libx264", rate=25 if name == "large" else 1, options=H264)
        height, width, _ = coded(0).shape
        streams["large"].height, streams["large"].width = height, width
        streams["small"].height, streams["small"].width = 48, 64
        for stream in out.streams:
            stream.pix_fmt = "yuv420p"
            stream.disposition = 1 if stream.index == default else 0
        for i in range(50):
            out.mux(streams["large"].encode(av.VideoFrame.from_ndarray(coded(i))))
        for _ in range(2):
            grey = np.full((48, 64, 3), 128, np.uint8)
            out.mux(streams["small"].encode(av.VideoFrame.from_ndarray(grey)))
        for stream in streams.values():
            out.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("small_first", [True, False])
@pytest.mark.parametrize("default", [None, 0, 1])
def test_the_main_track_is_taken(suffix: str, small_first: bool, default: int | None, tmp_path: Path) -> None:
    video = sampled(two_tracks(tmp_path / f"two.{suffix}", small_first, default), 2.0)
    assert video.source_size == coded(0).shape[:2]
    assert numbers(video) == list(video.indices) and len(video.indices) == 4


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
@pytest.mark.parametrize("first", [True, False])
def test_a_cover_is_not_the_video(first: bool, tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", 50, "libx264", 25, options=H264)
    cover = ["-f", "lavfi", "-i", "color=red:size=900x900:duration=0.04:rate=25"]
    command = ["ffmpeg", "-v", "error", "-i", str(tmp_path / "a.mp4"), *cover]
    command += ["-map", "1", "-map", "0"] if first else ["-map", "0", "-map", "1"]
    n = 0 if first else 1
    command += [f"-c:v:{1 - n}", "copy", f"-c:v:{n}", "mjpeg", f"-disposition:v:{n}", "attached_pic"]
    subprocess.run([*command, str(tmp_path / "b.mp4")], check=True)
    assert numbers(sampled(tmp_path / "b.mp4", 2.0)) == [0, 16, 33, 49]


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 48000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    with pytest.raises(VideoError, match=r"song\.mp4: no video track that can be decoded"):
        sampled(path)


# Names, and files that are damaged or joined


@pytest.mark.parametrize(
    "name",
    [
        "http:x.mp4",
        "file:a.mp4",
        "-y.mp4",
        "concat:a|b.mp4",
        "a%03d.mp4",
        "写真　一.mp4",
        "no suffix",
        "b.txt",
    ],
)
def test_a_name_is_only_a_name(name: str, tmp_path: Path) -> None:
    if os.name == "nt" and any(c in name for c in ":|"):
        pytest.skip("Windows has no such names")
    write_clip(tmp_path / "clip.mp4", 8, fps=4).replace(tmp_path / name)
    assert numbers(sampled(tmp_path / name, 2.0)) == [0, 2, 5, 7]


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no UTF-8 are Linux's")
def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4"))
    write_clip(tmp_path / "clip.mp4", 8, fps=4).replace(path)
    assert numbers(sampled(path, 2.0)) == [0, 2, 5, 7]


def test_metadata_that_is_no_utf8(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mkv", 8, fps=4)
    data = path.read_bytes()
    assert b"Lavf" in data
    path.write_bytes(data.replace(b"Lavf", b"\xe9\xff\xc3f"))
    assert numbers(sampled(path, 2.0)) == [0, 2, 5, 7]


def test_joined_recordings_are_read_to_the_end(tmp_path: Path) -> None:
    """`cat a.ts b.ts`: times begin anew, and the second part is of another size."""
    write_clip(tmp_path / "a.ts", 60, "libx264", options=H264)
    larger = (np.kron(coded(i), np.ones((2, 2, 1), np.uint8)) for i in range(60, 120))
    write_clip(tmp_path / "b.ts", larger, "libx264", options=H264)
    (tmp_path / "c.ts").write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    video = sampled(tmp_path / "c.ts", 2.0)
    assert video.indices[-1] == 119 and video.source_size == coded(0).shape[:2]
    assert numbers(video) == list(video.indices)


@pytest.mark.parametrize("name", ["crashed.mkv", "broadcast.ts", "dvd.mpg", "fragments.mp4", "dv.avi"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_recording_that_breaks_off(
    name: str, share: float, files: Callable[[str], Path], tmp_path: Path
) -> None:
    data = files(name).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: int(len(data) * share)])
    video = sampled(path)
    assert 20 < video.indices[-1] < N - 1
    assert numbers(video)[:-1] == list(video.indices)[:-1]  # of the last, a part may be missing


def test_a_frame_that_is_damaged_is_left_out(files: Callable[[str], Path], tmp_path: Path) -> None:
    data = bytearray(files("intra.mov").read_bytes())
    at = data.find(b"\xff\xd8", len(data) // 2)
    data[at : at + 700] = bytes(700)  # one frame's headers and tables
    path = tmp_path / "damaged.mov"
    path.write_bytes(data)
    clip = Clip(path, "damaged", "")
    clip.recount()
    found = [decoded(frame) for frame in clip.read(range(clip.n_frames))]
    clip.close()
    assert len(found) == N - 1 and len(set(range(N)) - set(found)) == 1
    video = sampled(path, 15.0)
    assert numbers(video) == [found[index] for index in video.indices]


def test_a_picture_is_pointed_to_the_right_flag(tmp_path: Path) -> None:
    from PIL import Image

    for kind in ("png", "webp", "tiff", "bmp", "gif"):
        Image.fromarray(coded(3)).save(tmp_path / f"a.{kind}")
        with pytest.raises(VideoError, match="picture") as caught:
            sampled(tmp_path / f"a.{kind}")
        assert "`image`" in (caught.value.hint or "")


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_animated_pictures_are_videos(kind: str, tmp_path: Path) -> None:
    from PIL import Image

    frames = [Image.fromarray(coded(i)) for i in range(30)]
    options = {"lossless": True} if kind == "webp" else {}
    frames[0].save(
        tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], duration=100, loop=0, **options
    )
    video = sampled(tmp_path / f"a.{kind}", 2.0)
    assert len(video.indices) == 6 and numbers(video) == list(video.indices)


def test_transparent_frames_are_shown_over_white(tmp_path: Path) -> None:
    path = tmp_path / "alpha.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=4)
        stream.width, stream.height, stream.pix_fmt = 84, 56, "bgra"
        for _ in range(4):
            rgba = np.zeros((56, 84, 4), np.uint8)
            rgba[:, 42:] = (220, 10, 10, 255)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(rgba, "rgba")))
        out.mux(stream.encode())
    frame = sampled(path, 2.0).frames[0]
    assert frame[20, 10].tolist() == [255, 255, 255]
    np.testing.assert_allclose(frame[20, 70], (220, 10, 10), atol=2)


@pytest.mark.parametrize(
    ("matrix", "red"),
    [((-1, 0, 0, 1), "top"), ((1, 0, 0, -1), "bottom"), ((0, 1, 1, 0), "left"), ((0, -1, -1, 0), "right")],
)
def test_mirrored_frames_as_front_cameras_record(
    matrix: tuple[int, int, int, int], red: str, tmp_path: Path
) -> None:
    frame = sampled(rotate(write_clip(tmp_path / "a.mp4", 4, fps=4), matrix), 2.0).frames[0]
    edges = {"top": frame[8], "bottom": frame[-8], "left": frame[:, 8], "right": frame[:, -8]}
    assert [name for name, edge in edges.items() if edge[:, 0].mean() > 150 > 2 * edge[:, 1].mean()] == [red]
