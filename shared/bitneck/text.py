"""Text of another machine, made fit for a terminal and a log line. Pure."""

import unicodedata

__all__ = ["MAX_TEXT", "clean_text"]

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
