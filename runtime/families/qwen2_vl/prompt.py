"""Qwen2-VL's prompts: ChatML, boxes between tags (arXiv 2409.12191, section 2.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qvl.runtime.prompt.rules import PromptRules

DEFAULT_SYSTEM = "You are a helpful assistant."


def rules(text: Mapping[str, Any], vision: Mapping[str, Any]) -> PromptRules:
    """The rules, given the metadata of the text file and of the vision file."""
    return PromptRules(default_system=DEFAULT_SYSTEM)
