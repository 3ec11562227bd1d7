"""Captions of the float32 tiny model, many at once against one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.clips import write_clip

from qvl.convert import Converted
from qvl.runtime import caption, load
from qvl.runtime.caption.inputs import Item, find_inputs
from qvl.runtime.caption.options import CaptionOptions
from qvl.runtime.caption.record import Record
from qvl.runtime.caption.runner import Runner
from qvl.runtime.caption.setup import open_run
from qvl.runtime.caption.stdout import JsonLines
from qvl.runtime.model import Model

SIZES = [(28, 28), (56, 84), (140, 28), (112, 112), (84, 56), (200, 130), (28, 28), (60, 300), (90, 90)]


@pytest.fixture(scope="module")
def model(tiny_model: Converted) -> Iterator[Model]:
    with load(tiny_model.text, tiny_model.mmproj, device="cpu", kv_type="f32", threads=2) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(5)
    for i, (w, h) in enumerate(SIZES):
        Image.fromarray(random.integers(0, 256, (h, w, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def captions(
    model: Model, folder: Path, *, parallel: int = 1, n_ctx: int | None = None, **options: object
) -> dict[str, Record]:
    chosen = CaptionOptions(**{"max_tokens": 12, **options})  # type: ignore[arg-type]
    items = find_inputs([str(folder)]).items
    runner, captioner = open_run(model, items, chosen, JsonLines(), parallel=parallel, n_ctx=n_ctx)
    with captioner:
        return {Path(record.path).name: record for record in runner.run()}


def texts(records: dict[str, Record]) -> dict[str, str | None]:
    return {name: record.raw or record.caption for name, record in records.items()}


def alone(model: Model, path: Path, prompt: str = "Describe this image.") -> str:
    content = [{"type": "image", "image": str(path)}, {"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": content}]
    return model.generate(messages, max_tokens=12, temperature=0).result().raw.strip()


@pytest.mark.parametrize("parallel", [1, 3, 8])
def test_many_at_once_say_what_one_at_a_time_says(model: Model, pictures: Path, parallel: int) -> None:
    together = captions(model, pictures, parallel=parallel, sampling={"temperature": 0.0})
    expected = {path.name: alone(model, path) for path in sorted(pictures.glob("*.png"))}
    assert texts(together) == expected
    assert len(set(expected.values())) > 5  # the pictures matter


def test_a_small_context_only_takes_longer(model: Model, pictures: Path) -> None:
    options = {"sampling": {"temperature": 0.0}}
    wide = captions(model, pictures, parallel=4, **options)  # type: ignore[arg-type]
    narrow = captions(model, pictures, parallel=4, n_ctx=256, **options)  # type: ignore[arg-type]
    assert texts(wide) == texts(narrow)


def test_a_picture_that_cannot_fit_is_reported_and_the_others_are_captioned(
    model: Model, pictures: Path
) -> None:
    big = pictures.parent / "big"
    big.mkdir(exist_ok=True)
    Image.new("RGB", (800, 800), "red").save(big / "big.png")
    Image.new("RGB", (56, 56), "red").save(big / "small.png")
    records = captions(model, big, parallel=2, n_ctx=256)
    assert "`max_pixels`" in str(records["big.png"].error)
    assert records["small.png"].caption is not None
    area = int(str(records["big.png"].error).split("`max_pixels` ")[1].split()[0])
    assert captions(model, big, parallel=2, n_ctx=256, max_pixels=area)["big.png"].error is None


@pytest.mark.parametrize("parallel", [1, 5])
def test_sampling_depends_on_seed_and_content_only(model: Model, pictures: Path, parallel: int) -> None:
    hot = {"temperature": 1.5, "top_k": 0, "top_p": 1.0}
    first = texts(captions(model, pictures, parallel=parallel, sampling=hot, seed=7))
    renamed = pictures.parent / f"renamed{parallel}"
    renamed.mkdir()
    for i, path in enumerate(sorted(pictures.glob("*.png"))):
        (renamed / f"{9 - i}.png").write_bytes(path.read_bytes())
    second = texts(captions(model, renamed, parallel=3, sampling=hot, seed=7))
    assert {f"{9 - int(name[0])}.png": text for name, text in second.items()} == first
    other = texts(captions(model, pictures, parallel=parallel, sampling=hot, seed=8))
    assert all(other[name] != first[name] for name in first)


def test_samples_share_the_picture_and_differ(model: Model, pictures: Path) -> None:
    hot = {"temperature": 1.5, "top_k": 0, "top_p": 1.0}
    record = captions(model, pictures, parallel=2, sampling=hot, samples=3)["3.png"]
    assert len(set(record.captions)) == 3
    assert record.caption == record.captions[0]
    single = captions(model, pictures, sampling=hot)["3.png"]
    assert single.caption == record.caption


def test_the_prompt_and_its_place_matter(model: Model, pictures: Path) -> None:
    greedy = {"temperature": 0.0}
    plain = captions(model, pictures, parallel=3, sampling=greedy)
    before = captions(model, pictures, parallel=3, sampling=greedy, prompt="See {image} now, {stem}.")
    assert before["3.png"].prompt == "See {image} now, 3."
    messages = [
        {"role": "user", "content": ["See ", {"type": "image", "image": str(pictures / "3.png")}, " now, 3."]}
    ]
    expected = model.generate(messages, max_tokens=12, temperature=0).result().raw.strip()
    assert before["3.png"].caption == expected != plain["3.png"].caption


def test_the_model_goes_on_from_the_start(model: Model, pictures: Path) -> None:
    greedy = {"temperature": 0.0}
    plain = captions(model, pictures, sampling=greedy)["3.png"]
    assert plain.caption is not None
    started = captions(model, pictures, sampling=greedy, start_with="A photo of ")["3.png"]
    assert str(started.caption).startswith("A photo of")
    assert plain.prompt_tokens is not None and started.prompt_tokens is not None
    assert started.prompt_tokens > plain.prompt_tokens


def test_a_schema_is_kept_by_all(model: Model, pictures: Path, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2, 3]}}, "required": ["n"]}
    (tmp_path / "s.json").write_text(json.dumps(schema))
    records = captions(model, pictures, parallel=4, schema=tmp_path / "s.json", max_tokens=80)
    assert len(records) == len(SIZES)
    for record in records.values():
        assert json.loads(str(record.caption))["n"] in (1, 2, 3)


def test_json_that_is_cut_is_a_failure(model: Model, pictures: Path, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
    (tmp_path / "s.json").write_text(json.dumps(schema))
    records = list(caption(model, pictures, schema=tmp_path / "s.json", max_tokens=3))
    assert {record.error for record in records} == {
        f"{record.path}: no whole JSON in 3 tokens: raise `max_tokens`" for record in records
    }
    assert not any(record.caption for record in records)


def test_videos_are_captioned_as_videos(model: Model, tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.avi", [np.full((56, 56, 3), 30 * i, np.uint8) for i in range(8)], fps=4)
    record = captions(model, tmp_path, sampling={"temperature": 0.0})["clip.avi"]
    content = [
        {"type": "video", "video": str(tmp_path / "clip.avi")},
        {"type": "text", "text": "Describe this image."},
    ]
    expected = model.generate([{"role": "user", "content": content}], max_tokens=12, temperature=0).result()
    assert record.caption == expected.raw.strip()
    assert record.prompt_tokens == expected.usage.prompt_tokens


def test_runs_that_follow_each_other_see_their_own_pictures(model: Model, pictures: Path) -> None:
    """On a cluster, a model stays loaded from one block of pictures to the next."""
    options = CaptionOptions(max_tokens=12, sampling={"temperature": 0.0})
    first, captioner = open_run(model, [], options, JsonLines(), parallel=2)
    expected = {path.name: alone(model, path) for path in sorted(pictures.glob("*.png"))}
    found = {}
    with captioner:
        for path in sorted(pictures.glob("*.png")):
            plan = replace(first.plan, items=[Item(str(path))])
            (record,) = Runner(plan, captioner, JsonLines()).run()
            found[path.name] = record.caption
    assert found == expected
