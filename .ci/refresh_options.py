"""Writes docs/options.md: what every command's `--help` says.

python .ci/refresh_options.py            writes it
python .ci/refresh_options.py --check    exits with 1 where the page is out of date
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "options.md"
HEAD = """# Options

`qvl COMMAND --help` prints the same; `python .ci/refresh_options.py` writes this page from it.
"""


def help_of(command: str) -> str:
    """A command's help, a hundred columns wide."""
    environment = {**os.environ, "COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1"}
    run = [sys.executable, "-m", "qvl.cli", command, "--help"]
    return subprocess.run(run, capture_output=True, text=True, check=True, env=environment).stdout.rstrip()


def page() -> str:
    """The page as it should be."""
    from qvl.cli.commands import COMMANDS

    parts = [f"\n## qvl {name}\n\n```text\n{help_of(name)}\n```\n" for name in COMMANDS]
    return HEAD + "".join(parts)


def main() -> int:
    new = page()
    if "--check" in sys.argv:
        return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != new)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
