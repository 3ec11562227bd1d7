"""The epsilon of the RMS norms, which llama.cpp of llama-cpp-python 0.3.36 does not read for qwen2vl.

When the loading of hyperparameters was split by architecture, qwen2vl's fall-through into qwen2's was lost
(src/models/qwen2vl.cpp, `load_arch_hparams`, against src/models/qwen2.cpp), so the file's
`attention.layer_norm_rms_epsilon` is left out and 0 is used: logits are off by some 1e-4, and a hidden row of
zeros becomes NaN. No call of llama.h sets it. So it is written into the open model, where the loader would
have, if and only if it is found there beyond doubt: `struct llama_hparams` has it among constants that no
other place in memory shows in that order. Where it is not found, or not 0, nothing is written.
"""

from __future__ import annotations

import ctypes
import logging
import struct
from typing import Final

LOGGER: Final = logging.getLogger("qvl.llama")
# src/llama-hparams.h: what stands between f_norm_group_eps and rope_freq_base_train, as initialized there
# (attention, router and final soft-capping; nine RWKV counts, of which one is 2; rope_attn_factor)
_BETWEEN: Final = struct.pack("<3f9If", 50.0, 30.0, 30.0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 1.0)
_BEFORE: Final = struct.pack("<3f", 0.0, 0.0, 0.0)  # f_norm_eps, f_norm_rms_eps, f_norm_group_eps
_SPAN: Final = 16384  # the struct lies at the model's beginning, its arrays of 512 layers before these


def restore_epsilon(model: int, epsilon: float, freq_base: float) -> bool:
    """Set the epsilon of an open model whose loader has left it at 0.

    Args:
        model: the `llama_model *`, or any address with `_SPAN` readable bytes.
        epsilon: `attention.layer_norm_rms_epsilon` of the file.
        freq_base: `rope.freq_base` of the file, which the loader has put right behind.

    Returns:
        Whether it was set.
    """
    memory = (ctypes.c_char * _SPAN).from_address(model)
    pattern = _BEFORE + _BETWEEN + struct.pack("<f", freq_base)
    data = memory.raw
    if data.count(pattern) != 1:
        LOGGER.info("rms norm epsilon: llama.cpp has read it, or keeps it elsewhere")
        return False
    offset = data.index(pattern) + ctypes.sizeof(ctypes.c_float)
    ctypes.c_float.from_address(model + offset).value = epsilon
    LOGGER.info("rms norm epsilon: %g, which llama.cpp had left at 0", epsilon)
    return True
