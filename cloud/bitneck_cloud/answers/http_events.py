"""``GET /v1/answers``: answers as server-sent events."""

import json
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import FastAPI, Header, Query, Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from bitneck.errors import BitneckError
from bitneck_cloud.answers.document import MapForm
from bitneck_cloud.answers.filters import Wanted
from bitneck_cloud.answers.hub import Missed
from bitneck_cloud.answers.subscriptions import News, Subscription, Subscriptions
from bitneck_cloud.faults import public_text
from bitneck_cloud.sessions.registry import Registry

__all__ = ["add_answers"]

_EVENTS = "text/event-stream"
_RETRY_MS = 2000
"""Milliseconds after which a client connects again."""
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""No proxy keeps an event back."""
_NONE: list[str] = []


def add_answers(
    app: FastAPI,
    subscriptions: Subscriptions,
    registry: Registry,
    guarded: Sequence[Any],
    problems: dict[int | str, dict[str, Any]],
) -> None:
    """Add the route.

    Args:
        app: the application.
        subscriptions: to answers.
        registry: models, for the names of their classes.
        guarded: what every route depends on.
        problems: what every route may answer.
    """
    events: dict[int | str, dict[str, Any]] = {
        200: {"description": "events: answer, missed, end", "content": {_EVENTS: {}}}
    }

    @app.get(
        "/v1/answers", dependencies=guarded, responses=problems | events, tags=["answers"],
        response_class=StreamingResponse,
    )  # fmt: skip
    async def answers(
        request: Request,
        client: Annotated[list[str], Query(description="a client's name, a pattern, or @GROUP")] = _NONE,
        model: Annotated[list[str], Query(description="id of a model, or a pattern")] = _NONE,
        session: Annotated[list[str], Query(description="id of a session")] = _NONE,
        classes: Annotated[
            list[str], Query(alias="class", description="name of a class, a pattern, or an index")
        ] = _NONE,
        min_score: Annotated[
            float, Query(ge=0, le=1, description="least score, or share of a class map, of such a class")
        ] = 0.0,
        map_form: Annotated[MapForm, Query(alias="map", description="form of class maps")] = MapForm.NONE,
        after: Annotated[str, Query(description="id of the last answer that you have; 0 for all that is kept")] = "",
        last_event_id: Annotated[str, Header(description="the same; it counts more than after")] = "",
    ) -> StreamingResponse:
        """Every answer from now on, or from an earlier one on, as server-sent events."""
        wanted = Wanted(
            client=tuple(client),
            model=tuple(model),
            session=tuple(session),
            classes=tuple(classes),
            min_score=min_score,
        )
        subscription = subscriptions.open(
            wanted,
            {name: served.labels for name, served in registry.models.items()},
            form=map_form,
            after=last_event_id or after,
            holder=getattr(request.state, "holder", None),
        )
        return _Events(subscriptions, subscription)


class _Events(StreamingResponse):
    """The events of one subscription. It ends when its client goes, or the subscription is over."""

    def __init__(self, subscriptions: Subscriptions, subscription: Subscription) -> None:
        super().__init__(_events(subscription, subscriptions.heartbeat_s), headers=_HEADERS, media_type=_EVENTS)
        self._subscriptions = subscriptions
        self._subscription = subscription

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._subscriptions.close(self._subscription)


async def _events(subscription: Subscription, heartbeat_s: float) -> AsyncIterator[bytes]:
    # An event without data is none: it only sets the id from which the client goes on.
    yield f": answers\nretry: {_RETRY_MS}\nid: {subscription.upto}\n\n".encode()
    try:
        while True:
            news = await subscription.next(heartbeat_s)
            if not news.written:
                news.written.append(_written(news))
            yield news.written[0]
    except BitneckError as exc:
        yield _event("end", json.dumps({"reason": public_text(exc)}), subscription.upto).encode()


def _written(news: News) -> bytes:
    parts = [_event("answer", text, number) for number, text in news.answers]
    if news.missed is not None:
        parts.insert(0, _event("missed", _missed(news.missed), news.missed_upto))
    return ("".join(parts) or f": no news\nid: {news.upto}\n\n").encode()


def _event(name: str, data: str, upto: str) -> str:
    """An event. Its data is JSON in ASCII, so it has one line."""
    return f"event: {name}\ndata: {data}\nid: {upto}\n\n"


def _missed(missed: Missed) -> str:
    return json.dumps({"count": missed.count, "reason": missed.reason})
