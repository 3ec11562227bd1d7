"""`qvl chat`, the real program: one question, a pipe, and a conversation in a pseudo-terminal."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.terminal import Terminal

from qvl.cli.main import run
from qvl.convert import Converted
from qvl.runtime import load

QVL = [sys.executable, "-m", "qvl.cli"]
GREEDY = ["--temp", "0", "-t", "1"]
PROMPT = r">>> $"


@pytest.fixture(scope="module")
def model(tiny_model: Converted) -> Path:
    return tiny_model.text.parent


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (84, 112, 3), np.uint8)
    path = tmp_path_factory.mktemp("pictures") / "my picture.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path / "XDG_STATE_HOME" / "qvl"


@pytest.fixture
def chat(model: Path) -> Iterator[Callable[..., Terminal]]:
    """Starts `qvl chat` in a terminal and waits for its prompt."""
    started: list[Terminal] = []

    def start(*args: str) -> Terminal:
        terminal = Terminal([*QVL, "chat", "-m", str(model), *GREEDY, *args])
        started.append(terminal)
        terminal.expect(PROMPT)
        return terminal

    yield start
    for terminal in started:
        terminal.__exit__(None, None, None)


def ask(model: Path, *args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*QVL, "chat", "-m", str(model), *GREEDY, *args],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )


def replies(model: Path, picture: Path | None, *questions: str, n: int = 8) -> list[str]:
    """What the Python API says to these questions, one after the other."""
    said: list[str] = []
    messages: list[dict[str, object]] = []
    with load(model, threads=1) as loaded:
        for i, question in enumerate(questions):
            image = [{"type": "image", "image": str(picture)}] if picture and i == 0 else []
            messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
            said.append(loaded.generate(messages, max_tokens=n, temperature=0.0).result().text)
            messages.append({"role": "assistant", "content": said[-1]})
    return said


# one question --------------------------------------------------------------------------------------


def test_stdout_is_the_reply_and_nothing_else(model: Path, picture: Path) -> None:
    done = ask(model, "--image", str(picture), "-p", "What is this?", "-n", "8")
    assert done.returncode == 0, done.stderr
    assert done.stdout == replies(model, picture, "What is this?")[0] + "\n"
    assert ask(model, "-p", "What is this?", "-n", "8", "-q").stderr == ""


@pytest.mark.parametrize("args", [[], ["-p", "-"]])
def test_piped_stdin_is_the_prompt(model: Path, args: list[str]) -> None:
    done = ask(model, *args, "-n", "8", stdin="What is this?\n")
    assert done.stdout == replies(model, None, "What is this?")[0] + "\n"


def test_json_has_usage_and_timings(model: Path, picture: Path) -> None:
    done = ask(model, "--image", str(picture), "-p", "What is this?", "-n", "8", "--json")
    said = json.loads(done.stdout)
    assert said["text"] == replies(model, picture, "What is this?")[0]
    assert said["usage"]["image_tokens"] == 3 * 4
    assert said["usage"]["completion_tokens"] == 8
    assert said["finish_reason"] == "length"
    assert said["timings"]["prefill_seconds"] > 0


def test_the_same_seed_gives_the_same_text(model: Path) -> None:
    hot = ("-p", "Hello", "-n", "8", "--temp", "1.5", "--top-k", "0", "--seed")
    assert ask(model, *hot, "1").stdout == ask(model, *hot, "1").stdout != ask(model, *hot, "2").stdout


def test_what_was_seen_is_kept_for_the_next_time(
    model: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def encoded(*args: str) -> int:
        done = ask(model, "--image", str(picture), "-p", "What?", "-n", "1", "--json", *args)
        return int(json.loads(done.stdout)["usage"]["images_encoded"])

    def kept() -> int:
        assert run(["cache", "--json"]) == 0
        return int(json.loads(capsys.readouterr().out)["entries"])

    assert encoded("--no-cache") == 1
    assert kept() == 0
    assert [encoded(), encoded(), encoded("--no-cache")] == [1, 0, 1]
    assert kept() == 1
    assert run(["cache", "--clear"]) == 0
    assert "freed" in capsys.readouterr().out
    assert kept() == 0


def test_a_schema_is_kept(model: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"]}')
    said = json.loads(ask(model, "-p", "Hello", "-n", "64", "--schema", str(schema)).stdout)
    assert isinstance(said["n"], bool)


def test_json_that_is_cut_off_is_a_failure(model: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "string", "minLength": 50}')
    done = ask(model, "-p", "Hello", "-n", "4", "--schema", str(schema))
    assert done.returncode == 1 and "the JSON is not whole" in done.stderr


def test_a_picture_that_is_text_is_named(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("not a picture")
    done = ask(model, "--image", str(path), "-p", "What?")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "notes.png" in done.stderr
    assert "Traceback" not in done.stderr


# a conversation ------------------------------------------------------------------------------------


def test_a_conversation(chat: Callable[..., Terminal], model: Path, picture: Path) -> None:
    first, second = replies(model, picture, "What is this?", "And now?")
    terminal = chat("-n", "8")
    terminal.enter(f"/image '{picture}'")
    terminal.expect(r"attached .*my picture\.png")
    terminal.expect(PROMPT)
    for question, reply in (("What is this?", first), ("And now?", second)):
        terminal.enter(question)
        terminal.expect(question.replace("?", r"\?"))
        assert reply.strip() in terminal.expect(r"(?s)\n(.*?)\n[^\n]*>>> $")[1]
    assert terminal.leave() == 0


def test_a_dropped_picture_is_attached(chat: Callable[..., Terminal], picture: Path) -> None:
    terminal = chat("-n", "4")
    terminal.enter(str(picture).replace(" ", "\\ "))
    terminal.expect("attached")
    terminal.expect(r"\[my picture\.png\] >>> ")
    terminal.enter("/clear")
    terminal.expect(r"\n>>> $")
    terminal.enter("/no/such/picture.png what is it?")
    terminal.expect("error: /no/such/picture.png: no such file")
    terminal.enter("/imgae x")
    terminal.expect("hint: did you mean /image?")
    terminal.enter("/exit")
    assert terminal.exit_code() == 0


def test_ctrl_c_keeps_the_partial_reply(chat: Callable[..., Terminal], state: Path) -> None:
    terminal = chat("-n", "100000")
    terminal.enter("Tell me everything.")
    terminal.expect(r"Tell me everything\.\n(?s:.{20})")
    terminal.interrupt()
    terminal.expect(r"\(stopped\)")
    terminal.expect(PROMPT)
    messages = json.loads((state / "sessions" / "last.json").read_text())["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"]
    assert len(messages[1]["content"]) >= 10
    terminal.enter("/set max_tokens 4")
    terminal.expect(PROMPT)
    terminal.enter("Go on.")
    terminal.expect(r"Go on\.\n")
    terminal.expect(r"\n>>> $")
    assert terminal.leave() == 0


def test_ctrl_c_at_an_empty_prompt_says_how_to_leave(chat: Callable[..., Terminal]) -> None:
    terminal = chat()
    terminal.type("half a line")
    terminal.expect("half a line")
    assert "Ctrl-D" not in terminal.interrupt_until(r"(?s)\n(.*?)>>> ")[1]  # the first prompt after it
    terminal.interrupt_until(r"Ctrl-D or /exit ends")
    terminal.expect(PROMPT)
    assert terminal.leave() == 0


def test_kill_ends_a_conversation(chat: Callable[..., Terminal]) -> None:
    terminal = chat()
    until = time.monotonic() + 30
    while terminal.process.poll() is None and time.monotonic() < until:
        terminal.process.terminate()  # right after its prompt readline can miss one
        time.sleep(0.3)
    assert terminal.exit_code() == 130


def test_several_lines(chat: Callable[..., Terminal], state: Path) -> None:
    terminal = chat("-n", "2")
    for line in ('"""one', "two", 'three"""'):
        terminal.enter(line)
    terminal.expect(r"three")
    terminal.expect(r"\n>>> $")
    assert terminal.leave() == 0
    messages = json.loads((state / "sessions" / "last.json").read_text())["messages"]
    assert messages[0]["content"] == "one\ntwo\nthree"


def test_history_and_completion(chat: Callable[..., Terminal], picture: Path, state: Path) -> None:
    terminal = chat()
    terminal.type(f"/ima\t{picture.parent}/my\t")
    terminal.expect(r"my\\ picture\.png")
    terminal.type("\r")
    terminal.expect("attached")
    terminal.expect(r">>> $")
    assert terminal.leave() == 0
    assert f"/image {picture.parent}" in (state / "history").read_text()
    again = chat()
    again.type("\x1b[A")
    again.expect(r"/image ")


def test_continue_goes_on(model: Path) -> None:
    first = ask(model, "-p", "What is this?", "-n", "8").stdout.removesuffix("\n")
    messages = [
        {"role": "user", "content": "What is this?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And now?"},
    ]
    with load(model, threads=1) as loaded:
        second = loaded.generate(messages, max_tokens=8, temperature=0.0).result().text
    assert ask(model, "--continue", "-p", "And now?", "-n", "8").stdout == f"{second}\n"


def test_stats_count_what_was_kept(chat: Callable[..., Terminal], picture: Path) -> None:
    terminal = chat("-n", "4", "--image", str(picture))
    for question, kept_at_least in (("What is this?", 12), ("And now?", 30)):
        terminal.enter(question)
        terminal.expect(r"\n>>> $")
        terminal.enter("/stats")
        assert terminal.expect(r"pictures +(\d+) tokens: (\d+|none) encoded")[1] == "12"
        prompt = terminal.expect(r"prompt +(\d+) tokens: (\d+) cached")
        assert kept_at_least < int(prompt[2]) < int(prompt[1])
        terminal.expect(PROMPT)


def test_stats_of_several_pictures(chat: Callable[..., Terminal], picture: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.png"
    Image.new("RGB", (56, 84)).save(other)
    terminal = chat("-n", "1", "--image", str(picture), "--image", str(other))
    terminal.enter("What are these?")
    terminal.expect(r"\n>>> $")
    terminal.enter("/stats")
    terminal.expect(r"pictures +18 tokens: .* encoded.*\n +12 my picture\.png\n +6 other\.png\nprompt")


def test_ctrl_c_ends_one_question_with_what_was_said(model: Path) -> None:
    with Terminal(
        [*QVL, "chat", "-q", "-m", str(model), "-n", "100000", "-t", "1", "-p", "Go on."]
    ) as terminal:
        terminal.expect(r"(?s:.{20})")
        terminal.interrupt()
        assert terminal.exit_code() == 130
        assert terminal.text.endswith("\ninterrupted\n") and "Traceback" not in terminal.text


@pytest.fixture(scope="module")
def large_picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pixels = np.random.default_rng(1).integers(0, 255, (1120, 1120, 3), np.uint8)
    path = tmp_path_factory.mktemp("pictures") / "large.png"
    Image.fromarray(pixels).save(path)
    return path


def test_looking_ahead_is_called_off(chat: Callable[..., Terminal], large_picture: Path) -> None:
    terminal = chat("-n", "2")
    terminal.enter(f"/image {large_picture}")
    terminal.expect(r"\[large\.png\] >>> $")
    terminal.enter("/clear")
    terminal.expect(r"conversation cleared")
    terminal.expect(r"\n>>> $")
    terminal.enter("Hello")
    terminal.expect(r"\n>>> $")
    terminal.enter("/stats")
    assert terminal.expect(r"pictures +(\d+) tokens")[1] == "0"
    terminal.enter(f"/image {large_picture}")
    terminal.expect(r"\[large\.png\] >>> $")
    assert terminal.leave() == 0  # while it is still being looked at


def test_ctrl_c_while_a_picture_is_looked_at(chat: Callable[..., Terminal], large_picture: Path) -> None:
    terminal = chat("-n", "2")
    terminal.enter(f"{large_picture} What is this?")
    terminal.expect(r"attached .*\n")
    terminal.interrupt()
    terminal.expect(r"\(stopped\)")
    terminal.expect(r"\[large\.png\] >>> $")  # the question is taken back, the picture stays attached
    terminal.enter("/clear")
    terminal.expect(r"\n>>> $")
    assert terminal.leave() == 0


def test_a_folder_of_frames_is_a_video(model: Path, tmp_path: Path) -> None:
    for i in range(4):
        Image.new("RGB", (112, 84), (60 * i, 100, 200)).save(tmp_path / f"{i}.png")
    done = ask(model, "--video", str(tmp_path), "-p", "What happens?", "-n", "2", "--json")
    assert done.returncode == 0, done.stderr
    usage = json.loads(done.stdout)["usage"]
    assert usage["image_tokens"] % 2 == 0
    assert usage["images_encoded"] == 1


def test_reading_frames_is_shown(chat: Callable[..., Terminal], tmp_path: Path) -> None:
    noise = np.random.default_rng(2).integers(0, 255, (1500, 2000, 3), np.uint8)
    first = tmp_path / "00.png"
    Image.fromarray(noise).save(first, compress_level=1)
    for i in range(1, 12):
        (tmp_path / f"{i:02}.png").hardlink_to(first)
    terminal = chat("-n", "2", "--max-pixels", "3136")
    terminal.enter(f"/video {tmp_path}")
    terminal.expect(r"attached")
    terminal.expect(r">>> $")
    terminal.enter("What happens?")
    terminal.expect(r"reading the frames .*\d+%")
    terminal.expect(r"\n>>> $")
    assert terminal.leave() == 0


def test_a_picture_that_does_not_fit_says_what_would(
    chat: Callable[..., Terminal], large_picture: Path
) -> None:
    terminal = chat("-n", "2", "-c", "512", "--image-detail", "high")
    terminal.enter(f"/image {large_picture}")
    terminal.expect(r"\(1120 x 1120, 1600 tokens, about .*\)")
    terminal.expect(r">>> $")
    terminal.enter("What is this?")
    assert int(terminal.expect(r"--max-pixels (\d+) would fit")[1]) <= 512 * 28 * 28
    terminal.expect(r"/detach removes them")
    terminal.expect(r"\[large\.png\] >>> $")
    terminal.enter("/detach")
    terminal.expect(r"\n>>> $")
    assert terminal.leave() == 0


def test_a_long_input_shows_at_once_that_it_is_read(model: Path) -> None:
    """Before it is tokenized, and before any progress is reported."""
    text = "word " * 2200
    with Terminal([*QVL, "chat", "-m", str(model), *GREEDY, "-n", "1", "-c", "16384", text]) as terminal:
        terminal.expect("reading")
        assert terminal.exit_code() == 0, terminal.text[-300:]
    with Terminal(
        [*QVL, "chat", "-m", str(model), *GREEDY, "-n", "1", "-c", "16384", "-q", text]
    ) as terminal:
        assert terminal.exit_code() == 0
        assert "reading" not in terminal.text
