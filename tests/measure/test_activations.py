"""Statistics of activations, against what the same model computes elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from qvl.convert import Converted
from qvl.runtime.find import ModelFiles
from qvl.runtime.ggml.imatrix import Entry
from qvl.runtime.measure.activations import InputSums, as_stored, in_decoder, in_decoder_or_head, in_encoder
from qvl.runtime.measure.pair import Pair, Question
from qvl.runtime.measure.samples import Example

TOKENS = list(range(100, 140))


def weights(path: Path) -> dict[str, NDArray[np.float32]]:
    return {t.name: np.asarray(t.data, np.float32) for t in gguf.GGUFReader(path).tensors}


def picture(height: int = 84, width: int = 112, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def observed(
    model: Converted, kept: object = in_decoder
) -> tuple[dict[str, Entry], dict[str, Entry], Question]:
    """Sums of the decoder over TOKENS, and of the encoder over a picture."""
    decoder, encoder = InputSums(kept), InputSums(in_encoder)  # type: ignore[arg-type]
    with Pair(ModelFiles(model.text, model.mmproj), n_ctx=256, observer=decoder) as pair:
        assert pair.vision is not None
        pair.vision.observer = encoder
        question = pair.read(Example("hello", picture()))
        pair.encode(question)
        decoder.flush()
        pair.decoder.run(TOKENS, {})
        entries = as_stored(encoder.entries, pair.vision.stored)
    return decoder.entries, entries, question


def test_every_matrix_is_seen_with_every_input(tiny_model: Converted) -> None:
    text, vision, question = observed(tiny_model)
    n_patches = next(iter(question.patches.values())).pixel_values.shape[0]
    for path, entries in ((tiny_model.text, text), (tiny_model.mmproj, vision)):
        shapes = {n: w.shape for n, w in weights(path).items() if w.ndim == 2 and "embd" not in n}
        assert {n: len(e.sums) for n, e in entries.items()} == {n: s[1] for n, s in shapes.items()}
    assert {e.count for e in text.values()} == {len(TOKENS)}
    assert {n: e.count for n, e in vision.items()} == {
        n: n_patches // 4 if n.startswith("mm.") else n_patches for n in vision
    }


def test_the_head_is_seen_if_asked(tiny_model: Converted) -> None:
    text, _, _ = observed(tiny_model, in_decoder_or_head)
    assert text["token_embd.weight"].count == len(TOKENS)


def test_products_are_of_blocks_of_256(nano: Callable[[str, str], Converted]) -> None:
    """The rows of a head that is the embedding as well are read by themselves, so it has none."""
    text, vision, _ = observed(nano("f32", "f32"), in_decoder_or_head)
    assert text.pop("token_embd.weight").products is None
    for name, entry in (text | vision).items():
        assert entry.products is not None, name
        assert entry.products.shape == (len(entry.sums) // 256, 256, 256)
        found = np.einsum("bii->bi", entry.products).reshape(-1)
        np.testing.assert_allclose(found, entry.sums, rtol=1e-4, atol=1e-6 * entry.sums.max())
    x = weights(nano("f32", "f32").text)
    inputs = x["token_embd.weight"][TOKENS].astype(np.float64)
    inputs *= x["blk.0.attn_norm.weight"] / np.sqrt(np.square(inputs).mean(axis=1, keepdims=True) + 1e-6)
    expected, got = inputs.T @ inputs, text["blk.0.attn_q.weight"].products
    assert got is not None
    assert np.abs(got[0] - expected).max() < 1e-4 * np.abs(expected).max()


def test_the_first_layers_sums_are_numpys(tiny_model: Converted) -> None:
    """The input of the first attention is a norm of what the file holds: no model is needed for it."""
    text, vision, question = observed(tiny_model)
    w = weights(tiny_model.text)
    x = w["token_embd.weight"][TOKENS].astype(np.float64)
    x = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + 1e-6) * w["blk.0.attn_norm.weight"]
    for part in "qkv":
        np.testing.assert_allclose(
            text[f"blk.0.attn_{part}.weight"].sums, np.square(x).sum(axis=0), rtol=1e-5
        )
        assert text[f"blk.0.attn_{part}.weight"].products is None  # 128 wide, no block of 256

    v = weights(tiny_model.mmproj)
    kernels = [v[f"v.patch_embd.weight{suffix}"] for suffix in ("", ".1")]
    kernel = np.stack(kernels, axis=2).reshape(len(kernels[0]), -1).astype(np.float64)
    x = next(iter(question.patches.values())).pixel_values @ kernel.T
    x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-6)
    x = x * v["v.blk.0.ln1.weight"] + v["v.blk.0.ln1.bias"]
    np.testing.assert_allclose(vision["v.blk.0.attn_v.weight"].sums, np.square(x).sum(axis=0), rtol=1e-4)


@pytest.mark.parity
def test_all_sums_are_those_of_transformers(tiny_checkpoint: Path, tiny_model: Converted) -> None:
    torch = pytest.importorskip("torch")
    from qvl.cli.transformers_model import TransformersModel
    from qvl.convert.config import read_config
    from qvl.convert.families import qwen2_vl
    from qvl.convert.tensor_map import canonical

    text, vision, question = observed(tiny_model)
    model = TransformersModel(tiny_checkpoint)
    found: dict[str, NDArray[np.float64]] = {}

    def watch(name: str) -> object:
        def hook(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
            found[name] = inputs[0].double().square().reshape(-1, inputs[0].shape[-1]).sum(0).numpy()

        return hook

    for name, module in model._model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(watch(canonical(f"{name}.weight")))
    model.encode(question)
    model.logits(TOKENS, {}, [0])
    config = read_config(tiny_checkpoint)
    sources = {t.name: t.source for t in (*qwen2_vl.text_rows(config), *qwen2_vl.vision_rows(config))}
    for entries, tolerance in ((text, 2e-3), (vision, 1e-5)):
        for name, entry in entries.items():
            expected = found[sources[name]]
            # the decoder's cache is in float16, and so is what it attends to
            error = np.abs(entry.sums - expected).max() / expected.max()
            assert error < tolerance, name
