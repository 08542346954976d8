from __future__ import annotations

from towers_made_once import _towers_are_built_fast  # noqa: F401 - a fixture
