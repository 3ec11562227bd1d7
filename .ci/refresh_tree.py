"""Writes the tree of docs/architecture.md: every module with the first sentence of its docstring.

python .ci/refresh_tree.py            writes it
python .ci/refresh_tree.py --check    exits with 1 where the page is out of date
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = ("convert", "runtime", "cli", "models")
BEGIN, END = "<!-- tree: begin -->", "<!-- tree: end -->"


def summary(path: Path) -> str:
    """The first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.:;]) ", first)[0].rstrip(".:;")


def tree() -> str:
    """The tree as Markdown."""
    lines = []
    for package in PACKAGES:
        for folder in [ROOT / package, *sorted(p for p in (ROOT / package).rglob("*") if p.is_dir())]:
            files = sorted(folder.glob("*.py"))
            if not files or "nano" in folder.parts:
                continue
            init = folder / "__init__.py"
            name = folder.relative_to(ROOT).as_posix()
            lines += ["", f"**{name}/** {summary(init) if init.exists() else ''}".rstrip(), ""]
            lines += [f"- `{file.name}`: {summary(file)}" for file in files if file != init]
    return "\n".join(lines).strip()


def refreshed(page: str) -> str:
    """The page with its tree anew."""
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    return f"{page[:start]}\n\n{tree()}\n\n{page[end:]}"


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    new = refreshed(page)
    if "--check" in sys.argv:
        return int(new != page)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
