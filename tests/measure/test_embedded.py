"""What quantization costs the embedded model, which is trained, on pictures that it has not seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from numpy.typing import NDArray
from support.reordered import Reordered, reorder

from qvl.convert import Converted, convert
from qvl.models.nano.train import questions as ask
from qvl.models.nano.train.draw import draw_scene
from qvl.models.nano.train.world import sample_scene
from qvl.runtime.find import ModelFiles
from qvl.runtime.ggml.imatrix import Imatrix, read_imatrix
from qvl.runtime.measure.calibrate import Plan, calibrate
from qvl.runtime.measure.decoder import Vectors
from qvl.runtime.measure.divergence import Tally, VisionTally
from qvl.runtime.measure.pair import Pair, Question
from qvl.runtime.measure.samples import Sample

pytestmark = pytest.mark.slow

CHECKPOINT = Path(__file__).resolve().parents[2] / "models" / "nano"
N_CTX = 512
TASKS = ("describe", "count_all", "ground", "where")
# Seeds of the pictures to calibrate on, of those to hold matrices against, and of those to answer about.
CALIBRATION, HELD_OUT, ASKED = 1, 2, 3
ORDERS = range(10)
SHOWN = 48


def drawn(n: int, seed: int) -> Iterator[Sample]:
    """Pictures of one to three shapes, each with a question."""
    rng = np.random.default_rng(seed)
    made = 0
    while made < n:
        scene = sample_scene(rng, int(rng.integers(1, 4)))
        pixels, _ = draw_scene(rng, scene)
        asked = ask.TASKS[TASKS[made % len(TASKS)]](rng, scene)
        if asked is not None:
            made += 1
            yield Sample(asked[0], pixels)


@dataclass(frozen=True)
class Answered:
    """What float32 makes of a question."""

    question: Question
    vectors: Vectors
    reply: list[int]
    logits: NDArray[np.float32]


def opened(made: Converted) -> Pair:
    return Pair(ModelFiles(made.text, made.mmproj), n_ctx=N_CTX)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with opened(convert(CHECKPOINT, tmp_path_factory.mktemp("f32"), "f32", "f32")) as pair:
        yield pair


@pytest.fixture(scope="module")
def answered(reference: Pair) -> list[Answered]:
    made = []
    for sample in drawn(128, ASKED):
        question = reference.read(sample)
        vectors = reference.encode(question)
        reply = reference.greedy(question.units, vectors, 32)
        logits = reference.logits(question.units, vectors, reply)
        made.append(Answered(question, vectors, reply, logits))
    return made


def test_q8_0_says_what_float32_says(answered: list[Answered], tmp_path: Path) -> None:
    """Over some 1500 tokens: a share of 99% is then known to half a percent."""
    said, seen = Tally(), VisionTally()
    with opened(convert(CHECKPOINT, tmp_path, "q8_0", "q8_0")) as pair:
        for a in answered:
            own = pair.encode(a.question)
            said.add(a.logits, pair.logits(a.question.units, own, a.reply), a.reply)
            for key, vectors in own.items():
                seen.add(a.vectors[key], vectors)
    found = said.result()
    assert found.n_tokens > 1000
    assert found.top1 >= 0.99
    assert found.kl_mean < 1e-3
    assert seen.result().relative < 0.01


@pytest.fixture(scope="module")
def statistics(reference: Pair, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Imatrix]:
    """An importance matrix, and what other pictures would have given."""
    folder = tmp_path_factory.mktemp("imatrix")
    plan = Plan(tuple(drawn(40, CALIBRATION)), reply_tokens=24)
    calibrate(reference.files, plan, folder / "i.gguf", n_ctx=N_CTX)
    held_out = Plan(tuple(drawn(32, HELD_OUT)), reply_tokens=24)
    return folder / "i.gguf", calibrate(reference.files, held_out, folder / "h.gguf", n_ctx=N_CTX)


def test_an_importance_matrix_lowers_errors_on_other_pictures(
    reference: Pair, statistics: tuple[Path, Imatrix], tmp_path: Path
) -> None:
    """Of what comes out of every matrix, in both files: the square of the error, for inputs as they occur."""
    matrix, held_out = statistics
    plain = convert(CHECKPOINT, tmp_path / "plain", "q4_k_m", "q4_k")
    weighed = convert(CHECKPOINT, tmp_path / "weighed", "q4_k_m", "q4_k", matrix)
    for file in ("text", "mmproj"):
        true, a, b = (dequantized(getattr(m, file)) for m in (reference.files, plain, weighed))
        ratios = {}
        for name, importance in held_out.importance().items():
            if name in true:
                errors = [np.square(w[name] - true[name]) @ importance.astype(np.float64) for w in (a, b)]
                ratios[name] = errors[1].sum() / errors[0].sum()
        assert len(ratios) in (4 * 7, 5 * 6 + 2)
        assert max(ratios.values()) < 1, max(ratios, key=lambda name: ratios[name])
        assert np.mean(list(ratios.values())) < 0.95


def test_the_order_of_channels_changes_nothing_else(
    answered: list[Answered], statistics: tuple[Path, Imatrix], tmp_path: Path
) -> None:
    """What the next test rests on."""
    copy = reorder(CHECKPOINT, statistics[0], tmp_path, 0)
    said = Tally()
    with opened(convert(copy.checkpoint, tmp_path / "f32", "f32", "f32")) as pair:
        for a in answered[:4]:
            said.add(a.logits, pair.logits(a.question.units, pair.encode(a.question), a.reply), a.reply)
    assert said.result().kl_max < 1e-6
    moved, before = (read_imatrix(path).importance() for path in (copy.matrix, statistics[0]))
    assert np.array_equal(moved["blk.1.attn_q.weight"], before["blk.1.attn_q.weight"][copy.hidden])


def test_an_importance_matrix_lowers_what_a_four_bit_encoder_costs(
    reference: Pair, answered: list[Answered], statistics: tuple[Path, Imatrix], tmp_path: Path
) -> None:
    """KL of what a float32 decoder says of pictures that q4_k has seen.

    Of one file KL is a matter of luck: with other weights sharing blocks it is easily half as much again.
    So it is the mean over ORDERS: of the logarithm, for no order to outweigh the others.

    Of a decoder as q4_k_m this is not held, because it is not so: over four states of the training the ratio
    was 0.6, 0.8, 1.5 and 1.0, although every matrix alone gives smaller errors (above). The search with
    weights, even with all of them alike, was 1.2 by itself.
    """
    ratios = []
    for seed in ORDERS:
        folder = tmp_path / str(seed)
        copy = reorder(CHECKPOINT, statistics[0], folder, seed)
        plain, weighed = (
            kl_of_vision(
                reference, convert(copy.checkpoint, folder, "f32", "q4_k", m, force=True), answered, copy
            )
            for m in (None, copy.matrix)
        )
        ratios.append(weighed / plain)
    assert np.log(ratios).mean() < 0, ratios


def kl_of_vision(reference: Pair, made: Converted, answered: Sequence[Answered], order: Reordered) -> float:
    tally, old_places = Tally(), np.argsort(order.hidden)
    with opened(made) as pair:
        for a in answered[:SHOWN]:
            seen = {
                key: np.ascontiguousarray(vectors[:, old_places])
                for key, vectors in pair.encode(a.question).items()
            }
            tally.add(a.logits, reference.logits(a.question.units, seen, a.reply), a.reply)
    return tally.result().kl_mean


def dequantized(path: Path) -> dict[str, NDArray[np.float64]]:
    return {
        t.name: dequantize(t.data, t.tensor_type).astype(np.float64)
        for t in gguf.GGUFReader(path).tensors
        if len(t.shape) == 2
    }
