"""Which sinks want an answer, and in which form: what was found for a client, model and session is kept. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bitneck.errors import InvalidConfig, UnknownModel
from bitneck_cloud.answers.document import json_of
from bitneck_cloud.answers.filters import AnswerFilter
from bitneck_cloud.answers.sinks.settings import SinkTable
from bitneck_cloud.answers.sinks.state import Document, Entry
from bitneck_cloud.fleet.patterns import Groups

__all__ = ["Routing"]

_MOST_KEPT = 4096


@dataclass(frozen=True, slots=True)
class _Form:
    """Sinks that get the same document of an answer.

    Attributes:
        mapped: whether it has the map.
        tables: of the sinks.
        names: of them.
        fits_all: bytes that all of them take.
    """

    mapped: bool
    tables: tuple[SinkTable, ...]
    names: tuple[str, ...]
    fits_all: int


class Routing:
    """Finds the sinks that want an answer, and makes the documents for them.

    Args:
        tables: of all sinks.
        groups: of clients, for filters.

    Raises:
        InvalidConfig: a filter is refused.
    """

    def __init__(self, tables: Sequence[SinkTable], groups: Groups) -> None:
        self._tables = tuple(tables)
        self._filters = {table.name: AnswerFilter(table.wanted, groups) for table in tables}
        self._by_class = frozenset(place for place, it in enumerate(self._filters.values()) if it.by_class)
        self._places: dict[tuple[str, str, str], tuple[int, ...]] = {}
        self._forms: dict[tuple[tuple[int, ...], bool], tuple[_Form, ...]] = {}

    def check_served(self, labels: Mapping[str, Sequence[str]]) -> None:
        """Refuse a sink that no answer of the served models would ever go to.

        Args:
            labels: names of the classes of each served model, by its id.

        Raises:
            InvalidConfig: the filter of a sink has a model or class that is not served.
        """
        for name, chosen in self._filters.items():
            try:
                chosen.check_served(labels)
            except (InvalidConfig, UnknownModel) as exc:
                raise InvalidConfig(f"sink {name}: {exc}") from exc

    def takes_client(self, name: str, client: str, model: str) -> bool:
        """Whether a sink takes answers of a client and model at all.

        Args:
            name: of the sink.
            client: cleaned name.
            model: id.
        """
        return self._filters[name].takes_client(client, model)

    def entry(self, document: Document, owner: str, too_large: "Counter[str]") -> tuple[Entry | None, str]:
        """What is to be committed of an answer.

        Args:
            document: of the answer. A map has run lengths, or is null.
            owner: who sent the frame.
            too_large: counts answers that are too large for a sink, by its name.

        Returns:
            None if no sink wants it; and its JSON without a map, empty if none wants that.
        """
        wanting = self._wanting(document)
        text = ""
        bodies: list[tuple[tuple[str, ...], bytes]] = []
        for form in self._forms_of(wanting, document.get("map") is not None):
            written = json_of(document if form.mapped else _without_map(document))
            if not form.mapped:
                text = written
            body = written.encode()
            fitting = form.names
            if len(body) > form.fits_all:
                fitting = tuple(table.name for table in form.tables if len(body) <= table.max_answer_bytes)
                too_large.update(set(form.names) - set(fitting))
            if fitting:
                bodies.append((fitting, body))
        if not bodies:
            return None, text
        spool, session = document.get("spool"), document["session"]
        stream = f"spool {owner} {spool}" if spool else f"session {session}"
        return Entry(stream, document["seq"], document["number"], tuple(bodies)), text

    def _wanting(self, document: Document) -> tuple[int, ...]:
        """Places of the sinks that want an answer, among the tables."""
        facts = str(document["client"]), str(document["model"]), str(document["session"])
        if (places := self._places.get(facts)) is None:
            chosen = [self._filters[table.name] for table in self._tables]
            # Of those that choose by class, all that may want it.
            places = tuple(
                place for place, it in enumerate(chosen)
                if (it.takes_client(*facts[:2]) if it.by_class else it.takes(*facts, ()))
            )  # fmt: skip
            if len(self._places) >= _MOST_KEPT:
                self._places.clear()
            self._places[facts] = places
        asked = self._by_class.intersection(places) if self._by_class else None
        if not asked:
            return places
        found = _found(document)
        no = {place for place in asked if not self._filters[self._tables[place].name].takes(*facts, found)}
        return tuple(place for place in places if place not in no)

    def _forms_of(self, wanting: tuple[int, ...], has_map: bool) -> tuple[_Form, ...]:
        if (forms := self._forms.get((wanting, has_map))) is None:
            tables = [self._tables[place] for place in wanting]
            forms = tuple(
                _Form(mapped, chosen, tuple(it.name for it in chosen), min(it.max_answer_bytes for it in chosen))
                for mapped in (False, True)
                if (chosen := tuple(it for it in tables if (has_map and it.maps != "none") == mapped))
            )
            if len(self._forms) >= _MOST_KEPT:
                self._forms.clear()
            self._forms[wanting, has_map] = forms
        return forms


def _without_map(document: Document) -> Document:
    return document if document.get("map", "") is None else {**document, "map": None}


def _found(document: Document) -> list[tuple[int, str, float]]:
    """Index, name, and score or share of the classes in a document."""
    found = [(each["index"], each["name"], each["score"]) for each in document.get("labels") or ()]
    return found + [(each["index"], each["name"], each["share"]) for each in document.get("shares") or ()]
