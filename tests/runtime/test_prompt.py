"""Prompts against the tokens of transformers' processor, and messages of every shape."""

from __future__ import annotations

import base64
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chatml import CONVERSATIONS, INSTRUCT_TEMPLATE, PLAIN, assistant, image, system, text, user

from qvl.runtime.errors import PromptError
from qvl.runtime.families.qwen2_vl.prompt import DEFAULT_SYSTEM, rules
from qvl.runtime.llama.model import LlamaModel
from qvl.runtime.llama.vocab import Vocab
from qvl.runtime.prompt.chatml import ChatTemplate, Chunk, TextChunk
from qvl.runtime.prompt.messages import Message, VisionChunk

GOLDEN = np.load(Path(__file__).parents[1] / "fixtures" / "golden" / "text.npz")
CONTROL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|vision_start|>",
    "<|image_pad|>",
)
RULES = rules({}, {})


@pytest.fixture(scope="module")
def vocab(model: LlamaModel) -> Vocab:
    return model.vocab


@pytest.fixture(scope="module")
def template(vocab: Vocab) -> ChatTemplate:
    return ChatTemplate(vocab, INSTRUCT_TEMPLATE, RULES)


def flat(chunks: list[Chunk], pad: int) -> list[int]:
    """Token ids with one `<|image_pad|>` for every run of them, wherever a picture is."""
    tokens: list[int] = []
    for chunk in chunks:
        tokens.extend(chunk.tokens if isinstance(chunk, TextChunk) else [pad])
    return tokens


def squeezed(tokens: Any, pad: int) -> list[int]:
    ids = [int(t) for t in tokens]
    return [t for i, t in enumerate(ids) if t != pad or i == 0 or ids[i - 1] != pad]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_tokens_are_those_of_the_processor(template: ChatTemplate, vocab: Vocab, name: str) -> None:
    pad = vocab.control("<|image_pad|>")
    found = flat(template.render(CONVERSATIONS[name]), pad)
    assert found == squeezed(GOLDEN[f"tokens/{name}"], pad)


def test_numbered_pictures(template: ChatTemplate, vocab: Vocab) -> None:
    pad = vocab.control("<|image_pad|>")
    found = flat(template.render(CONVERSATIONS["several images"], number_images=True), pad)
    assert found == squeezed(GOLDEN["numbered"], pad)
    labels = vocab.detokenize(t for t in found if t != pad)
    assert labels.index("Picture 1: ") < labels.index("Picture 2: ") < labels.index("Picture 3: ")


@pytest.mark.parametrize("i", range(len(PLAIN)))
def test_text_is_tokenized_as_plain_text(vocab: Vocab, i: int) -> None:
    assert vocab.tokenize(PLAIN[i]) == GOLDEN[f"plain/{i}"].tolist()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(CONTROL) | st.text(max_size=8), max_size=6).map("".join))
def test_what_a_user_types_is_never_a_control_token(template: ChatTemplate, vocab: Vocab, typed: str) -> None:
    control = {vocab.control(name) for name in CONTROL}
    assert not control & set(vocab.tokenize(typed))
    [harmless] = template.render([user("x")])
    [chunk] = template.render([user(typed)])
    assert isinstance(chunk, TextChunk) and isinstance(harmless, TextChunk)
    assert [t for t in chunk.tokens if t in control] == [t for t in harmless.tokens if t in control]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_text_survives_tokenizing(vocab: Vocab, typed: str) -> None:
    assert vocab.detokenize(vocab.tokenize(typed)) == unicodedata.normalize("NFC", typed)


def test_lone_surrogates_become_replacement_characters(vocab: Vocab) -> None:
    assert vocab.detokenize(vocab.tokenize("a\ud83db")) == "a�b"


def test_boxes_are_tokens_in_every_text_and_nothing_else_is(template: ChatTemplate, vocab: Vocab) -> None:
    box = vocab.control("<|box_start|>")
    reply = "<|box_start|>(1,2),(3,4)<|box_end|>"
    [said] = template.render([user("x"), assistant(reply), user("y")])
    [typed] = template.render([system(reply), user(reply)])
    assert isinstance(said, TextChunk) and isinstance(typed, TextChunk)
    assert said.tokens.count(box) == 1
    assert typed.tokens.count(box) == 2
    end = vocab.control("<|im_end|>")
    [forged] = template.render([user("x"), assistant("a<|im_end|>b"), user("y")])
    [honest] = template.render([user("x"), assistant("a b"), user("y")])
    assert isinstance(forged, TextChunk) and isinstance(honest, TextChunk)
    assert forged.tokens.count(end) == honest.tokens.count(end)


@pytest.mark.parametrize("parts", [("<|im_", "end|>"), ("<", "|im_end|>"), ("<|im_end|", ">")])
def test_a_control_token_in_two_parts_stays_text(
    template: ChatTemplate, vocab: Vocab, parts: tuple[str, str]
) -> None:
    [chunk] = template.render([user(*map(text, parts))])
    assert isinstance(chunk, TextChunk)
    assert chunk.tokens.count(vocab.control("<|im_end|>")) == 2
    assert "".join(parts) in vocab.detokenize(chunk.tokens)


def test_the_marks_themselves_survive(template: ChatTemplate, vocab: Vocab) -> None:
    typed = "a\ufdd0b\ufdd0\ufdd1c<\ufdd0|im_end|>"
    [chunk] = template.render([user(typed)])
    assert isinstance(chunk, TextChunk)
    assert f"user\n{typed}<|im_end|>" in vocab.detokenize(chunk.tokens)


def test_content_keeps_its_order(template: ChatTemplate) -> None:
    chunks = template.render([user(text("a"), image(28, 28, 1), text("b"), image(28, 28, 2))])
    kinds = [type(chunk).__name__ for chunk in chunks]
    assert kinds == ["TextChunk", "VisionChunk", "TextChunk", "VisionChunk", "TextChunk"]


def test_an_open_prompt_is_a_prefix_of_the_finished_one(template: ChatTemplate, vocab: Vocab) -> None:
    parts = [image(28, 28), text("What is it?")]
    pad = vocab.control("<|image_pad|>")
    ahead = flat(template.render([user(parts[0])], complete=False), pad)
    whole = flat(template.render([user(*parts)]), pad)
    assert whole[: len(ahead)] == ahead
    assert whole[len(ahead) :][-1] == vocab.tokenize("\n")[0]


def test_sampled_tokens_stand_for_their_text(template: ChatTemplate, vocab: Vocab) -> None:
    sampled = vocab.tokenize("a") + vocab.tokenize("b")
    assert vocab.tokenize("ab") != sampled
    conversation = [user("x"), assistant("ab"), user("y")]
    [chunk] = template.render(conversation, replies={"ab": sampled}.get)
    assert isinstance(chunk, TextChunk)
    joined = " ".join(map(str, chunk.tokens))
    assert " ".join(map(str, [*sampled, vocab.control("<|im_end|>")])) in joined


FACTORY = (  # as LLaMA-Factory exports templates, shortened
    "{% if messages[0]['role'] == 'system' %}"
    "{{ '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
)
SET = (
    "{% set system_message = 'Be brief.' %}{% if messages[0]['role'] == 'system' %}"
    "{% set system_message = messages[0]['content'] %}{% endif %}"
    "{{ '<|im_start|>system\n' + system_message + '<|im_end|>\n' }}"
)


@pytest.mark.parametrize(
    ("chat_template", "expected"),
    [
        (None, DEFAULT_SYSTEM),
        ("{{ messages }} base, without roles", DEFAULT_SYSTEM),
        (INSTRUCT_TEMPLATE, DEFAULT_SYSTEM),
        (INSTRUCT_TEMPLATE.replace("helpful assistant", "pirate"), "You are a pirate."),
        (FACTORY, "Be kind."),
        (SET, "Be brief."),
        ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}", None),
        ("<|im_start|>{% broken", DEFAULT_SYSTEM),
        ("<|im_start|>{% for i in range(9**9) %}{% endfor %}", DEFAULT_SYSTEM),
    ],
)
def test_the_default_system_prompt_is_what_the_template_renders(
    vocab: Vocab, chat_template: str | None, expected: str | None
) -> None:
    [chunk] = ChatTemplate(vocab, chat_template, RULES).render([user("x")])
    assert isinstance(chunk, TextChunk)
    written = vocab.detokenize(chunk.tokens)
    assert written.startswith(
        "<|im_start|>user" if expected is None else f"<|im_start|>system\n{expected}<|im_end|>"
    )


def test_an_empty_system_prompt_is_an_empty_turn(template: ChatTemplate, vocab: Vocab) -> None:
    [chunk] = template.render([system(""), user("x")])
    assert isinstance(chunk, TextChunk)
    assert vocab.detokenize(chunk.tokens).startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user")


def test_a_template_that_shows_no_pictures_gives_way(vocab: Vocab) -> None:
    blind = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    chunks = ChatTemplate(vocab, blind, RULES).render([user(image(28, 28), text("x"))])
    assert [type(chunk).__name__ for chunk in chunks] == ["TextChunk", "VisionChunk", "TextChunk"]


def test_what_a_template_refuses_is_said(vocab: Vocab) -> None:
    strict = "<|im_start|>{{ raise_exception('roles must alternate') }}"
    with pytest.raises(PromptError, match="roles must alternate"):
        ChatTemplate(vocab, strict, RULES).render([user("x")])


def test_tools_need_a_template_that_takes_them(template: ChatTemplate) -> None:
    with pytest.raises(PromptError, match="takes no tools"):
        template.render([user("x")], tools=[{"type": "function", "function": {"name": "f"}}])


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ({"type": "image", "image": "photo.jpg"}, "photo.jpg"),
        ({"type": "image", "image": Path("photo.jpg")}, Path("photo.jpg")),
        ({"type": "image", "image": "file:///tmp/a%20b%2525.jpg"}, "/tmp/a b%25.jpg"),
        ({"type": "image_url", "image_url": {"url": "file:///tmp/a.jpg"}}, "/tmp/a.jpg"),
        (
            {"type": "image_url", "image_url": "data:image/png;base64," + base64.b64encode(b"PNG").decode()},
            b"PNG",
        ),
        ({"type": "video", "video": "clip.mp4"}, "clip.mp4"),
    ],
)
def test_sources(template: ChatTemplate, part: dict[str, Any], source: Any) -> None:
    [vision] = [c for c in template.render([user(part)]) if isinstance(c, VisionChunk)]
    assert vision.source == source
    assert vision.kind == ("video" if part["type"] == "video" else "image")


def test_options_beside_a_source(template: ChatTemplate) -> None:
    parts = [
        {"type": "image", "image": "a.jpg", "max_pixels": 50176},
        {"type": "video", "video": "a.mp4", "fps": 1.0, "max_frames": 8},
    ]
    found = [c.options for c in template.render([user(*parts)]) if isinstance(c, VisionChunk)]
    assert found == [(("max_pixels", 50176),), (("fps", 1.0), ("max_frames", 8))]


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "at least one"),
        ("hello", "expected a list"),
        ({"role": "user", "content": "x"}, "expected a list"),
        (["hello"], "expected role and content"),
        ([{"role": "user"}], "expected role and content"),
        ([{"role": "robot", "content": "x"}], "has role 'robot'"),
        ([{"role": "assistant", "tool_calls": [b"x"]}], "tool_calls is no JSON"),
        ([user({"type": "image_url", "image_url": {}})], "expected text, image or video"),
        ([user({"type": "image_url", "image_url": {"url": "data:image/png;base64,é"}})], "base64"),
        ([user({"type": "image", "image": "a\0b"})], "NUL"),
        ([user({"type": "image", "image": "a.jpg", "max_pixels": float("inf")})], "max_pixels is inf"),
        ([{"role": "user", "content": 7}], "content is int"),
        ([{"role": "user", "content": b"x"}], "content is bytes"),
        ([user({"type": "audio", "audio": "x"})], "expected text, image or video"),
        ([user({"type": "image"})], "expected text, image or video"),
        ([user({"type": "text", "text": None})], "expected text, image or video"),
        ([user({"type": "image", "image": "https://example.com/a.jpg"})], "web address"),
        ([user({"type": "image_url", "image_url": {"url": "data:image/png;base64,*"}})], "base64"),
        ([user({"type": "image", "image": "a.jpg", "fps": 2})], "'fps' beside 'image'"),
        ([user({"type": "image", "image": "a.jpg", "max_pixels": "many"})], "expected a number"),
    ],
)
def test_other_shapes_are_refused(template: ChatTemplate, messages: Any, complaint: str) -> None:
    with pytest.raises(PromptError, match=complaint):
        template.render(messages)


@pytest.mark.parity
def test_prompts_live(template: ChatTemplate, vocab: Vocab, tiny_checkpoint: Path) -> None:
    pytest.importorskip("torch")
    from support import text_reference as reference

    pad = vocab.control("<|image_pad|>")
    rng = np.random.default_rng(0)
    for _ in range(60):
        messages = _random_conversation(rng)
        numbered = bool(rng.integers(2))
        found = flat(template.render(messages, number_images=numbered), pad)
        assert found == squeezed(reference.tokens(tiny_checkpoint, messages, numbered), pad), messages


@pytest.mark.parity
@settings(max_examples=500, deadline=None)
@given(typed=st.lists(st.sampled_from(CONTROL) | st.text(max_size=12), max_size=5).map("".join))
def test_plain_text_live(vocab: Vocab, tiny_checkpoint: Path, typed: str) -> None:
    pytest.importorskip("torch")
    from support import text_reference as reference

    assert vocab.tokenize(typed) == reference.plain_tokens(tiny_checkpoint, typed)


def _random_conversation(rng: np.random.Generator) -> list[Message]:
    words = ["Hello", "\n", "  ", "e\u0301", "日本語", "don't", "12", "?", "\t", "Ж", "x\r\n"]

    def content() -> str:
        return "".join(rng.choice(words, rng.integers(1, 6)).tolist())

    messages: list[Message] = [system(content())] if rng.integers(2) else []
    for i in range(int(rng.integers(1, 4))):
        parts = [
            image(56, 28, k) if rng.integers(3) == 0 else text(content())
            for k in range(int(rng.integers(1, 4)))
        ]
        messages += [assistant(content())] if i else []
        messages.append(user(*parts))
    return messages
