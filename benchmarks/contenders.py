"""Image encoders with one face, so that they can take turns: ours, llama.cpp's and transformers'.

Each takes a picture that has its final size already, so that all see the same patches, from pixels in
memory to embeddings in memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvl.runtime.llama.binding import import_part, llama
from qvl.runtime.vision.encoder import VisionEncoder

Picture = NDArray[np.uint8]
Embeddings = NDArray[np.float32]
_KEPT: list[Any] = []  # callbacks of which the C side holds a pointer only


@dataclass(frozen=True)
class Contender:
    """An encoder that is loaded.

    Attributes:
        program: "qvl", "qvl exact", "mtmd" or "transformers".
        weights: the type of its matrices.
        encode: uint8 [h, w, 3] to float32 [n_tokens, n_embd].
    """

    program: str
    weights: str
    encode: Callable[[Picture], Embeddings]

    @property
    def name(self) -> str:
        return f"{self.program} {self.weights.upper()}"


def ours(stack: ExitStack, mmproj: Path, kind: str, threads: int, precision: Any = "auto") -> Contender:
    encoder = stack.enter_context(VisionEncoder(mmproj, device="cpu", threads=threads, precision=precision))
    name = "qvl" if precision == "auto" else f"qvl {precision}"
    return Contender(name, kind, lambda picture: encoder.encode([picture])[0].embeddings)


def mtmd(stack: ExitStack, text: Path, mmproj: Path, kind: str, threads: int) -> Contender:
    """libmtmd in this process. It wants a text model to go with the encoder, of which it takes the width."""
    c = llama()
    model = c.llama_model_load_from_file(str(text).encode(), c.llama_model_default_params())
    stack.callback(c.llama_model_free, model)
    m, context = _mtmd_context(stack, model, mmproj, threads)
    width = c.llama_model_n_embd_inp(model)

    def encode(picture: Picture) -> Embeddings:
        with _chunks(m, context, picture, m.mtmd_default_marker()) as chunks:
            every = [m.mtmd_input_chunks_get(chunks, i) for i in range(m.mtmd_input_chunks_size(chunks))]
            image = next(x for x in every if m.mtmd_input_chunk_get_type(x) == m.MTMD_INPUT_CHUNK_TYPE_IMAGE)
            if m.mtmd_encode_chunk(context, image):
                raise RuntimeError("libmtmd failed")
            shape = (m.mtmd_input_chunk_get_n_tokens(image), width)
            return np.ctypeslib.as_array(m.mtmd_get_output_embd(context), shape).copy()

    return Contender("mtmd", kind, encode)


def mtmd_answer(stack: ExitStack, model: int, mmproj: Path, threads: int) -> Callable[[Picture, bytes], None]:
    """What llama-mtmd-cli does between its prompt and the first token: encode, and read all of it.

    Args:
        model: a `llama_model *`.
    """
    c = llama()
    m, context = _mtmd_context(stack, model, mmproj, threads)
    params = c.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 2048, 2048, 512
    params.n_threads = params.n_threads_batch = threads
    decoder = c.llama_init_from_model(model, params)
    stack.callback(c.llama_free, decoder)

    def answer(picture: Picture, prompt: bytes) -> None:
        c.llama_memory_clear(c.llama_get_memory(decoder), True)
        end = c.llama_pos(0)
        with _chunks(m, context, picture, prompt) as chunks:
            failed = m.mtmd_helper_eval_chunks(context, decoder, chunks, 0, 0, 2048, True, ctypes.byref(end))
        if failed or not c.llama_get_logits_ith(decoder, -1):
            raise RuntimeError("libmtmd failed")

    return answer


def _mtmd_context(stack: ExitStack, model: int, mmproj: Path, threads: int) -> tuple[Any, int]:
    c, m = llama(), import_part("mtmd_cpp")
    silent = c.llama_log_callback(lambda level, text, data: None)
    for mute in (m.mtmd_log_set, m.mtmd_helper_log_set):
        mute(silent, ctypes.c_void_p(0))
    _KEPT.append(silent)
    params = m.mtmd_context_params_default()
    params.use_gpu, params.warmup, params.n_threads, params.print_timings = False, False, threads, False
    context = m.mtmd_init_from_file(str(mmproj).encode(), model, params)
    if not context:
        raise RuntimeError(f"libmtmd refuses {mmproj}")
    stack.callback(m.mtmd_free, context)
    return m, context


@contextmanager
def _chunks(m: Any, context: int, picture: Picture, prompt: bytes) -> Iterator[int]:
    """A prompt with one picture at its marker, as libmtmd cuts it up."""
    height, width, _ = picture.shape
    pixels = np.ascontiguousarray(picture)
    bitmap = m.mtmd_bitmap_init(width, height, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
    chunks = m.mtmd_input_chunks_init()
    try:
        text = m.mtmd_input_text(prompt, len(prompt), False, True)
        if m.mtmd_tokenize(context, chunks, ctypes.byref(text), (m.mtmd_bitmap_p_ctypes * 1)(bitmap), 1):
            raise RuntimeError("libmtmd refuses the prompt")
        yield chunks
    finally:
        m.mtmd_input_chunks_free(chunks)
        m.mtmd_bitmap_free(bitmap)


def transformers(mmproj: Path, kind: str, threads: int) -> Contender:
    """The tower of transformers in "bf16" or "f32", with random weights of the mmproj's shape.

    Raises:
        ImportError: torch or transformers are not installed.
    """
    import torch
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    torch.set_num_threads(threads)
    with VisionEncoder(mmproj, device="cpu") as encoder:
        shape, preprocessor = encoder.config, encoder.preprocessor
    config = Qwen2VLVisionConfig(
        depth=shape.n_layer,
        embed_dim=shape.n_embd,
        num_heads=shape.n_head,
        mlp_ratio=shape.n_ff // shape.n_embd,
        hidden_size=shape.n_out,
    )
    config._attn_implementation = "sdpa"
    dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[kind]
    torch.set_default_dtype(dtype)
    tower = Qwen2VisionTransformerPretrainedModel(config).eval()
    torch.set_default_dtype(torch.float32)

    def encode(picture: Picture) -> Embeddings:
        patches = preprocessor.image(picture)
        pixels = torch.from_numpy(patches.pixel_values).to(dtype)
        with torch.inference_mode():
            seen = tower(pixels, grid_thw=torch.tensor([patches.grid_thw]))
        embeddings: Embeddings = seen.pooler_output.float().numpy()
        return embeddings

    return Contender("transformers", kind, encode)
