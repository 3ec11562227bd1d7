"""Our files against those of llama.cpp's own converter (recorded by tests/support/make_upstream.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.checkpoint import write_checkpoint
from support.make_upstream import SHAPE, STYLE, record

from qvl.convert import convert

RECORDED: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).resolve().parent.parent / "fixtures" / "upstream.json").read_text(encoding="utf-8")
)
# What upstream says and we do not, or say otherwise.
APART = {
    "text": {"general.name", "general.size_label"},
    "mmproj": {
        *("general.name", "general.size_label"),
        *("general.sampling.top_k", "general.sampling.top_p"),
        *("general.sampling.temp", "general.sampling.penalty_repeat"),
        "clip.vision.feed_forward_length",  # upstream's is the decoder's width, ours the encoder's own
    },
}


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_tensors_and_metadata_are_upstreams(tmp_path: Path, kind: str) -> None:
    done = convert(write_checkpoint(tmp_path / "tiny", SHAPE, STYLE), tmp_path, kind, kind)
    for part, path in (("text", done.text), ("mmproj", done.mmproj)):
        ours, theirs = record(path), RECORDED[f"{part}-{kind}"]
        assert ours["tensors"] == theirs["tensors"]
        held = theirs["metadata"].keys() - APART[part]
        assert {key: ours["metadata"].get(key) for key in held} == {
            key: theirs["metadata"][key] for key in held
        }
