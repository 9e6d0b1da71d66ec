"""``Subscribe``: answers as a gRPC server stream."""

import asyncio
from typing import Any

from bitneck.errors import BitneckError, DeadlineExceeded, InvalidConfig
from bitneck.v2 import inference_pb2 as pb
from bitneck_cloud.aborting import abort
from bitneck_cloud.access.bearers import BearerTokens
from bitneck_cloud.access.callers import bearer_token, host_of
from bitneck_cloud.answers.document import MapForm
from bitneck_cloud.answers.filters import Wanted
from bitneck_cloud.answers.subscriptions import News, Subscriptions
from bitneck_cloud.sessions.registry import Registry

__all__ = ["AnswerStream"]

_FORMS = {pb.MAP_FORM_NONE: MapForm.NONE, pb.MAP_FORM_RUNS: MapForm.RUNS, pb.MAP_FORM_PNG: MapForm.PNG}


class AnswerStream:
    """Serves ``Subscribe``. `bitneck_cloud.access.security.ReaderTokens` has checked the caller's token.

    Args:
        subscriptions: to answers.
        registry: models, for the names of their classes.
        operators: tokens of the control API.
    """

    def __init__(self, subscriptions: Subscriptions, registry: Registry, operators: BearerTokens) -> None:
        self._subscriptions = subscriptions
        self._registry = registry
        self._operators = operators

    async def serve(self, request: pb.SubscribeRequest, context: Any) -> None:
        """Write events until the client goes, does not read in time, or the subscription is over."""
        holder = self._operators.find(bearer_token(context.invocation_metadata()))
        who = f"{holder} ({host_of(context.peer() or '')})"
        failure: BitneckError
        try:
            form = _FORMS.get(request.map)
            if form is None:
                raise InvalidConfig(f"the map form {request.map} is unknown to this server; ask for none, runs or png")
            subscription = self._subscriptions.open(
                _wanted(request),
                {name: served.labels for name, served in self._registry.models.items()},
                form=form,
                after=request.after,
                holder=holder,
                who=who,
            )
        except BitneckError as exc:
            await abort(context, exc)
        try:
            await self._write(context, pb.AnswerEvent(id=subscription.upto))
            while True:
                await self._tell(context, await subscription.next(self._subscriptions.heartbeat_s))
        except TimeoutError:
            failure = DeadlineExceeded(f"an event was not read for {self._subscriptions.stall_s:.0f} s")
        except BitneckError as exc:
            failure = exc
        finally:
            self._subscriptions.close(subscription)
        await abort(context, failure)  # gRPC cannot write a status before what the client does not read

    async def _tell(self, context: Any, news: News) -> None:
        if news.missed is not None:
            missed = pb.Missed(count=news.missed.count, reason=news.missed.reason)
            await self._write(context, pb.AnswerEvent(id=news.missed_upto, missed=missed))
        for number, text in news.answers:
            await self._write(context, pb.AnswerEvent(id=number, document=text))
        if news.missed is None and not news.answers:
            await self._write(context, pb.AnswerEvent(id=news.upto))

    async def _write(self, context: Any, event: pb.AnswerEvent) -> None:
        async with asyncio.timeout(self._subscriptions.stall_s or None):
            await context.write(event)


def _wanted(request: pb.SubscribeRequest) -> Wanted:
    return Wanted(
        client=tuple(request.client),
        model=tuple(request.model),
        session=tuple(request.session),
        classes=tuple(request.classes),
        min_score=request.min_score,
    )
