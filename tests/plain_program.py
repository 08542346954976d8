"""The program `dgbench` with one more method, `plain`, for tests that start it as several processes."""

from __future__ import annotations

from pathlib import Path

from mfuser import methods

methods.__path__.append(str(Path(__file__).parent / "plain_method"))

if __name__ == "__main__":
    from dgbench.cli import main

    main()
