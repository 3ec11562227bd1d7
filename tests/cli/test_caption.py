"""`qvl caption` as a program, on the tiny model."""

from __future__ import annotations

import io
import json
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import pytest
from PIL import Image
from support.terminal import Terminal

from qvl.cli.caption_run import Report
from qvl.cli.main import run
from qvl.cli.output import Output
from qvl.convert import Converted
from qvl.runtime.caption.activity import Activity
from qvl.runtime.caption.bookkeeping import Tally
from qvl.runtime.caption.record import Record


class Outcome(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


Qvl: TypeAlias = Callable[..., Outcome]
Start: TypeAlias = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(1)
    for i in range(6):
        Image.fromarray(noise.integers(0, 256, (56, 56, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def flags(tiny_model: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What names the model, in a temporary folder to work in."""
    monkeypatch.chdir(tmp_path)
    return ["-m", str(tiny_model.text), "--mmproj", str(tiny_model.mmproj), "-n", "6", "--temp", "0"]


@pytest.fixture
def qvl(flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Qvl:
    """Runs `qvl caption ARGUMENTS` in this process."""

    def call(*arguments: object, stdin: str = "") -> Outcome:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        code = run(["caption", *map(str, arguments), *flags])
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def start(flags: list[str]) -> Start:
    """Starts `qvl caption ARGUMENTS` as a process of its own."""

    def call(*arguments: object, before: Callable[[], None] | None = None) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "qvl.cli", "caption", *map(str, arguments), *flags]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, text=True, stdout=pipe, stderr=pipe, preexec_fn=before)

    return call


def test_stdout_has_the_records_and_nothing_else(qvl: Qvl, photos: Path) -> None:
    done = qvl(photos, "--prefix", "photo: ", "--trigger", "sks")
    assert done.returncode == 0
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(records) == 6
    assert all(record["caption"].startswith("sks, photo: ") for record in records)
    assert "6 captioned" in done.stderr


def test_failures_are_records_and_exit_1(qvl: Qvl, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("no picture")
    done = qvl("bad.png", photos / "1.png", "gone.png", "-o", "out.jsonl", "-q")
    assert done.returncode == 1
    assert done.stdout == ""
    records = {r["path"]: r for r in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert "found text" in records["bad.png"]["error"]
    assert "no such file" in records["gone.png"]["error"]
    assert isinstance(records[str(photos / "1.png")]["caption"], str)
    again = qvl("bad.png", photos / "1.png", "gone.png", "-o", "out.jsonl")
    assert again.returncode == 1
    assert "3 done before, 2 of them had failed" in again.stderr


def test_lists_csv_and_mirrored_sidecars(qvl: Qvl, photos: Path, tmp_path: Path) -> None:
    done = qvl("-", "-o", "out.csv", stdin=f"{photos}/1.png\n{photos}/2.png\n")
    assert done.returncode == 0
    assert len((tmp_path / "out.csv").read_text().splitlines()) >= 3
    assert qvl(photos, "--out-dir", "texts", "--sidecar", ".caption").returncode == 0
    assert sorted(p.name for p in (tmp_path / "texts").glob("*.caption")) == [
        f"{i}.caption" for i in range(6)
    ]


def test_changed_settings_are_refused_by_name(qvl: Qvl, photos: Path) -> None:
    assert qvl(photos, "-o", "out.jsonl").returncode == 0
    done = qvl(photos, "-o", "out.jsonl", "-p", "Name the colours.")
    assert done.returncode == 1
    assert "prompt: not set → 'Name the colours.'" in done.stderr
    assert "hint: --overwrite" in done.stderr
    assert qvl(photos, "-o", "out.jsonl", "-p", "Name the colours.", "--overwrite").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["--append", "--prepend"], 2, "--append and --prepend, expected one"),
        (["--append"], 1, "--append needs a file of captions"),
        (["--parallel", "many"], 2, "--parallel: 'many'"),
        (["-p", "a", "--prompt-file", "b"], 2, "--prompt and --prompt-file"),
        (["--prompt-file", "gone"], 1, "gone: the prompt cannot be read: No such file"),
        (["--kv-type", "q9"], 2, "q9: expected one of"),
        (["-p", "{subject}"], 1, "{subject}, which is not known"),
        (["--vars", "gone.csv"], 1, "gone.csv: cannot be read as CSV: No such file"),
        (["--schema", "gone.json"], 1, "gone.json: cannot be read: No such file"),
        (["--actors", "2"], 2, "needs --ray"),
        (["--sidecar", ".png", "--overwrite"], 1, "'.png', a picture's"),
        (["--threads", "100000"], 2, "expected 512 or less"),
        (["-o", "/dev/null"], 1, "/dev/null: a pipe or a device, expected a file"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    qvl: Qvl, photos: Path, arguments: list[str], code: int, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model is loaded, which may take long."""
    monkeypatch.setattr("qvl.cli.caption_run.open_model", lambda *_: pytest.fail("the model was loaded"))
    done = qvl(photos, *arguments)
    assert done.returncode == code
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


def wait_for(out: Path, n_lines: int) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until and (not out.exists() or out.read_bytes().count(b"\n") < n_lines):
        time.sleep(0.005)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_leaves_a_good_file(qvl: Qvl, start: Start, tmp_path: Path, times: int) -> None:
    noise = np.random.default_rng(2)
    (tmp_path / "in").mkdir()
    for i in range(150):
        Image.fromarray(noise.integers(0, 256, (56, 56, 3), np.uint8)).save(tmp_path / "in" / f"{i:03}.png")
    arguments = ("in", "-o", "out.jsonl", "--parallel", "2", "--start-with", "A")
    process = start(*arguments)
    wait_for(tmp_path / "out.jsonl", 3)
    second = qvl(*arguments)  # while the first one runs
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "run the same command to resume" in said
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert 3 <= len([json.loads(line) for line in lines]) < 150
    assert second.returncode == 1
    assert "another run is writing to it" in second.stderr
    assert qvl(*arguments).returncode == 0
    paths = [json.loads(line)["path"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(paths) == [f"in/{i:03}.png" for i in range(150)]


def test_a_full_disk_stops_the_run_and_space_resumes_it(
    qvl: Qvl, start: Start, photos: Path, tmp_path: Path
) -> None:
    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))

    process = start(photos, "-o", "out.jsonl", "--parallel", "1", before=little_room)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "out.jsonl: the disk is full" in said
    assert "run the same command again" in said
    n = len([json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()])
    assert 0 < n < 6
    assert (tmp_path / "out.jsonl").stat().st_size < 1500
    again = qvl(photos, "-o", "out.jsonl", "--parallel", "1")
    assert again.returncode == 0
    assert f"{6 - n} captioned, {n} done before" in again.stderr


def test_without_a_terminal_there_is_a_line_a_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    tally = Tally(total=100, skipped=10)
    report = Report(Output(), tally)
    for _ in range(30):
        now += 10
        tally.done += 1
        report.take(Record("a.png", "a cat"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[0] == "16 of 100, 6 a minute, 14 min 00 s left"


def test_records_on_a_terminal_are_whole_lines(flags: list[str], photos: Path) -> None:
    command = [sys.executable, "-m", "qvl.cli", "caption", "--json", str(photos / "1.png"), *flags]
    with Terminal(command, {"COLUMNS": "40"}) as terminal:
        assert terminal.exit_code() == 0
    (record,) = (line for line in terminal.text.splitlines() if line.startswith("{"))
    assert json.loads(record)["path"] == str(photos / "1.png")
    assert "━" not in terminal.text


def test_what_takes_long_is_said() -> None:
    tally, activity = Tally(total=2), Activity()
    report = Report(Output(), tally, activity)
    assert report.label() == "captioning"
    assert activity.at("reading the frames of a.mp4", 0.25)
    activity.at("looking", 0.5)
    assert report.label() == "looking 50%"
    activity.over("looking")
    tally.failed = 1
    assert re.fullmatch(r"1 failed, [\d.,]+ a minute, reading the frames of a\.mp4 25%", report.label())
    activity.closed = True
    assert not activity.at("reading the frames of a.mp4", 1.0)
    assert activity.words() == ""


@pytest.mark.parametrize(("resumes", "words"), [(True, "run the same command to resume"), (False, "-o FILE")])
def test_an_interrupted_run_says_what_to_do(resumes: bool, words: str) -> None:
    """What went to stdout is not remembered: the same command would begin anew."""
    summary = Report(Output(), Tally(total=3, done=1, interrupted=True), resumes=resumes).summary()
    assert "interrupted, 2 left" in summary and words in summary


def test_on_a_terminal_a_caption_has_its_path(photos: Path) -> None:
    one = sorted(photos.glob("*.png"))[0]
    command = [sys.executable, "-m", "qvl.cli", "caption", "-q", str(one), "-n", "2", "-t", "1"]
    for extra, expected in (([], rf"\n?{re.escape(str(one))}: \S"), (["--json"], r'\{"path": ')):
        with Terminal([*command, *extra]) as terminal:
            terminal.expect(expected)
            assert terminal.exit_code() == 0


def test_results_never_go_over_what_is_read(qvl: Qvl, photos: Path, tmp_path: Path) -> None:
    one = sorted(photos.glob("*.png"))[0]
    listed = tmp_path / "list.txt"
    listed.write_text(f"{one}\n")
    before = one.read_bytes()
    for target in (one, listed):
        for mode in ([], ["--overwrite"]):
            done = qvl(f"@{listed}", "-o", str(target), *mode)
            assert done.returncode == 1 and "is an input" in done.stderr
    assert one.read_bytes() == before and listed.read_text() == f"{one}\n"


def test_equal_samples_are_said(flags: list[str], photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["caption", str(photos / "0.png"), *flags[:4], "--samples", "2", "-n", "2"]
    for given, said in (("--temp 0", True), ("", True), ("--top-k 1", True), ("--temp 0.7", False)):
        assert run([*command, *given.split()]) == 0
        words = capsys.readouterr().err
        assert ("the 2 samples of a picture are equal" in words) == said
        assert ("--temp 0.7 makes them differ" in words) == said
