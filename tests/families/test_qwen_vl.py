"""Qwen-VL from its published layout to an answer: embeddings, logits, tokens and commands."""

from __future__ import annotations

import base64
import json
import logging
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.families import family_config, write_family
from support.patterns import pattern

from qvl.convert import Converted, convert
from qvl.convert.tiktoken import SPECIAL_TOKENS
from qvl.convert.vocab import SPLIT
from qvl.runtime import load
from qvl.runtime.engine.units import VisionUnit

TIKTOKEN = Path(__file__).resolve().parents[2].parent / "shared/checkpoints/Qwen-VL/qwen.tiktoken"
IMG, END_IMG = 4466, 4467  # in the tests' vocabulary
SEED = 3


def config(**own: Any) -> dict[str, Any]:
    """Two heads of 128 and the published 256 queries."""
    found = family_config("qwen_vl")
    visual = found["visual"] | {"image_size": 448, "n_queries": 256, "output_dim": 256}
    return found | {"hidden_size": 256, "num_attention_heads": 2, "visual": visual} | own


def messages(height: int = 300, width: int = 451) -> list[dict[str, Any]]:
    content = [
        {"type": "image", "image": pattern(height, width)},
        {"type": "text", "text": "What is in the picture?"},
    ]
    return [{"role": "user", "content": content}]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def divergence(expected: NDArray[np.float64], found: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL divergence at every position, from log-probabilities [n, n_vocab]."""
    return np.asarray((np.exp(expected) * (expected - found)).sum(-1))


@pytest.mark.parity
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "base"])
def test_checkpoint_to_logits(chat: bool, tmp_path: Path) -> None:
    """The whole way: embeddings as torch's stock modules give them, logits and replies as transformers."""
    torch = pytest.importorskip("torch")
    from support import qwen_vl_reference as reference

    folder = write_family(tmp_path / "model", "qwen_vl", dtype="F32", seed=SEED, chat=chat, config=config())
    state = reference.published_state(folder, SEED)
    see, decoder = reference.tower(folder, state), reference.decoder(folder, state)
    files = convert(folder, tmp_path / "gguf", "f32", "f32")
    with load(files.text, files.mmproj, device="cpu", kv_type="f32", precision="exact", n_ctx=2048) as model:
        for height, width in ((300, 451), (448, 448), (90, 700)):
            patches = model.vision.preprocessor.image(pattern(height, width))
            expected = see(patches.pixel_values, [patches.grid_thw])
            [found] = model.vision.encode([pattern(height, width)])
            assert found.grid_thw == (1, 32, 32) and found.embeddings.shape == expected.shape == (256, 256)
            error = np.linalg.norm(found.embeddings - expected) / np.linalg.norm(expected)
            assert error < 5e-6, (height, width)

        units = model.template.units(messages(), model.store.place)
        ids = [i for unit in units for i in ([unit] if isinstance(unit, int) else [0] * 256)]
        [at] = [i for i, unit in enumerate(units) if isinstance(unit, VisionUnit)]
        assert (ids[at - 1], ids[at + 256], len(ids)) == (IMG, END_IMG, len(units) + 255)
        patches = model.vision.preprocessor.image(pattern(300, 451))
        rows = torch.from_numpy(see(patches.pixel_values, [patches.grid_thw]))
        with torch.no_grad():
            embeddings = decoder.model.embed_tokens(torch.tensor([ids]))
            embeddings[0, at : at + 256] = rows
            out = decoder(inputs_embeds=embeddings, use_cache=True)
        expected, found = log_softmax(out.logits[0].numpy()), log_softmax(model.logits(messages()))
        assert divergence(expected, found).max() <= 1e-5
        assert (expected.argmax(-1) == found.argmax(-1)).mean() >= 0.999

        reply: list[int] = []
        while (token := int(out.logits[0, -1].argmax())) not in model.text.vocab.end_tokens:
            reply.append(token)
            if len(reply) == 64:
                break
            with torch.no_grad():
                out = decoder(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
        own = model.generate(messages(), max_tokens=64, temperature=0.0).result()
        assert list(own.tokens) == reply and len(reply) == 64


TEXTS = (
    "The quick brown fox jumps over the lazy dog. It's 1,234.56 o'clock, isn't it?",
    "我能吞下玻璃而不伤身体。图中有两只猫,坐在沙发上。",
    "我能吞下玻璃而不傷身體。",
    "私はガラスを食べられます。それは私を傷つけません。",
    "나는 유리를 먹을 수 있어요. 그래도 아프지 않아요",
    "Я могу есть стекло, оно мне не вредит.",
    "Μπορώ να φάω σπασμένα γυαλιά.",
    "أنا قادر على أكل الزجاج و هذا لا يؤلمني.",
    "אני יכול לאכול זכוכית וזה לא מזיק לי.",
    "मैं काँच खा सकता हूँ।",
    "আমি কাঁচ খেতে পারি",
    "நான் கண்ணாடி சாப்பிடுவேன்",
    "ฉันกินกระจกได้ แต่มันไม่ทำให้ฉันเจ็บ",
    "Tôi có thể ăn thủy tinh mà không hại gì.",
    "Je peux manger du verre, ça ne me fait pas mal.",
    "Ich kann Glas essen, ohne mir zu schaden. Straße, Größe",
    "Cam yiyebilirim, bana zararı dokunmaz. İIıi",
    "Mogę jeść szkło i mi nie szkodzi. Zażółć gęślą jaźń",
    "ᚠᛇᚻ᛫ᛒᛦᚦ᛫ᚠᚱᚩᚠᚢᚱ",
    "მინას ვჭამ და არა მტკივა.",
    "Կրնամ ապակի ուտել",
    "ខ្ញុំអាចញុំកញ្ចក់បាន",
    "🦊👩‍👩‍👧‍👦🇫🇷 ½ ² ① Ⅻ 𝔘𝔫𝔦",
    "x\t\ty\n\n\n  z \r\n\r\n   ",
    "for (int i = 0; i < 10; ++i) { a[i] += 0x1F; }  // 注释",
    "١٢٣ ๔๕๖ 1234567890",
    "e\u0301 vs \u00e9, \u1112\u1161\u11ab, A\u030a",
    "<|notaspecial|> <im> </ref",
    "'S 'LL we'Re",
    "\u00a0\u2003\u3000 x",
    "a" * 300 + " " * 70 + "!" * 90,
)


@pytest.mark.parity
@pytest.mark.skipif(not TIKTOKEN.is_file(), reason=f"no {TIKTOKEN}")
def test_tokens_are_those_of_qwen_tiktoken(tmp_path: Path) -> None:
    """The published vocabulary through conversion and llama.cpp, against tiktoken on the published file."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {
        base64.b64decode(token): int(rank)
        for token, rank in (line.split() for line in TIKTOKEN.read_bytes().splitlines() if line)
    }
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    theirs = tiktoken.Encoding("qwen", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=specials)
    visual = family_config("qwen_vl")["visual"] | {"output_dim": 32, "layers": 1}
    small = {"hidden_size": 32, "kv_channels": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    own = config(**small, num_attention_heads=1, vocab_size=151936, visual=visual)
    folder = write_family(tmp_path / "model", "qwen_vl", config=own)
    (folder / "qwen.tiktoken").write_bytes(TIKTOKEN.read_bytes())
    files = convert(folder, tmp_path / "gguf", "f16", "f16")
    with load(files.text, files.mmproj, device="cpu", n_ctx=512) as model:
        vocab = model.text.vocab
        assert {name: vocab.control(name) for name in ("<|endoftext|>", "<img>", "<imgpad>", "</box>")} == {
            "<|endoftext|>": 151643, "<img>": 151857, "<imgpad>": 151859, "</box>": 151854,
        }  # fmt: skip
        for text in TEXTS:
            expected = theirs.encode(unicodedata.normalize("NFC", text), disallowed_special=())
            assert vocab.tokenize(text) == expected, text
        rng = np.random.default_rng(0)
        words = [word for text in TEXTS for word in text.split()]
        for _ in range(200):
            text = "".join(str(rng.choice(words)) + str(rng.choice(["", " ", "\n", ", "])) for _ in range(12))
            expected = theirs.encode(unicodedata.normalize("NFC", text), disallowed_special=())
            assert vocab.tokenize(text) == expected, text


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Converted]:
    """Chat and base, converted."""
    folder = tmp_path_factory.mktemp("qwen-vl")
    return {
        name: convert(write_family(folder / name, "qwen_vl", chat=name == "chat"), folder / f"{name}-gguf")
        for name in ("chat", "base")
    }


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qvl.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)


def save(path: Path) -> Path:
    from PIL import Image

    Image.fromarray(pattern(90, 120)).save(path)
    return path


def test_a_published_folder_to_an_answer_in_two_commands(tmp_path: Path) -> None:
    folder, picture = write_family(tmp_path / "Qwen-VL-Chat", "qwen_vl"), save(tmp_path / "a.png")
    done = run("convert", folder, "-o", tmp_path / "gguf")
    assert done.returncode == 0, done.stderr
    args = ("-m", tmp_path / "gguf", "--image", picture, "-p", "What is it?", "-n", 8, "--temp", 0, "--json")
    asked = run("chat", *args)
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout)["text"]


@pytest.mark.parametrize(
    ("name", "words"), [("base", "Describe the image in English:"), ("chat", "Describe this image.")]
)
def test_captions_are_asked_for_in_the_models_words(
    name: str, words: str, made: dict[str, Converted], tmp_path: Path
) -> None:
    asked = ("-m", made[name].text.parent, "-n", 4, "--temp", 0)
    picture = save(tmp_path / "a.png")
    for given, expected in (((), words), (("-p", "Say {stem}."), "Say a.")):
        done = run("caption", picture, *asked, *given)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["prompt"] == expected


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "qvl.prompt"]


def test_prompts_beyond_the_trained_length_warn_once(
    made: dict[str, Converted], caplog: pytest.LogCaptureFixture
) -> None:
    def prompt(words: int) -> list[dict[str, Any]]:
        return [{"role": "user", "content": " red" * words}]

    with (
        caplog.at_level(logging.WARNING, "qvl.prompt"),
        load(made["chat"].text, made["chat"].mmproj, device="cpu") as model,
    ):
        place = model.store.place
        head = len(model.template.units(prompt(0), place))
        assert len(model.template.units(prompt(2048 - head), place)) == 2048
        assert not warnings(caplog)
        for _ in range(2):
            model.template.units(prompt(2049 - head), place)
        [said] = warnings(caplog)
        assert "2049 tokens" in said and "trained on 2048" in said
    caplog.clear()
    pictures = [{"type": "image", "image": pattern(20, 20)}] * 140  # 16 tokens each
    with (
        caplog.at_level(logging.WARNING, "qvl.prompt"),
        load(made["chat"].text, made["chat"].mmproj, device="cpu", n_ctx=2048) as model,
    ):
        assert not warnings(caplog)
        model.template.units([{"role": "user", "content": pictures}], model.store.place)
        assert len(warnings(caplog)) == 1


def test_a_context_beyond_the_trained_length_warns(
    made: dict[str, Converted], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with (
        caplog.at_level(logging.WARNING, "qvl.prompt"),
        load(made["base"].text, made["base"].mmproj, device="cpu", n_ctx=4096),
    ):
        [said] = warnings(caplog)
        assert "the context has 4096 tokens" in said
    asked = run("chat", "-m", made["chat"].text.parent, "-c", 4096, "-p", "Hello.", "-n", 1)
    assert asked.returncode == 0 and "trained on 2048" in asked.stderr


@pytest.mark.parity
def test_beyond_the_trained_length_rope_stays_plain(tmp_path: Path) -> None:
    """What is computed there is Qwen2's plain rope, which differs from the published formulas."""
    torch = pytest.importorskip("torch")
    from support import qwen_vl_reference as reference

    folder = write_family(tmp_path / "model", "qwen_vl", dtype="F32", seed=SEED)
    state = reference.published_state(folder, SEED)
    assert [reference.ntk_base(n) for n in (100, 2048)] == [1e4, 1e4]
    assert [reference.ntk_base(n) / 1e4 for n in (2049, 4096, 4097)] == pytest.approx(
        [3 ** (128 / 126), 3 ** (128 / 126), 7 ** (128 / 126)]
    )
    files = convert(folder, tmp_path / "gguf", "f32", "f32")
    text = [{"role": "user", "content": " red, one" * 800}]
    with load(files.text, files.mmproj, device="cpu", kv_type="f32", n_ctx=4096) as model:
        units = model.template.units(text, model.store.place)
        found = log_softmax(model.logits(text)[2048:])
    ids = torch.tensor([units])
    assert 2048 < len(units) < 4096
    published = reference.decoder(folder, state, reference.ntk_base(len(units)))
    with torch.no_grad():
        plain = log_softmax(reference.decoder(folder, state)(ids).logits[0, 2048:].numpy())
        with reference.log_n_queries(published):
            scaled = log_softmax(published(ids).logits[0, 2048:].numpy())
    assert divergence(plain, found).max() <= 1e-5
    assert divergence(scaled, found).mean() > 1e-3
