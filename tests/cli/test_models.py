"""Which model is meant, and which ones are here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qvl.cli.main import run
from qvl.convert import Converted
from qvl.runtime import find
from qvl.runtime.errors import InputError
from qvl.runtime.find import embedded_model, find_model


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("QVL_MODEL", raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two types of one model, the better one larger, with one encoder."""
    for name, size in (("a-Q4_K_M.gguf", 10), ("a-Q8_0.gguf", 20), ("mmproj-a-Q8_0.gguf", 5)):
        (tmp_path / name).write_bytes(bytes(size))
    return tmp_path


def test_a_type_is_chosen_by_its_name(folder: Path) -> None:
    assert find_model(f"{folder}:q4_k_m").text.name == "a-Q4_K_M.gguf"
    assert find_model(f"{folder}:Q8_0").text.name == "a-Q8_0.gguf"
    with pytest.raises(InputError, match=r"no model file of type q4_k, found a-Q4_K_M\.gguf, a-Q8_0\.gguf"):
        find_model(f"{folder}:q4_k")


@pytest.mark.parametrize(
    ("free", "name"), [(100, "a-Q8_0.gguf"), (15, "a-Q4_K_M.gguf"), (1, "a-Q4_K_M.gguf")]
)
def test_else_the_better_that_fits(
    folder: Path, monkeypatch: pytest.MonkeyPatch, free: int, name: str
) -> None:
    monkeypatch.setattr(find, "free_memory", lambda: free)
    files = find_model(folder)
    assert files.text.name == name and files.mmproj is not None


def test_the_variable_names_the_default(tiny_model: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_model().text.parent == embedded_model()
    monkeypatch.setenv("QVL_MODEL", str(tiny_model.text.parent))
    assert find_model().text == tiny_model.text
    assert find_model("embedded").text.parent == embedded_model()
    monkeypatch.setenv("QVL_MODEL", "/no/such")
    with pytest.raises(InputError, match="QVL_MODEL=/no/such: no such file or folder"):
        find_model()


def test_models_lists_what_was_used(
    tiny_model: Converted,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)

    def here() -> dict[str, bool]:
        assert run(["models", "--json"]) == 0
        return {Path(m["text"]).name: m["default"] for m in json.loads(capsys.readouterr().out)["local"]}

    assert list(here().values()) == [True]
    chat = ["chat", "-q", "-m", str(tiny_model.text.parent), "-p", "hello", "-n", "1", "-t", "1"]
    for _ in range(2):
        assert run(chat) == 0
    capsys.readouterr()
    assert here()[tiny_model.text.name] is False and len(here()) == 2
    assert run(["models"]) == 0
    out = capsys.readouterr().out
    assert tiny_model.text.name in out and "on this machine" in out and "Qwen/Qwen2-VL-2B-Instruct" in out


def test_an_importance_matrix_goes_over_no_input(
    tiny_model: Converted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words to calibrate on\n")
    before = tiny_model.mmproj.stat()
    for target in (tiny_model.mmproj, tiny_model.text, text):
        command = ["imatrix", "-o", str(target), "-m", str(tiny_model.text.parent), "--text", str(text)]
        assert run([*command, "--force"]) == 1
        assert "is an input" in capsys.readouterr().err
    assert tiny_model.mmproj.stat() == before and text.read_text().startswith("some words")
