"""A comparison as the Markdown that fits into a step summary or a comment of GitHub, and as JSON."""

from __future__ import annotations

import json

from dgbench.render.compare import comparison_tables
from dgbench.render.results import plain_data
from dgbench.render.texts import markdown
from dgbench.report.compare import Comparison

SUMMARY_BYTES = 1024 * 1024
"""What GitHub keeps of a step's summary: a larger one is refused whole."""
COMMENT_BYTES = 65_536
"""What GitHub takes as a comment, there in characters: never more than bytes."""


def as_markdown(found: Comparison, limit: int) -> str:
    """Return the verdict, scores, costs and then the classes of each target, as far as they fit into so many bytes of UTF-8."""
    tables = comparison_tables(found, per_class=True)
    main = [table for table in tables if not table.title.startswith("IoU by class")]
    classes = [table for table in tables if table.title.startswith("IoU by class")]
    blocks = [f"## {markdown(table).replace('**', '')}" if table is main[0] else markdown(table) for table in main]
    if classes:
        inside = "\n\n".join(map(markdown, classes))
        blocks.append(f"<details><summary>IoU by class</summary>\n\n{inside}\n\n</details>")
    return trimmed("\n\n".join(blocks) + "\n", limit)


def trimmed(text: str, limit: int) -> str:
    """Cut Markdown at the end of a line so that it fits into so many bytes of UTF-8, and say how much is left out."""
    if len(text.encode()) <= limit:
        return text
    lines = text.split("\n")
    # what closes an open block, and the line that says what is missing
    room = limit - len(b"\n\n</details>\n\n_100000000 more lines are in the report's other files._\n")
    kept: list[str] = []
    for line in lines:
        room -= len(line.encode()) + 1
        if room < 0:
            break
        kept.append(line)
    closing = ["", "</details>"] if any(line.startswith("<details>") for line in kept) else []
    end = [*closing, "", f"_{len(lines) - len(kept)} more lines are in the report's other files._", ""]
    cut = "\n".join([*kept, *end])
    return cut if len(cut.encode()) <= limit else ""


def as_json(found: Comparison) -> str:
    """Return all numbers, and the verdict."""
    return json.dumps(plain_data(found), indent=1, ensure_ascii=True, allow_nan=False) + "\n"
