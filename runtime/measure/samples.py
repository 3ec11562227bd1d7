"""Data to measure and calibrate models on: pictures with questions, and text."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from qvl.runtime.caption.names import SYSTEM_FOLDERS
from qvl.runtime.errors import InputError
from qvl.runtime.files import parse_json

QUESTIONS: Final = (
    "Describe this image.",
    "What is in this picture?",
    "Read the text in the image.",
    "How many things are there?",
    "What colors do you see?",
)
ANSWERS: Final = "answers.json"  # beside qvl's own sample pictures: what to ask, and what is true
SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".avif")


@dataclass(frozen=True)
class Example:
    """One question, about a picture or about nothing.

    Attributes:
        image: anything `open_image` takes, or None.
    """

    prompt: str
    image: Any = None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation: one user turn."""
        picture = [] if self.image is None else [{"type": "image", "image": self.image}]
        return [{"role": "user", "content": [*picture, {"type": "text", "text": self.prompt}]}]

    @property
    def name(self) -> str:
        """For people: the picture's file name and the question."""
        picture = f"{Path(self.image).name}: " if isinstance(self.image, str | Path) else ""
        return f"{picture}{self.prompt}"


def load_samples(
    images: Path | None = None, prompts: Path | None = None, limit: int | None = None
) -> list[Example]:
    """Samples of a folder and a file.

    Args:
        images: a folder of pictures, or one picture; the sample pictures of qvl by default.
        prompts: a text file with a question a line, asked in turn; or JSON lines `{"prompt", "image"}`, whose
            pictures are named relative to `images`, or to the file where that is not given.
        limit: at most so many samples.

    Raises:
        InputError: nothing to ask, or a file that cannot be read.
    """
    lines = list(QUESTIONS) if prompts is None else _lines(prompts)
    if prompts is not None and lines[0].startswith("{"):
        folder = images if images is not None else prompts.parent
        return [_sample(prompts, i, line, folder) for i, line in enumerate(lines, 1)][:limit]
    place = images if images is not None else sample_pictures()
    pictures = find_pictures(place)
    if prompts is None and (place / ANSWERS).is_file():
        return _asked(place)[:limit]
    n = max(len(pictures), len(lines) if prompts is not None else 0)
    return [Example(lines[i % len(lines)], pictures[i % len(pictures)]) for i in range(n)][:limit]


def find_pictures(place: Path) -> list[Path]:
    """Picture files of a folder and those below it, in order of name; or the one named.

    Raises:
        InputError: there are none.
    """
    place = place.expanduser()
    if place.is_file():
        return [place]
    found = sorted(p for p in place.rglob("*") if _is_picture(p, place)) if place.is_dir() else []
    if not found:
        raise InputError(f"{place}: no pictures", hint="name a folder with PNG or JPEG files (`images`)")
    return found


def _is_picture(path: Path, place: Path) -> bool:
    """True if a file below a folder is a picture by its name; hidden ones and a system's are left out."""
    parts = path.relative_to(place).parts
    own = all(not part.startswith(".") and part.casefold() not in SYSTEM_FOLDERS for part in parts)
    return own and path.suffix.lower() in SUFFIXES


def sample_pictures() -> Path:
    """The folder of pictures that comes with qvl.

    Raises:
        InputError: this installation has none.
    """
    spec = find_spec("qvl.models")
    for place in (spec and spec.submodule_search_locations) or ():
        folder = Path(place) / "samples"
        if folder.is_dir():
            return folder
    raise InputError("this installation has no sample pictures", hint="name a folder (`images`)")


def _asked(folder: Path) -> list[Example]:
    """The questions that a folder's answers.json has about its pictures."""
    records = parse_json((folder / ANSWERS).read_text(encoding="utf-8"))
    return [
        Example(question, folder / record["file"])
        for record in records
        if Path(record.get("file", "")).suffix.lower() in SUFFIXES
        for question, _ in record.get("turns", ())
    ]


def _lines(path: Path) -> list[str]:
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
        lines = [line.strip() for line in text.split("\n")]  # JSON and questions may hold U+2028
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(
            f"{path}: cannot be read: {e}", hint="expected a text file, a question a line"
        ) from e
    lines = [line for line in lines if line]
    if not lines:
        raise InputError(f"{path}: is empty", hint="expected a question a line")
    return lines


def _sample(path: Path, number: int, line: str, folder: Path) -> Example:
    try:
        record = parse_json(line)
        prompt, image = record["prompt"], record.get("image")
    except (ValueError, KeyError, AttributeError) as e:
        raise InputError(
            f"{path}, line {number}: not what was expected: {line:.60}",
            hint='every line like {"image": "a.png", "prompt": "What is this?"}',
        ) from e
    return Example(str(prompt), None if image is None else folder / image)
