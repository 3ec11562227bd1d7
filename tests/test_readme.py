"""The README speaks of commands and options that exist, and says what the defaults are."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(
    {line.strip() for line in re.findall(r"(?:^ {4,}|\| |\$ )(qvl [a-z]+ [^#|\n]*)", README, re.M)}
)


@lru_cache
def help_of(command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "qvl.cli", command, "--help"], capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize("line", COMMANDS)
def test_its_commands_exist(line: str) -> None:
    _, command, *words = shlex.split(line.partition(">")[0])
    known = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", help_of(command)))
    assert {w for w in words if w.startswith("-") and w != "-"} <= known


def test_it_has_commands() -> None:
    assert len(COMMANDS) > 5


@pytest.mark.parametrize("script", ["refresh_options.py", "refresh_tree.py"])
def test_pages_made_from_the_code_are_up_to_date(script: str) -> None:
    done = subprocess.run([sys.executable, str(ROOT / ".ci" / script), "--check"])
    assert done.returncode == 0, f"run: python .ci/{script}"


def test_what_it_links_to_exists() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_its_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake ([a-z]+)", README)) <= targets | {"less"}


def test_its_python_compiles() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")


def test_ideas_of_the_papers_are_where_the_page_says() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    places = re.findall(r"\| `([a-z0-9_/]+\.py)`: `(\w+)` \|$", page, re.M)
    assert len(places) > 10
    for path, name in places:
        found = re.search(
            rf"^ *(def|class) {name}\b|^{name}\b", (ROOT / path).read_text(encoding="utf-8"), re.M
        )
        assert found, f"{path} defines no {name}"
