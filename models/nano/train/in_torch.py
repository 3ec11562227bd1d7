"""Answers of a training state by teacher forcing: the true answer where greedy decoding would give it, else ""."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from qvl.models.nano.train import vocabulary
from qvl.models.nano.train.evaluate import Item
from qvl.models.nano.train.export import NANO, load_weights
from qvl.models.nano.train.lexicon import DEFAULT_SYSTEM
from qvl.models.nano.train.model import Nano
from qvl.models.nano.train.pack import Packer, Sample, Shape
from qvl.models.nano.train.run import INPUTS

SHAPES = {
    "image": Shape(1, 1, 64, 1, 160),
    "pair": Shape(1, 2, 92, 1, 96),
    "video": Shape(1, 8, 308, 1, 96),
}


class Teacher:
    def __init__(self, state: Path, average: bool = True) -> None:
        torch.set_num_threads(1)
        config, weights = load_weights(state, average)
        self.model = Nano(config).eval()
        rounded = {k: v.bfloat16().float() for k, v in weights.items()}
        self.model.load_state_dict(rounded, strict=False)
        self.packer = Packer(vocabulary.load(NANO))

    @torch.no_grad()
    def __call__(self, item: Item) -> list[str]:
        shape = replace(SHAPES[item.kind], frames=len(item.frames))
        sample = Sample(item.kind, item.frames, (("all", item.turns),), DEFAULT_SYSTEM)
        arrays = self.packer.batch([sample], shape, ["all"])
        x = {k: torch.from_numpy(arrays[k]) for k in INPUTS}
        hidden = self.model(x)[0][0, 0]
        right = (hidden @ self.model.model.embed_tokens.weight.T).argmax(-1) == x["labels"][0, 0]
        asked = x["labels"][0, 0] >= 0
        replies: list[str] = []
        at = 0
        for _, answer in item.turns:  # each answer is one run of labelled positions
            while not asked[at]:
                at += 1
            start = at
            while at < len(asked) and asked[at]:
                at += 1
            replies.append(answer if bool(right[start:at].all()) else "")
        return replies
