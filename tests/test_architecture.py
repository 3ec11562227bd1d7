"""The rules of the house that a machine can hold: who imports whom, and what an import may cost."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("runtime", "convert", "models", "cli")
MAX_LINES = 400

# What a package may import of qvl; a prefix allows all below it.
ALLOWED = {
    "runtime": ("qvl.runtime", "qvl.models"),
    "convert": (
        "qvl.convert",
        "qvl.runtime.errors",
        "qvl.runtime.families.table",
        "qvl.runtime.files",
        "qvl.runtime.ggml",
        "qvl.runtime.resources",
        "qvl.runtime.atomic",
        "qvl.runtime.files",
        "qvl.runtime.locks",
        "qvl.runtime.families.table",
    ),
    "models": ("qvl.models", "qvl.runtime.errors"),
    "cli": ("qvl",),
}

# Floors inside the runtime: what a folder must not import.
FORBIDDEN = {
    "engine": ("caption", "detail", "families", "measure", "model", "serve"),
    "ggml": ("caption", "detail", "engine", "families", "llama", "measure", "model", "prompt", "vision"),
    "llama": ("caption", "detail", "engine", "families", "measure", "model", "prompt", "vision"),
    "vision": ("caption", "engine", "llama", "measure", "model"),
}


def sources(package: str) -> list[Path]:
    # What makes the embedded model is a program of its own, outside the wheel.
    return [p for p in sorted((ROOT / package).rglob("*.py")) if "nano" not in p.relative_to(ROOT).parts]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            base = node.module or ""
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    assert sources(package)
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources(package)
        for line, name in imports(path)
        if name.split(".")[0] in ("qvl", *PACKAGES)
        and not any(f"{name}.".startswith(f"{allowed}.") for allowed in ALLOWED[package])
    ]
    assert not wrong, f"{package} must not import:\n" + "\n".join(wrong)


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_floors_of_the_runtime(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources(f"runtime/{folder}")
        for line, name in imports(path)
        if name.startswith("qvl.runtime.") and name.split(".")[2] in FORBIDDEN[folder]
    ]
    assert not wrong, f"runtime/{folder} must not import:\n" + "\n".join(wrong)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("qvl", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def run_time_imports(path: Path) -> set[str]:
    """Names that are imported when the module or one of its functions runs, not only for its types."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def circles(graph: dict[str, set[str]]) -> list[str] | None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        return list(e.args[1])
    return None


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_itself_by_a_circle(package: str) -> None:
    modules = {module_name(path): path for path in sources(package)}
    graph = {
        name: {
            next((m for m in (target, target.rpartition(".")[0]) if m in modules), "")
            for target in run_time_imports(path)
        }
        - {"", name}
        for name, path in modules.items()
        if path.name != "__init__.py"
    }
    assert any(graph.values()) or len(graph) == 1
    assert circles(graph) is None


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) is not None


def test_few_files_are_loose_in_the_runtime() -> None:
    assert len([p for p in (ROOT / "runtime").glob("*.py") if p.name != "__init__.py"]) < 10


def test_the_runtime_needs_no_torch() -> None:
    heavy = {"torch", "transformers", "torchvision", "ray"}
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for package in ("runtime", "convert", "models")
        for path in sources(package)
        for line, name in imports(path)
        if name.split(".")[0] in heavy
    ]
    assert not found


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


def test_every_package_is_in_the_wheel() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT).as_posix() for package in PACKAGES for path in sources(package)}
    assert folders <= set(setuptools["package-dir"].values())
    assert set(setuptools["packages"]) == set(setuptools["package-dir"])


def test_a_file_is_one_concept() -> None:
    long = {
        str(path.relative_to(ROOT)): n
        for folder in (*PACKAGES, "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if (n := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert not long, f"longer than {MAX_LINES} lines: {long}"


@pytest.mark.parametrize("package", ("runtime", "convert"))
def test_the_library_names_no_flags(package: str) -> None:
    """Its errors name parameters in backquotes; the command line turns them into its flags."""
    found = []
    for path in sources(package):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}  # docstrings
        found += [
            f"{path.relative_to(ROOT)}:{node.lineno}: {node.value}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts
            if re.search(r"(?<![\w-])--[a-z]{2}", node.value) and "llama-imatrix" not in node.value
        ]
    assert not found


def imported_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_runtime_is_light() -> None:
    loaded = imported_by("import qvl.runtime")
    assert not loaded & {"av", "huggingface_hub", "torch", "transformers", "llama_cpp", "rich", "typer"}


def test_help_imports_nothing_heavy() -> None:
    loaded = imported_by("from qvl.cli.main import run; run(['chat', '--help'])")
    assert not loaded & {"numpy", "av", "PIL", "gguf", "llama_cpp", "huggingface_hub"}


def least_cpu(arguments: list[str], runs: int = 5) -> float:
    """Processor seconds of a run of Python: what it takes when nothing else keeps the machine busy."""

    def once() -> float:
        process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        process.returncode = 0
        return usage.ru_utime + usage.ru_stime

    return min(once() for _ in range(runs))


def test_help_answers_at_once() -> None:
    bare = least_cpu(["-c", "pass"])
    for command, limit in (([], 0.05), (["chat"], 0.2)):
        extra = least_cpu(["-m", "qvl.cli", *command, "--help"]) - bare
        assert extra < limit, f"qvl {' '.join(command)} --help: {extra:.2f} s above a bare interpreter"
