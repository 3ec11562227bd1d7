"""Markup of boxes in captions: new captions are readable, and files of earlier versions go on."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from support.caption_fakes import FakeCaptioner, runner, write_pictures

from qvl.runtime.caption.ledger import Ledger
from qvl.runtime.caption.record import FIELDS, Record
from qvl.runtime.caption.state import Mode
from qvl.runtime.errors import FormatError

CAT = "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(0,0),(500,500)<|box_end|>"
BOXES = ({"label": "cat", "box": [0, 0, 20, 15]},)
OLD_FIELDS = [name for name in FIELDS if name != "raw"]


class Pointing(FakeCaptioner):
    """Says where the cat is."""

    def step(self):  # type: ignore[no-untyped-def]
        return [replace(done, texts=(CAT,) * len(done.texts)) for done in super().step()]


def run(folder: Path, out: Path | None, mode: Mode = "skip", *, sidecar: bool = False) -> list[Record]:
    caption, ledger = runner(folder, out, mode, sidecar=sidecar)
    caption.captioner = Pointing()
    with ledger:
        return list(caption.run())


def readable(folder: Path) -> tuple[str, dict[str, object]]:
    """The caption of the picture in a folder, as it should be."""
    [path] = folder.glob("*.png")
    width, height = Image.open(path).size
    box = [0, 0, round(width / 2), round(height / 2)]
    return f"cat {box}", {"label": "cat", "box": box}


def old_csv(path: Path, *rows: dict[str, object]) -> None:
    """A file as the version before wrote it."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, OLD_FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_captions_are_readable_with_raw_and_boxes_beside(tmp_path: Path, suffix: str) -> None:
    write_pictures(tmp_path / "in", 1)
    text, box = readable(tmp_path / "in")
    out = tmp_path / f"out.{suffix}"
    [record] = run(tmp_path / "in", out)
    assert (record.caption, record.raw, record.boxes) == (text, CAT, (box,))
    with Ledger(out, {"prompt": "Describe."}) as ledger:
        assert list(ledger.records()) == [record]
    [joined] = run(tmp_path / "in", out, "append")
    assert (joined.caption, joined.raw) == (f"{text}, {text}", f"{CAT}, {CAT}")
    assert joined.boxes == (box, box)


def test_text_files_are_readable(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    [picture] = write_pictures(folder, 1)
    text, box = readable(folder)
    run(folder, None, sidecar=True)
    assert picture.with_suffix(".txt").read_text() == f"{text}\n"
    [joined] = run(folder, None, "append", sidecar=True)
    assert joined.boxes == (box, box)
    picture.with_suffix(".txt").write_text(f"{CAT}\n")  # of the version before
    [joined] = run(folder, None, "append", sidecar=True)
    assert picture.with_suffix(".txt").read_text() == f"{text}, {text}\n"
    picture.with_suffix(".txt").write_text("by hand\n")
    [joined] = run(folder, None, "prepend", sidecar=True)
    assert (joined.caption, joined.boxes) == (f"{text}, by hand", (box,))


def test_a_csv_file_of_the_version_before_goes_on(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out.csv"
    pictures = write_pictures(folder, 2)
    boxes = json.dumps([{"label": "cat", "box": [0, 0, 20, 15]}])
    old_csv(out, {"path": str(pictures[0]), "caption": f"{CAT}, old", "boxes": boxes})
    [record] = run(folder, out)  # the other one
    assert [row["path"] for row in rows(out)] == [str(path) for path in pictures]
    assert rows(out)[0]["caption"] == f"{CAT}, old"  # what is there is not changed unasked
    assert rows(out)[1]["raw"] == record.raw == CAT
    assert list(rows(out)[0]) == list(FIELDS)


@pytest.mark.parametrize("mode", ["append", "overwrite"])
def test_an_interrupted_pass_over_an_old_csv_file_goes_on(tmp_path: Path, mode: Mode) -> None:
    """Its place in the file is known by an offset, so the columns stay until it is done."""
    folder, out = tmp_path / "in", tmp_path / "out.csv"
    pictures = write_pictures(folder, 2)
    old_csv(out, *({"path": str(path), "caption": CAT} for path in pictures))
    start = out.stat().st_size
    with out.open("a") as file:
        file.write(f"{pictures[0]},new" + "," * (len(OLD_FIELDS) - 2) + "\n")
    state = {"settings": {"prompt": "Describe."}, "pass_mode": mode, "pass_start": start}
    out.with_name("out.csv.qvl").write_text(json.dumps({"qvl_caption": 1, **state}) + "\n")
    [record] = run(folder, out, mode)
    assert record.path == str(pictures[1])
    first, second = rows(out)
    assert first["caption"] == "new" and list(first) == list(FIELDS)
    assert second["caption"].startswith("cat [0, 0, ") and "<|" not in second["caption"]


def test_a_jsonl_file_of_the_version_before_is_appended_to(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out.jsonl"
    [picture] = write_pictures(folder, 1)
    text, box = readable(folder)
    old = {"path": str(picture), "caption": CAT, "boxes": [box]}
    out.write_text(json.dumps(old) + "\n")
    assert run(folder, out) == []
    assert json.loads(out.read_text()) == old
    [record] = run(folder, out, "append")
    assert (record.caption, record.boxes) == (f"{text}, {text}", (box, box))


def test_a_copy_of_an_old_caption_is_readable(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out.jsonl"
    [picture] = write_pictures(folder, 1)
    text, _ = readable(folder)
    [record] = run(folder, out)
    out.write_text(replace(record, caption=CAT, raw=None).as_json() + "\n")
    (folder / "same.png").write_bytes(picture.read_bytes())
    [copy] = run(folder, out)
    assert (copy.same_as, copy.caption, copy.raw) == (str(picture), text, CAT)


@pytest.mark.parametrize("columns", ["path", "path,caption,rating", "path,caption,path", "caption,raw"])
def test_other_columns_are_refused_and_the_file_is_kept(tmp_path: Path, columns: str) -> None:
    out = tmp_path / "out.csv"
    out.write_text(f"{columns}\na,b,c\n")
    with pytest.raises(FormatError, match="the header is not that of captions"):
        Ledger(out, {})
    assert out.read_text() == f"{columns}\na,b,c\n"


@pytest.mark.parametrize("length", [8, 12, 40, len(",".join(OLD_FIELDS))])
def test_a_torn_header_of_the_version_before_is_begun_again(tmp_path: Path, length: int) -> None:
    out = tmp_path / "out.csv"
    out.write_text(",".join(OLD_FIELDS)[:length])
    with Ledger(out, {}) as ledger:
        ledger.append([Record("a.png", "x", raw="y")])
    assert [(row["path"], row["raw"]) for row in rows(out)] == [("a.png", "y")]
