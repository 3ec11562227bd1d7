"""What a turn costs in tokens and pictures, and that its result is the same as from nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.chatml import assistant, image, system, text, user

from qvl.convert import Converted
from qvl.runtime.embeddings import EmbeddingStore, source_key
from qvl.runtime.errors import Cancelled, ContextFullError, ImageError, InputError
from qvl.runtime.llama.context import Context
from qvl.runtime.llama.model import LlamaModel
from qvl.runtime.prompt import ChatTemplate, Message, VisionChunk
from qvl.runtime.session import Session
from qvl.runtime.tokens import VisionUnit, common_prefix, n_cells, n_positions
from qvl.runtime.vision.encoder import VisionEmbedding
from qvl.runtime.vision.preprocess import Patches

GREEDY: dict[str, Any] = {"temperature": 0.0, "repeat_penalty": 1.0}


class FakeEyes:
    """Embeddings made of the picture's mean colour and size: no encoder, and every call is counted."""

    merge_size = 2

    def __init__(self, n_embd: int) -> None:
        self.n_embd = n_embd
        self.encoded: list[int] = []
        self.prepared = 0
        self.pause = 0.0

    def prepare(self, chunk: VisionChunk) -> Patches:
        self.prepared += 1
        if isinstance(chunk.source, str):
            raise ImageError(f"{chunk.source}: cannot be read")
        frames = np.asarray(chunk.source)
        height, width = frames.shape[-3:-1]
        t = 1 if chunk.kind == "image" else len(frames) // 2
        values = np.full((1, 1), frames.mean(), np.float32)
        return Patches(values, (t, height // 14, width // 14))

    def encode_patches(self, inputs: Sequence[Patches], progress: Any = None) -> list[VisionEmbedding]:
        self.encoded.append(len(inputs))
        out = []
        for patches in inputs:
            for step in range(10):
                time.sleep(self.pause)
                if progress is not None and progress(step / 10) is False:
                    raise Cancelled("stopped")
            t, h, w = patches.grid_thw
            rng = np.random.default_rng(int(patches.pixel_values[0, 0] * 1000))
            rows = rng.standard_normal((t * h * w // 4, self.n_embd), dtype=np.float32)
            out.append(VisionEmbedding(rows, patches.grid_thw))
        return out


@pytest.fixture(scope="module")
def model(tiny_model: Converted) -> Iterator[LlamaModel]:
    with LlamaModel(tiny_model.text, device="cpu") as opened:
        yield opened


@pytest.fixture
def eyes(model: LlamaModel) -> FakeEyes:
    return FakeEyes(model.hparams.n_embd)


@pytest.fixture
def session(model: LlamaModel, eyes: FakeEyes) -> Iterator[Session]:
    opened = new_session(model, eyes)
    yield opened
    opened.close()


def new_session(model: LlamaModel, eyes: FakeEyes, n_ctx: int = 1024, **options: Any) -> Session:
    context = Context(model, n_ctx=n_ctx, n_batch=64, kv_type="f32", threads=1)
    return Session(context, EmbeddingStore(eyes), ChatTemplate(model.vocab), **options)


def fresh(model: LlamaModel, messages: Sequence[Message], **options: Any) -> tuple[int, ...]:
    """The reply's tokens from a session that has seen nothing."""
    session = new_session(model, FakeEyes(model.hparams.n_embd))
    try:
        return session.generate(messages, **GREEDY, **options).result().tokens
    finally:
        session.close()


def test_a_turn_costs_its_own_tokens(session: Session, eyes: FakeEyes) -> None:
    conversation = [user(image(140, 196), text("What is this?"))]
    first = session.generate(conversation, max_tokens=8, **GREEDY).result()
    assert first.usage.images_encoded == 1 and first.usage.cached_tokens == 0
    assert first.usage.image_tokens == 5 * 7
    conversation += [first.message, user("And that?")]
    second = session.generate(conversation, max_tokens=8, **GREEDY).result()
    vocab = session._context.model.vocab
    # "<|im_end|>", "\n", "<|im_start|>", "user\nAnd that?", "<|im_end|>", "\n", "<|im_start|>", "assistant\n"
    own = 6 + len(vocab.tokenize("user\nAnd that?")) + len(vocab.tokenize("assistant\n"))
    # the reply's last token was sampled, not decoded
    assert second.usage.prefilled_tokens == own + 1
    assert second.usage.images_encoded == 0 and second.usage.cached_tokens > 35
    assert eyes.encoded == [1] and eyes.prepared == 1


def test_what_is_reused_changes_nothing(session: Session, model: LlamaModel) -> None:
    conversation = [system("Short."), user(image(84, 112, 1), text("One?"))]
    for question in ("Two?", "Three?"):
        reply = session.generate(conversation, max_tokens=12, **GREEDY).result()
        assert fresh(model, conversation, max_tokens=12)[:1] == reply.tokens[:1]
        conversation += [assistant("Yes."), user(image(56, 84, len(conversation)), text(question))]
    reply = session.generate(conversation, max_tokens=12, **GREEDY).result()
    assert reply.tokens == fresh(model, conversation, max_tokens=12)
    assert reply.usage.cached_tokens > 0


TURNS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(["Hi", "What?", "One two three", "é", "\n"])),
    min_size=1,
    max_size=4,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(TURNS, min_size=2, max_size=4))
def test_any_prompt_after_any_other(
    session: Session, model: LlamaModel, prompts: list[list[tuple[int, str]]]
) -> None:
    """Editing, undoing, going back and forth: always what a fresh session gives, and counts that add up."""
    for turns in prompts:
        messages: list[Message] = []
        for i, (pictures, words) in enumerate(turns):
            if i:
                messages.append(assistant("Yes."))
            messages.append(user(*(image(56, 28 * (k + 1), k) for k in range(pictures)), text(words)))
        reply = session.generate(messages, max_tokens=4, **GREEDY).result()
        assert reply.tokens == fresh(model, messages, max_tokens=4)
        assert session.n_cached == n_cells(session._units)
        assert session._context.last_position() == n_positions(session._units) - 1


def test_editing_rewinds(session: Session, eyes: FakeEyes) -> None:
    opening = user(image(140, 140), text("What is this?"))
    session.generate([opening, assistant("A cat."), user("Which colour?")], max_tokens=4, **GREEDY).result()
    edited = session.generate(
        [opening, assistant("A cat."), user("Which size?")], max_tokens=4, **GREEDY
    ).result()
    assert edited.usage.cached_tokens > 25 and edited.usage.images_encoded == 0
    undone = session.generate([opening], max_tokens=4, **GREEDY).result()
    assert undone.usage.prefilled_tokens < 10
    assert eyes.encoded == [1]


def test_a_picture_twice_is_encoded_once(session: Session, eyes: FakeEyes) -> None:
    picture = image(56, 56)
    reply = session.generate([user(picture, text("and"), picture)], max_tokens=2, **GREEDY).result()
    assert reply.usage.images_encoded == 1 and reply.usage.image_tokens == 8
    assert eyes.encoded == [1]


def test_same_sized_pictures_are_not_mixed_up(session: Session, model: LlamaModel) -> None:
    one, two = image(56, 56, 1), image(56, 56, 2)
    for order in ([one, two], [two, one], [one, one]):
        messages = [user(*order, text("?"))]
        assert session.generate(messages, max_tokens=6, **GREEDY).result().tokens == fresh(
            model, messages, max_tokens=6
        )


def test_replies_keep_their_tokens(session: Session) -> None:
    """Random weights sample what no tokenizer would give; the next prompt still continues the cache."""
    conversation = [user("Hello")]
    for _ in range(3):
        reply = session.generate(conversation, max_tokens=20, temperature=1.5, seed=7).result()
        held = session.n_cached
        conversation += [reply.message, user("Go on")]
        after = session.generate(conversation, max_tokens=1, **GREEDY).result()
        assert after.usage.cached_tokens == held


def test_reading_ahead(session: Session, model: LlamaModel, eyes: FakeEyes) -> None:
    picture = image(140, 196)
    assert session.prefill([user(picture)]) > 35
    assert session.prefill([user(picture)]) == 0
    messages = [user(picture, text("What is this?"))]
    reply = session.generate(messages, max_tokens=8, **GREEDY).result()
    assert reply.usage.images_encoded == 0 and reply.usage.prefilled_tokens < 12
    assert eyes.encoded == [1]
    assert reply.tokens == fresh(model, messages, max_tokens=8)


def test_reading_ahead_called_off(session: Session, model: LlamaModel, eyes: FakeEyes) -> None:
    eyes.pause = 0.02
    cancel = threading.Event()
    caught: list[BaseException] = []

    def read() -> None:
        try:
            session.prefill([user(image(280, 280))], cancel=cancel)
        except Cancelled as e:
            caught.append(e)

    thread = threading.Thread(target=read)
    thread.start()
    time.sleep(0.05)
    cancel.set()
    thread.join(5)
    assert caught and not thread.is_alive()
    eyes.pause = 0
    messages = [user(image(56, 56), text("?"))]
    assert session.generate(messages, max_tokens=6, **GREEDY).result().tokens == fresh(
        model, messages, max_tokens=6
    )


def test_closing_calls_off_what_is_read_ahead(model: LlamaModel, eyes: FakeEyes) -> None:
    eyes.pause = 0.2
    session = new_session(model, eyes)
    caught: list[type[BaseException]] = []

    def read() -> None:
        try:
            session.prefill([user(image(280, 280))])
        except Cancelled as e:
            caught.append(type(e))

    thread = threading.Thread(target=read)
    thread.start()
    time.sleep(0.05)
    start = time.perf_counter()
    session.close()
    assert time.perf_counter() - start < 1.5  # encoding it to the end would take 2 s
    thread.join()
    assert caught == [Cancelled]
    session.close()


def test_asking_waits_for_what_is_read_ahead(session: Session, eyes: FakeEyes) -> None:
    eyes.pause = 0.01
    picture = image(84, 84)
    thread = threading.Thread(target=lambda: session.prefill([user(picture)]))
    thread.start()
    time.sleep(0.02)
    reply = session.generate([user(picture, text("What?"))], max_tokens=2, **GREEDY).result()
    thread.join()
    assert eyes.encoded == [1] and reply.usage.images_encoded == 0


def test_a_video_is_one_span_with_rising_time(session: Session, model: LlamaModel) -> None:
    clip = np.zeros((12, 28, 56, 3), np.uint8)
    messages = [user({"type": "video", "video": clip}, text("What happens?"))]
    reply = session.generate(messages, max_tokens=4, **GREEDY).result()
    [unit] = [u for u in session._units if isinstance(u, VisionUnit)]
    assert (unit.span.t, unit.span.h, unit.span.w) == (6, 1, 2)
    assert reply.usage.image_tokens == 12
    again = session.generate(messages, max_tokens=4, **GREEDY).result()
    assert again.tokens == reply.tokens == fresh(model, messages, max_tokens=4)


# -- a full context


def test_the_oldest_turns_go(model: LlamaModel, eyes: FakeEyes) -> None:
    dropped: list[int] = []
    session = new_session(model, eyes, n_ctx=256, on_drop=dropped.append)
    conversation = [system("You count.")]
    lost = []
    for i in range(12):
        conversation.append(user(image(56, 84, i), text(f"Number {i} of a dozen, please")))
        reply = session.generate(conversation, max_tokens=8, **GREEDY).result()
        conversation.append(assistant("Well then."))
        lost.append(reply.dropped_messages)
        tokens = [u for u in session._units if isinstance(u, int)]
        said = model.vocab.detokenize(tokens)
        assert "<|im_start|>system\nYou count.<|im_end|>" in said  # never the system prompt
        assert f"Number {i} of" in said
        assert (
            said.count("<|im_start|>user") == said.count("<|vision_start|>") == said.count("<|vision_end|>")
        )
        assert n_cells(session._units) <= 256
    assert lost == sorted(lost) and lost[-1] > 0 and lost[-1] % 2 == 0
    assert dropped == sorted(set(lost) - {0})  # told once for each time, not every turn
    assert len(dropped) < 6  # more goes than must, so that not every turn starts over
    session.close()


def test_after_dropping_a_turn_is_cheap_again(model: LlamaModel, eyes: FakeEyes) -> None:
    session = new_session(model, eyes, n_ctx=256)
    conversation: list[Message] = []
    costs = []
    for i in range(14):
        conversation.append(user(f"Question number {i}, of many questions that there are"))
        reply = session.generate(conversation, max_tokens=4, **GREEDY).result()
        conversation.append(reply.message)
        costs.append((reply.dropped_messages, reply.usage.prefilled_tokens))
    changed = {i for i in range(1, 14) if costs[i][0] != costs[i - 1][0]}
    assert changed
    assert all(cost < 40 for i, (_, cost) in enumerate(costs) if i and i not in changed)
    session.close()


def test_undoing_brings_dropped_turns_back(model: LlamaModel, eyes: FakeEyes) -> None:
    session = new_session(model, eyes, n_ctx=256)
    conversation = [message for i in range(10) for message in (user(f"Question {i} " * 8), assistant("Yes"))]
    long = session.generate([*conversation, user("?")], max_tokens=2, **GREEDY).result()
    assert long.dropped_messages > 0
    short = session.generate([*conversation[:2], user("?")], max_tokens=2, **GREEDY).result()
    assert short.dropped_messages == 0
    session.close()


def test_a_picture_that_cannot_fit_says_what_would(session: Session, eyes: FakeEyes) -> None:
    with pytest.raises(ContextFullError, match="1 picture of 1024 tokens") as caught:
        session.generate([user(image(896, 896), text("?"))], max_tokens=64).result()
    hint = caught.value.hint or ""
    assert "--max-pixels" in hint and "--ctx-size" in hint
    pixels = int(hint.split("--max-pixels ")[1].split()[0])
    side = int((pixels**0.5) // 28 * 28)
    assert eyes.encoded == []  # said before the work
    session.generate([user(image(side, side), text("?"))], max_tokens=64, **GREEDY).result()


def test_a_text_that_cannot_fit(session: Session) -> None:
    with pytest.raises(ContextFullError, match="the message takes") as caught:
        session.generate([user("word " * 2000)]).result()
    assert caught.value.n_ctx == 1024 and caught.value.n_tokens > 1024
    assert "pixels" not in (caught.value.hint or "")


def test_a_reply_ends_where_the_context_does(model: LlamaModel, eyes: FakeEyes) -> None:
    session = new_session(model, eyes, n_ctx=256)
    reply = session.generate(
        [user("x")], max_tokens=10_000, temperature=2.0, seed=1, grammar='root ::= "a" root'
    ).result()
    assert reply.finish_reason == "length"
    assert reply.usage.prompt_tokens + reply.usage.completion_tokens == 256 + 1
    session.close()


# -- trouble on the way


def test_an_unreadable_picture_leaves_the_session_usable(session: Session, model: LlamaModel) -> None:
    messages = [user(image(56, 56), text("?"))]
    session.generate(messages, max_tokens=2, **GREEDY).result()
    with pytest.raises(ImageError, match=r"gone\.jpg"):
        session.generate([user({"type": "image", "image": "gone.jpg"})]).result()
    reply = session.generate(messages, max_tokens=6, **GREEDY).result()
    assert reply.tokens == fresh(model, messages, max_tokens=6)


def test_no_encoder(model: LlamaModel) -> None:
    context = Context(model, n_ctx=256)
    session = Session(context, EmbeddingStore(None), ChatTemplate(model.vocab))
    assert session.generate([user("x")], max_tokens=2).result().usage.completion_tokens <= 2
    with pytest.raises(InputError, match="without an image encoder") as caught:
        session.generate([user(image(56, 56))]).result()
    assert "--mmproj" in (caught.value.hint or "")
    session.close()


def test_clear_forgets_but_keeps_embeddings(session: Session, eyes: FakeEyes) -> None:
    messages = [user(image(56, 56), text("?"))]
    session.generate(messages, max_tokens=2, **GREEDY).result()
    session.clear()
    assert session.n_cached == 0
    reply = session.generate(messages, max_tokens=2, **GREEDY).result()
    assert reply.usage.cached_tokens == 0 and reply.usage.images_encoded == 0
    assert eyes.encoded == [1]


# -- what a source is known by


def test_source_keys(tmp_path: Path) -> None:
    array = np.arange(2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 3)
    picture = Image.fromarray(array)
    file = tmp_path / "a.png"
    picture.save(file)
    sources: list[Any] = [
        array, array + 1, array.reshape(1, 4, 3), picture, picture.convert("L"), file, file.read_bytes(),
        [array, array], [array], str(tmp_path),
    ]  # fmt: skip
    keys = [source_key(VisionChunk("image", source)) for source in sources]
    assert len(set(keys)) == len(keys)
    assert keys == [source_key(VisionChunk("image", source)) for source in sources]
    assert source_key(VisionChunk("image", str(file))) == source_key(VisionChunk("image", file))
    assert source_key(VisionChunk("video", file)) != source_key(VisionChunk("image", file))
    assert source_key(VisionChunk("image", file, (("max_pixels", 784),))) != keys[5]
    before = source_key(VisionChunk("image", file))
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(file)
    assert source_key(VisionChunk("image", file)) != before
    assert source_key(VisionChunk("image", tmp_path / "missing.png"))


def test_a_store_stays_within_its_bound(eyes: FakeEyes) -> None:
    store = EmbeddingStore(eyes, max_bytes=3 * 4 * 4 * eyes.n_embd)
    units = [store.unit(VisionChunk("image", np.full((56, 56, 3), i, np.uint8))) for i in range(6)]
    store.encode(units)
    assert eyes.encoded == [6]
    store.trim()
    store.encode([units[-1], units[-2]])
    assert eyes.encoded == [6]
    store.unit(VisionChunk("image", np.full((56, 56, 3), 0, np.uint8)))
    store.encode([units[0]])
    assert eyes.encoded == [6, 1] and eyes.prepared == 7


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix(a: list[int], b: list[int]) -> None:
    n = common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]
