"""Divergence of a model's files from a reference, in all and part by part.

The reference answers every sample greedily. Then both models say, token by token, what they expect of that
reply: on the reference's embeddings, which shows the decoder alone, and on their own, which shows both
together. For the parts, a reference is put together in which one part comes from the model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from qvl.runtime.errors import InputError
from qvl.runtime.find import ModelFiles
from qvl.runtime.ggml.gguf import read_gguf
from qvl.runtime.ggml.gguf_writer import splice
from qvl.runtime.measure.decoder import Vectors
from qvl.runtime.measure.divergence import Divergence, Predictions, VisionError, VisionTally
from qvl.runtime.measure.pair import Pair, Question, StepProgress, Subject
from qvl.runtime.measure.samples import Example


@dataclass(frozen=True)
class Part:
    """A part that can be swapped: its name, the file it is in, and its tensors there."""

    name: str
    file: str
    taken: Callable[[str], bool]


PARTS: Final = (
    Part("ViT", "mmproj", lambda name: name.startswith("v.") and not name.startswith("v.post_ln")),
    Part("merger", "mmproj", lambda name: name.startswith(("mm.", "v.post_ln"))),
    Part("decoder", "text", lambda name: name.startswith(("blk.", "output_norm"))),
    Part("embeddings and head", "text", lambda name: name in ("token_embd.weight", "output.weight")),
)


@dataclass(frozen=True)
class Answer:
    """The reference's reply to one sample.

    Attributes:
        tokens: the end token included.
        parted: first token that the model, with its own embeddings, would say otherwise.
    """

    sample: str
    reply: str
    tokens: int
    parted: int | None


@dataclass(frozen=True)
class Report:
    """Result of a comparison.

    Attributes:
        vision: error of the embeddings; None without pictures.
        decoder: the model's decoder on the reference's embeddings.
        together: the model as it is.
        parts: the reference with one part taken from the model, by the part's name; empty when not asked for.
    """

    model: str
    reference: str
    vision: VisionError | None
    decoder: Divergence
    together: Divergence
    parts: dict[str, Divergence]
    answers: tuple[Answer, ...]


def verify(
    model: Pair,
    reference: Pair,
    samples: Sequence[Example],
    *,
    subject: Subject | None = None,
    truth: Subject | None = None,
    max_tokens: int = 64,
    attribute: bool = True,
    progress: StepProgress | None = None,
) -> Report:
    """Compare a model with a reference.

    Args:
        reference: reads the samples; parts of the model are swapped into its files.
        subject, truth: what answers in the model's and the reference's place: the same weights in another
            program.
        max_tokens: longest reply.
        attribute: measure the parts too. Takes room for a copy of the reference's larger file, in the
            folder for temporary files.
        progress: may raise, which stops.

    Raises:
        InputError: the two have different tokens or layers.
        ImageError: a picture cannot be read.
    """
    _check_alike(model, reference)
    parts = [p for p in PARTS if p.file == "text" or model.vision is not None] if attribute else []
    with tempfile.TemporaryDirectory(prefix="qvl-verify-") as folder:
        run = _Run(model, reference, Path(folder), progress, len(samples) * (1 + len(parts)))
        run.subject, run.truth = subject or model, truth or reference
        answered = [run.answer(i, reference.read(sample), max_tokens) for i, sample in enumerate(samples)]
        swapped = {part.name: run.swap(part, answered) for part in parts}
    detokenize = reference.text.vocab.detokenize
    together = run.together.result()
    return Report(
        run.subject.name,
        run.truth.name,
        run.vision.result() if run.vision.n_tokens else None,
        run.decoder.result(),
        together,
        swapped,
        tuple(
            Answer(a.question.sample.name, detokenize(a.reply), len(a.reply), parted)
            for a, parted in zip(answered, together.parted, strict=True)
        ),
    )


@dataclass(frozen=True)
class _Answered:
    question: Question
    vectors: Vectors
    reply: list[int]
    logits: Path


class _Run:
    def __init__(
        self, model: Pair, reference: Pair, folder: Path, progress: StepProgress | None, total: int
    ) -> None:
        self.model, self.reference = model, reference
        self.subject: Subject = model
        self.truth: Subject = reference
        self.folder, self.progress = folder, progress
        self.done, self.total = 0, total
        self.vision, self.decoder, self.together = VisionTally(), Predictions(), Predictions()

    def answer(self, i: int, question: Question, max_tokens: int) -> _Answered:
        """Let the reference answer, and the model say what it thinks of that."""
        truth, model, units = self.truth, self.subject, question.units
        vectors = truth.encode(question)
        reply = truth.greedy(units, vectors, max_tokens)
        logits = truth.logits(units, vectors, reply)
        own = model.encode(question)
        for key in own:
            self.vision.add(vectors[key], own[key])
        with_given = model.logits(units, vectors, reply)
        self.decoder.add(logits, with_given, reply)
        self.together.add(logits, model.logits(units, own, reply) if own else with_given, reply)
        self.step(question.sample.name)
        path = self.folder / f"{i}.npy"
        np.save(path, logits)  # 40 MB for a reply of 64 tokens
        return _Answered(question, vectors, reply, path)

    def swap(self, part: Part, answered: Sequence[_Answered]) -> Divergence:
        """The reference with one part of the model, against the reference."""
        tally = Predictions()
        with self.spliced(part) as hybrid:
            for a in answered:
                vectors = hybrid.encode(a.question) if part.file == "mmproj" else a.vectors
                logits = hybrid.logits(a.question.units, vectors, a.reply)
                tally.add(np.load(a.logits), logits, a.reply)
                self.step(part.name)
        return tally.result()

    @contextmanager
    def spliced(self, part: Part) -> Iterator[Pair]:
        files, donors = self.reference.files, self.model.files
        base, donor = (getattr(f, part.file) for f in (files, donors))
        path = self.folder / f"{part.file}.gguf"
        splice(read_gguf(base), read_gguf(donor), part.taken, path)
        hybrid = replace(files, **{part.file: path})
        device = self.reference.text.devices
        try:
            with Pair(
                hybrid,
                n_ctx=self.reference.decoder.n_ctx,
                device=device[0].name if device else "cpu",
            ) as pair:
                yield pair
        finally:
            path.unlink(missing_ok=True)

    def step(self, what: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total, what)


def _check_alike(model: Pair, reference: Pair) -> None:
    for attribute, what in (("text", "decoder"), ("mmproj", "image encoder")):
        paths = [getattr(pair.files, attribute) for pair in (model, reference)]
        if paths[0] is None or paths[1] is None:
            if paths[0] is not paths[1]:
                raise InputError(
                    f"only one of {model.name} and {reference.name} has an mmproj", hint="name it as well"
                )
            continue
        shapes = [{t.name: t.shape for t in read_gguf(p, arrays=False).tensors.values()} for p in paths]
        if shapes[0] != shapes[1]:
            names = sorted(n for n in {**shapes[0], **shapes[1]} if shapes[0].get(n) != shapes[1].get(n))
            raise InputError(
                f"{paths[0]} and {paths[1]}: not the same {what}: {names[0]} is "
                f"{shapes[0].get(names[0], 'missing')} and {shapes[1].get(names[0], 'missing')}",
                hint="compare files that were made from one checkpoint",
            )
    tokens = [pair.text.metadata.get("tokenizer.ggml.tokens") for pair in (model, reference)]
    if tokens[0] != tokens[1]:
        raise InputError(
            f"{model.name} and {reference.name}: have different tokens",
            hint="compare files that were made from one checkpoint",
        )


__all__ = ["PARTS", "Answer", "ModelFiles", "Part", "Report", "verify"]
