"""Train the nano model on a CPU: one process a core, shared weights, resumable at any moment.

    python -m qvl.models.nano.train.run --work /var/tmp/qvl-nano --ranks 2

`control.json` in the work folder is read every few steps: learning rates, stage, when to stop. Without it the
stages of `curriculum.py` open by accuracy and the rates stay as given, with a linear fall over the last part.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from torch import Tensor

from qvl.models.nano.train import vocabulary
from qvl.models.nano.train.curriculum import STAGES
from qvl.models.nano.train.losses import (
    among_loss,
    answer_loss,
    corner_loss,
    dense_loss,
    look_loss,
    match_loss,
)
from qvl.models.nano.train.model import Config, Nano
from qvl.models.nano.train.optimizer import Flat
from qvl.models.nano.train.pack import Packer
from qvl.models.nano.train.stream import SHAPES, TASK_NAMES, batch
from qvl.models.nano.train.whiten import patch_filters

NANO = Path(__file__).resolve().parent.parent
DEFAULTS: dict[str, Any] = {
    "lr": 2e-3, "muon_lr": 0.012, "decay": 0.05, "warmup": 100, "aux": None, "stage": None,
    "fall_start": None, "fall_end": None, "save_seconds": 90, "average": 0.995, "look": 0.3, "shapes": None,
}  # fmt: skip
INPUTS = (
    "kind", "colour", "char", "box", "shown", "prefix_ids", "prefix_pos", "prefix_valid", "vision_index",
    "ids", "pos", "segment", "labels", "corners", "spans", "about", "cover", "grid", "patches", "second",
    "centre", "among", "match",
)  # fmt: skip


TARGETS = (
    "labels",
    "weight",
    "corners",
    "spans",
    "about",
    "cover",
    "box",
    "shown",
    "kind",
    "colour",
    "char",
    "centre",
    "among",
    "match",
)


def tensors(arrays: dict[str, np.ndarray], video: bool) -> dict[str, Tensor]:
    out = {k: torch.from_numpy(arrays[k]) for k in INPUTS if video or k != "second"}
    answers = (out["labels"] >= 0).float()
    same = out["segment"][..., :, None] == out["segment"][..., None, :]
    length = (same.float() @ answers[..., None])[..., 0]
    out["weight"] = answers * length.clamp(min=1).rsqrt()
    return out


class Metrics:
    """Running accuracy of whole answers for each task, and of the dense heads."""

    def __init__(self, values: dict[str, float] | None = None) -> None:
        self.values: dict[str, float] = dict(values or {})

    def put(self, name: str, value: float, rate: float = 0.02) -> None:
        self.values[name] = self.values.get(name, value) * (1 - rate) + rate * value

    def answers(self, x: dict[str, np.ndarray], correct: np.ndarray) -> None:
        at = x["labels"] >= 0
        key = np.nonzero(at)
        group = (key[0] * 8 + key[1]) * 64 + x["segment"][at]
        task = x["task"][at]
        right: dict[int, bool] = {}
        names: dict[int, int] = {}
        for g, t, c in zip(group.tolist(), task.tolist(), correct.tolist(), strict=True):
            right[g] = right.get(g, True) and c
            names[g] = t
        totals: dict[int, list[bool]] = {}
        for g, ok in right.items():
            totals.setdefault(names[g], []).append(ok)
        for t, oks in totals.items():
            self.put(TASK_NAMES[t], float(np.mean(oks)))


def control(work: Path) -> dict[str, Any]:
    try:
        return {**DEFAULTS, **json.loads((work / "control.json").read_text())}
    except (OSError, ValueError):
        return dict(DEFAULTS)


def rate(now: dict[str, Any], step: int) -> float:
    """Warm-up, level, then a linear fall between two wall-clock times, so that the end is always reached."""
    scale = min(1.0, (step + 1) / now["warmup"])
    if now["fall_start"] and time.time() > now["fall_start"]:
        scale *= max(0.02, (now["fall_end"] - time.time()) / (now["fall_end"] - now["fall_start"]))
    return scale


def save(work: Path, flat: Flat, meta: dict[str, Any]) -> None:
    torch.save({"meta": meta, "flat": flat.state()}, work / "last.tmp")
    (work / "last.tmp").replace(work / "last.pt")


def worker(
    rank: int, ranks: int, work: Path, flat: Flat, shared: dict[str, Any], barrier: Any, config: Config
) -> None:
    torch.set_num_threads(1)
    model = Nano(config).bfloat16()
    for name, value in Nano(config).named_buffers():  # tables stay in float32
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, value)
    flat.attach(model, rank)
    forward = torch.compile(model, dynamic=False) if shared["compile"] else model
    packer = Packer(vocabulary.load(NANO))
    meta = dict(shared["meta"])
    step, stage, metrics = meta["step"], meta["stage"], Metrics(meta["metrics"])
    now, saved, logged, pictures = control(work), time.time(), time.time(), 0
    while True:
        if step % 10 == 0:
            now = control(work)
            stage = now["stage"] if now["stage"] is not None else stage
        plan = STAGES[stage]
        names, weights = zip(*plan.buckets.items(), strict=True)
        pick = np.random.default_rng((7, step))
        bucket = str(pick.choice(names, p=np.array(weights) / sum(weights)))
        arrays = batch(np.random.default_rng((1, shared["seed"], step, rank)), packer, bucket, plan)
        x = tensors(arrays, bucket.startswith("video"))
        flat.grads[rank].zero_()
        hidden, seen, middle, looks, matches = forward({k: v for k, v in x.items() if k not in TARGETS})
        loss, correct = answer_loss(model, hidden, x)
        dense, accuracy = dense_loss(model, seen, middle, x)
        look, found = look_loss(looks, x)
        among, match = among_loss(looks, x), match_loss(model, matches, middle, x)
        loss = loss + now["look"] * (look + among + match)
        for name, value in (("among", among), ("match", match)):
            if bool(value > 0):
                accuracy[name] = float(value.detach()) / 2
        if found:
            accuracy["look"] = found
        corners = corner_loss(model, hidden, x)
        dense = dense + corners
        if bool(corners > 0):
            accuracy["corners"] = float(corners.detach()) / 10
        (loss + (plan.aux if now["aux"] is None else now["aux"]) * dense).backward()
        barrier.wait()
        scale = rate(now, step)
        flat.step(rank, ranks, now["lr"] * scale, now["muon_lr"] * scale, now["decay"], step + 1)
        step += 1
        if step % 5 == 0 and rank == ranks - 1:
            power = min(now["average"], 1 - 1 / (step / 5 + 1)) if step < 500 else now["average"] ** 5
            flat.average.lerp_(flat.master, 1 - power)
        barrier.wait()
        pictures += SHAPES[bucket].batch * SHAPES[bucket].frames * ranks
        if rank == 0:
            metrics.answers(arrays, correct.numpy())
            metrics.put("loss", float(loss.detach()))
            for name, value in accuracy.items():
                metrics.put("aux_" + name, value)
            if step % 50 == 0:
                line = " ".join(f"{k}={v:.3f}" for k, v in sorted(metrics.values.items()))
                speed = pictures / (time.time() - logged)
                print(
                    f"{time.strftime('%X')} step {step} stage {stage} lr x{scale:.2f} {speed:.1f} pic/s "
                    + line,
                    flush=True,
                )
                logged, pictures = time.time(), 0
                gate = plan.gate
                if now["stage"] is None and gate and metrics.values.get(gate[0], 0) > gate[1]:
                    stage += 1
            if time.time() - saved > now["save_seconds"]:
                save(work, flat, {"step": step, "stage": stage, "metrics": metrics.values})
                saved = time.time()
            shared["live"][0] = stage
            if now["fall_end"] and time.time() > now["fall_end"]:
                shared["live"][1] = 1
        barrier.wait()
        stage = int(shared["live"][0])
        if shared["live"][1]:
            break
    if rank == 0:
        save(work, flat, {"step": step, "stage": stage, "metrics": metrics.values})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="minutes to start, about a tenth faster")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    config = Config(vocab_size=vocabulary.load(NANO).get_vocab_size())
    model = Nano(config)
    resumes = (args.work / "last.pt").exists()
    if not resumes:
        model.init_weights()
        model.visual.patch_embed.proj.weight.data.copy_(patch_filters(args.seed, config.embed_dim))
    flat = Flat(model, args.ranks)
    meta: dict[str, Any] = {"step": 0, "stage": 0, "metrics": {}}
    if resumes:
        saved = torch.load(args.work / "last.pt")
        flat.load(saved["flat"])
        meta = saved["meta"]
    live = torch.tensor([float(meta["stage"]), 0.0]).share_memory_()
    signal.signal(signal.SIGTERM, lambda *_: live.__setitem__(1, 1.0))  # save, then stop
    shared = {"meta": meta, "seed": args.seed, "compile": args.compile, "live": live}
    (args.work / "pid").write_text(f"{os.getpid()}\n")
    size = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("aux"))
    print(f"{size:,} parameters, from step {meta['step']}")
    barrier = mp.get_context("spawn").Barrier(args.ranks)
    mp.spawn(worker, (args.ranks, args.work, flat, shared, barrier, config), nprocs=args.ranks)


if __name__ == "__main__":
    main()
