"""Who subscribes to answers: a bounded number of readers of the hub, which wait for what comes next.

    keep(answers) --> Hub --wake, every 100 ms at most--> Subscription.next --> HTTP or gRPC, as its client reads

A subscriber has nothing of its own but a position. One that does not read waits in its own write, and costs nothing
when an answer is kept.
"""

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bitneck.errors import BitneckError, Overloaded, Unauthenticated, Unavailable
from bitneck_cloud.access.bearers import BearerTokens, Holder
from bitneck_cloud.answers.document import MapForm, Published
from bitneck_cloud.answers.filters import AnswerFilter, Wanted
from bitneck_cloud.answers.hub import Hub, Missed
from bitneck_cloud.fleet.patterns import Groups
from bitneck_cloud.observe.audit import record
from bitneck_cloud.observe.metrics import Metrics

__all__ = ["Newest", "News", "Subscription", "Subscriptions"]

_PAUSE_S = 0.1
"""Seconds between two wakings: of many answers a second, several go to a subscriber at once."""
_MOST, _LOOK_AT = 128, 1024
"""Answers that a subscriber gets at once, and that are looked at for it in one go. A server with 1,000 frames a second
has 100 of them between two wakings: they go together."""
_MOST_CHARACTERS = 1 << 18
"""Of the documents that a subscriber gets at once, unless one alone is longer."""


@dataclass(frozen=True, slots=True)
class News:
    """What a subscriber is to be told.

    Attributes:
        answers: id and document of each.
        missed: comes before them; None for nothing.
        missed_upto: id of the last answer that is gone.
        upto: id up to which the subscriber has seen everything, once it has this.
        position: number of the answer that comes next.
        written: what a transport has made of it, for all that get the same; see `Newest`.
    """

    answers: tuple[tuple[str, str], ...]
    missed: Missed | None
    missed_upto: str
    upto: str
    position: int
    written: list[bytes] = field(default_factory=list)


@dataclass(slots=True)
class Newest:
    """What a subscriber was told last, for others that want all answers too, and have come as far.

    Attributes:
        asked: form of class maps, number of the first answer, and the number that came after the newest one.
        news: for it.
    """

    asked: tuple[MapForm, int, int] | None = None
    news: News | None = None


class Subscription:
    """One subscriber. `close` it in the end.

    Attributes:
        holder: of its token; None where none is needed.
        sent: answers that it got.
        missed: answers that it was told it can get no more.

    Args:
        number: for the log.
        hub: where it reads.
        wanted: says which answers it gets.
        form: of class maps.
        position: where it begins.
        gone: what it has missed before it began.
        holder: of its token.
        who: the caller, for the log.
        metrics: counts what it missed.
        newest: what others were told.
    """

    def __init__(
        self,
        number: int,
        hub: Hub,
        wanted: AnswerFilter,
        form: MapForm,
        *,
        position: int,
        gone: Missed | None,
        holder: Holder | None,
        who: str | None,
        metrics: Metrics,
        newest: Newest,
    ) -> None:
        self.holder = holder
        self.number = number
        self.who = who
        self.sent = 0
        self.missed = 0
        self._hub = hub
        self._wanted = wanted
        self._form = form
        self._position = position
        self._gone = gone
        self._ended: BitneckError | None = None
        self._at_once = False
        self._metrics = metrics
        self._newest = newest
        self._waiter: asyncio.Future[None] | None = None

    @property
    def upto(self) -> str:
        """Id up to which it has seen everything."""
        return self._hub.id_of(self._position - 1)

    async def next(self, within_s: float) -> News:
        """What is new, as soon as something is; nothing new if nothing comes in time.

        Args:
            within_s: seconds.

        Raises:
            BitneckError: why the subscription is over, once everything before its end was told.
        """
        loop = asyncio.get_running_loop()
        limit = loop.time() + within_s
        while not self._at_once:
            if (told := self._as_others()) is not None:
                return told
            reading = self._hub.read(self._position, self._wanted, most=_MOST, look_at=_LOOK_AT)
            if self._gone is not None or reading.missed is not None or reading.answers:
                return await self._news(reading.answers, reading.position, reading.missed)
            self._position = reading.position
            if self._position < self._hub.end:  # there are more to look at: let others go first
                await asyncio.sleep(0)
            elif self._ended is not None:
                raise self._ended
            elif (left := limit - loop.time()) <= 0 or not await self._woken(left):
                return News((), None, "", self.upto, self._position)
        raise self._ended or Unavailable("the subscription is over")

    def _as_others(self) -> News | None:
        """What another subscriber was told, if it is the same for this one."""
        newest = self._newest
        if newest.asked != (self._form, self._position, self._hub.end):
            return None
        if newest.news is None or self._gone is not None or not self._wanted.takes_all:
            return None
        self._position = newest.news.position
        self.sent += len(newest.news.answers)
        return newest.news

    async def _news(self, answers: tuple[Published, ...], position: int, missed: Missed | None) -> News:
        missed, self._gone = self._gone or missed, None
        asked = self._form, self._position, self._hub.end
        documents: list[tuple[str, str]] = []
        characters = 0
        for published in answers:
            text = await self._text(published)
            characters += len(text)
            if documents and characters > _MOST_CHARACTERS:
                position = published.number
                break
            documents.append((self._hub.id_of(published.number), text))
        self._position = position
        self.sent += len(documents)
        missed_upto = ""
        if missed is not None:
            self.missed += missed.count or 0
            self._metrics.missed_answers(missed.count or 0)
            missed_upto = self._hub.id_of(missed.before - 1)
        news = News(tuple(documents), missed, missed_upto, self.upto, position)
        if missed is None and self._wanted.takes_all:
            self._newest.asked, self._newest.news = asked, news
        return news

    async def _text(self, published: Published) -> str:
        made = published.made(self._form)
        if made is not None:
            return made
        if published.takes_long(self._form):
            made = await asyncio.to_thread(published.text, self._form)
        else:
            made = published.text(self._form)
        self._hub.count(published)
        return made

    async def _woken(self, within_s: float) -> bool:
        """Whether something came in time."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(within_s):
                await self._waiter
        except TimeoutError:
            return False
        finally:
            self._waiter = None
        return True

    def wake(self) -> None:
        """Something is new, perhaps."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def end(self, why: BitneckError, *, at_once: bool = False) -> None:
        """End it.

        Args:
            why: for its client.
            at_once: without what is new.
        """
        self._ended = self._ended or why
        self._at_once = self._at_once or at_once
        self.wake()


class Subscriptions:
    """The subscribers of one server, on one event loop.

    Args:
        hub: keeps the answers.
        most: subscribers at once.
        metrics: counts what happens.
        heartbeat_s: seconds after which a subscriber without news gets a sign of life.
        stall_s: seconds that a subscriber may leave one message unread; 0 for ever.
        groups: of clients, for filters.
    """

    def __init__(
        self, hub: Hub, *, most: int, metrics: Metrics, heartbeat_s: float, stall_s: float, groups: Groups
    ) -> None:
        self.hub = hub
        self._groups = groups
        self.heartbeat_s = heartbeat_s
        self.stall_s = stall_s
        self._most = most
        self._metrics = metrics
        self._open: dict[int, Subscription] = {}
        self._numbers = itertools.count(1)
        self._draining: BitneckError | None = None
        self._woke = -1.0
        self._waking: asyncio.TimerHandle | None = None
        self._newest = Newest()

    def __len__(self) -> int:
        """Subscribers now."""
        return len(self._open)

    def open(
        self,
        wanted: Wanted,
        labels: Mapping[str, Sequence[str]],
        *,
        form: MapForm,
        after: str,
        holder: Holder | None,
        who: str | None = None,
    ) -> Subscription:
        """A new subscriber.

        Args:
            wanted: by it.
            labels: names of the classes of each served model.
            form: of class maps.
            after: see `Hub.begin`.
            holder: of its token; None where none is needed.
            who: the caller, for the log; None for the one that the context knows.

        Raises:
            InvalidConfig, UnknownModel: see `AnswerFilter`, its `check_served`, and `Hub.begin`.
            Overloaded: there are too many subscribers.
            Unavailable: the server is stopping.
        """
        if self._draining is not None:
            raise self._draining
        chosen = AnswerFilter(wanted, self._groups)
        chosen.check_served(labels)
        position, gone = self.hub.begin(after)
        if len(self._open) >= self._most:
            raise Overloaded(f"{self._most} subscribers are there already; end one, or raise max_subscribers")
        number = next(self._numbers)
        subscription = Subscription(
            number, self.hub, chosen, form, position=position, gone=gone, holder=holder, who=who, metrics=self._metrics,
            newest=self._newest,
        )  # fmt: skip
        self._open[number] = subscription
        record("subscription begin", f"subscription {number}", who=who, after={"map": form, **_filled(wanted)})
        return subscription

    def close(self, subscription: Subscription) -> None:
        """A subscriber is gone."""
        if self._open.pop(subscription.number, None) is None:
            return
        before = {"sent": subscription.sent, "missed": subscription.missed}
        record("subscription end", f"subscription {subscription.number}", who=subscription.who, before=before)

    def keep(self, answers: Sequence[Published]) -> None:
        """Take answers that were sent to their devices, and wake who waits for them."""
        self.hub.keep(answers)
        if not self._open or self._waking is not None:
            return
        loop = asyncio.get_running_loop()
        wait_s = max(0.0, self._woke + _PAUSE_S - loop.time())
        self._waking = loop.call_later(wait_s, self._wake)

    def _wake(self) -> None:
        self._waking = None
        self._woke = asyncio.get_running_loop().time()
        for subscription in self._open.values():
            subscription.wake()

    def end_revoked(self, tokens: BearerTokens) -> None:
        """End the subscriptions whose token is valid no more."""
        for subscription in list(self._open.values()):
            holder = subscription.holder
            if holder is None and not tokens.needed:
                continue
            if holder is None or not tokens.valid(holder):
                subscription.end(Unauthenticated(f"the token of {holder} is not valid any more"), at_once=True)

    def drain(self, reason: str) -> None:
        """End every subscription, once it has what is there. New ones are refused from now on."""
        self._draining = Unavailable(reason)
        for subscription in list(self._open.values()):
            subscription.end(self._draining)


def _filled(wanted: Wanted) -> dict[str, object]:
    """What a subscriber asks for, without what it leaves open."""
    fields = {name: getattr(wanted, name) for name in ("client", "model", "session", "classes", "min_score")}
    return {name: value for name, value in fields.items() if value}
