"""Settings and fixtures that every test shares."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("qvl", deadline=None)  # a busy machine is no failure
settings.load_profile("qvl")
