"""`benchmarks/README.md` names every script and every table."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "benchmarks"


def test_every_script_and_every_result_is_in_the_index() -> None:
    index = (FOLDER / "README.md").read_text()
    # a module that another script imports is no script of its own
    scripts = [path.name for path in FOLDER.glob("*.py") if "__main__" in path.read_text()]
    assert scripts
    assert not [name for name in scripts if f"`{name}" not in index]
    assert not [path.name for path in FOLDER.glob("*.md") if path.name != "README.md" and f"]({path.name})" not in index]
