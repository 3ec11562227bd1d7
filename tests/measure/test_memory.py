"""Predicted memory, against what runs take."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.checkpoint import Shape, Style, write_checkpoint

from qvl.cli.main import run
from qvl.convert import Converted, convert
from qvl.runtime.errors import InputError
from qvl.runtime.find import ModelFiles
from qvl.runtime.llama.context import Context
from qvl.runtime.llama.memory import text_memory
from qvl.runtime.llama.model import LlamaModel
from qvl.runtime.measure.memory import predict_memory

# Large enough that Python is the smaller part.
SHAPE = Shape(hidden=768, inner=2048, heads=6, kv_heads=2, layers=6, dim=512, vision_heads=8, depth=4)
RUN = """
import json, resource, sys
from pathlib import Path
import numpy as np
from qvl.runtime import load
text_file, mmproj, n_ctx, width, height = *sys.argv[1:3], *map(int, sys.argv[3:])
picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
with load(text_file, mmproj, device="cpu", n_ctx=n_ctx) as model:
    text = "What is this?" + " 1" * (n_ctx // 8)  # two tokens each: a batch is full, as it is planned
    content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
    model.generate([{"role": "user", "content": content}], max_tokens=4, temperature=0.0).result()
status = Path("/proc/self/status")
if status.exists():  # Linux counts the process that started this one into ru_maxrss
    print(next(int(line.split()[1]) * 1024 for line in status.open() if line.startswith("VmHWM")))
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""
PREDICT = """
import sys
from pathlib import Path
from qvl.runtime.find import ModelFiles
from qvl.runtime.measure.memory import predict_memory
text, mmproj, n_ctx, width, height = *map(Path, sys.argv[1:3]), *map(int, sys.argv[3:])
print(predict_memory(ModelFiles(text, mmproj), n_ctx=n_ctx, image_size=(width, height)).total)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("large") / "large", SHAPE, Style(dtype="BF16"))


def bytes_of(script: str, *arguments: object) -> int:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform == "win32", reason="no ru_maxrss")
@pytest.mark.parametrize(
    ("types", "n_ctx", "size"),
    [
        (("q4_k_m", "q8_0"), 16384, (280, 280)),
        (("q4_0", "f32"), 2048, (1120, 840)),
    ],
)
def test_within_a_tenth_of_what_a_run_takes(
    checkpoint: Path, tmp_path: Path, types: tuple[str, str], n_ctx: int, size: tuple[int, int]
) -> None:
    made = convert(checkpoint, tmp_path, *types)
    predicted = bytes_of(PREDICT, made.text, made.mmproj, n_ctx, *size)
    taken = bytes_of(RUN, made.text, made.mmproj, n_ctx, *size)
    assert predicted == pytest.approx(taken, rel=0.1)


@pytest.mark.parametrize("text_type", ["f32", "q4_k_m"])
def test_llama_cpp_allocates_what_it_plans(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, text_type: str
) -> None:
    made = convert(checkpoint, tmp_path, text_type, "q8_0")
    planned = text_memory(made.text, n_ctx=1000, n_batch=256)
    with (
        caplog.at_level(logging.INFO, "qvl.llama"),
        LlamaModel(made.text, device="cpu") as model,
        Context(model, n_ctx=1000, n_batch=256, n_ubatch=256),
    ):
        said = "\n".join(record.getMessage() for record in caplog.records)
    for kind, size in (
        ("CPU_REPACK model", planned.repacked),
        ("KV", planned.kv_cache),
        ("compute", planned.compute),
        ("output", planned.output),
    ):
        found = sum(float(mb) for mb in re.findall(rf"{kind} buffer size = +([\d.]+) MiB", said))
        assert size == pytest.approx(found * 2**20, abs=2e4), kind


def test_parts_add_up(tiny_model: Converted) -> None:
    files = ModelFiles(tiny_model.text, tiny_model.mmproj)
    small, large = (predict_memory(files, n_ctx=n, image_size=(280, 280)) for n in (512, 1024))
    assert large.text.kv_cache == 2 * small.text.kv_cache
    # `total` has what this process has resident at the moment, which changes from one call to the next
    assert large.model > small.model > small.text.weights and small.total > small.model
    assert small.image_tokens == 100
    picture = predict_memory(files, n_ctx=512, image_size=(1001, 499))
    assert picture.image_size == (1008, 504)
    assert picture.vision_compute > small.vision_compute
    with pytest.raises(InputError, match="no mmproj"):
        predict_memory(ModelFiles(tiny_model.text, None), n_ctx=512, image_size=(28, 28))


def test_the_command(tiny_model: Converted, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["inspect", str(tiny_model.text), "--mmproj", str(tiny_model.mmproj), "--memory", "-c", "512"]
    assert run([*command, "--image-size", "280x140", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["image_size"] == [280, 140]
    assert found["image_tokens"] == 50
    assert run(command) == 0
    assert "context of 512 tokens" in capsys.readouterr().out
    assert run([*command, "--image-size", "big"]) == 1
    assert "'big' is not a size" in capsys.readouterr().err
