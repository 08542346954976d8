"""Escaping of text from outside (names in records, files, archives), so that it is only shown and never interpreted.

A terminal interprets escape sequences, a spreadsheet formulas, a Markdown page tags and images, TeX its commands. All output
passes through here; Rich only draws its `Text`, which has no markup.
"""

from __future__ import annotations

import re

# C0 and C1 controls, lone surrogates, and characters that change the direction of text or are invisible
_OBEYED = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    r"""Return the text with every control character written out, as `\x1b` or `\u202e`."""
    return text if text.isprintable() else _OBEYED.sub(_written, text)


def visible_lines(text: str) -> str:
    """Return a message of one or more lines, each made `visible`: the line breaks are ours, the text may not be."""
    return "\n".join("\t".join(map(visible, line.split("\t"))) for line in text.split("\n"))


def visible_json(text: str) -> str:
    r"""Return JSON with the controls that it allows in strings written as `\u009b`: its meaning stays."""
    # JSON escapes controls below the space itself, and outside of strings they are its line feeds
    return text if text.isascii() and "\x7f" not in text else _OBEYED.sub(_as_json, text)


def _written(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _as_json(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x20:
        return found[0]
    units = found[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def in_markdown(text: str, *, inside_stars: bool = False) -> str:
    """Return text that GitHub's Markdown shows literally, without tags, links, images, cells or emphasis.

    Args:
        inside_stars: the text will be between `**`, which a `*` in it could end.
    """
    text = _MARKDOWN.sub(r"\\\g<0>", visible(text))
    text = (_STARS if inside_stars else _OPENS_EMPHASIS).sub(r"\\\g<0>", text)
    return _ENTITY.sub("&amp;", text).replace("<", "&lt;").replace(">", "&gt;")


def as_item(text: str) -> str:
    """Return text for Markdown after `- `, which is not read as a heading or a list."""
    return _STARTS_BLOCK.sub(r"\\\g<0>", text.strip(), count=1)


_STARTS_BLOCK = re.compile(r"^[#+*-]|(?<=^\d)[.)]|(?<=^\d\d)[.)]|(?<=^\d\d\d)[.)]")
_MARKDOWN = re.compile(r"[\\`|\[\]]")
_OPENS_EMPHASIS = re.compile(r"\*(?=\S)|(?<![^\W_])_(?=\S)|~(?=\S)")
_STARS = re.compile(r"\*|(?<![^\W_])_|_(?![^\W_])|~")
_ENTITY = re.compile(r"&(?=#?\w+;)")


def in_latex(text: str) -> str:
    """Return text that LaTeX sets literally."""
    shown = "".join(_LATEX.get(letter, letter) for letter in _DASHES.sub("-\0", visible(text))).replace("\0", "{}")
    # at a row's start, LaTeX would read these two as arguments of the preceding `\\`
    return f"{{{shown[0]}}}{shown[1:]}" if shown[:1] in ("[", "*") else shown


_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",  # else an opening quotation mark
    "±": r"$\pm$",
    "–": "--",
    "—": "---",
    "’": "'",
    "·": r"\textperiodcentered{}",
    "•": r"\textbullet{}",
    "∞": r"$\infty$",
    "†": r"\textdagger{}",
    "…": r"\ldots{}",
    "²": r"$^2$",
    "×": r"$\times$",
}
_DASHES = re.compile(r"-(?=-)")  # LaTeX would set two of them, as in --json, as one dash


def in_csv(value: object) -> object:
    """Return a value for a cell of CSV: text that a spreadsheet would take for a formula gets a `'` in front, numbers do not."""
    if not isinstance(value, str):
        return value
    # controls are written out at this point, so that none can hide a formula
    shown = visible(value)
    return f"'{shown}" if shown.lstrip().startswith(_FORMULA) and not _NUMBER.fullmatch(shown) else shown


_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")
