"""Check a built wheel: it holds what it should and no more, and answers where it is installed, offline."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

PACKAGES = ("cli", "convert", "models", "runtime")
EMBEDDED = sorted(Path("models/gguf").glob("*.gguf"))
SAMPLES = Path("models/samples")
REPOSITORY_ONLY = Path("models/nano")  # the checkpoint and its training
EXPECTED = re.compile(
    r"qvl/(__init__\.py|py\.typed)|qvl/(cli|convert|models|runtime)/(.*\.(py|so|pyd)|py\.typed|registry\.toml"
    r"|gguf/[^/]*\.gguf|samples/[^/]*|serve/(page|page/vendor|docs)/[^/]*)"
)


def check_contents(wheel: Path) -> str:
    names = zipfile.ZipFile(wheel).namelist()
    top_level = {name.split("/")[0] for name in names}
    strangers = {name for name in top_level if name != "qvl" and not name.endswith(".dist-info")}
    assert not strangers, f"{wheel.name} would put {sorted(strangers)} into site-packages"
    ours = [name for name in names if name.startswith("qvl/")]
    strangers = {name for name in ours if not EXPECTED.fullmatch(name) or REPOSITORY_ONLY.as_posix() in name}
    assert not strangers, f"{wheel.name} carries {sorted(strangers)}, which nobody needs"
    for package in PACKAGES:
        assert f"qvl/{package}/py.typed" in names, f"{wheel.name} lacks qvl/{package}/py.typed"
        files = [path for path in Path(package).rglob("*.py") if REPOSITORY_ONLY not in path.parents]
        sources = {f"qvl/{path.as_posix()}".replace("qvl/runtime/qvl/", "qvl/") for path in files}
        lost = sources - set(names)
        assert not lost, f"{wheel.name} lacks {sorted(lost)}: list their package in pyproject.toml"
    lost = {f"qvl/{path.as_posix()}" for path in EMBEDDED} - set(names)
    assert not lost, f"{wheel.name} lacks the embedded model's {sorted(lost)}"
    return f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 1e6:.1f} MB, qvl.* alone"


def check_answer(wheel: Path) -> str:
    """Install it into an environment of its own, cut off the network, and ask about a sample from elsewhere.

    What it depends on is taken from this environment: it was installed from the same pyproject.toml.
    """
    record = next(r for r in json.loads((SAMPLES / "answers.json").read_text()) if r.get("file") == "one.png")
    question, truth = record["turns"][0]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        home.mkdir()
        shutil.copy(SAMPLES / "one.png", home)
        environment = Path(folder) / "venv"
        venv.create(environment)
        python = environment / "bin" / "python"
        site = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        install = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "-qq",
            "--no-index",
            "--no-deps",
        ]
        subprocess.run([*install, "--ignore-installed", str(wheel.resolve())], check=True)
        dead = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
        offline = (
            ["unshare", "-rn"] if not subprocess.call(["sh", "-c", "unshare -rn true 2>/dev/null"]) else []
        )
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "XDG_"))}

        def out(*command: str) -> str:
            done = subprocess.run(
                [*offline, *command], env=kept | dead | {"HOME": str(home)}, cwd=home,
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

        named = out(str(python), "-c", "import qvl; print(qvl.__version__, *dir(qvl))")
        assert wheel.name.startswith(f"qvl-{named.split()[0]}-"), f"it is version {named}"
        for package in PACKAGES:
            where = Path(out(str(python), "-c", f"import qvl.{package} as p; print(p.__file__)"))
            assert where.is_relative_to(environment.resolve()), f"not of the wheel: {where}"
        said = out(str(environment / "bin" / "qvl"), "chat", "-p", question, "--image", "one.png")
    assert said == truth, f"it says {said!r} of one.png, expected {truth!r}"
    return f"installed and offline it answers: {said}"


def main() -> None:
    (wheel,) = map(Path, sys.argv[1:])
    print(check_contents(wheel))
    if EMBEDDED:
        print(check_answer(wheel))


if __name__ == "__main__":
    main()
