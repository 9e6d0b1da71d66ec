"""Which answers a subscriber wants: by client, model, session, class and score. Pure."""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bitneck.errors import InvalidConfig, UnknownModel
from bitneck.wire.messages import Classification
from bitneck_cloud.answers.document import Published

__all__ = ["MAX_VALUES", "AnswerFilter", "Wanted"]

MAX_VALUES = 64
"""Values that one filter may have."""
_MAX_CHARACTERS = 256
"""Of a value."""
_MAX_VERDICTS = 4096
_NEAREST = 3
"""Names that an error message proposes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a subscriber asks for. Of several values of one field, one has to fit; an empty field fits all.

    Attributes:
        client: names of clients, or patterns with ``*``, ``?`` and ``[...]``.
        model: ids of models.
        session: ids of sessions.
        classes: names of classes, or their indices.
        min_score: least score of a wanted class, or its least share of a class map, 0 to 1. Without classes, that of
            the best class.
    """

    client: tuple[str, ...] = ()
    model: tuple[str, ...] = ()
    session: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    min_score: float = 0.0

    def check(self) -> None:
        """Refuse what no filter can be made of.

        Raises:
            InvalidConfig: too many values, too long ones, or a score beyond 0 to 1.
        """
        for field in ("client", "model", "session", "classes"):
            values: tuple[str, ...] = getattr(self, field)
            name = "class" if field == "classes" else field
            if len(values) > MAX_VALUES:
                raise InvalidConfig(f"{len(values)} values of {name}, at most {MAX_VALUES}; use a pattern, or none")
            if any(len(value) > _MAX_CHARACTERS for value in values):
                raise InvalidConfig(f"a value of {name} has at most {_MAX_CHARACTERS} characters")
        if not 0.0 <= self.min_score <= 1.0:
            raise InvalidConfig(f"min_score {self.min_score:g}: give 0 to 1")


class AnswerFilter:
    """Says of each answer whether it is wanted.

    Args:
        wanted: by the subscriber.
        labels: names of the classes of each served model, by its id.

    Raises:
        InvalidConfig: see `Wanted.check`; or no served model has a class of this name or index.
        UnknownModel: a model that is not served.
    """

    def __init__(self, wanted: Wanted, labels: Mapping[str, Sequence[str]]) -> None:
        wanted.check()
        for model in wanted.model:
            if model not in labels:
                raise UnknownModel(f"no model {model[:80]!r} is served; there are: {', '.join(labels)}")
        self._names = frozenset(wanted.client)
        patterns = [value for value in wanted.client if any(mark in value for mark in "*?[")]
        self._patterns = re.compile("|".join(map(fnmatch.translate, patterns))) if patterns else None
        self._verdicts: dict[str, bool] = {}  # of clients: a pattern can take a millisecond, and names repeat
        self._models = frozenset(wanted.model)
        self._sessions = frozenset(wanted.session)
        self._min_score = wanted.min_score
        meant = [names for model, names in labels.items() if not wanted.model or model in wanted.model]
        self._indices, self._classes = _classes(wanted.classes, meant)
        self._by_class = bool(wanted.classes) or wanted.min_score > 0.0

    def __call__(self, published: Published) -> bool:
        """Whether the answer is wanted."""
        answered = published.answered
        if self._models and answered.model not in self._models:
            return False
        if self._sessions and answered.origin.session not in self._sessions:
            return False
        if self._names and not self._of_client(published.client):
            return False
        return not self._by_class or self._has_class(published)

    def _of_client(self, client: str) -> bool:
        if client in self._names or self._patterns is None:
            return client in self._names
        verdict = self._verdicts.get(client)
        if verdict is None:
            if len(self._verdicts) >= _MAX_VERDICTS:
                self._verdicts.clear()
            verdict = self._verdicts[client] = self._patterns.match(client) is not None
        return verdict

    def _has_class(self, published: Published) -> bool:
        output = published.answered.output
        found: Iterable[tuple[int, str, float]]
        if isinstance(output, Classification):
            found = ((each.index, each.name, each.score) for each in output.labels)
        else:
            found = ((each.index, each.name, each.share) for each in output.classes)
        every = not self._indices and not self._classes
        return any(
            score >= self._min_score and (every or index in self._indices or name in self._classes)
            for index, name, score in found
        )


def _classes(values: Sequence[str], models: Sequence[Sequence[str]]) -> tuple[frozenset[int], frozenset[str]]:
    """Indices and names of classes. A number is an index, unless it is a name."""
    indices, names = set(), set()
    known = {name for labels in models for name in labels}
    most = max((len(labels) for labels in models), default=0)
    for value in values:
        if value in known:
            names.add(value)
        elif value.isascii() and value.isdigit() and int(value) < most:
            indices.add(int(value))
        else:
            near = difflib.get_close_matches(value[:80], known, _NEAREST)
            hint = f"the nearest names are {', '.join(map(repr, near))}" if near else f"indices are 0 to {most - 1}"
            raise InvalidConfig(f"no served model has a class {value[:80]!r}; {hint}")
    return frozenset(indices), frozenset(names)
