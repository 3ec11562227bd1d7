"""From a Hugging Face checkpoint to GGUF."""

from qvl.convert.pipeline import convert
from qvl.convert.summary import Converted

__all__ = ["Converted", "convert"]
