"""Captions over a local Ray of two actors, one of which dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.caption_fakes import write_pictures

from qvl.convert import Converted
from qvl.runtime import caption, load
from qvl.runtime.caption.distributed import RayRunner
from qvl.runtime.caption.inputs import find_inputs
from qvl.runtime.caption.ledger import Ledger
from qvl.runtime.caption.options import CaptionOptions
from qvl.runtime.find import ModelFiles

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")

OPTIONS = CaptionOptions(max_tokens=6, sampling={"temperature": 1.0})
LOADING = {"device": "cpu", "kv_type": "f32", "threads": 1}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=3, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    yield
    ray.shutdown()


def actors() -> list[int]:
    """Processes of the actors of this test's own cluster, found by their titles; never those of another."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
        except OSError:  # gone meanwhile
            continue
        if title.startswith(b"ray::") and b"(MapBatches(Actor)" in title and is_own(int(folder.name)):
            found.append(int(folder.name))
    return found


def is_own(pid: int) -> bool:
    """True if a process descends from this one."""
    while pid > 1:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return False
        pid = int(stat.rpartition(")")[2].split()[1])
        if pid == os.getpid():
            return True
    return False


def expected(tiny_model: Converted, folder: Path) -> dict[str, str | None]:
    with load(tiny_model.text, tiny_model.mmproj, **LOADING) as model:  # type: ignore[arg-type]
        captions = caption(model, folder, max_tokens=6, temperature=1.0, parallel=4)
        return {record.path: record.caption for record in captions}


def test_an_actor_that_dies_loses_nothing(cluster: None, tiny_model: Converted, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "in", 120)
    pictures.append(Path(shutil.copy(pictures[0], tmp_path / "in" / "same.png")))
    (tmp_path / "in" / "bad.png").write_text("no picture")
    items = find_inputs([str(tmp_path / "in")]).items
    files = ModelFiles(tiny_model.text, tiny_model.mmproj)
    out = tmp_path / "out.jsonl"
    reported: list[str] = []
    n_reported_at_kill = -1

    def kill_one() -> None:
        nonlocal n_reported_at_kill
        until = time.monotonic() + 240
        while not (reported and len(actors()) >= 2) and time.monotonic() < until:
            time.sleep(0.01)
        n_reported_at_kill = len(reported)
        os.kill(actors()[0], signal.SIGKILL)

    with Ledger(out, {}) as ledger:
        runner = RayRunner(items, OPTIONS, ledger, files, actors=2, load_options=LOADING, parallel=2, block=4)
        killer = threading.Thread(target=kill_one)
        killer.start()
        for record in runner.run():
            reported.append(record.path)
        killer.join()
    assert 0 < n_reported_at_kill < len(items)
    assert sorted(reported) == sorted([*map(str, pictures), str(tmp_path / "in" / "bad.png")])
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(record["path"] for record in records) == sorted(reported)
    captions = {record["path"]: record["caption"] for record in records}
    assert captions == expected(tiny_model, tmp_path / "in")
    assert (runner.tally.failed, runner.tally.copied) == (1, 1)


def test_a_rerun_on_the_cluster_goes_on(cluster: None, tiny_model: Converted, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    pictures = write_pictures(folder, 12)
    files = ModelFiles(tiny_model.text, tiny_model.mmproj)

    def run(paths: list[str]) -> list[str]:
        with Ledger(tmp_path / "out.jsonl", {}) as ledger:
            items = find_inputs(paths).items
            runner = RayRunner(items, OPTIONS, ledger, files, actors=1, load_options=LOADING, block=4)
            return [record.path for record in runner.run()]

    assert len(run([str(path) for path in pictures[:5]])) == 5
    assert sorted(run([str(folder)])) == [str(path) for path in pictures[5:]]
    assert run([str(folder)]) == []
