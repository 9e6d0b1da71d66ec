"""Which answers a sink gets. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

__all__ = ["Filter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Patterns with ``*``, ``?`` and ``[abc]``; an empty list takes everything.

    Attributes:
        clients: names of clients.
        models: names of models.
        classes: names of classes, one of which must be in the answer.
        min_score: least score, or share of the pixels, of a class that counts.
    """

    clients: Sequence[str] = ()
    models: Sequence[str] = ()
    classes: Sequence[str] = ()
    min_score: float = 0.0

    def takes_client(self, client: str, model: str) -> bool:
        """Whether it takes answers of this client and model at all."""
        return _any_of(client, self.clients) and _any_of(model, self.models)

    def takes(self, document: Mapping[str, Any]) -> bool:
        """Whether it takes an answer, given as its document."""
        if not self.takes_client(str(document["client"]), str(document["model"])):
            return False
        if not self.classes and self.min_score <= 0:
            return True
        found = [(each["name"], each["score"]) for each in document.get("labels") or ()]
        found += [(each["name"], each["share"]) for each in document.get("shares") or ()]
        return any(value >= self.min_score and _any_of(str(name), self.classes) for name, value in found)


def _any_of(name: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)
