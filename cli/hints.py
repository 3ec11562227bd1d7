"""Errors of the library in the words of the command line.

The library names its parameters in backquotes: "a smaller context (`n_ctx`)". Here they become the flags that
set them: "a smaller context (--ctx-size)".
"""

from __future__ import annotations

import re
from typing import Final

_PARAMETER: Final = re.compile(r"`(\w+)`")

FLAGS: Final = {
    "n_ctx": "--ctx-size",
    "n_gpu_layers": "-ngl",
    "temperature": "--temp",
    "image": "--image",
    "video": "--video",
    "text_file": "--text",
}
"""Parameters whose flag is spelled otherwise; the others are the flag with dashes."""


def with_flags(text: str) -> str:
    """The text with every parameter in backquotes as its flag.

    >>> with_flags("a smaller context (`n_ctx`) or smaller pictures (`max_pixels`)")
    'a smaller context (--ctx-size) or smaller pictures (--max-pixels)'
    """
    return _PARAMETER.sub(lambda found: FLAGS.get(found[1], f"--{found[1].replace('_', '-')}"), text)
