"""Frames and pictures in another order get another answer, the true one: positions matter.

Each count is of fresh draws where the answer is true for the order drawn and for the order reversed, and the
two differ. Whoever does not see the order says the same twice and scores 0; LEAST is far above what guessing
would give. With the clip's times all the same, the trained model itself falls below it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qvl.models.nano.train.questions import describe_text
from qvl.models.nano.train.sequences import Clip, sample_clip, sample_pair
from qvl.runtime import load
from qvl.runtime.model import Model
from qvl.runtime.positions import VisionSpan

SEED = 41_000_000  # neither training's nor the evaluation's
DRAWS = 24
LEAST = 12
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}

Asked = tuple[str, str, str]  # a question, its answer, and the answer when the order is reversed
Pictures = list[NDArray[np.uint8]]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    """The embedded model."""
    with load(device="cpu", n_ctx=1024) as opened:
        yield opened


def draws(sample: Callable[[np.random.Generator], Clip], task: str) -> Iterator[tuple[Clip, Pictures]]:
    """DRAWS clips or pairs about which `task` can be asked, with their pictures."""
    rng = np.random.default_rng((SEED, len(task)))
    made = 0
    while made < DRAWS:
        clip = sample(rng)
        if clip.qa[0][0] == task:
            made += 1
            yield clip, [pixels for pixels, _ in clip.draw(rng)]


def short_clip(rng: np.random.Generator) -> Clip:
    return sample_clip(rng, 2 * int(rng.integers(2, 5)))


def video(frames: Pictures) -> list[dict[str, Any]]:
    return [{"type": "video", "video": frames}]


def images(pictures: Pictures) -> list[dict[str, Any]]:
    return [{"type": "image", "image": picture} for picture in pictures]


def answer(model: Model, media: list[dict[str, Any]], question: str) -> str:
    messages = [{"role": "user", "content": [*media, {"type": "text", "text": question}]}]
    return model.generate(messages, max_tokens=60, temperature=0).result().raw.strip()


def motion(clip: Clip) -> Asked:
    said = clip.qa[0][1][1]
    word = said.rstrip(".").split()[-1]
    return "What moves where?", said, said.replace(word, OPPOSITE[word])


def first(clip: Clip) -> Asked:
    answers = dict(answer for _, answer in clip.qa)
    return "What appears first?", answers["What appears first?"], answers["What appears last?"]


def which(clip: Clip) -> Asked:
    question, said = clip.qa[0][1]
    return question, said, f"The {'second' if 'first' in said else 'first'} picture."


def second(clip: Clip) -> Asked:
    return "Describe the second picture.", describe_text(clip.scenes[1]), describe_text(clip.scenes[0])


def score(
    model: Model,
    found: Iterator[tuple[Clip, Pictures]],
    asked: Callable[[Clip], Asked],
    media: Callable[[Pictures], list[dict[str, Any]]],
) -> int:
    """Draws of which both answers are true."""
    right = 0
    for clip, pictures in found:
        question, forward, backward = asked(clip)
        if forward != backward and answer(model, media(pictures), question) == forward:
            right += answer(model, media(pictures[::-1]), question) == backward
    return right


def test_a_reversed_motion_goes_the_other_way(model: Model) -> None:
    """Guessing the four directions: 1.5 of 24."""
    assert score(model, draws(short_clip, "motion"), motion, video) >= LEAST


def test_what_appeared_first_appears_last(model: Model) -> None:
    assert score(model, draws(short_clip, "order"), first, video) >= LEAST


def test_the_first_picture_is_then_the_second(model: Model) -> None:
    """Guessing: 6 of 24, and 16 or more once in 49,000 times."""
    assert score(model, draws(lambda rng: sample_pair(rng, 3), "which"), which, images) >= 16


def test_the_second_picture_is_the_one_described(model: Model) -> None:
    """Two whole sentences: never by guessing."""
    assert score(model, draws(lambda rng: sample_pair(rng, 2), "which"), second, images) >= LEAST // 2


def test_without_times_there_is_no_first(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same clips, weights and bar, with every frame at the time of the first."""
    positions = VisionSpan.positions

    def at_once(span: VisionSpan, start: int) -> NDArray[np.int32]:
        made = positions(span, start)
        made[0] = start
        return made

    monkeypatch.setattr(VisionSpan, "positions", at_once)
    assert score(model, draws(short_clip, "order"), first, video) < LEAST // 2
