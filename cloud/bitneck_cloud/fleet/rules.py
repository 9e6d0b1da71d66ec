"""Rules that give clients their rates, by patterns of the model's and the client's name. Pure.

The most specific rule counts: first by the client, then by the model, then the one that was set last. A rule that no
operating point of a session's model fits is passed over.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from bitneck.errors import InvalidConfig, UnknownRule
from bitneck_cloud.fleet.patterns import Clients, Pattern
from bitneck_cloud.sessions.rates import RatePolicy

__all__ = ["EVERYTHING", "MAX_RULES", "RateRule", "RuleBook"]

MAX_RULES = 256
EVERYTHING = "*"


@dataclass(frozen=True, slots=True, kw_only=True)
class RateRule:
    """A rate for sessions of some clients with some models.

    Attributes:
        model: names of models.
        clients: names of clients.
        policy: the rate.
        since: when it was set, RFC 3339; empty for a rule of the settings.
        by: who set it.
        number: the greater, the later it was set.
    """

    model: Pattern
    clients: Clients
    policy: RatePolicy
    since: str = ""
    by: str = ""
    number: int = 0

    @property
    def key(self) -> tuple[str, str]:
        """What it is known by: there is one rule for the same two patterns."""
        return self.model.text, self.clients.text

    def matches(self, model: str, client: str) -> bool:
        """Whether it is for this client's sessions with this model."""
        return self.clients.matches(client) and self.model.matches(model)

    @property
    def rank(self) -> tuple[tuple[int, int], tuple[int, int], int]:
        """Of two rules for a session, the one of the greater rank counts."""
        return self.clients.specificity, self.model.specificity, self.number


class RuleBook:
    """All rules, in the order in which they count. A change gives a new book.

    Args:
        rules: in any order.

    Raises:
        InvalidConfig: too many, or two with the same patterns.
    """

    def __init__(self, rules: Iterable[RateRule] = ()) -> None:
        self.rules = tuple(sorted(rules, key=lambda rule: rule.rank, reverse=True))
        if len(self.rules) > MAX_RULES:
            raise InvalidConfig(f"there may be {MAX_RULES} rules; delete one, or use a pattern or a group")
        self._by_key = {rule.key: rule for rule in self.rules}
        if len(self._by_key) < len(self.rules):
            twice = next(rule for rule in self.rules if self._by_key[rule.key] is not rule)
            raise InvalidConfig(f"two rules have the model {twice.model.text!r} and the clients {twice.clients.text!r}")

    def matching(self, model: str, client: str) -> Iterator[RateRule]:
        """The rules for a client's sessions with a model, the most specific first."""
        return (rule for rule in self.rules if rule.matches(model, client))

    def get(self, key: tuple[str, str]) -> RateRule | None:
        """The rule with these patterns of model and clients."""
        return self._by_key.get(key)

    def put(self, rule: RateRule) -> "RuleBook":
        """A book with this rule, as the newest, in place of the one with the same patterns.

        Raises:
            InvalidConfig: too many rules.
        """
        others = [other for other in self.rules if other.key != rule.key]
        newest = max((other.number for other in self.rules), default=0) + 1
        return RuleBook([*others, replace(rule, number=newest)])

    def without(self, key: tuple[str, str]) -> "RuleBook":
        """A book without the rule of these patterns.

        Raises:
            UnknownRule: there is none.
        """
        if key not in self._by_key:
            raise UnknownRule(
                f"no rule has the model {key[0]!r:.80} and the clients {key[1]!r:.80}; GET /v1/rate lists them"
            )
        return RuleBook(rule for rule in self.rules if rule.key != key)
