"""What tests/fuzz has found: damaged or hostile files, and the errors that they get."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tracemalloc
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from fuzz.gguf_parts import GGUFParts
from support.families import write_family
from support.gguf_edit import edit

from qvl.cli.chat import sessions
from qvl.convert import Converted, convert
from qvl.convert.checkpoint import parse_json as parse_checkpoint_json
from qvl.convert.checkpoint import read_json
from qvl.runtime import load
from qvl.runtime.caption.ledger import Ledger
from qvl.runtime.errors import CheckpointError, FormatError, GGUFError, ImageError, InputError
from qvl.runtime.files import parse_json
from qvl.runtime.ggml.imatrix import Entry, Imatrix, read_imatrix, write_imatrix
from qvl.runtime.grammar.schema import schema_to_grammar
from qvl.runtime.llama.sampler import Sampler, Sampling
from qvl.runtime.vision.encoder import VisionEncoder
from qvl.runtime.vision.image import open_picture

DEEP = "[" * 2000 + "]" * 2000


def test_json_is_bounded_in_depth() -> None:
    assert parse_json('{"a": ["[[[[", {}]}') == {"a": ["[[[[", {}]}
    assert parse_json(b"[" * 64 + b"]" * 64)
    assert parse_json(json.dumps(["[" * 500, *[[]] * 500]))
    for text in (DEEP, "[" * 65 + "]" * 65, '{"a":' * 65 + "1" + "}" * 65, b"\xff"):
        with pytest.raises(ValueError):
            parse_json(text)


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"temperature": "hot"}},
        {"settings": {"top_k": 1.5}},
        {"settings": {"max_tokens": 0}},
        {"settings": {"seed": -1}},
        {"system": "a\0"},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "a\0.png"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png", "max_pixels": "x"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "x" * 5000}]}]},
    ],
)
def test_a_session_is_refused_by_its_name(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"qvl_session": 1, "messages": [], **change}))
    with pytest.raises((FormatError, InputError), match=r"s\.json: "):
        sessions.load(str(path))


@pytest.mark.parametrize("content", [DEEP, '{"qvl_session": 1, "messages": ' + DEEP + "}", "\udcff"])
def test_a_session_that_cannot_be_parsed(tmp_path: Path, content: str) -> None:
    path = tmp_path / "s.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(FormatError, match=r"s\.json: cannot be read as a session"):
        sessions.load(str(path))


def test_records_and_their_state_that_are_too_deep(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text(f'{{"path": "a", "caption": "b", "boxes": {DEEP}}}\n')
    with pytest.raises(FormatError, match=r"out\.jsonl: record 1 cannot be read: nested deeper"):
        Ledger(out, {})
    out.write_text("")
    (tmp_path / "out.jsonl.qvl").write_text(f"{DEEP}\n")  # as a torn line: the settings are not known
    Ledger(out, {}).close()


@pytest.mark.parametrize(
    ("key", "value"),
    [("imatrix.datasets", 5), ("imatrix.datasets", [5]), ("imatrix.chunk_count", "many"),
     ("imatrix.chunk_size", 1.5), ("imatrix.chunk_count", True), ("qvl.imatrix.prompts_done", ["x"])],
)  # fmt: skip
def test_fields_of_an_importance_matrix(tmp_path: Path, key: str, value: object) -> None:
    good, bad = tmp_path / "good.gguf", tmp_path / "bad.gguf"
    write_imatrix(
        good, Imatrix({"a.weight": Entry(np.ones(32), 1)}, ("x",), 1, extra={"general.architecture": "x"})
    )
    with pytest.raises(GGUFError, match=rf"bad\.gguf: {key} is"):
        read_imatrix(edit(good, bad, metadata={key: value}))


@pytest.mark.parametrize(
    "schema",
    [{"required": 5}, {"required": [[]]}, {"properties": 3}, {"allOf": {}}, {"type": [{}]}, {"type": 7},
     {"$ref": []}, {"enum": 1}, {"prefixItems": "x"}, {"minItems": "x"}, {"format": 1},
     {"$defs": 1, "type": "string"}, {"type": "string", "const": "\udcff"},
     {"type": "number", "minimum": 10**400}],
)  # fmt: skip
def test_schemas_of_other_shapes(schema: dict[str, object]) -> None:
    with pytest.raises(InputError, match="the JSON schema"):
        schema_to_grammar(schema if "type" in schema else {"type": "object", **schema})


def test_an_importance_matrix_without_inputs(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "i.gguf", Imatrix({"a.weight": Entry(np.ones(0), 1)}))
    with pytest.raises(GGUFError, match=r"i\.gguf: a\.weight has 0 sums"):
        read_imatrix(tmp_path / "i.gguf")


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe"])
def test_deepstack_features_of_the_last_layer(tmp_path: Path, family: str) -> None:
    """llama.cpp adds them to the rows of sampled tokens alone: an assertion that ends the process."""
    text = convert(write_family(tmp_path / "c", family), tmp_path / "out", "q8_0", "q8_0").text
    key = f"{family.replace('_', '')}.n_deepstack_layers"
    bad = edit(text, tmp_path / "bad.gguf", metadata={key: 4})
    with pytest.raises(GGUFError, match=r"bad\.gguf: 4 deepstack layers of 4, expected fewer"):
        load(bad, device="cpu")


def test_patches_that_the_encoder_does_not_take(tiny_model: Converted, tmp_path: Path) -> None:
    path = edit(tiny_model.mmproj, tmp_path / "m.gguf", metadata={"qvl.vision.temporal_patch_size": 7})
    with pytest.raises(GGUFError, match=r"m\.gguf"):
        VisionEncoder(path, device="cpu").encode([np.zeros((56, 56, 3), np.uint8)])


def test_a_png_chunk_longer_than_the_file_takes_no_memory(tmp_path: Path) -> None:
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 0xFFFFFFF0) + b"IDAT" + b"x" * 100
    (tmp_path / "a.png").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match=r"a\.png"):
            open_picture(tmp_path / "a.png")
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_checkpoints_text_with_half_a_surrogate_pair(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": "\\udcff"}')
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        read_json(tmp_path / "config.json")
    assert parse_checkpoint_json(b'{"a": "\\ud83d\\ude00"}', tmp_path) == {"a": "\U0001f600"}


def test_a_model_that_is_shortened_in_place_is_named_before_it_is_read(
    tiny_model: Converted, tmp_path: Path
) -> None:
    """Beyond the end of the file a page of its map is SIGBUS, which no process outlives."""
    for path in (tiny_model.text, tiny_model.mmproj):
        shutil.copy(path, tmp_path)
    text, mmproj = tmp_path / tiny_model.text.name, tmp_path / tiny_model.mmproj.name
    question = [{"role": "user", "content": "Hi"}]
    with load(tmp_path, device="cpu") as model:
        model.generate(question, max_tokens=1).result()
        shutil.copy(tiny_model.text, tmp_path / "new")
        (tmp_path / "new").replace(text)  # another file of that name: what is mapped stays
        model.generate(question, max_tokens=2).result()
    with load(tmp_path, device="cpu") as model:
        for path, run in (
            (mmproj, lambda: model.vision.encode([np.zeros((56, 56, 3), np.uint8)])),
            (text, lambda: model.generate(question, max_tokens=1).result()),
        ):
            os.truncate(path, 4096)
            with pytest.raises(FormatError, match=f"{path.name}: 4096 bytes, .* shortened while in use"):
                run()


@pytest.mark.parametrize("most", [1000, 1001, 2000, 2001, 1 << 64, 10**300])
def test_a_schema_of_more_items_than_a_grammar_counts(most: int) -> None:
    """llama.cpp refuses some of these counts, and others are beyond its integers."""
    with load(device="cpu", n_ctx=256) as model:
        for schema in ({"maxItems": most}, {"minItems": 1000, "maxItems": most}):
            grammar = schema_to_grammar({"type": "array", "items": {"type": "integer"}, **schema})
            Sampler(model.text.vocab, Sampling(), grammar).close()


def test_gate_and_up_of_different_types(tmp_path: Path) -> None:
    """Our kernels take the activations of one layer in one format, and the norm before both makes one."""
    checkpoint = write_family(tmp_path / "c", "qwen2_5_vl")
    whole, quantized = (
        GGUFParts(convert(checkpoint, tmp_path / kind, "q8_0", kind).mmproj.read_bytes())
        for kind in ("f16", "q8_0")
    )
    picture = np.random.default_rng(0).integers(0, 256, (112, 140, 3), np.uint8)
    for swapped in ("ffn_gate", "ffn_up"):
        mixed = quantized.copy()
        others = {part.name: part for part in whole.tensors}
        mixed.tensors = [
            others[part.name] if part.name.endswith(f"{swapped}.weight".encode()) else part
            for part in mixed.tensors
        ]
        mixed.lay_out()
        path = tmp_path / f"{swapped}.gguf"
        path.write_bytes(mixed.pack())
        found = []
        for precision in ("exact", "auto"):
            with closing(VisionEncoder(path, device="cpu", precision=precision)) as encoder:  # type: ignore[arg-type]
                found.append(encoder.encode([picture])[0].embeddings)
        exact, fast = found
        assert np.linalg.norm(fast - exact) < 0.03 * np.linalg.norm(exact)
