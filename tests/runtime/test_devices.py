"""Devices other than the CPU: a model whose weights lie in another process's memory answers the same."""

from __future__ import annotations

import numpy as np
import pytest
from support.patterns import pattern

from qvl.convert import Converted
from qvl.runtime import load
from qvl.runtime.errors import BackendError, InputError
from qvl.runtime.ggml.devices import devices, find_device

CONTENT = [{"type": "image", "image": pattern(90, 120)}, {"type": "text", "text": "Describe this image."}]
MESSAGES = [{"role": "user", "content": CONTENT}]


def test_a_model_on_a_device_answers_as_on_the_cpu(tiny_model: Converted, rpc_endpoint: str) -> None:
    with load(tiny_model.text, tiny_model.mmproj, device="cpu", n_ctx=512) as model:
        here = model.logits(MESSAGES)
        said = model.generate(MESSAGES, temperature=0, max_tokens=12).result().text
    with load(tiny_model.text, tiny_model.mmproj, device=f"rpc:{rpc_endpoint}", n_ctx=512) as model:
        assert [d.name[:3] for d in model.text.devices] == ["RPC"]
        assert model.vision.device.name.startswith("RPC")
        there = model.logits(MESSAGES)
        assert model.generate(MESSAGES, temperature=0, max_tokens=12).result().text == said
    # the encoder's k and v are float16 there, as flash attention on GPUs wants them
    assert np.array_equal(here.argmax(1), there.argmax(1))
    assert np.abs(here - there).max() < 2e-3 * np.abs(here).max()


def test_layers_can_be_split(tiny_model: Converted, rpc_endpoint: str) -> None:
    results = []
    for n_gpu_layers in (0, 1, -1):
        with load(
            tiny_model.text, device=f"rpc:{rpc_endpoint}", n_gpu_layers=n_gpu_layers, n_ctx=256
        ) as model:
            results.append(model.logits([{"role": "user", "content": "Hello"}]))
    assert np.allclose(results[0], results[1], atol=1e-4)
    assert np.allclose(results[0], results[2], atol=1e-4)


def test_devices_have_names() -> None:
    assert "CPU" in [d.name for d in devices()]
    assert find_device("cpu").is_cpu
    assert find_device("CPU").memory()[1] > 0


def test_unknown_devices_are_named() -> None:
    with pytest.raises(InputError, match=r"no device 'tpu7'.*cpu"):
        find_device("tpu7")


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9", "127.0.0.1:0", "nowhere", "127.0.0.1:99999999", ":"])
def test_an_rpc_server_that_is_not_there(endpoint: str) -> None:
    with pytest.raises(BackendError, match=r"no RPC (server answers|backend)"):
        find_device(f"rpc:{endpoint}")
