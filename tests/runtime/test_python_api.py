"""The Python API explains itself: names, signatures, representations, and errors where it cannot be used."""

from __future__ import annotations

import inspect
import json
import pydoc
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import qvl.runtime
from qvl.convert import convert
from qvl.models import embedded
from qvl.runtime import Model, Record, Reply, Session, VisionEmbedding, load
from qvl.runtime.caption import api
from qvl.runtime.caption.options import CaptionOptions
from qvl.runtime.engine.options import DEFAULTS
from qvl.runtime.errors import ImageError, InputError
from qvl.runtime.llama.sampler import Sampling

PICTURE = embedded.path().parent / "samples" / "one.png"
QUESTION = "What is in the picture?"
MESSAGES = [{"role": "user", "content": [{"type": "image", "image": str(PICTURE)}, QUESTION]}]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with load(device="cpu", threads=1) as opened:
        yield opened


def parameters(function: Callable[..., object]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def test_the_package_lists_its_public_names_and_has_them_all() -> None:
    assert dir(qvl.runtime) == sorted(qvl.runtime.__all__)
    assert {"load", "caption", "Model", "Reply", "Record", "Session"} <= set(dir(qvl.runtime))
    for name in dir(qvl.runtime):
        assert callable(getattr(qvl.runtime, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = qvl.runtime.nothing


def test_model_and_session_take_the_same_parameters() -> None:
    expected = parameters(Session.generate)
    assert parameters(Model.generate) == expected
    assert parameters(Model.ask)[3:] == expected[2:]


def test_options_are_spelled_out_and_others_refused(model: Model) -> None:
    shown = {p.name: p.default for p in parameters(Model.generate)[2:]}
    assert shown == dict(DEFAULTS)
    assert "temperature: 'float | None' = None" in pydoc.plain(pydoc.render_doc(Model.ask))
    for call in (model.generate, model.session(n_ctx=64).generate):
        with pytest.raises(TypeError, match="'temprature', expected one of max_tokens, temperature"):
            call(MESSAGES, temprature=0.5)  # type: ignore[call-arg]


def test_captions_take_every_option_by_name_with_its_default() -> None:
    options = {field.name: field for field in fields(CaptionOptions)}
    sampling = {*inspect.signature(Sampling).parameters} - {"seed", "repeat_last_n"}
    run = ["output", "mode", "accept_changes", "parallel", "n_ctx"]
    given = {parameter.name: parameter for parameter in parameters(qvl.runtime.caption)[2:]}
    assert {*given} == {*options, *sampling, *run} - {"sampling"}
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in given.values())
    for name in options.keys() & given.keys():
        assert given[name].default == options[name].default
    assert inspect.signature(qvl.runtime.caption) == inspect.signature(api.caption)


def test_help_shows_what_can_be_called(model: Model) -> None:
    assert "caption(model: 'Model', paths:" in pydoc.render_doc(qvl.runtime.caption, renderer=pydoc.plaintext)
    for name in qvl.runtime.__all__:
        value = getattr(qvl.runtime, name)
        public = [value] if not inspect.isclass(value) else [value, *vars(value).values()]
        for each in public:
            each = getattr(each, "fget", each)
            if callable(each) and not getattr(each, "__name__", "_").startswith("_"):
                assert inspect.getdoc(each), f"{name}: {each} has no docstring"
    assert model.ask.__doc__ and "Raises" in str(qvl.runtime.caption.caption.__doc__)


def test_the_package_of_all_has_its_version_and_its_parts() -> None:
    code = "import qvl; print(qvl.__version__, *dir(qvl)); qvl.runtime.load, qvl.convert.convert, qvl.models"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [version("qvl"), "__version__", "convert", "models", "runtime"]
    assert not hasattr(qvl, "nothing")


def test_a_question_about_a_picture_is_one_line(model: Model) -> None:
    reply = model.ask(PICTURE, QUESTION, temperature=0, max_tokens=12)
    streamed = model.generate(MESSAGES, temperature=0, max_tokens=12).result()
    assert reply.text == streamed.text != ""
    with Image.open(PICTURE) as image:
        assert model.ask(image, QUESTION, temperature=0, max_tokens=12).text == reply.text
    assert len(model.ask(PICTURE, QUESTION, max_tokens=1).tokens) == 1


@pytest.mark.parametrize("question", [None, 5, b"what", ["what"]])
def test_a_question_that_is_no_text_is_refused(model: Model, question: object) -> None:
    with pytest.raises(InputError, match="question is"):
        model.ask(PICTURE, question)  # type: ignore[arg-type]


def test_every_option_reaches_the_reply(model: Model) -> None:
    seen: list[str] = []
    schema = {"type": "object", "properties": {"n": {"enum": [1]}}, "required": ["n"]}
    reply = model.ask(
        PICTURE, QUESTION, temperature=1.5, top_k=9, top_p=0.9, min_p=0.01, repeat_penalty=1.1,
        presence_penalty=0.5, seed=7, schema=schema, number_images=True,
        progress=lambda stage, _: seen.append(stage),
    )  # fmt: skip
    assert json.loads(reply.text) == {"n": 1}
    assert reply.seed == 7 and "prefill" in seen
    assert model.ask(PICTURE, QUESTION, grammar='root ::= "ab"').text == "ab"
    assert model.ask(PICTURE, QUESTION, grammar='root ::= "abc"', stop=["b"]).text == "a"
    for wrong in ({"top_k": "x"}, {"top_p": 2}, {"min_p": -1}, {"repeat_penalty": "x"}, {"temperature": -1}):
        with pytest.raises(InputError):
            model.ask(PICTURE, QUESTION, **wrong)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("prompt", 5), ("prompt", "a {nothing}"), ("system", b"x"), ("output", 5), ("mode", "over"),
        ("mode", None), ("mode", "append"), ("parallel", "auto"), ("parallel", 0), ("n_ctx", 1.5),
        ("max_tokens", 0), ("max_tokens", "9"), ("samples", None), ("temperature", "hot"), ("top_k", 0.5),
        ("top_p", 2), ("min_p", -1), ("repeat_penalty", 0), ("seed", -1), ("seed", "x"), ("schema", 5),
        ("schema", "{"), ("schema", {"type": "nothing"}), ("schema", "gone.json"), ("variables", 5),
        ("variables", "gone.csv"), ("prefix", None), ("suffix", 5), ("triggers", "sks"), ("triggers", [5]),
        ("start_with", 5), ("min_pixels", 0), ("max_pixels", "x"), ("image_detail", "most"),
    ],
)  # fmt: skip
def test_an_option_of_captions_that_cannot_be_used_is_an_error_at_once(
    model: Model, name: str, wrong: object
) -> None:
    with pytest.raises(
        InputError, match="trigger" if name == "triggers" else r"gone\." if "gone." in str(wrong) else name
    ):
        qvl.runtime.caption(model, PICTURE, **{name: wrong})


@pytest.mark.parametrize("paths", [5, None, [], [None], [b"a.png"], {"a.png": 1}, "no*.png", ["a\0b"]])
def test_paths_that_are_none_are_an_error_at_once(model: Model, paths: Any) -> None:
    if paths == ["a\0b"]:
        [record] = qvl.runtime.caption(model, paths)
        assert record.failed
        return
    with pytest.raises(InputError):
        qvl.runtime.caption(model, paths)
    with pytest.raises(InputError, match="expected a Model"):
        qvl.runtime.caption("a.gguf", PICTURE)


def test_options_of_captions_reach_the_model(model: Model, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1]}}, "required": ["n"]}
    (tmp_path / "s.json").write_text(json.dumps(schema))
    (tmp_path / "v.csv").write_text("name,what\none.png,star\n")
    for given in (schema, json.dumps(schema), tmp_path / "s.json", str(tmp_path / "s.json")):
        [record] = qvl.runtime.caption(model, [PICTURE], schema=given)
        assert json.loads(str(record.caption)) == {"n": 1}
    [record] = qvl.runtime.caption(
        model, str(PICTURE), prompt="Find the {what}.", variables=str(tmp_path / "v.csv"), triggers=["sks"],
        prefix="<", suffix=">", samples=2, temperature=1.5, top_k=50, top_p=0.9, min_p=0.01,
        repeat_penalty=1.1, seed=3, max_tokens=4, parallel=2, n_ctx=1024, system="Be brief.",
        image_detail="low", min_pixels=3136,
    )  # fmt: skip
    assert record.prompt == "Find the star." and len(record.captions) == 2
    assert str(record.caption).startswith("sks, <") and str(record.caption).endswith(">")


def test_representations_are_short_and_print_no_arrays(model: Model) -> None:
    assert repr(model).startswith("Model('") and "n_ctx=8192" in repr(model) and ".gguf" in repr(model)
    embedding = VisionEmbedding(np.zeros((6, 32), np.float32), (1, 4, 6))
    assert repr(embedding) == "VisionEmbedding(6 tokens of 32 values, grid_thw=(1, 4, 6))"
    assert repr(Reply("A star.", (1, 2), "stop")) == "Reply('A star.', 2 tokens, 'stop')"
    assert repr(Record("a.png", "A star.", sha256="0" * 64)) == "Record('a.png', caption='A star.')"
    assert repr(Record("a.png", error="no picture")) == "Record('a.png', error='no picture')"
    session = model.session(n_ctx=512)
    stream = session.generate(MESSAGES, max_tokens=1)
    assert (repr(session), repr(stream)) == ("Session(0 of 512 tokens in use)", "Stream(going on)")
    stream.result()
    assert repr(session) != "Session(0 of 512 tokens in use)" and repr(stream).startswith("Stream(Reply(")
    assert repr(model.text) == "LlamaModel('nano-Q8_0.gguf', 'CPU')"
    assert repr(model.vision).startswith("VisionEncoder('mmproj-nano-Q8_0.gguf', 'CPU'")
    assert repr(model.context(n_ctx=64)) == "Context('nano-Q8_0.gguf', n_ctx=256, n_seq_max=1)"
    long = "word " * 1000
    for value in (Reply(long, (1,) * 1000, "length"), Record("a.png", long), Record("a.png", error=long)):
        assert len(repr(value)) < 200


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("precision", "x"), ("optimize", None), ("n_gpu_layers", "x"), ("n_gpu_layers", -2), ("progress", 5),
        ("ahead", 5), ("cache", "x"), ("device", 5), ("kv_type", 5), ("threads", 0), ("n_ctx", True),
    ],
)  # fmt: skip
def test_an_argument_of_load_that_cannot_be_used_is_named(name: str, wrong: object) -> None:
    with pytest.raises(InputError, match="KV type" if name == "kv_type" else f"{name} is {wrong!r}"):
        load(**{"n_ctx": 64, name: wrong}).session()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("src", 5), ("out_dir", None), ("text_type", 5), ("vision_type", None), ("imatrix", 5),
        ("progress", 5), ("threads", "x"), ("threads", 0), ("name", 5), ("tensor_types", "a=q8_0"),
        ("tensor_types", 5), ("tensor_types", [5]), ("token_embedding_type", 5), ("output_type", 5),
        ("revision", 5),
    ],
)  # fmt: skip
def test_an_argument_of_convert_that_cannot_be_used_is_named(
    tiny_checkpoint: Path, tmp_path: Path, name: str, wrong: object
) -> None:
    with pytest.raises(InputError, match="tensor type" if wrong == [5] else name):
        convert(**{"src": tiny_checkpoint, "out_dir": tmp_path, name: wrong})  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_pictures_and_boxes_of_another_form_are_named(model: Model) -> None:
    for images in (str(PICTURE), PICTURE, b"x", None, 5):
        with pytest.raises(InputError, match=r"images are .*, expected a list of pictures"):
            model.vision.encode(images)  # type: ignore[arg-type]
    assert len(model.vision.encode(path for path in [PICTURE])) == 1  # type: ignore[arg-type]
    for picture in (5, [PICTURE], object()):
        with pytest.raises(ImageError, match=r"a picture is .*, expected a path, bytes, a PIL image or"):
            model.ask(picture, QUESTION)  # type: ignore[arg-type]
    for boxes in (
        "x",
        [5],
        [{}],
        [{"box": [1, 2, 3]}],
        [{"box": "abcd"}],
        [{"quad": 5}],
        {"box": [1, 2, 3, 4]},
    ):
        with pytest.raises(InputError, match=r"box(es)? (is|are)"):
            qvl.runtime.draw(PICTURE, boxes)  # type: ignore[arg-type]
