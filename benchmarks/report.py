"""The results of benchmarks/vision.py as tables and a plot in benchmarks/README.md."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

BEGIN, END = "<!-- vision: begin -->", "<!-- vision: end -->"
TITLE = "# Benchmarks\n\nEvery table here is written by the script it names.\n"
# What, ours, theirs (the fastest of them), {level of kernels: {size: (must, aim)}}
Goals = dict[str, dict[str, tuple[float, float]]]
LEVELS = {"avx2": "avx2", "avxvnni": "avxvnni", "avx512vnni": "avx512", "avx512bf16": "avx512"}
GOALS: tuple[tuple[str, str, tuple[str, ...], Goals], ...] = (
    (
        "mtmd, same F16 mmproj",
        "qvl F16",
        ("mtmd F16",),
        {"avx2": {"448": (0.80, 0.65)}, "avxvnni": {"448": (0.80, 0.55)}, "avx512": {"448": (0.45, 0.35)}},
    ),
    (
        "mtmd, same Q8_0 mmproj",
        "qvl Q8_0",
        ("mtmd Q8_0",),
        {"avx2": {"448": (0.45, 0.33)}, "avxvnni": {"448": (0.35, 0.22)}, "avx512": {"448": (0.33, 0.22)}},
    ),
    (
        "mtmd, same Q4_K mmproj",
        "qvl Q4_K",
        ("mtmd Q4_K",),
        {"avx2": {"448": (0.60, 0.42)}, "avxvnni": {"448": (0.50, 0.33)}, "avx512": {"448": (0.60, 0.40)}},
    ),
    (
        "our default (Q8_0) against mtmd's (F16)",
        "qvl Q8_0",
        ("mtmd F16",),
        {
            "avx2": {"448": (0.60, 0.42), "896": (0.50, 0.33)},
            "avxvnni": {"448": (0.45, 0.30), "896": (0.40, 0.28)},
            "avx512": {"448": (0.42, 0.30), "896": (0.32, 0.24)},
        },
    ),
    (
        "our default (Q8_0) against transformers",
        "qvl Q8_0",
        ("transformers BF16", "transformers F32"),
        {
            "avx2": {"448": (0.55, 0.40), "896": (0.60, 0.38)},
            "avxvnni": {"448": (0.45, 0.30), "896": (0.45, 0.30)},
            "avx512": {"448": (0.62, 0.45), "896": (0.42, 0.30)},
        },
    ),
)
PROGRAM_GOALS = {"warm": (0.70, 0.55), "cold": (0.75, 0.6)}
PROGRAM_NAMES = {
    "warm": "llama-mtmd-cli, warm: encode and prefill of a picture and a question",
    "cold": "llama-mtmd-cli, cold: a process from its start to its first token",
}
PACKING_GOAL = (0.85, 0.7)
COLOURS = {"qvl": "#2a78d6", "mtmd": "#e08a2e", "transformers": "#8a8f98"}

Row = Sequence[str]


def write(results: dict[str, Any], plot: Path, readme: Path) -> None:
    """Put the report between its markers in the README, which is made if need be, and the plot beside it.

    Args:
        results: by processor and level of kernels.
        plot: drawn of the first of them.
    """
    parts = [BEGIN, "## Image encoder", "", "Written by `python benchmarks/vision.py`.", ""]
    parts += ["Ratios of medians, ours to theirs, in turns in one run; below 1 we are faster.", ""]
    for place, (title, found) in enumerate(results.items()):
        parts += [f"### {title}", "", _machine(found), ""]
        if goals := list(_goals(found)):
            parts += [_table(("against", "picture", "must", "aim", "measured"), goals), ""]
        if "encode" in found:
            if place == 0:
                plot.write_text(_plot(found["encode"]), encoding="utf-8")
                parts += [f"![Seconds to encode a picture, by program and type]({plot.name})", ""]
            parts += [_encode_table(found["encode"]), ""]
        for name, section in (("profile", _profile), ("programs", _rates)):
            if name in found:
                parts += [*section(found[name]), ""]
    parts.append(END)
    old = readme.read_text(encoding="utf-8") if readme.exists() else TITLE
    before, begin, rest = old.partition(BEGIN)
    after = rest.partition(END)[2] if begin else "\n"
    readme.write_text(before.rstrip() + "\n\n" + "\n".join(parts) + after, encoding="utf-8")


def _machine(results: dict[str, Any]) -> str:
    m = results["machine"]
    kernels = f"qvl's {m['native']} kernels" if m["native"] else "ggml's kernels alone"
    note = f" {results['note']}" if "note" in results else ""
    what = f"{m['cores']} cores, ggml {m['ggml']}, {kernels}; {results['date']}"
    return f"{what}. Random weights of Qwen2-VL-2B's shape.{note}"


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def _goals(results: dict[str, Any]) -> Iterator[Row]:
    sizes = results.get("encode", {})
    level = LEVELS.get(results["machine"]["native"], "")
    for what, ours, theirs, goals in GOALS:
        for size, (must, aim) in goals.get(level, {}).items():
            seconds = sizes.get(size, {}).get("seconds", {})
            if ours in seconds and (there := [name for name in theirs if name in seconds]):
                best = min(there, key=lambda name: _median(seconds[name]))
                named = f"{what}, {best.rpartition(' ')[2]}" if len(theirs) > 1 else what
                yield _goal(named, f"{size}x{size}", must, aim, seconds[ours], seconds[best])
    if programs := results.get("programs"):
        for part, (must, aim) in PROGRAM_GOALS.items():
            found = programs.get(part, {})
            for ours, theirs, files in (
                ("qvl F16", "llama-mtmd-cli F16", "same F16 mmproj"),
                ("qvl Q8_0", "llama-mtmd-cli F16", "our Q8_0, their F16"),
                ("qvl F16", "llama-mtmd-cli --no-warmup F16", "same F16 mmproj, theirs with --no-warmup"),
            ):
                if ours in found and theirs in found:
                    size = f"{programs['size']}x{programs['size']}"
                    what = f"{PROGRAM_NAMES[part]}; {files}"
                    yield _goal(what, size, must, aim, found[ours], found[theirs])
    if "packing" in results:
        seconds = results["packing"]["seconds"]
        what = "8 pictures in one call against 8 calls"
        yield _goal(what, "224x224", *PACKING_GOAL, seconds["together"], seconds["apart"])


def _goal(
    what: str, size: str, must: float, aim: float, ours: Sequence[float], theirs: Sequence[float]
) -> Row:
    ratio = _median(ours) / _median(theirs)
    mark = "" if ratio <= must else " (missed)"
    return what, size, f"{must:.2f}", f"{aim:.2f}", f"**{ratio:.2f}**{mark}"


def _encode_table(sizes: dict[str, Any]) -> str:
    names = list(dict.fromkeys(name for size in sizes.values() for name in size["seconds"]))
    rows = []
    for size, found in sizes.items():
        seconds = found["seconds"]
        cells = [f"{_median(seconds[name]):.3g}" if name in seconds else "" for name in names]
        rounds = max(map(len, seconds.values()))
        rows.append((size, str(found["patches"]), *cells, _how(found, rounds)))
    return "Seconds to encode one picture, medians.\n\n" + _table(("picture", "patches", *names, "how"), rows)


def _how(found: dict[str, Any], rounds: int) -> str:
    clock = "wall time" if found["clock"] == "wall" else "processor time"
    threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    return f"{clock}, {threads}, {rounds} round{'s' if rounds > 1 else ''}"


def _profile(found: dict[str, Any]) -> list[str]:
    seconds = found["seconds"]
    columns = [(size, kind) for size in seconds for kind in seconds[size]]
    operations = list(dict.fromkeys(op for size, kind in columns for op in seconds[size][kind]))
    totals = {column: sum(seconds[column[0]][column[1]].values()) for column in columns}

    def share(op: str, column: tuple[str, str]) -> float:
        return float(seconds[column[0]][column[1]].get(op, 0.0)) / totals[column]

    operations.sort(key=lambda op: -share(op, columns[0]))
    rows = [(op, *[f"{share(op, column):.1%}" for column in columns]) for op in operations]
    header = ("operation", *[f"{size}, {kind.upper()}" for size, kind in columns])
    return ["Where our time goes, by kind of operation.", "", _table(header, rows)]


def _rates(found: dict[str, Any]) -> list[str]:
    rates = found.get("rates", {})
    if not rates:
        return []
    rows = []
    for what, use in (("prefill", ""), ("prefill", " for captions"), ("generation", "")):
        ours, theirs = (_median(rates[name]) for name in (f"qvl {what}{use}", f"llama-bench {what}"))
        rows.append((f"{what}{use}", f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.2f}"))
    header = ("tokens a second", "qvl", "llama-bench", "ratio")
    return ["The decoder, on the same file; above 1 we are faster.", "", _table(header, rows)]


def _table(header: Row, rows: Sequence[Row]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plot(sizes: dict[str, Any]) -> str:
    """Bars for each size, each size scaled to its slowest: what counts is the ratio."""
    bar, gap, head, left, width = 16, 4, 30, 130, 460
    body: list[str] = []
    y = 8
    for size, found in sizes.items():
        medians = {name: _median(values) for name, values in found["seconds"].items()}
        slowest = max(medians.values())
        label = size if "x" in size else f"{size}x{size}"
        body.append(f'<text x="0" y="{y + 14}" class="h">{label}, {found["patches"]} patches</text>')
        y += head - 8
        for name, value in sorted(medians.items(), key=lambda item: item[1]):
            length = max(1.0, width * value / slowest)
            colour = COLOURS[name.split()[0]]
            middle = y + bar - 4
            body.append(f'<text x="{left - 8}" y="{middle}" text-anchor="end">{escape(name)}</text>')
            body.append(f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{bar}" fill="{colour}"/>')
            body.append(f'<text x="{left + length + 6:.1f}" y="{middle}">{value:.2f} s</text>')
            y += bar + gap
        y += 12
    style = (
        "text{font:12px system-ui,sans-serif;fill:#333}.h{font-weight:600}"
        "@media(prefers-color-scheme:dark){text{fill:#ddd}}"
    )
    size = f'width="{left + width + 70}" height="{y}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><style>{style}</style>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )
