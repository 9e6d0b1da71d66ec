"""Topics of MQTT from a template: whatever a client calls itself, it stays within its level. Pure."""

import functools
import re
import unicodedata
from collections.abc import Mapping, Sequence

__all__ = ["check_topic", "topic_of"]

_MAX_TEMPLATE_BYTES = 1024
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_SPECIAL = frozenset("+#/$%{}")
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories that MQTT forbids or advises against, or that turn the direction of writing."""
_EMPTY = "-"


def check_topic(template: str, known: Sequence[str], setting: str) -> None:
    """Refuse a template that gives no topic.

    Args:
        template: levels with placeholders such as ``bitneck/{client}``.
        known: placeholders that may stand in it.
        setting: name of the setting, for the message.

    Raises:
        ValueError: a wildcard, a control character, a reserved topic, or an unknown placeholder.
    """
    fixed = _PLACEHOLDER.sub("", template)
    for name in _PLACEHOLDER.findall(template):
        if name not in known:
            raise ValueError(f"{setting} has {{{name[:40]}}}; known: {', '.join(f'{{{each}}}' for each in known)}")
    if not template or len(template.encode(errors="replace")) > _MAX_TEMPLATE_BYTES:
        raise ValueError(f"{setting} has 1 to {_MAX_TEMPLATE_BYTES} bytes")
    if "{" in fixed or "}" in fixed:
        raise ValueError(f"{setting} has a brace without its other half")
    if "+" in fixed or "#" in fixed or any(unicodedata.category(c) in _UNSAFE for c in fixed):
        raise ValueError(f"{setting} has + or #, or a control character; a message's topic has none of them")
    if template.startswith("$"):
        raise ValueError(f"{setting} begins with $, which is the broker's own")


def topic_of(template: str, values: Mapping[str, str]) -> str:
    """The topic of one message.

    Args:
        template: as `check_topic` takes it.
        values: for its placeholders.
    """
    return _PLACEHOLDER.sub(lambda match: _level(values[match[1]]), template)


@functools.lru_cache(4096)
def _level(text: str) -> str:
    """A text as part of one level: what means something in a topic, or nothing at all, is percent-encoded.

    Two texts never become one, unless one of them is empty: that is a dash.
    """
    if not text:
        return _EMPTY
    return "".join(_encoded(c) if c in _SPECIAL or unicodedata.category(c) in _UNSAFE else c for c in text)


def _encoded(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode(errors="surrogatepass"))
