"""Patterns of names, as shells have them (globs), and which of two is more specific. Pure.

    *       any characters, also none
    ?       one character
    [abc]   one of these; [a-z] a range; [!abc] one that is none of these; [*] the character itself

Upper and lower case differ. A pattern stands for the whole name.
"""

import fnmatch
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from bitneck.errors import InvalidConfig
from bitneck.ids import MAX_CLIENT_CHARACTERS, check_id
from bitneck.text import clean_text

__all__ = ["MAX_GROUPS", "MAX_PATTERNS_OF_GROUP", "MAX_PATTERN_CHARACTERS", "Clients", "Groups", "Pattern"]

MAX_PATTERN_CHARACTERS = MAX_CLIENT_CHARACTERS
MAX_GROUPS = 256
MAX_PATTERNS_OF_GROUP = 1024
_GROUP_MARK = "@"
_WILD = re.compile(r"\[!?+\]?+[^\]]*\]|[*?]")
_NOTHING, _PATTERN, _GROUP, _EXACT = range(4)


@dataclass(frozen=True, slots=True)
class Pattern:
    """A pattern of names.

    Attributes:
        text: as it was written.
        specificity: the greater, the more specific: a name without wildcards, then patterns by how many characters
            they give, then ``*``.

    Raises:
        InvalidConfig: it is empty, too long, or has characters that no cleaned name has.
    """

    text: str
    specificity: tuple[int, int] = field(init=False, compare=False, repr=False)
    _match: Callable[[str], object] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= len(self.text) <= MAX_PATTERN_CHARACTERS:
            raise InvalidConfig(f"a pattern has 1 to {MAX_PATTERN_CHARACTERS} characters, got {len(self.text)}")
        if clean_text(self.text) != self.text:
            raise InvalidConfig(f"the pattern {self.text!r:.80} has control characters, which no client's name has")
        literal = len(_WILD.sub("", self.text))
        rank = _EXACT if _WILD.search(self.text) is None else _PATTERN if self.text.strip("*") else _NOTHING
        object.__setattr__(self, "specificity", (rank, literal if rank == _PATTERN else 0))
        # What stands before each `*` is not tried again once it has matched: no pattern takes exponential time.
        match = self.text.__eq__ if rank == _EXACT else re.compile(fnmatch.translate(self.text)).match
        object.__setattr__(self, "_match", match)

    @property
    def exact(self) -> bool:
        """Whether it stands for one name only, that of its text."""
        return self.specificity[0] == _EXACT

    def matches(self, name: str) -> bool:
        """Whether it stands for this name."""
        return bool(self._match(name))


@dataclass(frozen=True, slots=True)
class Clients:
    """Which clients are meant: a pattern, or ``@`` and the name of a group.

    Attributes:
        text: as it was written.
        patterns: any of them may match; none of a group that is not in the settings any more.
        specificity: see `Pattern`; a group is more specific than every pattern with a wildcard.
    """

    text: str
    patterns: tuple[Pattern, ...]
    specificity: tuple[int, int]

    def matches(self, name: str) -> bool:
        """Whether a client of this name is meant."""
        for pattern in self.patterns:  # noqa: SIM110  no generator: this runs for each rule and session
            if pattern.matches(name):
                return True
        return False


class Groups:
    """Named lists of patterns.

    Args:
        lists: patterns, by the group's name.

    Raises:
        InvalidConfig: a name or a pattern that is refused, or too many of them.
    """

    def __init__(self, lists: Mapping[str, tuple[str, ...]] | None = None) -> None:
        lists = lists or {}
        if len(lists) > MAX_GROUPS:
            raise InvalidConfig(f"there may be {MAX_GROUPS} groups, got {len(lists)}")
        for name, patterns in lists.items():
            check_id(name, "group")
            if not 1 <= len(patterns) <= MAX_PATTERNS_OF_GROUP:
                raise InvalidConfig(f"group {name}: 1 to {MAX_PATTERNS_OF_GROUP} patterns, got {len(patterns)}")
        self._groups = {name: tuple(Pattern(text) for text in patterns) for name, patterns in lists.items()}

    @property
    def lists(self) -> dict[str, list[str]]:
        """The patterns as they were written, by the group's name."""
        return {name: [pattern.text for pattern in patterns] for name, patterns in self._groups.items()}

    def clients(self, text: str, *, known: bool = True) -> Clients:
        """What a pattern or ``@GROUP`` stands for.

        Args:
            text: as it was written.
            known: refuse a group that is not there; else it stands for nobody.

        Raises:
            InvalidConfig: a pattern that is refused, or a group that is not there.
        """
        if not text.startswith(_GROUP_MARK):
            pattern = Pattern(text)
            return Clients(text, (pattern,), pattern.specificity)
        name = text.removeprefix(_GROUP_MARK)
        if known and name not in self._groups:
            raise InvalidConfig(
                f"there is no group {name[:80]!r} in the settings; there are: {', '.join(self._groups) or 'none'}. "
                "[@] stands for the character itself"
            )
        return Clients(text, self._groups.get(name, ()), (_GROUP, 0))
