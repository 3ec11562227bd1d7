"""The image encoder against llama.cpp's and transformers', on random weights of Qwen2-VL-2B's shape.

    python benchmarks/vision.py                     makes the files it needs in a temporary folder
    python benchmarks/vision.py --whole --peers "$(benchmarks/peers.sh)"
                                                    also against llama-mtmd-cli and llama-bench

Writes benchmarks/vision.json, and from it benchmarks/vision.svg and a section of benchmarks/README.md: a
table for each processor and level of kernels, which never mix. Contenders take turns, picture by picture, in
one process, on the same files and a new picture each round; ratios are of medians. What is not measured this
time stays in the JSON as it was, so that a long run can be made in parts (`--sections`, `--sizes`, `--only`):
keep those whose ratio counts in one part.

A lower level is measured on a better processor by holding everybody to it: QVL_NATIVE=avx2 for ours; for
llama.cpp a copy of the llama_cpp package, first on PYTHONPATH, with libraries built for AVX2 alone
(GGML_NATIVE=OFF, GGML_AVX2=ON, GGML_FMA=ON, GGML_F16C=ON); for torch ONEDNN_MAX_CPU_ISA=AVX2,
ATEN_CPU_CAPABILITY=avx2, MKL_ENABLE_INSTRUCTIONS=AVX2. Say so with `--title`.

transformers takes part where torch is installed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import contenders
import numpy as np
import programs
import random_model
import report
from contenders import Contender, Picture
from profile_encoder import profile

from qvl.runtime.measure.machine import describe_machine
from qvl.runtime.resources import default_threads
from qvl.runtime.vision.encoder import VisionEncoder
from qvl.runtime.vision.grid import MERGE_SIZE, PATCH_SIZE

HERE = Path(__file__).resolve().parent
SIZES = ("224", "448", "896", "1344", "1600x400")
TYPES = ("f16", "q8_0", "q4_k")
TORCH_TYPES = ("bf16", "f32")
SECTIONS = ("encode", "profile", "packing", "programs")
PACK = 8
WARM_PATCHES = 256  # beyond, a round that does not count costs more than it tells
Clock = Callable[[], float]


def picture(width: int, height: int, seed: int) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def parse_size(text: str) -> tuple[int, int]:
    """Width and height in pixels, cut to whole tokens, so that nobody resizes: "1600x400" is (1596, 392)."""
    width, _, height = text.partition("x")
    side = PATCH_SIZE * MERGE_SIZE
    return int(width) // side * side, int(height or width) // side * side


def in_turns(
    runs: dict[str, Callable[[int], Any]],
    rounds: int,
    budget: float,
    clock: Clock = time.perf_counter,
    warm: bool = True,
) -> dict[str, list[float]]:
    """What every run took, by name: seconds, or what it returned if that is a float.

    Args:
        runs: called with the number of the round.
        budget: seconds after which no round begins, when there has been one that counts.
        warm: begin with a round that does not count.
    """
    measured: dict[str, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    for number in range(0 if warm else 1, rounds + 1):
        if number > 1 and time.perf_counter() - started > budget:
            break
        turns = list(runs.items())
        for name, run in turns if number % 2 else turns[::-1]:
            before = clock()
            value = run(number)
            seconds = clock() - before
            if number:
                measured[name].append(value if isinstance(value, float) else seconds)
        last = ", ".join(f"{name} {values[-1]:.3g}" for name, values in measured.items() if values)
        print(f"  round {number}: {last or 'does not count'}", file=sys.stderr)
    return measured


class Encode:
    """All encoders at every size."""

    def __init__(self, args: argparse.Namespace, text: Path, mmprojs: dict[str, Path]) -> None:
        self.args, self.text, self.mmprojs = args, text, mmprojs

    def contenders(self, stack: ExitStack) -> list[Contender]:
        """Those that are asked for, loaded."""
        threads, text, found = self.args.threads, self.text, []
        for kind, path in self.mmprojs.items():
            if self._takes_part("qvl", kind):
                found.append(contenders.ours(stack, path, kind, threads))
            if self._takes_part("mtmd", kind):
                found.append(contenders.mtmd(stack, text, path, kind, threads))
        try:
            for kind in TORCH_TYPES:
                if self._takes_part("transformers", kind):
                    found.append(contenders.transformers(next(iter(self.mmprojs.values())), kind, threads))
        except ImportError as e:
            print(f"without transformers: {e}", file=sys.stderr)
        return found

    def _takes_part(self, program: str, kind: str) -> bool:
        return not self.args.only or f"{program} {kind.upper()}" in self.args.only

    def check(self, found: list[Contender]) -> None:
        """Both sides must see the same: their embeddings differ by rounding alone."""
        by_name = {c.name: c.encode(picture(112, 84, 0)) for c in found}
        for name, embeddings in by_name.items():
            other = by_name.get(name.replace("qvl", "mtmd", 1), embeddings)
            error = float(np.linalg.norm(embeddings - other) / np.linalg.norm(other))
            if embeddings.shape != other.shape or error > 0.1:
                raise SystemExit(f"{name} and mtmd disagree: relative error {error:.3f}")

    def run(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """What was measured at each size."""
        with ExitStack() as stack:
            found = self.contenders(stack)
            self.check(found)
            for size in self.args.sizes:
                width, height = parse_size(size)
                print(size, file=sys.stderr)
                turns: dict[str, Callable[[int], Any]] = {
                    c.name: (lambda n, c=c, w=width, h=height: c.encode(picture(w, h, n))) for c in found
                }
                patches = (width // 28) * (height // 28) * 4
                warm = patches <= WARM_PATCHES
                seconds = in_turns(turns, self.args.rounds, self.args.budget, self.args.timer, warm)
                yield size, {**conditions(self.args), "patches": patches, "seconds": seconds}


def measure_profile(args: argparse.Namespace, mmprojs: dict[str, Path], results: dict[str, Any]) -> None:
    """Where our time goes, by size and type, into the results."""
    results.update(conditions(args))
    seconds = results.setdefault("seconds", {})
    for kind, path in mmprojs.items():
        with VisionEncoder(path, device="cpu", threads=args.threads) as encoder:
            for size in args.profile_sizes:
                width, height = parse_size(size)
                patches = encoder.preprocessor.image(picture(width, height, 0))
                seconds.setdefault(size, {})[kind] = profile(encoder, [patches], args.timer)


def measure_packing(args: argparse.Namespace, mmproj: Path) -> dict[str, Any]:
    """Eight pictures in one call against one call each."""
    with VisionEncoder(mmproj, device="cpu", threads=args.threads) as encoder:
        pictures = [picture(224, 224, seed) for seed in range(PACK)]
        turns: dict[str, Callable[[int], Any]] = {
            "together": lambda n: encoder.encode(pictures),
            "apart": lambda n: [encoder.encode([each]) for each in pictures],
        }
        return {**conditions(args), "seconds": in_turns(turns, args.rounds, args.budget, args.timer)}


def merge(sizes: dict[str, Any], size: str, found: dict[str, Any]) -> None:
    """Put what was measured at a size in place of what these contenders took before, beside the others'."""
    old = sizes.get(size, {})
    same = {**old, "seconds": {}} == {**found, "seconds": {}}
    sizes[size] = {**found, "seconds": {**(old["seconds"] if same else {}), **found["seconds"]}}


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    return {"threads": args.threads, "clock": args.clock}


def processor(args: argparse.Namespace) -> str:
    """Conditions of the results: the processor, and the level of kernels that it runs or is held to."""
    machine = describe_machine()
    return f"{machine.cpu}, {args.title or machine.native or 'no kernels of ours'}"


def measure(args: argparse.Namespace, work: Path, results: dict[str, Any], save: Callable[[], None]) -> None:
    """Every section asked for, into the results of this processor, which are saved after each part."""
    results["machine"] = describe_machine().as_dict()
    if args.note:
        results["note"] = args.note
    results["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    if {"encode", "profile", "packing"} & {*args.sections}:
        text, mmprojs = random_model.files(work, random_model.SEEING, args.types)
        if "encode" in args.sections:
            for size, found in Encode(args, text, mmprojs).run():
                merge(results.setdefault("encode", {}), size, found)
                save()
        if "profile" in args.sections:
            measure_profile(args, mmprojs, results.setdefault("profile", {}))
            save()
        if "packing" in args.sections:
            results["packing"] = measure_packing(args, mmprojs.get("q8_0", next(iter(mmprojs.values()))))
            save()
    if "programs" in args.sections and args.peers and (args.whole or args.text):
        pair = (args.text, args.mmproj)
        if args.whole:
            whole, made = random_model.files(work, random_model.WHOLE, ["f16", "q8_0"])
            pair = (whole, made)
        elif args.mmproj is not None:
            pair = (args.text, dict(zip(("f16", "q8_0"), args.mmproj, strict=False)))
        found = results.setdefault("programs", {})
        for part in programs.measure(args, *pair, in_turns):
            found.update(conditions(args) | part)
            save()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="keep the made files here, for the next run")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=[*SECTIONS])
    parser.add_argument("--sizes", nargs="+", default=[*SIZES], metavar="W[xH]")
    parser.add_argument("--only", nargs="+", metavar="NAME", help='encoders by name, as "mtmd F16"')
    parser.add_argument("--profile-sizes", nargs="+", default=["448", "896"], metavar="W[xH]")
    parser.add_argument("--parts", nargs="+", choices=programs.PARTS, default=[*programs.PARTS])
    parser.add_argument("--types", nargs="+", default=[*TYPES])
    parser.add_argument("--rounds", type=int, default=3, help="that count, after a first that does not")
    parser.add_argument("--budget", type=float, default=180.0, help="seconds a size may take, about")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: one thread's own time")
    parser.add_argument("--whole", action="store_true", help="make a random model of full size too (12 GB)")
    parser.add_argument("--text", type=Path, help="in place of --whole: a text GGUF of full size")
    parser.add_argument("--mmproj", type=Path, nargs=2, metavar=("F16", "Q8_0"), help="that go with --text")
    parser.add_argument("--peers", type=Path, help="folder of llama-mtmd-cli and llama-bench")
    parser.add_argument("--title", help='in place of the level of kernels: "held to AVX2"')
    parser.add_argument("--note", help="what else to say of the machine")
    parser.add_argument("--results", type=Path, default=HERE / "vision.json")
    parser.add_argument("--report", action="store_true", help="only write the report from the results")
    args = parser.parse_args()
    args.timer = time.perf_counter
    if args.clock == "cpu":
        args.threads, args.timer = 1, time.process_time
    results = json.loads(args.results.read_text()) if args.results.exists() else {}
    if not args.report:
        found = results.setdefault(processor(args), {})
        with tempfile.TemporaryDirectory() as folder:
            measure(args, args.work or Path(folder), found, lambda: save(results, args.results))
    report.write(results, args.results.with_suffix(".svg"), args.results.with_name("README.md"))


def save(results: dict[str, Any], path: Path) -> None:
    for found in results.values():
        if "encode" in found:
            found["encode"] = dict(sorted(found["encode"].items(), key=lambda item: item[1]["patches"]))
    path.write_text(json.dumps(rounded(results), indent=1) + "\n")


def rounded(value: Any) -> Any:
    """Seconds to four significant digits."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
