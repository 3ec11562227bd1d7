from __future__ import annotations

import json
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.caption_fakes import PREPROCESSOR, FakeCaptioner, runner, said, write_pictures
from support.clips import write_clip

from qvl.runtime.caption.activity import Activity
from qvl.runtime.caption.captioner import Done
from qvl.runtime.caption.inputs import Item
from qvl.runtime.caption.prepare import PreparedPicture, Preparer, Rejected
from qvl.runtime.caption.prompts import Prompts, Template
from qvl.runtime.caption.record import Record
from qvl.runtime.caption.sidecar import Sidecars
from qvl.runtime.caption.state import Mode
from qvl.runtime.errors import Cancelled, OutputError


def run(folder: Path, out: Path | None, mode: Mode = "skip", **options: object) -> list[Record]:
    caption, ledger = runner(folder, out, mode, **options)  # type: ignore[arg-type]
    with ledger:
        return list(caption.run())


def lines(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_every_picture_gets_its_caption(tmp_path: Path) -> None:
    pictures, out = write_pictures(tmp_path / "in", 12), tmp_path / "out.jsonl"
    caption, ledger = runner(tmp_path / "in", out)
    with ledger:
        records = list(caption.run())
    assert sorted(r.path for r in records) == [str(p) for p in pictures]
    assert [r.as_dict() for r in records] == lines(out)
    by_path = {r.path: r.caption for r in records}
    texts = Counter(said(job, job.seeds[0]) for job in caption.captioner.submitted)  # type: ignore[attr-defined]
    assert Counter(by_path.values()) == texts
    assert caption.tally.done == 12
    assert run(tmp_path / "in", out) == []


def test_bad_pictures_stop_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    good = write_pictures(folder, 3)
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("this is no picture")
    (folder / "cut.png").write_bytes(good[0].read_bytes()[:100])
    (folder / "wrong.jpg").write_bytes(good[1].read_bytes()[:-1] + b"\0")  # a PNG all the same
    Image.new("RGB", (2000, 5)).save(folder / "ribbon.png")
    bomb = bytearray(good[0].read_bytes())
    bomb[16:24] = (60000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(bytes(bomb))
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "endless.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.png")
    records = {Path(r.path).name: r for r in run(folder, tmp_path / "out.jsonl")}
    odd = {"gone.png", "loop.png", "endless.png", "pipe.png"}
    failed = {name for name, record in records.items() if record.failed}
    assert failed == {"empty.png", "text.jpg", "cut.png", "ribbon.png", "bomb.png", *odd}
    for name in failed:
        assert str(folder / name) in str(records[name].error)
        assert records[name].caption is None
    assert "found text" in str(records["text.jpg"].error)
    assert "60000" in str(records["bomb.png"].error)
    found = "cannot be read: expected a file, found a pipe, a socket or a device"
    assert records["pipe.png"].error == f"{folder}/pipe.png: {found}"
    assert len(lines(tmp_path / "out.jsonl")) == 13


def test_errors_are_kept_and_retried_on_request(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out.jsonl"
    pictures = write_pictures(folder, 2)
    content = pictures[0].read_bytes()
    pictures[0].write_bytes(b"")
    assert [r.failed for r in run(folder, out)].count(True) == 1
    caption, ledger = runner(folder, out)
    with ledger:
        assert list(caption.run()) == []
    assert (caption.tally.skipped, caption.tally.failed_before) == (2, 1)
    pictures[0].write_bytes(content)
    assert [r.path for r in run(folder, out, "retry-errors")] == [str(pictures[0])]
    assert [line.get("error") for line in lines(out)] == [None, None]


def test_equal_pictures_are_captioned_once(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out.jsonl"
    pictures = write_pictures(folder, 4)
    for i in range(5):
        shutil.copy(pictures[i % 2], folder / f"copy{i}.png")
    caption, ledger = runner(folder, out)
    with ledger:
        records = {Path(r.path).name: r for r in caption.run()}
    assert len(caption.captioner.submitted) == 4  # type: ignore[attr-defined]
    assert caption.tally.copied == 5
    assert records["copy3.png"].caption == records["001.png"].caption
    assert records["copy3.png"].same_as == str(pictures[1])
    shutil.copy(pictures[3], folder / "later.png")
    assert run(folder, out)[0].same_as == str(pictures[3])  # known from the earlier run


def test_append_and_prepend(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out.jsonl"
    write_pictures(folder, 2)
    first = {r.path: r.caption for r in run(folder, out)}
    for record in run(folder, out, "append"):
        assert record.caption == f"{first[record.path]}, {first[record.path]}"
    assert len(lines(out)) == 2


def test_sidecars(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    pictures = write_pictures(folder, 4)
    pictures[0].with_suffix(".txt").write_text("by hand\n")
    shutil.copy(pictures[1], pictures[1].with_suffix(".jpg"))  # whose text would be 001.txt as well
    records = {Path(r.path).name: r for r in run(folder, None, sidecar=True)}
    assert sorted(records) == ["001.jpg", "001.png", "002.png", "003.png"]
    assert "001.txt, is that of" in str(records["001.png"].error)
    assert pictures[0].with_suffix(".txt").read_text() == "by hand\n"
    assert pictures[2].with_suffix(".txt").read_text() == f"{records['002.png'].caption}\n"
    assert run(folder, None, sidecar=True) == []
    pictures[2].with_suffix(".txt").unlink()
    assert [Path(r.path).name for r in run(folder, None, sidecar=True)] == ["002.png"]
    run(folder, None, "prepend", sidecar=True)
    assert pictures[0].with_suffix(".txt").read_text().endswith(", by hand\n")


def test_a_folder_that_takes_no_text_files_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    write_pictures(folder, 2)
    locked = write_pictures(folder / "locked", 1, seed=1)[0]
    monkeypatch.setattr("os.access", lambda path, _: Path(path) != locked.parent)  # root may write anywhere
    records = {Path(r.path).parent.name: r for r in run(folder, None, sidecar=True)}
    assert "locked/000.txt, may not be written there" in str(records["locked"].error)
    assert records["in"].caption
    monkeypatch.undo()
    assert [r.path for r in run(folder, None, "retry-errors", sidecar=True)] == [str(locked)]
    assert locked.with_suffix(".txt").exists()


def test_a_text_file_never_takes_the_place_of_its_picture(
    tmp_path: Path,
) -> None:
    """A picture with the suffix of text files, named itself."""
    picture = write_pictures(tmp_path / "in", 1)[0].rename(tmp_path / "in" / "a.txt")
    before = picture.read_bytes()
    (record,) = run(picture, None, "overwrite", sidecar=True)
    assert "its text file would take its place" in str(record.error)
    assert picture.read_bytes() == before


def test_names_as_long_as_names_can_be(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    picture = write_pictures(folder, 1)[0].rename(folder / f"{'ä' * 125}.png")  # 254 bytes
    (record,) = run(folder, None, sidecar=True)
    assert record.error is None
    assert picture.with_suffix(".txt").read_text() == f"{record.caption}\n"


def test_a_text_file_that_a_full_disk_prevented_is_written_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    pictures = write_pictures(folder, 6)
    run(folder, None, sidecar=True)
    old = {path: path.with_suffix(".txt").read_text().rstrip("\n") for path in pictures}

    def full(self: Sidecars, item: Item, record: Record) -> None:
        raise OutputError(f"{item.path}: no space left")

    with monkeypatch.context() as patch, pytest.raises(OutputError):
        patch.setattr(Sidecars, "write", full)
        run(folder, None, "append", sidecar=True)
    run(folder, None, "append", sidecar=True)
    for path in pictures:
        assert path.with_suffix(".txt").read_text() == f"{old[path]}, {old[path]}\n"


class Interrupting(FakeCaptioner):
    """Presses Ctrl-C at a step."""

    def __init__(self, at: int, times: int) -> None:
        super().__init__()
        self.at, self.times, self.steps = at, times, 0
        self.press: object = None

    def step(self) -> Sequence[Done]:
        self.steps += 1
        if self.steps == self.at:
            for _ in range(self.times):
                self.press()  # type: ignore[operator]
        return super().step()


@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupt_finishes_what_is_in_flight_and_two_stop_at_once(tmp_path: Path, times: int) -> None:
    folder, out = tmp_path / "in", tmp_path / "out.jsonl"
    write_pictures(folder, 12)
    caption, ledger = runner(folder, out)
    caption.captioner = captioner = Interrupting(3, times)
    captioner.press = caption.stop.request
    records: list[Record] = []
    with ledger:
        if times == 2:
            with pytest.raises(Cancelled):
                records.extend(caption.run())
        else:
            records.extend(caption.run())
            assert caption.tally.interrupted
            assert not captioner.busy
            assert len(records) == len(captioner.submitted) < 12
    done = len(lines(out))
    assert done < 12
    assert done + len(run(folder, out)) == 12
    assert len({line["path"] for line in lines(out)}) == 12


def test_videos_say_how_far_they_are_read(tmp_path: Path) -> None:
    clip = write_clip(
        tmp_path / "clip.mp4", [np.full((56, 84, 3), 15 * i, np.uint8) for i in range(16)], fps=4
    )

    class Seen(Activity):
        def at(self, what: str, share: float) -> bool:
            shares.append((what, share))
            return super().at(what, share)

    shares: list[tuple[str, float]] = []
    prepare = Preparer(PREPROCESSOR, Prompts(Template("Describe.")), Seen())
    assert isinstance(prepare(Item(str(clip))), PreparedPicture)
    assert {what for what, _ in shares} == {"reading the frames of clip.mp4"}
    assert [share for _, share in shares] == [*(i / 8 for i in range(1, 9)), 1.0]
    assert prepare.activity.words() == ""
    prepare.activity.closed = True
    assert isinstance(prepare(Item(str(clip))), Rejected)
