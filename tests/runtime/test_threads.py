"""What threads cost: teams that outlive their work, and spinning at barriers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from qvl.convert import Converted
from qvl.runtime.ggml.library import directory
from qvl.runtime.llama.context import Context
from qvl.runtime.llama.model import LlamaModel

LOADED = """
import os
from qvl.runtime.llama.binding import llama
llama()
print(os.environ.get("GOMP_SPINCOUNT"))
"""


def test_a_prompts_thread_ends_with_it(tiny_model: Converted) -> None:
    """Or libgomp would count its team for as long as it lives."""
    before, during = threading.active_count(), []

    def cancelled() -> bool:
        during.append(threading.active_count())
        return False

    with LlamaModel(tiny_model.text, device="cpu") as model, Context(model, n_ctx=2048, n_batch=2048) as c:
        while not during:  # it is asked every 50 ms
            c.clear()
            c.decode_tokens([1] * 2000, 0, cancelled=cancelled)
            assert threading.active_count() == before
    assert max(during) == before + 1


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is that of GCC")
@pytest.mark.parametrize(("given", "used"), [({}, "2000"), ({"GOMP_SPINCOUNT": "77"}, "77")])
def test_threads_spin_for_a_short_time(given: dict[str, str], used: str) -> None:
    """libgomp says itself what it has read; the process's own environment is as before."""
    if b"libgomp" not in (directory() / "libggml-cpu.so").read_bytes():
        pytest.skip("llama.cpp without OpenMP")
    bare = {k: v for k, v in os.environ.items() if not k.startswith(("GOMP_", "OMP_"))}
    environment = {**bare, **given, "OMP_DISPLAY_ENV": "VERBOSE"}
    done = subprocess.run([sys.executable, "-c", LOADED], env=environment, capture_output=True, text=True)
    assert f"GOMP_SPINCOUNT = '{used}'" in done.stderr
    assert done.stdout.strip() == given.get("GOMP_SPINCOUNT", "None")
