"""Vocabularies from either kind of tokenizer file, checked against llama.cpp and transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from support.checkpoint import TOKENIZER, Style, special_ids, write_checkpoint

from qvl.convert import Converted
from qvl.convert.config import read_config
from qvl.convert.vocab import TokenType, generation_defaults, read_chat_template, read_vocab
from qvl.runtime.errors import CheckpointError

N_BASE = 4252
CORPUS = (TOKENIZER / "corpus.txt").read_text(encoding="utf-8")


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def vocab_of(folder: Path) -> Any:
    return read_vocab(folder, read_config(folder).text)


def test_both_kinds_of_files_give_the_same_vocabulary(tmp_path: Path) -> None:
    slow = vocab_of(write_checkpoint(tmp_path / "slow", style=Style(tokenizer="slow")))
    fast = vocab_of(write_checkpoint(tmp_path / "fast", style=Style(tokenizer="fast")))
    assert slow == fast
    assert len(slow.tokens) == 4352
    assert slow.tokens[special_ids()["<|im_start|>"]] == "<|im_start|>"
    assert slow.types[:N_BASE] == (TokenType.NORMAL,) * N_BASE
    assert slow.types[N_BASE : N_BASE + 14] == (TokenType.CONTROL,) * 14
    assert slow.tokens[N_BASE + 14 :] == tuple(f"[PAD{i}]" for i in range(N_BASE + 14, 4352))
    assert set(slow.types[N_BASE + 14 :]) == {TokenType.UNUSED}
    ids = special_ids()
    found = (slow.bos_token_id, slow.eos_token_id, slow.pad_token_id)
    assert found == (ids["<|endoftext|>"], ids["<|im_end|>"], ids["<|endoftext|>"])


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["slow", "fast"])
def test_the_corpus_falls_into_transformers_pieces(tmp_path: Path, kind: str, tiny_model: Converted) -> None:
    """llama.cpp with our metadata against transformers with the checkpoint's files."""
    transformers = pytest.importorskip("transformers")
    llama_cpp = pytest.importorskip("llama_cpp")
    folder = write_checkpoint(tmp_path / kind, style=Style(tokenizer=kind))  # type: ignore[arg-type]
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    model = llama_cpp.Llama(str(tiny_model.text), vocab_only=True, verbose=False)
    for line in CORPUS.split("\n"):
        if "decomposed" in line:  # llama.cpp does not normalize; the prompt module does
            continue
        ours = model.tokenize(line.encode(), add_bos=False, special=False)
        assert ours == reference(line)["input_ids"], line


def test_metadata_of_the_file(tiny_model: Converted) -> None:
    fields = GGUFReader(tiny_model.text).fields
    value = {
        name: field.contents() for name, field in fields.items() if name.startswith(("token", "general"))
    }
    ids = special_ids()
    assert value["tokenizer.ggml.model"] == "gpt2"
    assert value["tokenizer.ggml.pre"] == "qwen2"
    assert value["tokenizer.ggml.eos_token_id"] == ids["<|im_end|>"]
    assert value["tokenizer.ggml.padding_token_id"] == ids["<|endoftext|>"]
    assert value["tokenizer.ggml.add_bos_token"] is False
    assert "<|im_start|>assistant" in value["tokenizer.chat_template"]
    assert len(value["tokenizer.ggml.tokens"]) == len(value["tokenizer.ggml.token_type"]) == 4352
    assert value["tokenizer.ggml.merges"][0] == "Ġ Ġ"
    assert value["general.sampling.top_k"] == 1
    assert value["general.sampling.temp"] == pytest.approx(0.1)
    assert value["general.sampling.penalty_repeat"] == pytest.approx(1.05)


@pytest.mark.parametrize("version", ["#version: 0.2\n", ""])
def test_a_merge_may_begin_with_a_hash(tmp_path: Path, version: str) -> None:
    folder = write_checkpoint(tmp_path / "c")
    lines = (folder / "merges.txt").read_text(encoding="utf-8")
    assert "\n# #\n" in lines
    changed = version + "# #\n" + lines.replace("\n# #\n", "\n")
    (folder / "merges.txt").write_text(changed, encoding="utf-8")
    assert vocab_of(folder).merges[:2] == ("# #", "Ġ Ġ")


def test_windows_line_ends(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c")
    before = vocab_of(folder)
    merges = (folder / "merges.txt").read_bytes()
    (folder / "merges.txt").write_bytes(merges.replace(b"\n", b"\r\n"))
    assert vocab_of(folder) == before


def test_added_tokens_of_a_fine_tune(tmp_path: Path) -> None:
    """A user-defined token, a control token by its look, and one that only added_tokens.json has."""
    folder = write_checkpoint(tmp_path / "c")

    def add(settings: dict[str, Any]) -> None:
        settings["added_tokens_decoder"]["4266"] = {"content": "<tool>", "special": False}
        settings["added_tokens_decoder"]["4267"] = {"content": "<|point|>", "special": False}

    edit(folder / "tokenizer_config.json", add)
    (folder / "added_tokens.json").write_text(json.dumps({"<extra>": 4268}))
    vocab = vocab_of(folder)
    assert vocab.tokens[4266:4270] == ("<tool>", "<|point|>", "<extra>", "[PAD4269]")
    kinds = TokenType.USER_DEFINED, TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNUSED
    assert vocab.types[4266:4270] == kinds


def test_older_merges_as_strings(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", style=Style(tokenizer="fast"))
    before = vocab_of(folder)

    def flatten(value: dict[str, Any]) -> None:
        value["model"]["merges"] = [" ".join(pair) for pair in value["model"]["merges"]]

    edit(folder / "tokenizer.json", flatten)
    assert vocab_of(folder) == before


def test_chat_templates_in_order(tmp_path: Path) -> None:
    assert read_chat_template(tmp_path, {}) is None
    assert read_chat_template(tmp_path, {"chat_template": "config"}) == "config"
    named = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    assert read_chat_template(tmp_path, {"chat_template": named}) == "d"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert read_chat_template(tmp_path, {"chat_template": "config"}) == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert read_chat_template(tmp_path, {"chat_template": "config"}) == "jinja"


def damage_vocab(token_id: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "vocab.json", lambda vocab: vocab.update({"!": token_id}))


def damage_merges(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "merges.txt").write_text(text, encoding="utf-8") and None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "vocab.json").unlink(), "neither tokenizer.json nor vocab.json"),
        (damage_vocab(10**6), "has the id 1000000, expected less than vocab_size 4352"),
        (damage_vocab(-1), "has the id -1"),
        (damage_vocab("0"), "has the id '0'"),
        (damage_vocab(5), "share id 5"),
        (damage_merges("a b\nc\n"), r"merge 2 is \['c'\], expected two pieces"),
        (damage_merges("a b c\n"), "merge 1 is"),
        (lambda f: (f / "merges.txt").write_bytes(b"\xff\xfe"), "merges.txt: cannot be read"),
        (lambda f: (f / "vocab.json").write_text("[1]"), "vocab.json: a JSON object was expected"),
        (lambda f: (f / "added_tokens.json").write_text('{"!": 4300}'), "token '!' has two ids"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = write_checkpoint(tmp_path / "c")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        vocab_of(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(model={"type": "Unigram"}), "not a byte-level BPE"),
        (lambda v: v["model"].pop("vocab"), "model.vocab or model.merges is missing"),
        (
            lambda v: v["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+"),
            "expected Qwen2's",
        ),
        (lambda v: v.update(added_tokens=[3]), "added_tokens has 3"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
    folder = write_checkpoint(tmp_path / "c", style=Style(tokenizer="fast"))
    edit(folder / "tokenizer.json", change)
    with pytest.raises(CheckpointError, match=message):
        vocab_of(folder)


def test_generation_defaults(tmp_path: Path) -> None:
    assert generation_defaults(tmp_path) == {}
    path = tmp_path / "generation_config.json"
    path.write_text(
        '{"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.1, '
        '"presence_penalty": 1.5}'
    )
    expected = {"temp": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1, "penalty_repeat": 1.1}
    expected = {f"general.sampling.{name}": value for name, value in expected.items()}
    assert generation_defaults(tmp_path) == expected | {"qvl.sampling.presence_penalty": 1.5}
    path.write_text('{"do_sample": false, "temperature": 0.7}')
    assert generation_defaults(tmp_path) == {"general.sampling.temp": 0.0}
    path.write_text('{"top_p": "high"}')
    with pytest.raises(CheckpointError, match='top_p is "high"'):
        generation_defaults(tmp_path)
