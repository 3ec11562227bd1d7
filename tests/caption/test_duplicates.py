"""Pictures of equal content in a run that hands them out to others; the cluster itself is left out."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.caption_fakes import write_pictures

from qvl.runtime.caption import distributed
from qvl.runtime.caption.distributed import RayRunner
from qvl.runtime.caption.duplicates import first_duplicates
from qvl.runtime.caption.inputs import Item, find_inputs
from qvl.runtime.caption.ledger import Ledger
from qvl.runtime.caption.options import CaptionOptions
from qvl.runtime.caption.prepare import content_hash
from qvl.runtime.caption.prompts import Prompts, Template
from qvl.runtime.caption.record import Record
from qvl.runtime.caption.state import Mode
from qvl.runtime.find import ModelFiles


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures; one of them twice more, and two empty files."""
    pictures = write_pictures(tmp_path / "in", 3)
    for name in ("copy1.png", "copy2.png"):
        shutil.copy(pictures[1], tmp_path / "in" / name)
    for name in ("empty1.png", "empty2.png"):
        (tmp_path / "in" / name).touch()
    return tmp_path / "in"


def test_only_files_of_a_shared_size_are_read(folder: Path) -> None:
    items = find_inputs([str(folder), str(folder / "gone.png")]).items
    names = [Path(item.path).name for item in items]
    read: list[str] = []

    def content_of(item: Item) -> str:
        read.append(Path(item.path).name)
        return content_hash(item.path)

    places = first_duplicates(items, Prompts(Template("Describe.")), content_of)
    twins = {names[i]: names[place] for i, place in enumerate(places) if place != i}
    assert twins == {"copy1.png": "001.png", "copy2.png": "001.png", "empty2.png": "empty1.png"}
    assert sorted(read) == ["001.png", "copy1.png", "copy2.png", "empty1.png", "empty2.png"]


@pytest.mark.parametrize(("template", "n_duplicates"), [("{width} by {height}", 3), ("This is {stem}.", 0)])
def test_the_prompts_of_duplicates_are_equal_too(folder: Path, template: str, n_duplicates: int) -> None:
    items = find_inputs([str(folder)]).items
    places = first_duplicates(items, Prompts(Template(template)), lambda item: content_hash(item.path))
    assert sum(place != i for i, place in enumerate(places)) == n_duplicates


class Here(RayRunner):
    """Captions made of the content, here in place of actors."""

    def _blocks(self, ray: Any, todo: Sequence[Item]) -> Iterator[list[tuple[int, str]]]:
        handed_out.extend(Path(item.path).name for item in todo)
        for i, item in enumerate(todo):
            path = Path(item.path).absolute()
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            record = Record(str(path), caption=f"{handed_out.count(path.name)} {sha256}", sha256=sha256)
            if not path.stat().st_size:
                record = Record(str(path), error=f"{path}: an empty file", sha256=sha256)
            yield [(i, record.as_json())]


handed_out: list[str] = []


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    handed_out.clear()
    monkeypatch.setattr(distributed, "_connect", lambda address: (None, False))


def run(arguments: list[str], out: Path, mode: Mode = "skip") -> RayRunner:
    with Ledger(out, {}, mode) as ledger:
        files = ModelFiles(Path("a.gguf"), None)
        runner = Here(find_inputs(arguments).items, CaptionOptions(), ledger, files)
        list(runner.run())
    return runner


def by_name(out: Path) -> dict[str, dict[str, Any]]:
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({record["path"] for record in records}) == len(records)
    return {Path(record["path"]).name: record for record in records}


def test_copies_are_captioned_once_and_failures_name_each_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out.jsonl"
    runner = run(["in"], out)
    assert handed_out == ["000.png", "001.png", "002.png", "empty1.png"]
    found = by_name(out)
    assert len(found) == 7
    assert found["copy2.png"]["caption"] == found["001.png"]["caption"]
    assert found["copy2.png"]["same_as"] == "in/001.png"
    assert "same_as" not in found["001.png"]
    assert [found[f"empty{i}.png"]["error"] for i in (1, 2)] == [
        f"in/empty{i}.png: an empty file" for i in (1, 2)
    ]
    assert (runner.tally.done, runner.tally.copied, runner.tally.failed) == (5, 2, 2)


def test_a_rerun_copies_what_an_earlier_run_has_said(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run([str(folder / "copy1.png"), str(folder / "000.png")], out)
    handed_out.clear()
    runner = run([str(folder)], out)
    assert handed_out == ["002.png", "empty1.png"]
    assert runner.tally.copied == 2
    assert by_name(out)["001.png"]["same_as"] == str(folder / "copy1.png")
    handed_out.clear()
    run([str(folder)], out, "append")  # each to its own old caption
    assert handed_out == ["000.png", "001.png", "002.png", "empty1.png"]
    found = by_name(out)
    assert found["copy2.png"]["caption"] == found["001.png"]["caption"]
    assert found["copy2.png"]["caption"].startswith("1 ")
    assert ", 1 " in found["copy2.png"]["caption"]
