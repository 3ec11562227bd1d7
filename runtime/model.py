"""A loaded model: the decoder, the image encoder, and the conversations on them. Glue only."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, TypeAlias, Unpack, get_args

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.engine.batches import batches
from qvl.runtime.engine.options import ReplyOptions, explicit
from qvl.runtime.engine.reply import Reply, Stream
from qvl.runtime.engine.session import Session
from qvl.runtime.engine.store import EmbeddingStore
from qvl.runtime.engine.units import VisionUnit, n_cells
from qvl.runtime.errors import (
    InputError,
    Unpicklable,
    check_callable,
    check_choice,
    check_text,
    check_whole,
    shown,
)
from qvl.runtime.families.matching import family_of, rules_of
from qvl.runtime.find import find_model
from qvl.runtime.ggml.scheduler import Observer
from qvl.runtime.grounding.box import Choose, Parser, Resized, Size
from qvl.runtime.llama.context import Context
from qvl.runtime.llama.model import ALL_LAYERS, LlamaModel
from qvl.runtime.llama.repack import Optimize
from qvl.runtime.llama.sampler import Sampling
from qvl.runtime.native import Precision
from qvl.runtime.prompt.chatml import ChatTemplate
from qvl.runtime.prompt.messages import Message, VisionChunk
from qvl.runtime.vision.backend import EncoderBackend
from qvl.runtime.vision.cache import EmbeddingCache
from qvl.runtime.vision.encoder import VisionEncoder
from qvl.runtime.vision.image import ImageSource

Ahead: TypeAlias = Callable[[VisionEncoder], Iterable[VisionChunk]]
"""Gives the pictures and videos that the first prompt will have."""

N_CTX: Final = 8192
_LOGIT_ROWS: Final = 128
_SLOTS: Final = 4  # calls of `Model.generate` that run at once


def load(
    path: str | Path | None = None,
    mmproj: str | Path | None = None,
    device: str = "auto",
    n_ctx: int = N_CTX,
    threads: int | None = None,
    *,
    n_gpu_layers: int = ALL_LAYERS,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    kv_type: str = "f16",
    precision: Precision = "auto",
    optimize: Optimize = "decode",
    cache: EmbeddingCache | None = None,
    progress: Callable[[float], None] | None = None,
    ahead: Ahead | None = None,
) -> Model:
    """Load a model from its files.

    Args:
        path: a text GGUF, a folder with one and its mmproj, or None for the embedded model.
        mmproj: the image encoder's GGUF, when it is not beside the text file.
        device: "auto" (a GPU if there is one), "cpu", "cuda0", "metal", "rpc:HOST:PORT"; see `find_device`.
        n_ctx: tokens a conversation can hold, those of pictures included.
        threads: CPU threads; physical cores unless given.
        n_gpu_layers: decoder layers on the device; -1 is all.
        min_pixels, max_pixels: bounds on a picture's size after resizing, in place of the model's own.
        kv_type: type of the KV cache: f16, f32 or q8_0.
        precision: "auto", our own kernels where the CPU has them, or "exact", ggml's alone.
        optimize: the workload that the decoder's memory layout favours on a CPU: "decode", one token at a
            time, or "prefill" and several sequences at a time, as `caption` runs them.
        cache: keeps the embeddings of pictures for other runs; without it they last as long as the model.
        progress: called with the fraction of the text model that is loaded.
        ahead: gives the pictures and videos that the first prompt will have, called in another thread; on
            a CPU they are encoded while the text model loads.

    Raises:
        InputError: no such file or device, or several files to choose from.
        GGUFError: a file that is damaged or of another kind, or two that do not belong together.
        BackendError: llama.cpp refused, mostly for too little memory.
    """
    check_text("device", device)
    for name, value in (("n_ctx", n_ctx), ("threads", threads)):
        if value is not None:
            check_whole(name, value, 1, 1 << 22)
    check_whole("n_gpu_layers", n_gpu_layers, ALL_LAYERS, 1 << 16)
    check_choice("precision", precision, get_args(Precision))
    check_choice("optimize", optimize, get_args(Optimize))
    check_callable("progress", progress)
    check_callable("ahead", ahead)
    if cache is not None and not isinstance(cache, EmbeddingCache):
        raise InputError(f"cache is {shown(cache)}, expected an EmbeddingCache")
    files = find_model(path, mmproj)
    with ExitStack() as opened:

        def open_text() -> LlamaModel:
            model = LlamaModel(
                files.text, device=device, n_gpu_layers=n_gpu_layers,
                optimize=optimize, precision=precision, progress=progress,
            )  # fmt: skip
            opened.callback(model.close)
            return model

        text = open_text() if ahead is None else None
        vision, store = None, EmbeddingStore(None)
        if files.mmproj is not None:
            vision = VisionEncoder(
                files.mmproj,
                device=device,
                threads=threads,
                min_pixels=min_pixels,
                max_pixels=max_pixels,
                precision=precision,
            )
            opened.callback(vision.close)
            store = EmbeddingStore(EncoderBackend(vision), cache=cache)
            opened.callback(store.close)
            if ahead is not None and vision.device.is_cpu:
                vision.spare_threads(1)  # llama.cpp loads with one
                store.look_ahead(partial(ahead, vision))
        text = text or open_text()
        if vision is not None:
            vision.spare_threads(0)
        model = Model(text, vision, n_ctx=n_ctx, threads=threads, kv_type=kv_type, store=store)
        opened.pop_all()
    return model


class Model(Unpicklable):
    """A decoder with its image encoder, as `load` opens it. Use as a context manager, or call `close`.

    Attributes:
        text: the decoder.
        path: the text file.
        family: name of the model's family (`qvl.runtime.families.table`).
        template: how messages become a prompt.
        sampling: the model's own settings.
        n_ctx: size of a session's context unless asked for another.
        threads: CPU threads; None for physical cores.
    """

    def __init__(
        self,
        text: LlamaModel,
        vision: VisionEncoder | None,
        *,
        n_ctx: int = N_CTX,
        threads: int | None = None,
        kv_type: str = "f16",
        store: EmbeddingStore | None = None,
    ) -> None:
        """The model owns its parts from now on, and closes them.

        Args:
            store: over this encoder.

        Raises:
            GGUFError: the mmproj is of another family's model, or of one of another width.
        """
        self.text = text
        self.path = text.path
        rules = rules_of(text, vision)
        family = family_of(text.metadata, vision.family if vision is not None else None)
        self.family = family.name if family is not None else ""
        self.template = ChatTemplate(text.vocab, text.metadata.get("tokenizer.chat_template"), rules)
        self.sampling = Sampling.from_metadata(text.metadata)
        self.n_ctx = n_ctx
        if n_ctx != N_CTX:  # the default does not say that long prompts are coming; these warn themselves
            self.template.warn_beyond(n_ctx, "the context")
        self._vision = vision
        self.threads = threads
        self._kv_type = kv_type
        self._store = store or EmbeddingStore(EncoderBackend(vision) if vision is not None else None)
        self._sessions: list[Session] = []
        self._default: Session | None = None
        self._lock = threading.Lock()  # of the default session, and of `logits`' memory
        self._closed = False

    def __repr__(self) -> str:
        vision = self._vision.path.name if self._vision is not None else None
        known = f"{self.path.name!r}, vision={vision!r}, family={self.family!r}, n_ctx={self.n_ctx}"
        return f"Model({known}{', closed' if self._closed else ''})"

    @property
    def vision(self) -> VisionEncoder:
        """The image encoder.

        Raises:
            InputError: the model was opened without one, or is closed.
        """
        self._check_usable()
        if self._vision is None:
            raise InputError(
                f"{self.path}: opened without an mmproj",
                hint="pass its mmproj file (`mmproj`), or put it into the same folder",
            )
        return self._vision

    def grounding(
        self, size: Size | None = None, choose: Choose | None = None, resized: Resized | None = None
    ) -> Parser:
        """A parser of boxes and points in one reply, in the form that the model's family writes them.

        Args:
            size: (width, height) in pixels of the picture that they are in, as it is shown; then the text of
                boxes is in pixels.
            choose: for several pictures; see `qvl.runtime.grounding.box.Choose`.
            resized: the (width, height) in which the model sees a picture of a size; by default that of the
                image encoder's own bounds.
        """
        return self.template.rules.grounding(size, choose, resized or self._resized)

    def _resized(self, size: Size) -> Size:
        if self._vision is None:
            return size
        height, width = self._vision.preprocessor.size(size[1], size[0])
        return width, height

    @property
    def has_vision(self) -> bool:
        """True if there is an image encoder."""
        return self._vision is not None

    def session(self, *, n_ctx: int | None = None, slots: int = 1) -> Session:
        """A new conversation with a KV cache of its own; pictures are encoded once for all of them.

        Args:
            n_ctx: KV cells, for all slots together.
            slots: prompts that can run at once.

        Raises:
            InputError: a size out of bounds, or the model is closed.
            BackendError: too little memory, or the model was loaded in another process.
        """
        check_whole("slots", slots, 1)
        context = self.context(n_ctx=self.n_ctx if n_ctx is None else n_ctx, n_seq_max=slots)
        session = Session(context, self._store, self.template, self.sampling)
        self._sessions.append(session)
        return session

    def context(
        self,
        *,
        n_ctx: int,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_seq_max: int = 1,
        n_outputs_max: int | None = None,
        observer: Observer | None = None,
    ) -> Context:
        """A bare context on the decoder, with the arguments and errors of `Context`. The caller closes it."""
        self._check_usable()
        return Context(
            self.text, n_ctx=n_ctx, n_batch=n_batch, n_ubatch=n_ubatch, n_seq_max=n_seq_max,
            n_outputs_max=n_outputs_max, threads=self.threads, kv_type=self._kv_type, observer=observer,
        )  # fmt: skip

    @property
    def store(self) -> EmbeddingStore:
        """Units and embeddings of pictures and videos; any thread may use it."""
        self._check_usable()
        return self._store

    def embedder(self) -> EmbeddingStore:
        """An embedder of prepared pictures that keeps none; for an `Engine` on a context.

        Raises:
            InputError: the model was opened without an image encoder.
        """
        return EmbeddingStore(EncoderBackend(self.vision), max_bytes=0)

    @explicit
    def generate(self, messages: Sequence[Message], **options: Unpack[ReplyOptions]) -> Stream:
        """Reply to messages, as a stream of pieces of text; `result()` waits for the whole.

        Calls share one session: a prompt that begins like an earlier one costs only the difference. Those
        of several threads run together, up to four at a time; the others wait. A stream that was not read
        to its end ends when the same thread reads another.

        Sampling settings that are None are the model's own (`general.sampling.*`), or greedy.

        Args:
            messages: see `ChatTemplate.render`.
            max_tokens: longest reply.
            temperature: 0 takes the likeliest token.
            top_k, top_p, min_p: leave unlikely tokens out.
            repeat_penalty: above 1 makes tokens of the text so far less likely.
            presence_penalty: above 0 makes tokens of the reply so far less likely, -2 to 2.
            seed: what the random numbers begin with.
            stop: strings that end the reply, and are not part of it.
            grammar: GBNF that the reply must fit.
            schema: JSON schema that the reply must fit.
            number_images: put "Picture 1: " before pictures.
            progress: called while frames are read, pictures encoded, and the prompt prefilled.

        Raises:
            InputError: a parameter out of bounds, an unusable schema or grammar, or the model is closed.
            BackendError: the model was loaded in another process.
            PromptError, ImageError, ContextFullError: raised by the stream, when the prompt is read.
        """
        self._check_usable()
        with self._lock:
            if self._default is None:
                self._default = self.session(slots=_SLOTS)
        return self._default.generate(messages, **options)

    @explicit
    def ask(self, picture: ImageSource, question: str, **options: Unpack[ReplyOptions]) -> Reply:
        """Reply to a question about a picture.

        >>> model.ask("photo.jpg", "What is this?").text  # doctest: +SKIP

        Args:
            picture: path, bytes, PIL image or uint8 array [h, w, 3].
            options: as for `generate`, as are the errors.
        """
        check_text("question", question)
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        return self.generate([{"role": "user", "content": content}], **options).result()

    def logits(self, messages: Sequence[Message], *, number_images: bool = False) -> NDArray[np.float32]:
        """Logits at every position of the prompt with its generation header, vision positions included.

        Conversations are not disturbed; calls of several threads take turns. The result is large: 0.6 MB a
        position for Qwen2-VL.

        Returns:
            float32 [n_positions, n_vocab], in the order of KV cells.

        Raises:
            InputError: the messages form no prompt, or the model is closed.
            BackendError: the model was loaded in another process.
        """
        self._check_usable()
        units = self.template.units(messages, self._store.place, number_images=number_images)
        encoded = self._store.encode(unit for unit in units if isinstance(unit, VisionUnit))
        n = n_cells(units)
        rows: list[NDArray[np.float32]] = []
        n_rows = min(n, _LOGIT_ROWS)
        with self._lock, self.context(n_ctx=n, n_batch=n_rows, n_outputs_max=n_rows) as context:
            for batch in batches(units, encoded.vectors, n_batch=context.n_batch, outputs="all"):
                context.decode(batch)
                rows.append(context.logits())
        return np.concatenate(rows)

    def _check_usable(self) -> None:
        self.text.check_process()
        if self._closed:
            raise InputError(f"{self.path}: the model is closed", hint="load it again")

    def close(self) -> None:
        """Free everything, sessions included. Doing it twice is harmless.

        In a forked child it does nothing: what would be freed is the parent's.
        """
        if not self.text.is_ours:
            return
        self._closed = True
        for session in self._sessions:
            session.close()
        self._sessions.clear()
        self._default = None
        self._store.close()
        if self._vision is not None:
            self._vision.close()
            self._vision = None
        self.text.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
