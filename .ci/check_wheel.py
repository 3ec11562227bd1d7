"""Check that a built wheel holds the qvl packages, typed, and nothing beside them."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

PACKAGES = ("cli", "convert", "models", "runtime")


def main(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top_level = {name.split("/")[0] for name in names}
    strangers = {name for name in top_level if name != "qvl" and not name.endswith(".dist-info")}
    assert not strangers, f"{wheel.name} would put {sorted(strangers)} into site-packages"
    for package in PACKAGES:
        assert f"qvl/{package}/py.typed" in names, f"{wheel.name} lacks qvl/{package}/py.typed"
        sources = {f"qvl/{path.as_posix()}" for path in Path(package).rglob("*.py")}
        lost = {name for name in sources - set(names) if "/train/" not in name}
        assert not lost, f"{wheel.name} lacks {sorted(lost)}: list their package in pyproject.toml"
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 1e6:.1f} MB, qvl.* alone")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
