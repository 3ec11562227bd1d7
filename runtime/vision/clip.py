"""A video file's frames through FFmpeg (PyAV), by their place among the frames of sequential decoding.

The packets' timestamps, read without decoding, say how many frames there are, at which rate, and from which
key frame each can be decoded. Where the decoder does not bear them out (field pictures, hidden frames, raw
streams, joined recordings) the frames are counted by decoding them, and read without seeking.

PyAV is imported when the first video file is opened, not before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.errors import VideoError
from qvl.runtime.files import open_file
from qvl.runtime.resources import default_threads

_BUFFER: Final = 1 << 18  # bytes of a read
_REORDERED: Final = 64  # frames between a packet's place in the file and on the screen; H.264 allows 16
_SEEK_GAIN: Final = 8  # frames that a seek must save
_RATES: Final = (1e-3, 300.0)  # frames a second that a recording may have
_MAX_THREADS: Final = 4
_VP8_SHOWN: Final = 0x10  # RFC 6386, 9.1: show_frame in the first byte of a frame


class CutShort(Exception):
    """The decoder does not give the frames that the packets promise."""


@dataclass(frozen=True)
class Timeline:
    """When a stream's frames are shown, in ticks of its time base, as its packets say.

    Attributes:
        times: int64 [n], rising.
        keys: int64 [k], places among `times` from which decoding can begin.
    """

    times: NDArray[np.int64]
    keys: NDArray[np.int64]

    @classmethod
    def of(cls, packets: Sequence[tuple[int | None, bool]]) -> Timeline | None:
        """From each packet's time and whether it is a key frame; None where times are missing or disagree."""
        if not packets or any(time is None for time, _ in packets):
            return None
        times = np.array([time for time, _ in packets], np.int64)
        order = np.argsort(times, kind="stable")
        rising = times[order]
        if (np.diff(rising) <= 0).any() or np.abs(order - np.arange(len(order))).max() > _REORDERED:
            return None
        keys = np.array([key for _, key in packets], bool)[order]
        return cls(rising, np.flatnonzero(keys))

    def place(self, time: int | None) -> int | None:
        """The place of the frame shown at a time, or None."""
        if time is None:
            return None
        at = int(np.searchsorted(self.times, time))
        return at if at < len(self.times) and self.times[at] == time else None


class Clip:
    """A video file; frames come in RGB and upright, by the file's display matrix.

    Attributes:
        n_frames: how many sequential decoding gives.
        fps: frames a second, on average.

    Raises:
        VideoError: FFmpeg cannot open it, or finds no video track that can be decoded.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path, name: str, kind: str) -> None:
        self.name, self._kind = name, kind
        self._av = _import_av(name)
        self._file = open_file(path)
        self._source = _ClipSource(self._file, path.suffix)
        self._container: Any = None
        self._stream: Any = None
        self._n_open = 0
        try:
            self._rewind()
            self._converter = self._av.video.reformatter.VideoReformatter()
            self.timeline = Timeline.of(self._packets())
            self.n_frames = len(self.timeline.times) if self.timeline else 0
            self.fps: float | None = self._rate()
            if self.timeline is None:
                self.recount()
        except BaseException:
            self.close()
            raise

    def recount(self) -> None:
        """Count the frames by decoding them all; from here on nothing is sought."""
        self.timeline = None
        self.n_frames = sum(1 for _ in self._decode())

    def read(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """Frames at these places, which rise: uint8 [h, w, 3].

        Raises:
            CutShort: the frames are not those counted; `recount` counts them anew.
        """
        frames, at = self._decode(), -1
        for index in indices:
            key = self._key_before(index)
            if key is not None and key > at + _SEEK_GAIN:
                frames = self._decode_near(index)
            found = next((pair for pair in frames if pair[0] >= index), None)
            if found is None or found[0] != index:
                raise CutShort
            at = index
            yield self._rgb(found[1])

    def close(self) -> None:
        """Close the file."""
        if self._container is not None:
            self._container.close()
        self._file.close()

    # the stream ------------------------------------------------------------------------------------

    def _rewind(self) -> None:
        """Open the file anew, at its beginning, with a new decoder."""
        if self._container is not None:
            self._container.close()
        self._container = None
        self._file.seek(0)
        try:
            self._container = self._av.open(
                self._source, metadata_errors="replace", buffer_size=_BUFFER, io_open=_refuse
            )
        except (self._av.FFmpegError, OSError, ValueError) as error:
            raise self._no_video() from error
        if self._container.format.name.endswith("_pipe"):  # FFmpeg's readers of single pictures
            raise VideoError(
                f"{self.name}: expected a video, found a picture", hint="pass it as a picture (`image`)"
            )
        stream = best_stream(self._container.streams.video)
        if stream is None:
            raise VideoError(
                f"{self.name}: no video track that can be decoded",
                hint="convert it with ffmpeg, or name the video itself",
            )
        for other in self._container.streams:
            if other.index != stream.index:
                other.discard = self._av.stream.Discard.all
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = min(_MAX_THREADS, default_threads())
        self._stream = stream

    def _no_video(self) -> VideoError:
        expected, kind = "a video (MP4, MOV, WebM, MKV, AVI, TS, …)", self._kind
        if kind.endswith("video"):
            expected, kind = "a video that can be decoded", f"{kind} that cannot"
        hint = "it may be damaged or cut short; convert it with ffmpeg"
        return VideoError(f"{self.name}: expected {expected}, found {kind}", hint=hint)

    def _packets(self) -> list[tuple[int | None, bool]]:
        """Time and key flag of each packet that shows a frame."""
        found: list[tuple[int | None, bool]] = []
        is_vp8 = self._stream.codec_context.name.startswith(("vp8", "libvpx")) and (
            "vp9" not in self._stream.codec_context.name
        )
        for packet in self._demux():
            if packet.size == 0 or packet.is_discard:
                continue
            if is_vp8 and not memoryview(packet)[0] & _VP8_SHOWN:
                continue
            found.append((packet.pts, packet.is_keyframe))
        return found

    def _demux(self) -> Iterator[Any]:
        """Packets to the end, or to where the file is damaged; none that its end cuts short."""
        held = None
        with contextlib.suppress(self._av.FFmpegError):
            for packet in self._container.demux(self._stream):
                if held is not None and packet.size:
                    yield held
                held = packet if packet.is_corrupt else None
                if held is None:
                    yield packet

    def _rate(self) -> float:
        """Frames a second: the header's where the timestamps agree or are missing, else theirs."""
        low, high = _RATES
        stated = [float(rate) for rate in (self._stream.average_rate, self._stream.guessed_rate) if rate]
        plausible = [rate for rate in stated if low <= rate <= high]
        if self.timeline is None or self.n_frames < 2:
            return plausible[-1] if plausible else 30.0
        span = float(self.timeline.times[-1] - self.timeline.times[0]) * float(self._stream.time_base)
        shown = (self.n_frames - 1) / span
        differ = 0.01 + 1 / self.n_frames  # timestamps are rounded, and the last frame's end is not known
        if plausible and not (low <= shown <= high and abs(plausible[0] / shown - 1) > differ):
            return plausible[0]
        whole = round(shown)  # what uneven timestamps lie around
        return float(whole) if abs(shown - whole) < 0.005 * shown else min(max(shown, low), high)

    # decoding --------------------------------------------------------------------------------------

    def _decode(self) -> Iterator[tuple[int, Any]]:
        """Every frame with its place, from the beginning."""
        self._rewind()
        for at, frame in enumerate(self._frames(self._demux())):
            if self.timeline is not None and self.timeline.place(frame.pts) != at:
                raise CutShort
            yield at, frame

    def _key_before(self, index: int) -> int | None:
        if self.timeline is None:
            return None
        n = int(np.searchsorted(self.timeline.keys, index, side="right"))
        return int(self.timeline.keys[n - 1]) if n else None

    def _decode_near(self, index: int) -> Iterator[tuple[int, Any]]:
        """Frames from a key frame at or before a place, further back each time that a seek lands late."""
        assert self.timeline is not None
        n = int(np.searchsorted(self.timeline.keys, index, side="right"))
        back = 1
        while back <= n:
            frames = self._decode_from(int(self.timeline.keys[n - back]), index)
            first = next(frames, None)
            if first is not None:
                yield first
                yield from frames
                return
            back *= 2
        yield from self._decode()

    def _decode_from(self, key: int, index: int) -> Iterator[tuple[int, Any]]:
        """Frames from where a seek to a key frame lands; none if that is past `index` or no key."""
        assert self.timeline is not None
        try:
            self._container.seek(int(self.timeline.times[key]), stream=self._stream)
        except (self._av.FFmpegError, OSError):  # a file without an index
            return
        packets = self._demux()
        first = next((packet for packet in packets if packet.is_keyframe), None)
        landed = None if first is None else self.timeline.place(first.pts)
        if landed is None or landed > index:
            return
        expected = None
        for frame in self._frames(packets, first):
            at = self.timeline.place(frame.pts)
            if at is None:
                raise CutShort
            if expected is None and at < landed:  # what leads the key frame needs frames before it
                continue
            if expected is None and (at > index or frame.is_corrupt):
                return
            if expected is not None and at != expected:
                raise CutShort
            yield at, frame
            expected = at + 1

    def _frames(self, packets: Iterator[Any], first: Any = None) -> Iterator[Any]:
        """Frames of packets; damaged ones are left out, as in players."""
        if first is not None:
            with contextlib.suppress(self._av.FFmpegError):
                yield from first.decode()
        for packet in packets:
            with contextlib.suppress(self._av.FFmpegError):
                yield from packet.decode()

    def _rgb(self, frame: Any) -> NDArray[np.uint8]:
        has_alpha = any(component.is_alpha for component in frame.format.components)
        made = self._converter.reformat(
            frame, format="rgba" if has_alpha else "rgb24", interpolation="BICUBIC", threads=1
        )
        pixels: NDArray[np.uint8] = made.to_ndarray()
        if has_alpha:  # over white, as pictures are
            alpha = pixels[..., 3:].astype(np.uint16)
            mixed = pixels[..., :3] * alpha + 255 * (255 - alpha)
            pixels = ((mixed + 127) // 255).astype(np.uint8)
        return np.ascontiguousarray(_upright(pixels, _display_matrix(frame)))


def best_stream(streams: Sequence[Any]) -> Any:
    """The track that a player shows: no cover, thumbnails or still; then the largest picture.

    Files of drones and cameras mark a thumbnail track as the default, so that mark only decides a tie.
    """
    kinds = ("attached_pic", "timed_thumbnails", "still_image", "dependent", "metadata")

    def score(stream: Any) -> tuple[bool, bool, int, bool, int]:
        marks = {mark.name for mark in type(stream.disposition) if mark in stream.disposition}
        area = stream.codec_context.width * stream.codec_context.height
        return not marks & {*kinds}, stream.frames != 1, area, "default" in marks, -stream.index

    usable = [stream for stream in streams if stream.codec_context is not None]
    moving = [stream for stream in usable if score(stream)[0]]
    return max(moving, key=score, default=None)


class _ClipSource:
    """A file for FFmpeg, under a name of our own: a file's name may be none that FFmpeg takes."""

    def __init__(self, file: BinaryIO, suffix: str) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell
        self.name = f"video{suffix}" if suffix.isascii() else "video"


def _refuse(url: str, flags: int, options: object) -> object:
    """A video is one file: what a playlist in it names is not opened."""
    raise OSError(f"{url}: not opened")


def _display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """(a, b, c, d) of a turn to the screen by quarters (ISO 14496-12, 8.3.2); else (1, 0, 0, 1), upright."""
    for side in frame.side_data:
        if side.type.name == "DISPLAYMATRIX":
            matrix = np.rint(np.frombuffer(bytes(side), "=i4")[:5] / 65536).astype(int).tolist()
            a, b, _, c, d = matrix
            if sorted(map(abs, (a, b))) == [0, 1] and abs(a) == abs(d) and abs(b) == abs(c):
                return a, b, c, d
    return 1, 0, 0, 1


def _upright(pixels: NDArray[np.uint8], matrix: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """Turn and mirror a frame, (x, y) going to (a*x + c*y, b*x + d*y)."""
    a, b, c, d = matrix
    if a == 0:
        pixels = pixels.transpose(1, 0, 2)
    across, down = (a, d) if a else (c, b)
    return pixels[::down, ::across]


def _import_av(name: str) -> Any:
    try:
        import av
        import av.video.reformatter
    except ImportError as error:
        raise VideoError(f"{name}: PyAV cannot be imported: {error}", hint="pip install av") from error
    return av
