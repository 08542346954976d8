"""What every test shares: fixed seeds, and the user's own settings kept out."""

from __future__ import annotations

import random

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fix the seeds; forget variables that change what is printed or where files go."""
    random.seed(0)
    np.random.seed(0)  # libraries under test may use the global generator
    for name in ("DGBENCH_DEBUG", "DGBENCH_DATA", "NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
