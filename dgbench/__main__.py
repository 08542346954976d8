"""`python -m dgbench`."""

from __future__ import annotations

from dgbench.cli import main

if __name__ == "__main__":
    main()
