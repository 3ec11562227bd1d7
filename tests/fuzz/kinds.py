"""Kinds of fuzzed input: for each, a writer of cases and the use that qvl makes of them.

A target may end well, or with a QvlError whose message names the file. Anything else is a finding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

from fuzz import media, models, requests


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    Attributes:
        make: writes case `rng` into a folder and returns what messages must name.
        use: hands it to qvl.
        named: whether messages must name the file.
    """

    make: Callable[[Path, Random], Path]
    use: Callable[[Path], object]
    named: bool = True


KINDS: Final = {
    "text": Kind(models.make_text, models.use_text),
    "mmproj": Kind(models.make_mmproj, models.use_mmproj),
    "checkpoint": Kind(models.make_checkpoint, models.use_checkpoint),
    "pickle": Kind(models.make_pickle, models.use_pickle),
    "imatrix": Kind(models.make_imatrix, models.use_imatrix),
    "image": Kind(media.make_image, media.use_image),
    "video": Kind(media.make_video, media.use_video),
    "schema": Kind(requests.json_file("case.json", requests.SCHEMA), requests.use_schema),
    "session": Kind(requests.json_file("case.json", requests.SESSION), requests.use_session, named=False),
    "records": Kind(media.make_records, media.use_records),
    "messages": Kind(
        requests.json_file("case.json", requests.SESSION["messages"]), requests.use_messages, named=False
    ),
    "cache": Kind(media.make_entry, media.use_entry),
    "http": Kind(requests.make_http, requests.use_http, named=False),
}
