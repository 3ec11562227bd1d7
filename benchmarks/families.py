"""Image encoders of all families against llama.cpp's libmtmd: ratios of medians, on the same files, in turns.

    python benchmarks/families.py --work /tmp/towers --prepare      makes the files (random weights)
    python benchmarks/families.py --work /tmp/towers                measures, and prints a table

Towers have their published widths and fewer blocks: 8, of which Qwen2.5-VL attends within windows in 7, as in
its 32, and Qwen3-VL takes deepstack features from one (three of 24 or 27). Decoders are stubs of the right
width. A ratio over 1 means that qvl is faster. Results are kept in benchmarks/families.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import contenders
import numpy as np
from vision import in_turns, picture, rounded

from qvl.convert import convert
from qvl.runtime.measure.machine import describe_machine
from qvl.runtime.resources import default_threads

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from support.families import family_config, write_family

HERE = Path(__file__).resolve().parent
DEPTH = 8
WINDOWS = {"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "fullatt_block_indexes": [7]}
DENSE = {"num_heads": 16, "num_position_embeddings": 2304, "deepstack_visual_indexes": [5]}
# published config.json of each: the encoder's, and the decoder's width
TOWERS: dict[str, tuple[str, dict[str, Any], int]] = {
    "Qwen2-VL 2B": ("qwen2_vl", {"embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4}, 1536),
    "Qwen2.5-VL 3B": ("qwen2_5_vl", WINDOWS, 2048),
    "Qwen3-VL 2B": ("qwen3_vl", {**DENSE, "hidden_size": 1024, "intermediate_size": 4096}, 2048),
    "Qwen3-VL 4B": ("qwen3_vl", {**DENSE, "hidden_size": 1024, "intermediate_size": 4096}, 2560),
    "Qwen3-VL 8B": ("qwen3_vl", {**DENSE, "hidden_size": 1152, "intermediate_size": 4304}, 4096),
}
TYPES = ("f16", "q8_0", "q4_k")


def files(work: Path, name: str) -> dict[str, tuple[Path, Path]]:
    """Text and vision file by type, made unless they are there."""
    family, vision, width = TOWERS[name]
    folder = work / name.replace(" ", "-")
    if not (folder / "model.safetensors").exists():
        print(f"making {folder.name} ...", file=sys.stderr)
        config = family_config(family)
        out = "hidden_size" if family == "qwen2_vl" else "out_hidden_size"
        config["vision_config"] |= {**vision, out: width, "depth": DEPTH}
        text = config.get("text_config", config)
        heads = {"num_attention_heads": width // 32, "num_key_value_heads": width // 32}
        text |= {"hidden_size": width, "num_hidden_layers": 1, **heads}
        write_family(folder, family, config=config)
    made = {}
    for kind in TYPES:
        paths = sorted((folder / kind).glob("*.gguf"))
        if len(paths) != 2:
            print(f"converting it to {kind} ...", file=sys.stderr)
            convert(folder, folder / kind, "q8_0", kind, force=True)
            paths = sorted((folder / kind).glob("*.gguf"))
        mmproj, text = sorted(paths, key=lambda path: not path.name.startswith("mmproj"))
        made[kind] = (text, mmproj)
    return made


def measure(args: argparse.Namespace, name: str, kind: str, sizes: list[int]) -> dict[str, dict[str, float]]:
    """Median seconds of both at each size, and their ratio."""
    text, mmproj = files(args.work, name)[kind]
    found = {}
    with ExitStack() as stack:
        both = {
            "qvl": contenders.ours(stack, mmproj, kind, args.threads).encode,
            "mtmd": contenders.mtmd(stack, text, mmproj, kind, args.threads).encode,
        }
        if kind == "f16":  # of quantized weights they round the inputs, too, each in its way
            ours, theirs = (encode(picture(448, 448, 0)) for encode in both.values())
            error = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
            if error > 0.1:
                raise SystemExit(f"{name}: qvl and mtmd disagree, relative error {error:.3f}")
        for size in sizes:
            turns: dict[str, Callable[[int], Any]] = {
                who: (lambda n, e=encode, s=size: e(picture(s, s, n))) for who, encode in both.items()
            }
            seconds = in_turns(turns, args.rounds, args.budget, args.timer, warm=False)
            middle = {who: median(times) for who, times in seconds.items()}
            ratio = middle["mtmd"] / middle["qvl"]
            found[str(size)] = {**middle, "ratio": ratio, "rounds": len(seconds["qvl"])}
    return found


def table(results: dict[str, Any], sizes: list[str]) -> str:
    """Markdown: a row for each tower and type, the ratio and both medians for each size."""
    head = "".join(f" {size}: ratio | qvl, s | mtmd, s |" for size in sizes)
    lines = [f"| tower, {DEPTH} blocks | type |{head}", "| --- | --- |" + " --- |" * (3 * len(sizes))]
    for name, kinds in results["towers"].items():
        for kind, found in kinds.items():
            cells = [found.get(size, {}) for size in sizes]
            row = "".join(
                f" {c['ratio']:.2f} | {c['qvl']:.2f} | {c['mtmd']:.2f} |" if c else " | | |" for c in cells
            )
            lines.append(f"| {name} | {kind.upper()} |{row}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of the files that are made")
    parser.add_argument("--prepare", action="store_true", help="only make the files")
    parser.add_argument("--towers", nargs="+", choices=[*TOWERS], default=[*TOWERS], metavar="NAME")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=[*TYPES])
    parser.add_argument("--sizes", nargs="+", type=int, default=[448, 896], metavar="SIDE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds a tower, type and size may take")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--results", type=Path, default=HERE / "families.json")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: one thread's own time")
    args = parser.parse_args()
    args.timer = time.perf_counter
    if args.clock == "cpu":
        args.threads, args.timer = 1, time.process_time
    for name in args.towers:
        files(args.work, name)
    if args.prepare:
        return
    results = json.loads(args.results.read_text()) if args.results.exists() else {"towers": {}}
    results |= {"machine": describe_machine().as_dict(), "threads": args.threads, "clock": args.clock}
    for kind in args.types:
        for name in args.towers:
            print(f"{name} {kind}", file=sys.stderr)
            kept = results["towers"].setdefault(name, {}).setdefault(kind, {})
            kept.update(measure(args, name, kind, args.sizes))
            args.results.write_text(json.dumps(rounded(results), indent=1) + "\n")
    print(table(results, [str(size) for size in sorted({448, 896, *args.sizes})]))


if __name__ == "__main__":
    main()
