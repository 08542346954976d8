"""A mirror on the loopback that has every domain, and a folder of data without the user's settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback_files import Server, serving
from small_sets import OFFICIAL


@pytest.fixture
def mirror() -> Iterator[Server]:
    with serving(
        {f"{name}/{archive}": content for name, make in OFFICIAL.items() for archive, content in make().items()}
    ) as server:
        yield server


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("DGBENCH_OFFLINE", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "data"
