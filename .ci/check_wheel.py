"""Check that a built wheel holds the qvl packages, typed, and nothing beside them, and that it answers."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGES = ("cli", "convert", "models", "runtime")
EMBEDDED = sorted(Path("models/gguf").glob("*.gguf"))


def check_contents(wheel: Path) -> str:
    names = zipfile.ZipFile(wheel).namelist()
    top_level = {name.split("/")[0] for name in names}
    strangers = {name for name in top_level if name != "qvl" and not name.endswith(".dist-info")}
    assert not strangers, f"{wheel.name} would put {sorted(strangers)} into site-packages"
    for package in PACKAGES:
        assert f"qvl/{package}/py.typed" in names, f"{wheel.name} lacks qvl/{package}/py.typed"
        sources = {f"qvl/{path.as_posix()}" for path in Path(package).rglob("*.py")}
        lost = sources - set(names)
        assert not lost, f"{wheel.name} lacks {sorted(lost)}: list their package in pyproject.toml"
    lost = {f"qvl/{path.as_posix()}" for path in EMBEDDED} - set(names)
    assert not lost, f"{wheel.name} lacks the embedded model's {sorted(lost)}"
    return f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 1e6:.1f} MB, qvl.* alone"


def check_answer(wheel: Path) -> str:
    """Unpack it elsewhere and ask the embedded model about a sample."""
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        sample = Path("models/samples/one.png").resolve()
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "qvl.cli",
                "chat",
                "-q",
                "--image",
                str(sample),
                "-p",
                "Describe this image.",
            ],
            env=os.environ | {"PYTHONPATH": folder, "XDG_STATE_HOME": folder, "XDG_CACHE_HOME": folder},
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    return f"it answers: {done.stdout.strip()}"


def main() -> None:
    (wheel,) = map(Path, sys.argv[1:])
    print(check_contents(wheel))
    if EMBEDDED:
        print(check_answer(wheel))


if __name__ == "__main__":
    main()
