"""The results of benchmarks/quantization.py as a table and a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final
from xml.sax.saxutils import escape

Row = dict[str, Any]
TASKS: Final = {"describe 1": "one shape", "describe 2": "two shapes", "count": "count",
                "read digits": "read", "ground": "IoU"}  # fmt: skip
DEFAULT: Final = "q4_k_m q8_0"
PLAIN, CALIBRATED, FRONT = "#8a8f98", "#2a78d6", "#2a78d6"
WIDTH, HEIGHT, MARGIN = 760, 440, 60


def write(results: dict[str, Any], table: Path, plot: Path) -> None:
    """Write the page and its plot."""
    rows = results["rows"]
    measured = sorted((r for r in rows.values() if "kl" in r), key=megabytes, reverse=True)
    best = front(measured)
    settings, machine = results["settings"], results["machine"]
    n = settings["questions"]
    parts = [
        "# What a type costs",
        "Written by `python benchmarks/quantization.py`, which converts the embedded model (trained, 7.9 "
        "million weights) to every pair of types, plain and with an importance matrix of qvl's own, and "
        "compares it with float32.",
        f"{results['date']}, {machine['cpu']}, {machine['cores']} cores. The importance matrix is of "
        f"{len(TASKS) * settings['calibration']} pictures, KL is over {measured[0]['n_tokens']} tokens of "
        f"replies to {len(TASKS) * settings['samples']} others, the scores are over {n} pictures a task that "
        f"none of them shows: a share of one picture is {1 / n:.3f}. ms is the median time of a question, "
        "picture and reply, on a machine that was not idle.",
        f"![KL against size]({plot.name})",
        "**Bold** rows are those that no other beats in size and KL at once.",
        "\n".join(_table(measured, best, rows["f32"])),
        *_default(rows),
        *_gains(measured),
        *_parts(rows),
    ]
    table.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    plot.write_text(_plot(measured, best), encoding="utf-8")


def megabytes(row: Row) -> float:
    return float(row["text_bytes"] + row["vision_bytes"]) / 1e6


def front(rows: Sequence[Row]) -> list[Row]:
    """Rows that no other beats in both, from the largest to the smallest."""
    return [
        r
        for r in rows
        if not any(megabytes(o) <= megabytes(r) and o["kl"] < r["kl"] for o in rows if o is not r)
    ]


def _table(rows: Sequence[Row], best: Sequence[Row], whole: Row) -> Iterator[str]:
    head = ["text", "vision", "imatrix", "MB", "KL", "KL, decoder", "vision error", "top-1", "same replies"]
    yield "| " + " | ".join([*head, *TASKS.values(), "ms"]) + " |"
    yield "|---|---|---|" + "--:|" * (7 + len(TASKS))
    for row in [whole, *rows]:
        cells = [row["text"], row["vision"], "yes" if row["imatrix"] else "", f"{megabytes(row):.2f}"]
        if "kl" in row:
            cells += [f"{row['kl']:.1e}", f"{row['kl_decoder']:.1e}", f"{row['vision_error']:.4f}"]
            cells += [f"{row['top1']:.2%}", f"{row['same_replies']:.0%}"]
        else:
            cells += [""] * 5
        cells += [f"{row['scores'][task]:.2f}" for task in TASKS] + [f"{1000 * row['seconds']:.0f}"]
        if any(row is b for b in best):
            cells[:2] = [f"**{cells[0]}**", f"**{cells[1]}**"]
        yield "| " + " | ".join(cells) + " |"


def _default(rows: dict[str, Row]) -> Iterator[str]:
    """The default beside its neighbours, and the grounds for it."""
    larger, smaller, four = (rows.get(key) for key in ("q6_k q8_0", "q3_k_m q4_k", "q4_k_m q4_k"))
    it, whole = rows.get(DEFAULT), rows["f32"]
    if it is None or larger is None or smaller is None or four is None:
        return
    lost = statistics.mean(whole["scores"][task] - it["scores"][task] for task in TASKS)
    worse = four["vision_error"] / it["vision_error"]
    yield "## The default"
    yield (
        f"The default, {it['text']} with {it['vision']}, says {it['top1']:.1%} of the tokens that "
        f"float32 says, and is right about the tasks {abs(lost):.3f} {'less' if lost > 0 else 'more'} often "
        f"on average. Six bits in the decoder would lose less ({larger['kl']:.1e} in place of "
        f"{it['kl']:.1e}), but the decoder is read from memory for every token, so that bits are seconds "
        f"there; three bits lose more ({smaller['kl']:.1e}). The image encoder is read once a picture, and "
        f"eight bits cost it little time: four would move its vectors {worse:.0f} times as far from "
        f"float32's ({four['vision_error']:.3f} in place of {it['vision_error']:.3f})."
    )


def _gains(rows: Sequence[Row]) -> Iterator[str]:
    """What the importance matrix changes, as ratios of KL and of the vision error."""
    pairs = [
        (plain, next(r for r in rows if r["imatrix"] and _types(r) == _types(plain)))
        for plain in rows
        if not plain["imatrix"] and any(r["imatrix"] and _types(r) == _types(plain) for r in rows)
    ]
    if not pairs:
        return
    yield "## What the importance matrix changes"
    yield (
        "Figures with it, as a share of those without: below 1 it helps. Of one file KL is a matter of "
        "luck: with channels in another order it is easily a fifth more or less. As means over four "
        "orders at each of four states of the training, the decoder's at q4_k_m was 0.52, 0.58, 0.44 and "
        "0.53 of that without (the dequantized weights run in float32, 256 questions). By the runtime, "
        "over six orders of the weights as they are, 40 pictures and 48 questions, it was 0.68, give or "
        "take 0.08 of its logarithm, and the encoder's at q4_k 0.34: tests/measure/test_embedded.py holds "
        "both to be below 1."
    )
    yield (
        "It comes from the products of inputs, which only qvl's own importance matrices have and Q4_K, "
        "Q5_K and Q6_K alone use (qvl.convert.feedback). Squares of inputs, all that llama.cpp's have, "
        "gave 0.96 on average over the same orders, and a weight for each column cannot do much more: the "
        "best there is, from gradients of the replies themselves, would give 0.92 (by a diagonal Fisher "
        "matrix). This decoder is 256 wide, so that one block of products holds all its channels; of a "
        "wider model a block holds only a part, and less is won there. Where products are forgotten beyond "
        "neighbourhoods of 128, 64, 16 and 1 of the 256 channels, the ratio of 0.68 becomes 0.66, 0.79, "
        "1.01 and 1.03, give or take 0.06, 0.11, 0.10 and 0.10 (python benchmarks/calibration.py): of the "
        "2B, with 256 of 1536 channels in a block, a fifth or less is to be hoped for."
    )
    yield (
        "What it takes, of Qwen2-VL-2B: 0.9 GB of importance matrix, 20 s for each picture of 448x448 in "
        "place of 12, and 56 s of conversion in place of 17, in 0.7 GB in place of 0.15, on two cores."
    )
    lines = ["| text | vision | KL | KL, decoder | vision error |", "|---|---|--:|--:|--:|"]
    for plain, weighed in pairs:
        ratios = [weighed[k] / plain[k] if plain[k] else 1.0 for k in ("kl", "kl_decoder", "vision_error")]
        cells = [plain["text"], plain["vision"], *(f"{ratio:.2f}" for ratio in ratios)]
        lines.append("| " + " | ".join(cells) + " |")
    yield "\n".join(lines)


def _types(row: Row) -> tuple[str, str]:
    return row["text"], row["vision"]


def _parts(rows: dict[str, Row]) -> Iterator[str]:
    row = rows.get(DEFAULT)
    if row is None or not row["parts"]:
        return
    yield f"## Where {row['text']} with {row['vision']} loses it"
    yield "KL of a float32 model in which one part is replaced (`qvl verify` finds these)."
    ranked = sorted(row["parts"].items(), key=lambda part: -part[1])
    lines = ["| part | KL |", "|---|--:|", *(f"| {name} | {kl:.1e} |" for name, kl in ranked)]
    yield "\n".join(lines)


def _plot(rows: Sequence[Row], best: Sequence[Row]) -> str:
    """Size across, KL upwards, both logarithmic."""
    xs, ys = [math.log(megabytes(r)) for r in rows], [math.log10(max(r["kl"], 1e-9)) for r in rows]
    left, right, low, high = min(xs) - 0.08, max(xs) + 0.08, min(ys) - 0.2, max(ys) + 0.2

    def at(row: Row) -> tuple[float, float]:
        x = (math.log(megabytes(row)) - left) / (right - left)
        y = (math.log10(max(row["kl"], 1e-9)) - low) / (high - low)
        return MARGIN + x * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - y * (HEIGHT - 1.5 * MARGIN)

    def text(x: float, y: float, words: str, anchor: str = "middle", size: int = 11) -> str:
        return (
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(words)}</text>'
        )

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="system-ui, sans-serif" fill="#444">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(WIDTH / 2, 22, "KL from float32 against size of the weights", size=15),
        text(WIDTH / 2, HEIGHT - 14, "MB, both files"),
    ]
    for power in range(math.ceil(low), math.floor(high) + 1):
        y = HEIGHT - MARGIN - (power - low) / (high - low) * (HEIGHT - 1.5 * MARGIN)
        out.append(f'<path d="M{MARGIN} {y:.1f}H{WIDTH - MARGIN}" stroke="#e4e4e4"/>')
        out.append(text(MARGIN - 6, y + 4, f"1e{power}", "end"))
    for mb in (2, 3, 4, 5, 6, 8, 10, 12, 16):
        if left < math.log(mb) < right:
            x = MARGIN + (math.log(mb) - left) / (right - left) * (WIDTH - 2 * MARGIN)
            out.append(text(x, HEIGHT - MARGIN + 18, str(mb)))
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, best))
    out.append(f'<polyline points="{line}" fill="none" stroke="{FRONT}" stroke-opacity="0.35"/>')
    for row in rows:
        x, y = at(row)
        colour = CALIBRATED if row["imatrix"] else PLAIN
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
        if any(row is b for b in best):
            out.append(text(x + 6, y - 6, f"{row['text']} + {row['vision']}", "start", 10))
    for i, (name, colour) in enumerate((("plain", PLAIN), ("with an importance matrix", CALIBRATED))):
        y = 44 + 16 * i
        out.append(f'<circle cx="{WIDTH - 230}" cy="{y - 4}" r="4" fill="{colour}"/>')
        out.append(text(WIDTH - 220, y, name, "start"))
    return "\n".join([*out, "</svg>"]) + "\n"
