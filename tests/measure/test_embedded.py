"""What quantization costs the embedded model, which is trained, on pictures that it has not seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from numpy.typing import NDArray

from qvl.convert import Converted, convert
from qvl.models.nano.train import questions as ask
from qvl.models.nano.train.draw import draw_scene
from qvl.models.nano.train.world import sample_scene
from qvl.runtime.find import ModelFiles
from qvl.runtime.ggml.imatrix import Imatrix
from qvl.runtime.measure.calibrate import Plan, calibrate
from qvl.runtime.measure.pair import Pair
from qvl.runtime.measure.samples import Sample
from qvl.runtime.measure.verify import Report, verify

pytestmark = pytest.mark.slow

CHECKPOINT = Path(__file__).resolve().parents[2] / "models" / "nano"
N_CTX = 512
TASKS = ("describe", "count_all", "ground", "where")


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


def files(made: Converted) -> ModelFiles:
    return ModelFiles(made.text, made.mmproj)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    made = convert(CHECKPOINT, tmp_path_factory.mktemp("f32"), "f32", "f32")
    with Pair(files(made), n_ctx=N_CTX) as pair:
        yield pair


def lost(reference: Pair, made: Converted, n: int = 48) -> Report:
    with Pair(files(made), n_ctx=N_CTX) as pair:
        return verify(pair, reference, tuple(drawn(n, 3)), attribute=False, max_tokens=32)


def test_q8_0_says_what_float32_says(reference: Pair, tmp_path: Path) -> None:
    found = lost(reference, convert(CHECKPOINT, tmp_path, "q8_0", "q8_0"))
    assert found.together.top1 >= 0.99
    assert found.together.kl_mean < 1e-3
    assert found.vision is not None
    assert found.vision.relative < 0.01


@pytest.fixture(scope="module")
def statistics(reference: Pair, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Imatrix]:
    """An importance matrix, and what other pictures would have given."""
    folder = tmp_path_factory.mktemp("imatrix")
    calibrate(reference.files, Plan(tuple(drawn(80, 1)), reply_tokens=24), folder / "i.gguf", n_ctx=N_CTX)
    held_out = Plan(tuple(drawn(32, 2)), reply_tokens=24)
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


@pytest.mark.parametrize("types", [("q4_k_m", "f32"), ("f32", "q4_k")], ids=["decoder", "vision"])
def test_an_importance_matrix_lowers_what_four_bits_cost(
    reference: Pair, statistics: tuple[Path, Imatrix], tmp_path: Path, types: tuple[str, str]
) -> None:
    """Of each half, with the other in float32. On few pictures KL is too uneven to compare."""
    found = [
        lost(reference, convert(CHECKPOINT, tmp_path / name, *types, matrix), n=96)
        for name, matrix in (("plain", None), ("weighed", statistics[0]))
    ]
    assert found[1].together.kl_mean < found[0].together.kl_mean


def dequantized(path: Path) -> dict[str, NDArray[np.float64]]:
    return {
        t.name: dequantize(t.data, t.tensor_type).astype(np.float64)
        for t in gguf.GGUFReader(path).tensors
        if len(t.shape) == 2
    }
