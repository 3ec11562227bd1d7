"""The public home of M-RoPE positions; see `qvl.runtime.prompt.positions`."""

from qvl.runtime.prompt.positions import Span, TextSpan, VisionSpan, mrope_positions

__all__ = ["Span", "TextSpan", "VisionSpan", "mrope_positions"]
