"""What a turn costs in tokens and pictures, and that its result is the same as from nothing."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.chatml import assistant, image, system, text, user
from support.sessions import GREEDY, RULES, FakeBackend, fresh, held, new_session

from qvl.runtime.engine.session import Session
from qvl.runtime.engine.store import EmbeddingStore
from qvl.runtime.engine.units import VisionUnit, n_cells, n_positions
from qvl.runtime.errors import Cancelled, ImageError, InputError
from qvl.runtime.llama.context import Context
from qvl.runtime.llama.model import LlamaModel
from qvl.runtime.prompt.chatml import ChatTemplate
from qvl.runtime.prompt.messages import Message


def test_a_turn_costs_its_own_tokens(session: Session, backend: FakeBackend) -> None:
    conversation = [user(image(140, 196), text("What is this?"))]
    first = session.generate(conversation, max_tokens=8, **GREEDY).result()
    assert first.usage.images_encoded == 1 and first.usage.cached_tokens == 0
    assert first.usage.image_tokens == 5 * 7
    conversation += [first.message, user("And that?")]
    second = session.generate(conversation, max_tokens=8, **GREEDY).result()
    vocab = session.engine._vocab
    # "<|im_end|>", "\n", "<|im_start|>", "user\nAnd that?", "<|im_end|>", "\n", "<|im_start|>", "assistant\n"
    own = 6 + len(vocab.tokenize("user\nAnd that?")) + len(vocab.tokenize("assistant\n"))
    # the reply's last token was sampled, not decoded
    assert second.usage.prefilled_tokens == own + 1
    assert second.usage.images_encoded == 0 and second.usage.cached_tokens > 35
    assert backend.encoded == [1] and backend.prepared == 1


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
        assert session.n_cached == n_cells(held(session))
        assert session.engine._context.last_position() == n_positions(held(session)) - 1


def test_editing_rewinds(session: Session, backend: FakeBackend) -> None:
    opening = user(image(140, 140), text("What is this?"))
    session.generate([opening, assistant("A cat."), user("Which colour?")], max_tokens=4, **GREEDY).result()
    edited = session.generate(
        [opening, assistant("A cat."), user("Which size?")], max_tokens=4, **GREEDY
    ).result()
    assert edited.usage.cached_tokens > 25 and edited.usage.images_encoded == 0
    undone = session.generate([opening], max_tokens=4, **GREEDY).result()
    assert undone.usage.prefilled_tokens < 10
    assert backend.encoded == [1]


def test_a_picture_twice_is_encoded_once(session: Session, backend: FakeBackend) -> None:
    picture = image(56, 56)
    reply = session.generate([user(picture, text("and"), picture)], max_tokens=2, **GREEDY).result()
    assert reply.usage.images_encoded == 1 and reply.usage.image_tokens == 8
    assert backend.encoded == [1]


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


def test_reading_ahead(session: Session, model: LlamaModel, backend: FakeBackend) -> None:
    picture = image(140, 196)
    assert session.prefill([user(picture)]) > 35
    assert session.prefill([user(picture)]) == 0
    messages = [user(picture, text("What is this?"))]
    reply = session.generate(messages, max_tokens=8, **GREEDY).result()
    assert reply.usage.images_encoded == 0 and reply.usage.prefilled_tokens < 12
    assert backend.encoded == [1]
    assert reply.tokens == fresh(model, messages, max_tokens=8)


def test_reading_ahead_called_off(session: Session, model: LlamaModel, backend: FakeBackend) -> None:
    backend.pause, backend.steps = 0.02, 10_000
    cancel = threading.Event()
    caught: list[BaseException] = []

    def read() -> None:
        try:
            session.prefill([user(image(280, 280))], cancel=cancel)
        except Cancelled as e:
            caught.append(e)

    thread = threading.Thread(target=read)
    thread.start()
    while not backend.encoded:
        time.sleep(0.01)
    cancel.set()
    thread.join(60)
    assert caught and not thread.is_alive()
    backend.pause, backend.steps = 0, 10
    messages = [user(image(56, 56), text("?"))]
    assert session.generate(messages, max_tokens=6, **GREEDY).result().tokens == fresh(
        model, messages, max_tokens=6
    )


def test_closing_calls_off_what_is_read_ahead(model: LlamaModel, backend: FakeBackend) -> None:
    backend.pause, backend.steps = 0.02, 10_000
    session = new_session(model, backend)
    caught: list[type[BaseException]] = []

    def read() -> None:
        try:
            session.prefill([user(image(280, 280))])
        except Cancelled as e:
            caught.append(type(e))

    thread = threading.Thread(target=read)
    thread.start()
    while not backend.encoded:
        time.sleep(0.01)
    session.close()
    assert backend.finished == 0  # that would take minutes
    thread.join()
    assert caught == [Cancelled]
    session.close()


def test_asking_waits_for_what_is_read_ahead(session: Session, backend: FakeBackend) -> None:
    backend.pause = 0.01
    picture = image(84, 84)
    thread = threading.Thread(target=lambda: session.prefill([user(picture)]))
    thread.start()
    while not backend.encoded:
        time.sleep(0.001)
    reply = session.generate([user(picture, text("What?"))], max_tokens=2, **GREEDY).result()
    thread.join()
    assert backend.encoded == [1] and reply.usage.images_encoded == 0


def test_a_video_is_one_span_with_rising_time(session: Session, model: LlamaModel) -> None:
    clip = np.zeros((12, 28, 56, 3), np.uint8)
    messages = [user({"type": "video", "video": clip}, text("What happens?"))]
    reply = session.generate(messages, max_tokens=4, **GREEDY).result()
    [unit] = [u for u in held(session) if isinstance(u, VisionUnit)]
    assert (unit.span.t, unit.span.h, unit.span.w) == (6, 1, 2)
    assert reply.usage.image_tokens == 12
    again = session.generate(messages, max_tokens=4, **GREEDY).result()
    assert again.tokens == reply.tokens == fresh(model, messages, max_tokens=4)


def test_an_unreadable_picture_leaves_the_session_usable(session: Session, model: LlamaModel) -> None:
    messages = [user(image(56, 56), text("?"))]
    session.generate(messages, max_tokens=2, **GREEDY).result()
    with pytest.raises(ImageError, match=r"gone\.jpg"):
        session.generate([user({"type": "image", "image": "gone.jpg"})]).result()
    reply = session.generate(messages, max_tokens=6, **GREEDY).result()
    assert reply.tokens == fresh(model, messages, max_tokens=6)


def test_no_encoder(model: LlamaModel) -> None:
    context = Context(model, n_ctx=256)
    session = Session(context, EmbeddingStore(None), ChatTemplate(model.vocab, None, RULES))
    assert session.generate([user("x")], max_tokens=2).result().usage.completion_tokens <= 2
    with pytest.raises(InputError, match="without an image encoder") as caught:
        session.generate([user(image(56, 56))]).result()
    assert "`mmproj`" in (caught.value.hint or "")
    session.close()


def test_clear_forgets_but_keeps_embeddings(session: Session, backend: FakeBackend) -> None:
    messages = [user(image(56, 56), text("?"))]
    session.generate(messages, max_tokens=2, **GREEDY).result()
    session.clear()
    assert session.n_cached == 0
    reply = session.generate(messages, max_tokens=2, **GREEDY).result()
    assert reply.usage.cached_tokens == 0 and reply.usage.images_encoded == 0
    assert backend.encoded == [1]
