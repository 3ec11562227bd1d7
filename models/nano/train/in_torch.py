"""Answers of a training state: by teacher forcing the true answer where greedy decoding gives it, else "".

A box is decoded token by token, since its IoU is asked for and not only whether it is exact.
"""

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
        self.tokenizer = vocabulary.load(NANO)
        self.packer = Packer(self.tokenizer)

    @torch.no_grad()
    def decode(self, item: Item, limit: int = 40) -> str:
        """Greedy answer to the first question."""
        shape = replace(SHAPES[item.kind], frames=len(item.frames))
        question = item.turns[0][0]
        sample = Sample(item.kind, item.frames, (("all", ((question, ""),)),), DEFAULT_SYSTEM)
        x = {k: torch.from_numpy(v) for k, v in self.packer.batch([sample], shape, ["all"]).items()}
        seen = self.model.visual(x["patches"], x["second"], x["grid"])
        end = self.packer.encode("<|im_end|>")[0]
        at = int((x["segment"] > 0).sum()) - 2  # the last token is the end that nobody said yet
        said: list[int] = []
        room = at + 1 + limit
        x["ids"] = torch.cat((x["ids"], torch.zeros(1, 1, limit, dtype=torch.long)), -1)[:, :, :room]
        x["segment"] = torch.ones_like(x["ids"])
        x["pos"] = x["pos"][:, :, :1] + torch.arange(x["ids"].shape[-1])
        while len(said) < limit:
            hidden = self.model(x, seen)[0][0, 0, at]
            token = int((self.model.model.embed_tokens.weight @ hidden).argmax())
            if token == end:
                break
            said.append(token)
            at += 1
            x["ids"][0, 0, at] = token
        return self.tokenizer.decode(said, skip_special_tokens=False)

    @torch.no_grad()
    def __call__(self, item: Item) -> list[str]:
        if item.task == "ground":
            return [self.decode(item)]
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
