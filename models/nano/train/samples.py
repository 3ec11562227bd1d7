"""Draw `models/samples`: pictures of odd sizes and kinds of file, two clips, and their true answers.

    python -m qvl.models.nano.train.samples --out models/samples

Seeds here are outside of those that training and evaluation use.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from qvl.models.nano.train.draw import draw_scene
from qvl.models.nano.train.questions import box_text, describe_text, names
from qvl.models.nano.train.reading import Page, sample_page
from qvl.models.nano.train.sequences import Clip, sample_clip, sample_pair
from qvl.models.nano.train.world import Scene, sample_scene

SEED = 31_000_000
Record = dict[str, Any]


def scene(number: int, count: int, size: tuple[int, int], background: str) -> tuple[Scene, np.ndarray]:
    rng = np.random.default_rng((SEED, number))
    while True:
        found = sample_scene(rng, count, size)
        if found.background == background:
            return found, draw_scene(rng, found)[0]


def still(
    name: str, number: int, count: int, size: tuple[int, int], background: str, **save: Any
) -> Callable[[Path], Record]:
    def write(out: Path) -> Record:
        what, pixels = scene(number, count, size, background)
        image = Image.fromarray(pixels)
        if name == "rotated.jpg":  # stored on its side; EXIF 6 says to turn it back
            exif = Image.Exif()
            exif[0x0112] = 6
            image = image.transpose(Image.Transpose.ROTATE_90)
            image.save(out / name, exif=exif, **save)
        else:
            image.save(out / name, **save)
        turns = [["Describe this image.", describe_text(what)], ["How many shapes are there?", str(count)]]
        record: Record = {"file": name, "size": list(size), "turns": turns}
        named = [(n, s) for n, s in names(what) if n == f"{s.colour} {s.kind}"]
        if named:
            phrase, shape = named[0]
            text = box_text(what, shape)
            record["ground"] = {
                "question": f"Find the {phrase}.",
                "phrase": phrase,
                "box": text,
                "pixels": shape.box,
            }
        return record

    return write


def page(name: str, number: int, digits: bool, lines: int, size: tuple[int, int]) -> Callable[[Path], Record]:
    def write(out: Path) -> Record:
        rng = np.random.default_rng((SEED, number))
        found: Page | None = None
        while found is None or len(found.lines) != lines or (lines > 1 and min(map(len, found.lines)) < 4):
            found = sample_page(rng, digits, 3 if lines > 1 else 2, size)
        Image.fromarray(found.pixels).save(out / name)
        return {"file": name, "size": list(size), "turns": [["Read the text.", "\n".join(found.lines)]]}

    return write


def pair(number: int) -> Callable[[Path], Record]:
    def write(out: Path) -> Record:
        rng = np.random.default_rng((SEED, number))
        clip = sample_pair(rng, 2)
        while clip.qa[0][0] != "differs":
            clip = sample_pair(rng, 2)
        files = ["before.png", "after.png"]
        for name, (pixels, _) in zip(files, clip.draw(rng), strict=True):
            Image.fromarray(pixels).save(out / name)
        return {"files": files, "turns": [["What differs?", clip.qa[0][1][1]]]}

    return write


def movie(name: str, number: int, task: str, question: str) -> Callable[[Path], Record]:
    """Four seconds at 4 frames a second, so that sampling at 2 has something to leave out."""

    def write(out: Path) -> Record:
        rng = np.random.default_rng((SEED, number))
        clip: Clip | None = None
        while clip is None or clip.qa[0][0] != task or min(clip.scenes[0].width, clip.scenes[0].height) < 120:
            clip = sample_clip(rng, 16)
        frames = [pixels for pixels, _ in clip.draw(rng)]
        h, w = (v // 2 * 2 for v in frames[0].shape[:2])
        with av.open(str(out / name), "w") as file:
            stream = file.add_stream("mpeg4" if name.endswith(".mp4") else "mjpeg", rate=4)
            stream.width, stream.height = w, h
            stream.pix_fmt = "yuv420p" if name.endswith(".mp4") else "yuvj420p"
            for frame in frames:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:h, :w]))))
            file.mux(stream.encode())
        return {"video": name, "turns": [[question, clip.qa[0][1][1]]]}

    return write


SAMPLES: tuple[Callable[[Path], Record], ...] = (
    still("one.png", 1, 1, (200, 151), "plain"),
    still("two.jpg", 2, 2, (237, 173), "plain", quality=92),
    still("three.webp", 3, 3, (301, 263), "plain", quality=92),
    still("dark.png", 4, 2, (161, 211), "dark"),
    still("noisy.png", 5, 2, (187, 187), "noisy"),
    still("many.png", 6, 6, (320, 240), "plain"),
    still("wide.png", 7, 2, (333, 71), "plain"),
    still("tall.png", 8, 2, (67, 299), "plain"),
    still("rotated.jpg", 9, 2, (256, 171), "plain", quality=92),
    still("shapes.avif", 10, 3, (280, 207), "plain", quality=85),
    page("number.png", 11, True, 1, (231, 90)),
    page("page.png", 12, True, 3, (217, 222)),
    page("word.png", 13, False, 1, (190, 101)),
    pair(14),
    movie("moves.mp4", 15, "motion", "What moves where?"),
    movie("order.avi", 16, "order", "In what order do the shapes appear?"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    records = [write(args.out) for write in SAMPLES]
    text = json.dumps(records, indent=2, ensure_ascii=False) + "\n"
    (args.out / "answers.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
