"""Text that came from outside (names in records, files, archives) is shown as characters, never obeyed by the terminal."""

from __future__ import annotations

import re

# C0 and C1 controls, surrogates that are no characters, and what turns the direction of a line or shows nothing
_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Return the text with every control character written out, as `\x1b` or `\u202e`."""
    return text if text.isprintable() else _OBEYED.sub(_written, text)


def _written(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
