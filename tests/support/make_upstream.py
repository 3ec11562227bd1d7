"""Record what llama.cpp's own converter makes of the tests' tiny checkpoint.

    PYTHONPATH=tests python -m support.make_upstream LLAMA_CPP tests/fixtures

LLAMA_CPP is llama.cpp's source as llama-cpp-python 0.3.36 vendors it; needs torch and transformers. Recorded
are metadata, and every tensor's type, shape and hash, for f32, f16 and bf16: Qwen2-VL's in upstream.json, the
later families' in upstream_families.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from support.checkpoint import Shape, Style, write_checkpoint
from support.families import write_family

# The converter knows a tokenizer by the ids of a test text; a trimmed vocabulary has other ids. All files are
# made by one process, since loading torch and transformers takes longer than converting.
RUN = """
import json
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
def none(self, *_):
    raise FileNotFoundError  # as it does for checkpoints without a sentencepiece model
TextModel._set_vocab_sentencepiece = none
import convert_hf_to_gguf
for arguments in json.loads(sys.argv[2]):
    sys.argv = ["convert_hf_to_gguf.py", *arguments]
    convert_hf_to_gguf.main()
"""


# Upstream's name table counts mm.N by the encoder's blocks: fewer than three do not get as far as mm.2.
SHAPE = Shape(tied=False, depth=3)
STYLE = Style(dtype="BF16")
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
PARTS: dict[str, list[str]] = {"text": [], "mmproj": ["--mmproj"]}


def record(path: Path) -> dict[str, Any]:
    """Metadata and tensors of a GGUF file; long arrays by hash."""
    reader = gguf.GGUFReader(path)
    metadata = {}
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            value = field.contents()
            long = isinstance(value, list) and len(value) > 16
            metadata[name] = hashlib.sha256(json.dumps(value).encode()).hexdigest() if long else value
    tensors = {}
    for tensor in reader.tensors:
        digest = hashlib.sha256(np.ascontiguousarray(tensor.data)).hexdigest()
        shape = "x".join(str(n) for n in tensor.shape[::-1])
        tensors[tensor.name] = f"{tensor.tensor_type.name} {shape} {digest[:16]}"
    return {"metadata": metadata, "tensors": tensors}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = write_checkpoint(Path(name) / "tiny", SHAPE, STYLE)
        _save(args.out / "upstream.json", upstream(args.llama_cpp, [folder])[0])
        folders = [write_family(Path(name) / each, each) for each in FAMILIES]
        made = upstream(args.llama_cpp, folders, ("f32", "f16"))
        _save(args.out / "upstream_families.json", dict(zip(FAMILIES, made, strict=True)))


def source() -> Path | None:
    """llama.cpp's converter: $QVL_LLAMA_CPP, or what .ci/setup has unpacked for the parity tests."""
    if given := os.environ.get("QVL_LLAMA_CPP"):
        return Path(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kept = cache / "qvl" / f"llama.cpp-{version('llama_cpp_python')}"
    return kept if (kept / "convert_hf_to_gguf.py").is_file() else None


def upstream(
    llama_cpp: Path, folders: Sequence[Path], kinds: Sequence[str] = ("f32", "f16", "bf16")
) -> list[dict[str, Any]]:
    """The converter's output for each checkpoint, by "text-KIND" and "mmproj-KIND"."""
    names = [f"{part}-{kind}" for kind in kinds for part in PARTS]
    made = [{name: folder.parent / f"{folder.name}-{name}.gguf" for name in names} for folder in folders]
    jobs = [
        [str(folder), "--outtype", name.split("-")[1], "--outfile", str(path), *PARTS[name.split("-")[0]]]
        for folder, files in zip(folders, made, strict=True)
        for name, path in files.items()
    ]
    command = [sys.executable, "-c", RUN, str(llama_cpp), json.dumps(jobs)]
    subprocess.run(command, check=True, capture_output=True)
    return [{name: record(path) for name, path in files.items()} for files in made]


def _save(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
