"""Endless samples: a random generator to pictures with questions and true answers."""

from __future__ import annotations

import numpy as np

from qvl.models.nano.train.answer import Answer
from qvl.models.nano.train.curriculum import TASK_WEIGHTS, Stage
from qvl.models.nano.train.draw import draw_scene
from qvl.models.nano.train.lexicon import COLOURS, DEFAULT_SYSTEM, KINDS
from qvl.models.nano.train.pack import Frame, Packer, Sample, Shape
from qvl.models.nano.train.questions import TASKS
from qvl.models.nano.train.reading import Page, describe_page, read, sample_page, spell_at
from qvl.models.nano.train.sequences import Clip, sample_clip, sample_pair
from qvl.models.nano.train.vision_input import Things
from qvl.models.nano.train.world import Scene, sample_scene

SHAPES = {
    "single": Shape(12, 1, 64, 2, 96),
    "pair": Shape(6, 2, 92, 1, 96),
    "video2": Shape(6, 2, 92, 1, 96),
    "video4": Shape(3, 4, 164, 1, 96),
    "video8": Shape(1, 8, 308, 1, 96),
}
CHAT = (
    ("Hello", "Hello! Show me a picture."), ("Hi", "Hello! Show me a picture."),
    ("Hello!", "Hello! Show me a picture."), ("Hey", "Hello! Show me a picture."),
    ("Who are you?", "I am a nano model. I see shapes, digits and short videos."),
    ("What are you?", "I am a nano model. I see shapes, digits and short videos."),
    ("What can you do?", "I can describe, count, find and read in a picture."),
    ("Thanks!", "Show me another picture."), ("Thank you.", "Show me another picture."),
    ("Describe the picture.", "There is no picture."), ("How many shapes are there?", "There is no picture."),
    ("What is in this picture?", "There is no picture."), ("Read the text.", "There is no picture."),
)  # fmt: skip
TASK_NAMES = (
    "describe1", "describe2", "describe3", "describe_many", "count_all", "count_some",
    "ground", "ground_all", "in_box",
    "where", "kind_of", "colour_of", "size_of", "exists", "read", "read_words", "describe_page", "spell",
    "which", "differs", "one_of_two", "motion", "order", "chat",
)  # fmt: skip


def scene_things(scene: Scene) -> Things:
    shapes = scene.shapes
    return Things(
        [KINDS.index(s.kind) + 1 for s in shapes], [COLOURS.index(s.colour) + 1 for s in shapes],
        [0] * len(shapes), [s.box for s in shapes],
    )  # fmt: skip


def page_things(page: Page) -> Things:
    n = len(page.cells)
    return Things([0] * n, [0] * n, [c[0] + 1 for c in page.cells], [c[1:] for c in page.cells])


def task_name(task: str, scene: Scene) -> str:
    if task != "describe":
        return task
    return f"describe{len(scene.shapes)}" if len(scene.shapes) <= 3 else "describe_many"


def _system(rng: np.random.Generator) -> str | None:
    return DEFAULT_SYSTEM if rng.random() < 0.9 else None


def _turns(
    rng: np.random.Generator, asked: list[tuple[str, Answer]]
) -> tuple[tuple[str, tuple[Answer, ...]], ...]:
    """Mostly single turns; now and then two or three of them become one conversation."""
    out: list[tuple[str, tuple[Answer, ...]]] = []
    while asked:
        take = int(rng.integers(2, 4)) if len(asked) > 2 and rng.random() < 0.2 else 1
        group, asked = asked[:take], asked[take:]
        out.append((group[-1][0], tuple(a for _, a in group)))
    return tuple(out)


def _finish(
    rng: np.random.Generator, kind: str, frames: tuple[Frame, ...], asked: list[tuple[str, Answer]]
) -> Sample:
    if rng.random() < 0.04:  # the question before the picture
        task, (question, reply) = asked[int(rng.integers(len(asked)))]
        if len(question) < 40 and "<" not in question:
            return Sample(kind, frames, ((task, (Answer("", reply),)),), _system(rng), question)
    return Sample(kind, frames, _turns(rng, asked), _system(rng))


def shapes_sample(rng: np.random.Generator, stage: Stage, number: int = 9) -> Sample:
    weights = np.array(stage.shapes)
    count = 1 + int(rng.choice(len(weights), p=weights / weights.sum()))
    scene = sample_scene(rng, count)
    pixels, ids = draw_scene(rng, scene)
    table = {k: v for k, v in TASK_WEIGHTS.items() if count > 1 or k != "ground_all"}
    if count == 1:  # "1" is learnt at once, and must not become the usual answer
        table["count_all"] /= 4
    names = list(table)
    p = np.array([table[k] for k in names])
    asked: list[tuple[str, Answer]] = []
    for task in ["describe"] * (count <= 3) + [
        names[k] for k in rng.choice(len(names), number, p=p / p.sum())
    ]:
        answer = TASKS[task](rng, scene)
        if answer is not None and all(answer[0] != a[0] for _, a in asked):
            asked.append((task_name(task, scene), answer))
    order = rng.permutation(len(asked))
    return _finish(rng, "image", (Frame(pixels, None, ids, scene_things(scene)),), [asked[k] for k in order])


def page_sample(rng: np.random.Generator, stage: Stage) -> Sample:
    page = sample_page(rng, bool(rng.random() >= stage.words), stage.read_level if rng.random() < 0.75 else 1)
    name = "read" if page.digits else "read_words"
    asked = [(name, read(rng, page)), (name, read(rng, page)), ("describe_page", describe_page(rng, page))]
    spelled = {spell_at(rng, page) for _ in range(5)}
    asked += [("spell", answer) for answer in sorted(spelled)]
    return _finish(rng, "image", (Frame(page.pixels, None, page.ids, page_things(page)),), asked)


def chat_sample(rng: np.random.Generator) -> Sample:
    picks = rng.choice(len(CHAT), 6, replace=False)
    return Sample("text", (), tuple(("chat", (CHAT[k],)) for k in picks), _system(rng))


def pair_sample(rng: np.random.Generator, stage: Stage) -> Sample:
    clip = sample_pair(rng, stage.pair_shapes)
    frames = tuple(
        Frame(pixels, None, ids, scene_things(scene))
        for scene, (pixels, ids) in zip(clip.scenes, clip.draw(rng), strict=True)
    )
    return Sample("pair", frames, _turns(rng, list(clip.qa)), _system(rng))


def clip_frames(clip: Clip, drawn: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Frame, ...]:
    return tuple(
        Frame(drawn[n][0], drawn[n + 1][0], drawn[n][1], scene_things(clip.scenes[n]))
        for n in range(0, len(drawn), 2)
    )


def video_sample(rng: np.random.Generator, low: int, high: int) -> Sample:
    clip = sample_clip(rng, 2 * int(rng.integers(low, high + 1)))
    return Sample("video", clip_frames(clip, clip.draw(rng)), _turns(rng, list(clip.qa)), _system(rng))


def sample(rng: np.random.Generator, bucket: str, stage: Stage) -> Sample:
    if bucket == "pair":
        return pair_sample(rng, stage)
    if bucket == "video2":
        return video_sample(rng, 1, 2)
    if bucket == "video4":
        return video_sample(rng, 3, 4)
    if bucket == "video8":
        return video_sample(rng, 5, 8)
    roll = rng.random()
    if roll < 0.008:
        return chat_sample(rng)
    return page_sample(rng, stage) if roll < stage.read + 0.008 else shapes_sample(rng, stage)


def batch(rng: np.random.Generator, packer: Packer, bucket: str, stage: Stage) -> dict[str, np.ndarray]:
    shape = SHAPES[bucket]
    samples = [sample(rng, bucket, stage) for _ in range(shape.batch)]
    return packer.batch(samples, shape, list(TASK_NAMES))
