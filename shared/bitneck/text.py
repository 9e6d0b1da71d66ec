"""Text of another machine, made fit for a terminal and a log line, and words for numbers. Pure."""

import unicodedata

__all__ = ["MAX_TEXT", "clean_text", "counted", "sized"]

MAX_TEXT = 500
"""Characters of a message that are kept."""

_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories that move the cursor, end lines, turn the direction of writing, or mean nothing."""


def clean_text(text: str, most: int = MAX_TEXT) -> str:
    """The text with a mark in place of control characters, and cut to a length.

    Args:
        text: from a peer, who may mean harm: escape sequences can rewrite a terminal, line ends can forge log lines.
        most: characters that are kept.
    """
    cut = text[:most]
    kept = "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in _UNSAFE else c for c in cut)
    return kept if len(text) <= most else f"{kept}…"


def counted(number: int, one: str, more: str = "") -> str:
    """A number and what it counts, such as ``1 frame`` and ``2 frames``.

    Args:
        number: how many.
        one: the words for one.
        more: the words for another number; empty for those with an s behind them.
    """
    return f"{number} {one if number == 1 else more or one + 's'}"


def sized(size: float) -> str:
    """Bytes, such as ``87 bytes`` and ``4.2 kB``."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
