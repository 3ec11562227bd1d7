"""A whole conversation with the embedded model, typed into a terminal, held to what the Python API says."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.terminal import Terminal

from qvl.runtime import Model, load
from qvl.runtime.grounding.tags import parse_grounding

SAMPLES = Path(__file__).parents[2] / "models" / "samples"
ONE, TALL = SAMPLES / "one.png", SAMPLES / "tall.png"
DESCRIBE, FIND = "Describe this image.", "Find the red star."
START = [sys.executable, "-m", "qvl.cli", "chat", "-t", "1", "--temp", "0", "-n", "96"]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with load(threads=1) as opened:
        yield opened


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    return tmp_path


@pytest.fixture
def chat(home: Path) -> Iterator[Callable[..., Terminal]]:
    started: list[Terminal] = []

    def start(*args: str) -> Terminal:
        terminal = Terminal([*START, *args], cwd=str(home))
        started.append(terminal)
        terminal.expect(r">>> $")
        return terminal

    yield start
    for terminal in started:
        terminal.__exit__(None, None, None)


def says(terminal: Terminal, line: str) -> str:
    """Type a line; what stands there when the next prompt comes."""
    terminal.enter(line)
    lines = terminal.expect(r"(?s)\n(.*?)\n?[^\n]*>>> $")[1].splitlines()
    return "\n".join(line for line in lines if "━" not in line).strip()


def picture(path: Path) -> dict[str, Any]:
    return {"type": "image", "image": str(path)}


def asked(*parts: Any) -> dict[str, Any]:
    texts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": texts}


def test_a_conversation(chat: Callable[..., Terminal], model: Model, home: Path) -> None:
    def answer(*messages: dict[str, Any]) -> dict[str, Any]:
        return model.session().generate(messages, max_tokens=96, temperature=0.0).result().message

    opening, second = asked(picture(ONE), DESCRIBE), asked(FIND)
    first = answer(opening)
    found = answer(opening, first, second)
    boxes = parse_grounding(found["content"], Image.open(ONE).size)
    terminal = chat()
    assert "attached" in says(terminal, f"/image {ONE}")
    assert says(terminal, DESCRIBE) == first["content"].strip()
    assert says(terminal, FIND) == boxes.text.strip() and boxes.boxes
    assert "drawn into" in says(terminal, "/draw star.png")
    assert Image.open(home / "star.png").size >= Image.open(ONE).size
    assert "cached" in says(terminal, "/stats")
    assert FIND in says(terminal, "/undo")
    assert says(terminal, "/retry") == first["content"].strip()
    terminal.enter("/edit")
    terminal.expect(r"\[one\.png\] >>> Describe this image\.$")
    terminal.type("\x15Find the red star.\r")
    alone = answer(asked(picture(ONE), FIND))["content"]
    assert (
        parse_grounding(alone, Image.open(ONE).size).text.strip() in terminal.expect(r"(?s)(.*?)\n>>> $")[1]
    )
    says(terminal, "/save star")
    says(terminal, "/clear")
    assert "1 question so far" in says(terminal, "/load star")
    third = says(terminal, "What color is it?")
    assert terminal.leave() == 0
    saved = json.loads((home / "qvl" / "sessions" / "last.json").read_text())["messages"]
    assert [m["role"] for m in saved] == ["user", "assistant"] * 2
    assert saved[0]["content"][0] == picture(ONE) and saved[3]["content"].strip() == third
    again = chat("--continue")
    assert third in again.text and "2 questions so far" in again.text
    assert again.leave() == 0


def test_several_pictures(chat: Callable[..., Terminal], model: Model, home: Path) -> None:
    messages = [asked(picture(TALL), picture(ONE), FIND)]
    found = model.session().generate(messages, max_tokens=96, temperature=0.0).result()
    boxes = parse_grounding(found.raw, Image.open(ONE).size)
    terminal = chat("--image", str(TALL), "--image", str(ONE))
    assert terminal.text.endswith("[tall.png, one.png] >>> ")
    said = says(terminal, FIND)
    assert said.startswith(boxes.text.strip())
    assert ("(boxes in picture 2 (one.png)" in said) == bool(boxes.boxes)
    drawn = says(terminal, "/draw")
    assert ("drawn into one-boxes.png" in drawn) == bool(boxes.boxes) == (home / "one-boxes.png").exists()
    shown = says(terminal, "/stats")
    for path, tokens in zip((TALL, ONE), found.usage.tokens_by_image, strict=True):
        assert f"{tokens} {path.name}" in shown


def test_a_full_context_drops_the_oldest_turns(chat: Callable[..., Terminal]) -> None:
    terminal = chat("-c", "256", "--image", str(ONE), "--system", "You are brief.")
    said = [says(terminal, question) for question in [DESCRIBE, *["What color is it?"] * 12]]
    assert any("the context is full" in text for text in said)
    assert "of 256 tokens in use" in says(terminal, "/stats")
    assert says(terminal, "/system") == "system prompt: You are brief."


def test_ctrl_c_while_it_speaks(chat: Callable[..., Terminal], home: Path) -> None:
    terminal = chat("--temp", "5", "--top-k", "0", "-n", "100000", "-q")
    terminal.enter("Tell me everything.")
    terminal.expect(r"everything\.\n(?s:[^━]{20})")
    terminal.interrupt()
    terminal.expect(r">>> $")
    messages = json.loads((home / "qvl" / "sessions" / "last.json").read_text())["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] and len(messages[1]["content"]) > 10
    says(terminal, "/set max_tokens 4")
    assert says(terminal, "And now?")
    assert terminal.leave() == 0
