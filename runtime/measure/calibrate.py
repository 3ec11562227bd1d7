"""Importance matrices: a model runs on pictures and text, and the squares of its activations are summed.

For a picture, the model first replies; then picture, question and reply run once more through both networks
and are counted. Text runs in pieces of some hundred tokens, as with llama-imatrix.

The file is rewritten every few prompts together with the number of prompts done, so that an interrupted run
can be resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from qvl.runtime.atomic import write_error
from qvl.runtime.errors import FormatError, ImageError, InputError, OutputError
from qvl.runtime.find import ModelFiles
from qvl.runtime.ggml.imatrix import Entry, Imatrix, read_imatrix, write_imatrix
from qvl.runtime.measure.activations import InputSums, as_stored, in_decoder, in_decoder_or_head, in_encoder
from qvl.runtime.measure.pair import Pair, StepProgress
from qvl.runtime.measure.samples import Example

CHUNK: Final = 512
_PLAN, _DONE = "qvl.imatrix.plan", "qvl.imatrix.prompts_done"


@dataclass(frozen=True)
class CalibrationPlan:
    """Calibration data and settings.

    Attributes:
        samples: pictures and questions.
        text: is run in pieces of `chunk` tokens.
        reply_tokens: longest reply to a sample; 0 counts the question alone.
        head: count the inputs of the output matrix too.
        products: count products of two inputs too (a kilobyte for each input of a matrix; not for experts).
    """

    samples: tuple[Example, ...] = ()
    text: str = ""
    text_name: str = "text"
    reply_tokens: int = 64
    chunk: int = CHUNK
    head: bool = False
    products: bool = True

    @property
    def datasets(self) -> tuple[str, ...]:
        pictures = {str(Path(s.image).parent.name) for s in self.samples if isinstance(s.image, str | Path)}
        return (*sorted(pictures), *([self.text_name] if self.text else []))


def calibrate(
    files: ModelFiles,
    plan: CalibrationPlan,
    out: Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    n_ctx: int = 4096,
    save_every: int = 16,
    force: bool = False,
    progress: StepProgress | None = None,
    warn: Callable[[str], None] | None = None,
) -> Imatrix:
    """Run a plan and write its importance matrix; resume it if it was interrupted before.

    Args:
        files: the model, best in f16 or bf16.
        out: the file to write, or to continue.
        save_every: prompts between two writes.
        force: start over and overwrite the file.
        warn: called for each picture that cannot be read and is left out, and once at the end for experts
            that no token was routed to.
        progress: may raise to stop; the file then holds the prompts done so far.

    Raises:
        InputError: nothing to run, or a prompt that does not fit n_ctx.
        OutputError: the file is of another run, or cannot be written.
        ImageError: no picture can be read.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise write_error(out, e) from e
    sums = InputSums(in_decoder_or_head if plan.head else in_decoder, products=plan.products)
    with Pair(files, n_ctx=max(n_ctx, plan.chunk), device=device, threads=threads, observer=sums) as pair:
        pieces = _pieces(pair.text.vocab.tokenize(plan.text), plan.chunk)
        total = len(plan.samples) + len(pieces)
        if total == 0:
            raise InputError("nothing to calibrate on", hint="give pictures (`images`) or text (`text`)")
        digest = _digest(files, plan)
        state = _begin(out, digest, total, plan, force)
        saved = done = int(state.extra[_DONE])
        try:
            for name, seen in _run(pair, sums, plan, pieces, done):
                done += 1
                if isinstance(seen, ImageError):
                    state = replace(state, extra={**state.extra, _DONE: done})
                    if warn is not None:
                        warn(f"left out: {seen.message}")
                else:
                    state = _add(state, seen, done)
                if done - saved >= save_every and done < total:
                    write_imatrix(out, state)
                    saved = done
                if progress is not None:
                    progress(done, total, name)
        finally:
            if done > saved and state.entries:
                write_imatrix(out, state)
    if not state.entries:
        raise ImageError(f"none of {len(plan.samples)} pictures can be read", hint="choose others")
    if state.partial and warn is not None:
        name, share = min(state.partial.items(), key=lambda item: item[1])
        warn(
            f"{len(state.partial)} stacks of experts have some without data, which are quantized with equal "
            f"weights; worst is {name} with data on {share:.0%}: more prompts reach more experts"
        )
    return state


def _run(
    pair: Pair, sums: InputSums, plan: CalibrationPlan, pieces: Sequence[Sequence[int]], skip: int
) -> Iterator[tuple[str, Mapping[str, Entry] | ImageError]]:
    """Yield each prompt's name with its statistics, or with the error of a picture that cannot be read."""
    seen = InputSums(in_encoder, products=plan.products)
    if pair.vision is not None:
        pair.vision.observer = seen
    for sample in plan.samples[skip:]:
        try:
            question = pair.read(sample)
        except ImageError as error:
            yield sample.name, error
            continue
        vectors = pair.encode(question)
        sums.paused = True
        room = min(plan.reply_tokens, pair.decoder.n_ctx - question.n_cells)
        reply = pair.greedy(question.units, vectors, room) if room > 0 else []
        sums.paused = False
        pair.decoder.run([*question.units, *reply], vectors)
        vision = as_stored(seen.flush(), pair.vision.stored) if pair.vision is not None else {}
        yield sample.name, sums.flush() | vision
    for i, piece in enumerate(pieces):
        if i + len(plan.samples) >= skip:
            pair.decoder.run(piece, {})
            yield f"text {i + 1}", sums.flush()


def _begin(out: Path, digest: str, total: int, plan: CalibrationPlan, force: bool) -> Imatrix:
    new = Imatrix({}, plan.datasets, 0, plan.chunk, {_PLAN: digest, _DONE: 0})
    if force or not out.exists():
        return new
    try:
        found = read_imatrix(out)
    except FormatError:
        found = new
    if found.extra.get(_PLAN) != digest or found is new:
        raise OutputError(
            f"{out}: exists, and is not a part of this run",
            hint="`force` overwrites it, or choose another name",
        )
    if int(found.extra.get(_DONE, 0)) >= total:
        raise OutputError(f"{out}: exists and is complete", hint="`force` starts over")
    # The file is about to be replaced, which a map of it would hinder on Windows.
    held = {
        n: replace(e, products=e.products if e.products is None else np.array(e.products))
        for n, e in found.entries.items()
    }
    return replace(found, entries=held)


def _add(state: Imatrix, seen: Mapping[str, Entry], done: int) -> Imatrix:
    for name, entry in seen.items():
        if not np.isfinite(entry.sums).all():
            raise InputError(
                f"{name}: inputs that are not finite",
                hint="the model's weights are damaged, or overflow in this type: try bf16 or f32",
            )
    entries = dict(state.entries)
    for name, entry in seen.items():
        entries[name] = entries[name] + entry if name in entries else entry
    return replace(state, entries=entries, chunks=state.chunks + 1, extra={**state.extra, _DONE: done})


def _pieces(tokens: Sequence[int], chunk: int) -> list[list[int]]:
    return [list(tokens[i : i + chunk]) for i in range(0, len(tokens), chunk)]


def _digest(files: ModelFiles, plan: CalibrationPlan) -> str:
    """Hash of the model, the prompts and the settings, which must be equal to resume a run."""
    digest = hashlib.blake2b(digest_size=16)
    for path in (files.text, files.mmproj):
        digest.update(f"{path and (path.name, path.stat().st_size)}\n".encode())
    for sample in plan.samples:
        digest.update(f"{sample.image}\n{sample.prompt}\n".encode())
    digest.update(f"{plan.text}\n{plan.reply_tokens} {plan.chunk} {plan.head} {plan.products}".encode())
    return digest.hexdigest()
