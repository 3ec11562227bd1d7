"""Every command on a tiny model of every family, through the command line's own functions."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from gguf import GGUFReader
from support.families import NAMES, write_family
from support.server import asked, running

from qvl.cli.main import run

SAMPLES = Path(__file__).parents[2] / "models" / "samples"
ONE, BEFORE, AFTER = (SAMPLES / f"{name}.png" for name in ("one", "before", "after"))
VIDEO = SAMPLES / "order.avi"
SEES_VIDEOS = [name for name in NAMES if name != "qwen_vl"]
GREEDY = ("--json", "--temp", 0, "-n", 8, "-t", 1)


@dataclass(frozen=True)
class Made:
    """A family's checkpoint, and folders of the pair in several types."""

    name: str
    checkpoint: Path
    small: Path
    q8: Path
    f16: Path


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


def qvl(*args: object) -> Ran:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run([str(arg) for arg in args])
    return Ran(code, out.getvalue(), err.getvalue())


def done(*args: object) -> Ran:
    ran = qvl(*args)
    assert ran.code == 0, ran.err
    return ran


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """A family's models, converted once by `qvl convert`; do not change them."""
    kept: dict[str, Made] = {}

    def of(name: str) -> Made:
        if name not in kept:
            root = tmp_path_factory.mktemp(name)
            checkpoint = write_family(root / "tiny", name)
            kinds = {"small": ("q4_k_m", "q8_0"), "q8": ("q8_0", "q8_0"), "f16": ("f16", "f16")}
            for folder, (text, vision) in kinds.items():
                done("convert", checkpoint, "-o", root / folder, "--type", text, "--vision-type", vision)
            kept[name] = Made(name, checkpoint, *(root / folder for folder in kinds))
        return kept[name]

    return of


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest, made: Callable[[str], Made]) -> Made:
    return made(request.param)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for kind in ("CACHE", "DATA", "STATE"):
        monkeypatch.setenv(f"XDG_{kind}_HOME", str(tmp_path / kind))
    yield


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with two pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in (ONE, BEFORE):
        shutil.copy(path, folder)
    return folder


def test_inspect(model: Made) -> None:
    text, vision = sorted(
        qvl("inspect", model.small, "--json").json, key=lambda file: "clip" in str(file["architecture"])
    )
    own = {"temp": 0.7, "top_k": 20, "top_p": 0.8, "presence_penalty": 1.5}
    if model.name == "qwen_vl":
        own = {"top_k": 0, "top_p": 0.5}
    assert text["sampling"] == pytest.approx(own)
    assert text["tokenizer"] is not None and vision["picture_tokens"]["max"] >= 16
    assert {"Q8_0", "F32"} <= {kind["type"] for kind in vision["tensors"]}
    predicted = qvl("inspect", model.small, "--memory", "--json").json
    width, height = predicted["image_size"]
    side = 32 if model.name.startswith("qwen3") else 28
    assert predicted["image_tokens"] == width * height // side**2 <= 1280
    assert model.name == "qwen_vl" or predicted["image_tokens"] > 1200


def test_chat_about_pictures(model: Made) -> None:
    """One, from the cache the second time, and two; the conversation goes on."""
    first = qvl("chat", "-m", model.small, "--image", ONE, "-p", "What?", *GREEDY).json["usage"]
    assert (first["images_encoded"], first["completion_tokens"]) == (1, 8)
    again = qvl("chat", "-m", model.small, "--image", ONE, "-p", "What?", *GREEDY).json["usage"]
    assert again == first | {"images_encoded": 0}
    more = qvl("chat", "-m", model.small, "--continue", "-p", "And?", *GREEDY).json["usage"]
    assert more["images_encoded"] == 0 and more["tokens_by_image"] == first["tokens_by_image"]
    assert more["prompt_tokens"] > first["prompt_tokens"]
    both = qvl(
        "chat", "-m", model.small, "--image", BEFORE, "--image", AFTER, "-p", "What changed?", *GREEDY
    ).json["usage"]
    assert both["images_encoded"] == 2 and len(both["tokens_by_image"]) == 2
    assert sum(both["tokens_by_image"]) == both["image_tokens"]
    assert qvl("cache", "--json").json["entries"] == 3


@pytest.mark.parametrize("name", SEES_VIDEOS)
def test_videos(made: Callable[[str], Made], name: str, two: Path, tmp_path: Path) -> None:
    model = made(name)
    usage = qvl("chat", "-m", model.small, "--video", VIDEO, "-p", "What?", *GREEDY).json["usage"]
    assert usage["image_tokens"] > 0 and usage["completion_tokens"] == 8
    frames = tmp_path / "frames"
    frames.mkdir()
    for i, path in enumerate((BEFORE, AFTER, BEFORE, AFTER)):
        shutil.copy(path, frames / f"{i}.png")
    usage = qvl("chat", "-m", model.small, "--video", frames, "-p", "What?", *GREEDY).json["usage"]
    assert usage["image_tokens"] > 0
    done("caption", VIDEO, "-m", model.small, "-o", tmp_path / "c.jsonl", "-n", 4, "-t", 1)
    assert json.loads((tmp_path / "c.jsonl").read_text().splitlines()[-1])["path"] == str(VIDEO)


def test_qwen_vl_sees_no_videos(made: Callable[[str], Made]) -> None:
    ran = qvl("chat", "-m", made("qwen_vl").small, "--video", VIDEO, "-p", "What?")
    assert ran.code == 1 and "has not learned to see a video" in ran.err


def test_too_many_pictures_for_the_context(model: Made) -> None:
    """What is proposed fits; nothing is where the size of pictures is fixed."""
    command = ["chat", "-m", model.small, "-c", 256, "-n", 4, "-p", "What?", "--temp", 0, "-t", 1]
    for _ in range(20):
        command += ["--image", BEFORE]
    ran = qvl(*command)
    assert ran.code == 1 and "20 pictures of" in ran.err and "--ctx-size" in ran.err
    if model.name == "qwen_vl":
        assert "--max-pixels" not in ran.err
        return
    area = int(ran.err.split("--max-pixels ")[1].split()[0])
    assert area % (32 if model.name.startswith("qwen3") else 28) ** 2 == 0
    done(*command, "--max-pixels", area)


def test_captions_resume(model: Made, tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    command = ["caption", ONE, BEFORE, AFTER, "-m", model.small, "-o", out, "-n", 4, "-t", 1]
    assert "3 captioned" in done(*command).err
    first = out.read_bytes()
    assert "0 captioned, 3 done before" in done(*command).err
    assert out.read_bytes() == first


def test_verify(model: Made, two: Path) -> None:
    """Eight bits are close to sixteen, and not equal to them."""
    ran = qvl(
        "verify", model.q8, "--against", model.f16, "--images", two, "-n", 4, "--no-parts", "--json", "-t", 1
    )
    assert len(ran.json["answers"]) == 2
    assert 0 < ran.json["vision"]["relative"] < 0.1
    assert 0 < ran.json["together"]["kl_mean"] < 0.02


def test_imatrix(model: Made, two: Path, tmp_path: Path) -> None:
    """What is counted covers the quantized matrices of both files."""
    counts = tmp_path / "imatrix.gguf"
    done("imatrix", "-m", model.f16, "--images", two, "-n", 4, "-o", counts, "-t", 1)
    command = ["convert", model.checkpoint, "-o", tmp_path, "--imatrix", counts, "--vision-type", "q4_0"]
    assert "error" not in done(*command).err
    names = {tensor.name for tensor in GGUFReader(counts).tensors}
    assert any(name.startswith("v.blk.0.ffn_down.weight") for name in names)
    assert any(name.startswith("blk.0.attn_q.weight") for name in names)
    assert ("blk.0.ffn_down_exps.weight.in_sum2" in names) == (model.name == "qwen3_vl_moe")


def test_bench(model: Made) -> None:
    ran = qvl(
        "bench", "-m", model.small, "--sizes", 56, "--read", 32, "--write", 4, "-r", 1, "-t", 1, "--json"
    )
    assert ran.json["read"]["amount"] == 32 and ran.json["write"]["amount"] == 4
    assert ran.json["first_token"]["rate"] > 0


def test_fit(model: Made, tmp_path: Path) -> None:
    ran = done("convert", model.checkpoint, "-o", tmp_path, "--fit", "4GB")
    assert "bf16 and bf16" in ran.err and "of 4.00 GB" in ran.err
    assert qvl("convert", model.checkpoint, "-o", tmp_path, "--fit", "1MB").code == 1


@pytest.mark.parametrize("text", NAMES)
def test_the_encoder_of_another_family_is_refused(made: Callable[[str], Made], text: str) -> None:
    """By name, those that share an architecture too."""
    [path] = (p for p in made(text).small.glob("*.gguf") if not p.name.startswith("mmproj"))
    for other in NAMES:
        if other.removesuffix("_moe") == text.removesuffix("_moe"):
            continue
        [mmproj] = made(other).small.glob("mmproj*.gguf")
        ran = qvl("chat", "-m", path, "--mmproj", mmproj, "-p", "Hi")
        assert ran.code == 1 and f"{mmproj}: an image encoder of Qwen" in ran.err, (text, other)
        assert "belongs to another model" in ran.err


def test_serve(model: Made) -> None:
    with running(n_ctx=1024, path=model.small) as server:
        body = {"model": "any", "messages": [asked("What?", "one.png")], "max_tokens": 4, "temperature": 0}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 4
