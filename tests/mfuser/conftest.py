from __future__ import annotations

from vocabularies import _vocabularies_are_read_once  # noqa: F401 - a fixture
