"""Runs that are killed at random instants, and started again: nothing is lost, nothing comes twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import caption_fakes
from support.caption_fakes import write_pictures

from qvl.convert import Converted
from qvl.runtime.caption.record import Record
from qvl.runtime.caption.table import scan, table_for

N_KILLS = int(os.environ.get("QVL_KILLS", "5"))  # `make bench` and the closing note: 50


def records(out: Path) -> list[Record]:
    """The whole records of a file, as another program would read them."""
    if not out.exists():
        return []
    with out.open("rb") as file:
        return [line.record for line in scan(out, file, table_for(out))]


def killed(command: list[str], after: float, out: Path) -> str:
    """Run a command, kill it so many seconds after it opened the file of results; what it printed."""
    beside = out.with_name(f"{out.name}.qvl")
    stamp = beside.stat().st_mtime_ns if beside.exists() else 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until:
            if beside.exists() and beside.stat().st_mtime_ns != stamp:
                break
            time.sleep(0.002)
        time.sleep(after)
        process.send_signal(signal.SIGKILL)
        printed, said = process.communicate()
    assert process.returncode in (-signal.SIGKILL, 0, 1), said.decode()  # 0, 1: it was done before
    return printed.decode()


def torn_end(out: Path, chance: random.Random) -> bytes:
    """The piece of a next record that a power cut leaves; of the header, where that is not written yet."""
    header = table_for(out).header
    if out.stat().st_size < len(header):
        return chance.choice([header[: chance.randrange(len(header))], bytes(40)])
    return chance.choice([b'{"path": "in/0', b"in/0,cap", bytes(40)])


def finished(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "-"])
def test_a_run_that_is_killed_again_and_again(tmp_path: Path, name: str) -> None:
    """With a captioner that costs nothing, so that most of the time is spent on the file."""
    chance = random.Random(name)
    pictures = write_pictures(tmp_path / "in", 60)
    sidecars = name == "-"
    out = tmp_path / "in" / ".qvl-caption.jsonl" if sidecars else tmp_path / name
    target = "-" if sidecars else str(out)
    command = [sys.executable, caption_fakes.__file__, str(tmp_path / "in"), target, "skip", "0.005"]
    reported: Counter[str] = Counter()
    for _ in range(N_KILLS):
        new = killed(command, chance.uniform(0, 0.1), out).split("\n")[:-1]
        safe = {record.path for record in records(out)}
        assert safe >= set(new), "reported before it was on disk"
        reported.update(new)
        if out.exists() and chance.random() < 0.5:
            with out.open("ab") as file:
                file.write(torn_end(out, chance))
    reported.update(finished(command).split())
    assert max(reported.values()) == 1, "reported twice"
    found = records(out)
    assert sorted(record.path for record in found) == [str(path) for path in pictures]
    assert finished(command) == ""
    assert records(out) == found
    if sidecars:
        for record in found:
            assert Path(record.path).with_suffix(".txt").read_text() == f"{record.caption}\n"


@pytest.mark.parametrize("mode", ["overwrite", "append"])
def test_a_pass_over_old_captions_that_is_killed(tmp_path: Path, mode: str) -> None:
    chance = random.Random(mode)
    pictures = write_pictures(tmp_path / "in", 30)
    out = tmp_path / "in" / ".qvl-caption.jsonl"
    command = [sys.executable, caption_fakes.__file__, str(tmp_path / "in"), "-", "skip", "0"]
    finished(command)
    old = {record.path: record.caption for record in records(out)}
    command[-2:] = [mode, "0.005"]
    for _ in range(N_KILLS // 2):
        killed(command, chance.uniform(0, 0.06), out)
        assert {record.path for record in records(out)} == set(old)
    finished(command)
    found = records(out)
    assert sorted(record.path for record in found) == [str(path) for path in pictures]
    for record in found:
        text = str(old[record.path])
        assert record.caption == (f"{text}, {text}" if mode == "append" else text)
        assert Path(record.path).with_suffix(".txt").read_text() == f"{record.caption}\n"


def test_the_program_with_a_model_is_killed(tmp_path: Path, tiny_model: Converted) -> None:
    """The whole of `qvl caption`, on the float32 tiny model, against a run that nobody disturbed."""
    chance = random.Random(50)
    folder = tmp_path / "in"
    folder.mkdir()
    noise = np.random.default_rng(3)
    for i in range(120):
        height, width = noise.integers(28, 90, 2)
        Image.fromarray(noise.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{i:03}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")

    def command(out: Path) -> list[str]:
        model = ["-m", str(tiny_model.text), "--mmproj", str(tiny_model.mmproj)]
        options = ["--temp", "1", "--seed", "3", "-n", "6", "--parallel", "4", "--kv-type", "f32", "-q"]
        return [sys.executable, "-m", "qvl.cli", "caption", str(folder), *model, *options, "-o", str(out)]

    calm, out = tmp_path / "calm.jsonl", tmp_path / "killed.jsonl"
    started = time.monotonic()
    assert subprocess.run(command(calm), capture_output=True, check=False).returncode == 1
    seconds = time.monotonic() - started
    n_before = 0
    for _ in range(N_KILLS):
        killed(command(out), chance.uniform(0, seconds / 3), out)
        n_now = len(records(out))
        assert n_now >= n_before
        n_before = n_now if n_now < 121 else 0
        if n_now == 121:  # it got through: once more from the start
            out.unlink()
            out.with_name(f"{out.name}.qvl").unlink()
    assert subprocess.run(command(out), capture_output=True, check=False).returncode == 1
    captions = {record.path: (record.caption, record.error) for record in records(out)}
    assert len(records(out)) == len(captions) == 121
    assert captions == {record.path: (record.caption, record.error) for record in records(calm)}
