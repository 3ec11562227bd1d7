"""A checkpoint in transformers, in float32; importing this needs the `parity` extra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, Qwen2VLForConditionalGeneration
from transformers.utils import logging

from qvl.runtime.engine.units import Unit, VisionUnit
from qvl.runtime.measure.decoder import Vectors
from qvl.runtime.measure.pair import Question
from qvl.runtime.prompt.positions import TextSpan, mrope_positions


class TransformersModel:
    """A `Subject` of measurement: prompts come as units, with M-RoPE positions of our own."""

    def __init__(self, folder: Path) -> None:
        logging.disable_progress_bar()
        model: Any = Qwen2VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        self._model = model.eval()
        ends = self._model.generation_config.eos_token_id
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())
        self.name = f"{folder.name} in transformers"

    def encode(self, question: Question) -> Vectors:
        """Embeddings of the question's pictures by key."""
        vectors = {}
        for key, patches in question.patches.items():
            with torch.no_grad():
                made = self._model.model.visual(
                    torch.from_numpy(patches.pixel_values), grid_thw=torch.tensor([patches.grid_thw])
                )
            vectors[key] = np.asarray(getattr(made, "pooler_output", made))
        return vectors

    def greedy(self, units: Sequence[Unit], vectors: Vectors, max_tokens: int) -> list[int]:
        """The likeliest reply, its end token included where it ends in time."""
        cache = DynamicCache()
        logits = self._forward(units, vectors, 0, cache)
        position = _end(units)
        reply: list[int] = []
        while True:
            reply.append(int(logits[-1].argmax()))
            if reply[-1] in self._ends or len(reply) >= max_tokens:
                return reply
            logits = self._forward(reply[-1:], vectors, position, cache)
            position += 1

    def logits(self, units: Sequence[Unit], vectors: Vectors, reply: Sequence[int]) -> NDArray[np.float32]:
        """float32 [len(reply), n_vocab]."""
        rows = self._forward([*units, *reply[:-1]], vectors, 0, DynamicCache())
        return rows[len(rows) - len(reply) :]

    def _forward(
        self, units: Sequence[Unit], vectors: Vectors, start: int, cache: DynamicCache
    ) -> NDArray[np.float32]:
        positions, _ = mrope_positions(_spans(units), start)
        table = self._model.get_input_embeddings()
        parts = [
            torch.from_numpy(vectors[unit.key])
            if isinstance(unit, VisionUnit)
            else table(torch.tensor([unit]))
            for unit in units
        ]
        with torch.no_grad():
            hidden = self._model.model.language_model(
                inputs_embeds=torch.cat(parts)[None],
                position_ids=torch.from_numpy(positions).long()[:, None],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            return np.asarray(self._model.lm_head(hidden)[0])


def _spans(units: Sequence[Unit]) -> list[Any]:
    return [unit.span if isinstance(unit, VisionUnit) else TextSpan(1) for unit in units]


def _end(units: Sequence[Unit]) -> int:
    return mrope_positions(_spans(units))[1]
