"""Which answers a subscriber or a sink wants: by client, model, session, class and score. Pure."""

import difflib
import functools
import glob
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from bitneck.errors import InvalidConfig, UnknownModel
from bitneck.wire.messages import Classification
from bitneck_cloud.answers.document import Published
from bitneck_cloud.fleet.patterns import Groups, Pattern

__all__ = ["MAX_VALUES", "AnswerFilter", "Wanted"]

MAX_VALUES = 64
"""Values that one filter may have."""
_MAX_WILD = 2048
"""Patterns with a wildcard that a filter of clients may have, those of its groups included: each costs a new name one
to eight microseconds on the event loop."""
_MAX_CHARACTERS = 256
"""Of a session's id."""
_MAX_VERDICTS = 4096
"""Names whose verdict is remembered: thousands of patterns take milliseconds, and names repeat."""
_INDEX_DIGITS = 9
"""That a class's index has at most."""
_NEAREST = 3
"""Names that an error message proposes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is asked for. Of several values of one field, one has to fit; an empty field fits all.

    Attributes:
        client: names of clients, patterns, or ``@`` and the name of a group; see `bitneck_cloud.fleet.patterns`.
        model: ids of models, or patterns.
        session: ids of sessions.
        classes: names of classes, patterns, or indices. A number is an index; ``[7]`` is a class with the name 7.
        min_score: least score of a wanted class, or its least share of a class map, 0 to 1. Without classes, that of
            the best class.
    """

    client: tuple[str, ...] = ()
    model: tuple[str, ...] = ()
    session: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    min_score: float = 0.0


class AnswerFilter:
    """Says of each answer whether it is wanted.

    Args:
        wanted: by the subscriber or sink.
        groups: of clients.

    Attributes:
        by_class: whether it looks at the classes of an answer.
        takes_all: whether nothing is filtered.

    Raises:
        InvalidConfig: too many values or patterns, a refused pattern, no such group, or a score beyond 0 to 1.
    """

    def __init__(self, wanted: Wanted, groups: Groups) -> None:
        for field in ("client", "model", "session", "classes"):
            if (count := len(getattr(wanted, field))) > MAX_VALUES:
                name = "class" if field == "classes" else field
                raise InvalidConfig(f"{count} values of {name}, at most {MAX_VALUES}; use a pattern, or none")
        if any(len(value) > _MAX_CHARACTERS for value in wanted.session):
            raise InvalidConfig(f"a value of session has at most {_MAX_CHARACTERS} characters")
        if not 0.0 <= wanted.min_score <= 1.0:
            raise InvalidConfig(f"min_score {wanted.min_score:g}: give 0 to 1")
        self._models = [Pattern(text) for text in dict.fromkeys(wanted.model)]
        self._classes = [_OfClass(text) for text in dict.fromkeys(wanted.classes)]
        self._of_model = _any_of(self._models, open_to_all=not wanted.model)
        clients = dict.fromkeys(it for text in dict.fromkeys(wanted.client) for it in groups.clients(text).patterns)
        if (count := sum(not pattern.exact for pattern in clients)) > _MAX_WILD:
            raise InvalidConfig(
                f"{count} patterns of clients, those of groups included; at most {_MAX_WILD} may have wildcards: "
                "give fewer groups"
            )
        self._of_client = _any_of(tuple(clients), open_to_all=not wanted.client)
        self._of_class = _any_class_of(self._classes)
        self._sessions = frozenset(wanted.session)
        self._min_score = wanted.min_score
        self.by_class = bool(wanted.classes) or wanted.min_score > 0.0
        self.takes_all = wanted == Wanted()

    def check_served(self, labels: Mapping[str, Sequence[str]]) -> None:
        """Refuse what fits no answer of the served models.

        Args:
            labels: names of the classes of each served model, by its id.

        Raises:
            InvalidConfig: no served model has a class of this name or index.
            UnknownModel: a model that is not served.
        """
        for pattern in self._models:
            if not any(map(pattern.matches, labels)):
                raise UnknownModel(f"no model {pattern.text[:80]!r} is served; there are: {', '.join(labels)}")
        meant = [names for model, names in labels.items() if self._of_model(model)]
        for wanted in self._classes:
            if not any(wanted.matches(index, name) for names in meant for index, name in enumerate(names)):
                raise InvalidConfig(f"no served model has a class {wanted.text[:80]!r}; {_hint(wanted.text, meant)}")

    def takes_client(self, client: str, model: str) -> bool:
        """Whether it takes answers of this client and model at all.

        Args:
            client: cleaned name.
            model: id.
        """
        return self._of_model(model) and self._of_client(client)

    def takes(self, client: str, model: str, session: str, found: Iterable[tuple[int, str, float]]) -> bool:
        """Whether an answer is wanted.

        Args:
            client: cleaned name.
            model: id.
            session: id.
            found: index, name, and score or share of each class of the answer; only read if `by_class`.
        """
        if not self._of_model(model) or (self._sessions and session not in self._sessions):
            return False
        if not self._of_client(client):
            return False
        return not self.by_class or any(
            score >= self._min_score and self._of_class(index, name) for index, name, score in found
        )

    def __call__(self, published: Published) -> bool:
        """Whether the answer is wanted."""
        if self.takes_all:
            return True
        answered = published.answered
        output = answered.output
        found: Iterable[tuple[int, str, float]]
        if isinstance(output, Classification):
            found = ((each.index, each.name, each.score) for each in output.labels)
        else:
            found = ((each.index, each.name, each.share) for each in output.classes)
        return self.takes(published.client, answered.model, answered.origin.session, found)


class _OfClass:
    """A value of the field ``class``: an index, or a pattern of names."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._index = int(text) if text.isascii() and text.isdigit() and len(text) <= _INDEX_DIGITS else None
        self._pattern = Pattern(text)

    def matches(self, index: int, name: str) -> bool:
        return index == self._index if self._index is not None else self._pattern.matches(name)


def _any_of(patterns: Sequence[Pattern], *, open_to_all: bool) -> Callable[[str], bool]:
    """Whether one of the patterns fits a name; or every name does."""
    if open_to_all:
        return lambda _: True
    names = frozenset(pattern.text for pattern in patterns if pattern.exact)
    wild = [pattern for pattern in patterns if not pattern.exact]
    return functools.lru_cache(_MAX_VERDICTS)(lambda name: name in names or any(it.matches(name) for it in wild))


def _any_class_of(classes: Sequence[_OfClass]) -> Callable[[int, str], bool]:
    if not classes:
        return lambda _index, _name: True
    return functools.lru_cache(_MAX_VERDICTS)(lambda index, name: any(it.matches(index, name) for it in classes))


def _hint(value: str, models: Sequence[Sequence[str]]) -> str:
    """What to write in place of a class that no model has."""
    known = {name for labels in models for name in labels}
    near = [_written(name) for name in difflib.get_close_matches(value[:80], known, _NEAREST)]
    if near:
        return f"the nearest names are {', '.join(map(repr, near))}"
    return f"indices are 0 to {max((len(labels) for labels in models), default=0) - 1}"


def _written(name: str) -> str:
    """The pattern that stands for a class's name and nothing else."""
    return f"[{name[0]}]{name[1:]}" if name.isascii() and name.isdigit() else glob.escape(name)
