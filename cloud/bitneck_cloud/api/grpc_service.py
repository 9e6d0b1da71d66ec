"""The gRPC service: manifests and files, single frames, and the bidirectional stream."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from bitneck.errors import BitneckError, BundleMismatch, DeadlineExceeded, Unauthenticated, Unavailable, UnknownFile
from bitneck.ids import check_id
from bitneck.v2 import inference_pb2 as pb
from bitneck.v2 import inference_pb2_grpc as pb_grpc
from bitneck.wire.compression import deflated
from bitneck.wire.frames import check_frame
from bitneck.wire.messages import GoAway, NewBundle, Open, Opened, SetPoint
from bitneck_cloud.aborting import abort
from bitneck_cloud.access.bearers import BearerTokens
from bitneck_cloud.access.callers import caller_of
from bitneck_cloud.access.limits import CallerLimits
from bitneck_cloud.answers.grpc_events import AnswerStream
from bitneck_cloud.api.grpc_peer import Context, GrpcPeer
from bitneck_cloud.api.wire import frame_from_wire, result_to_wire, to_wire
from bitneck_cloud.engine.engine import Engine
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_cloud.observe.audit import record
from bitneck_cloud.observe.logs import REQUEST_ID_HEADER, new_request_id
from bitneck_cloud.observe.metrics import Metrics
from bitneck_cloud.observe.tracing import FrameTracer
from bitneck_cloud.sessions.answering import Answering
from bitneck_cloud.sessions.conversation import Conversation
from bitneck_cloud.sessions.jobs import job_of, origin_of, result_of
from bitneck_cloud.sessions.rates import link_limit_kbps
from bitneck_cloud.sessions.registry import Registry, new_session_id
from bitneck_cloud.sessions.session import Event, Session, StreamState

__all__ = ["InferenceService"]

_LOG = logging.getLogger(__name__)
_CHUNK_BYTES = 64 * 1024


class InferenceService(pb_grpc.SplitInferenceServicer):
    """`bitneck.v2.SplitInference` on one event loop.

    Args:
        registry: models and sessions.
        engine: computes the frames.
        metrics: counts what happens.
        tracer: takes the frames' spans.
        tokens: of the devices, to know callers by name.
        limits: of the callers.
        answers: serves subscriptions.
        idle_s: see `CloudSettings`.
        stall_s: likewise.
        similar_bytes: likewise.
        tls: whether connections are encrypted.
        earlier: loads the generation of a model, by its name, that has a bundle's id; for the frames of spools.
        look: finds out whether devices can fetch the candidate of a model now, before one gets its manifest.
    """

    def __init__(
        self,
        registry: Registry,
        engine: Engine,
        metrics: Metrics,
        tracer: FrameTracer,
        tokens: BearerTokens,
        limits: CallerLimits,
        answers: AnswerStream,
        *,
        idle_s: float,
        stall_s: float,
        similar_bytes: int,
        tls: bool = False,
        earlier: Callable[[str, str], Awaitable[ServedModel]] | None = None,
        look: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        self._registry = registry
        self._engine = engine
        self._metrics = metrics
        self._tracer = tracer
        self._tokens = tokens
        self._limits = limits
        self._answers = answers
        self._idle_s = idle_s
        self._stall_s = stall_s
        self._similar_bytes = similar_bytes
        self._tls = tls
        self._streams: dict[str, Conversation] = {}
        self._earlier = earlier
        self._look = look
        self._draining = False

    async def GetManifest(self, request: pb.GetManifestRequest, context: Context) -> pb.GetManifestResponse:  # noqa: N802
        """The manifest that a client gets of a served model, compressed for one that takes it so."""
        await _identify(context)
        try:
            served = self._registry.offered(request.model, request.client)
            if await self._away(served.name, served.bundle.bundle_id):
                served = self._registry.offered(request.model, request.client)
            bundle = served.bundle
        except BitneckError as exc:
            await abort(context, exc)
        sent, size = deflated(bundle.manifest_json) if request.deflate else (bundle.manifest_json, 0)
        return pb.GetManifestResponse(
            model=bundle.manifest.name,
            bundle_id=bundle.bundle_id,
            manifest_json=sent,
            size=size,
            unix_us=time.time_ns() // 1000,
        )

    async def FetchFile(  # type: ignore[override]  # noqa: N802  grpc.aio also takes a coroutine that writes
        self, request: pb.FetchFileRequest, context: Context
    ) -> None:
        """One file of the edge's half, or a part of it, in chunks."""
        await _identify(context)
        try:
            served = self._fetched_from(request)
            size = served.manifest.files[request.path].size
            position = min(request.offset, size)
            end = min(position + request.length, size) if request.length else size
            while position < end:
                data = await self._part(served, request.path, position, min(_CHUNK_BYTES, end - position))
                position += len(data)
                sent, packed = await asyncio.to_thread(deflated, data) if request.deflate else (data, 0)
                async with self._in_time():
                    await context.write(pb.FileChunk(data=sent, size=packed))
        except TimeoutError:
            await abort(context, DeadlineExceeded(f"{request.path}: a chunk was not read for {self._stall_s:.0f} s"))
        except BitneckError as exc:
            await abort(context, exc)

    async def _part(self, served: ServedModel, path: str, offset: int, most: int) -> bytes:
        """A part of a file for a device; see `EdgeFiles.read`.

        Raises:
            BundleMismatch: the bundle is a candidate whose folder is away: the client gets another one.
            Unavailable: it cannot be read now.
        """
        try:
            return await served.files.read(path, offset, most)
        except Unavailable as exc:
            _LOG.error("a device cannot fetch a file of %s, %s: %s", served.name, served.bundle.bundle_id, exc)
            if await self._away(served.name, served.bundle.bundle_id):
                raise BundleMismatch("the files of this bundle are away; get the manifest again") from exc
            raise Unavailable(
                f"this server cannot read {path} of its bundle now, and its log says why; try again later"
            ) from exc

    async def _away(self, model: str, bundle_id: str) -> bool:
        """Whether a bundle is a candidate that devices cannot fetch now."""
        candidate = self._registry.candidate(model)
        if self._look is None or candidate is None or candidate.bundle.bundle_id != bundle_id:
            return False
        await self._look(model)
        return self._registry.withheld(model)

    def _fetched_from(self, request: pb.FetchFileRequest) -> ServedModel:
        """The generation whose file a client wants."""
        served = self._registry.model(request.model)
        candidate = self._registry.candidate(served.name)
        if candidate is not None and request.bundle_id == candidate.bundle.bundle_id:
            served = candidate
        if request.bundle_id != served.bundle.bundle_id:  # older generations are served, but not to new devices
            raise BundleMismatch(
                f"the client has bundle {request.bundle_id[:80] or '(none)'}, this server has "
                f"{served.bundle.bundle_id}; get its manifest and files again"
            )
        if request.path not in served.manifest.files_for("edge"):
            raise UnknownFile(f"the bundle {served.name} hands out no file {request.path[:80]!r}")
        return served

    async def Infer(self, request: pb.InferRequest, context: Context) -> pb.InferResponse:  # noqa: N802
        """One frame, one answer."""
        received = time.time()
        await _identify(context)
        frame = frame_from_wire(request.frame)
        known = caller_of(context, self._tokens)
        caller, client = known.name, known.holder.name if known.holder is not None else ""
        name, model = "(none)", None
        try:
            self._limits.frame(caller, time.monotonic())
            self._limits.single(caller, len(frame.payload), time.monotonic())
            model = self._registry.generation(request.model, request.bundle_id)
            name = model.name
            frame = model.named(frame)
            check_frame(frame)
            model.check(frame)
            origin = origin_of(frame, client, new_session_id(), received, None)
            job = job_of(model, frame, (caller, ""), origin)
            computing = self._engine.compute(job)
            self._metrics.accepted(name, frame.point, len(frame.payload))
            computed = await computing
        except BitneckError as exc:
            self._metrics.frame(name, exc.grpc_status)
            if model is not None:
                model.count_fault(exc)
            await abort(context, exc)
        self._metrics.frame(name, "OK")
        job.count(computed)
        trace = self._tracer.parent(context.invocation_metadata())
        self._tracer.frame(name, frame.point, frame.seq, received, computed, trace)
        return pb.InferResponse(
            bundle_id=model.bundle.bundle_id, result=result_to_wire(result_of(computed, frame.seq, received))
        )

    async def Stream(  # type: ignore[override]  # noqa: N802  grpc.aio also takes a coroutine that writes
        self, request_iterator: AsyncIterator[pb.ClientMessage], context: Context
    ) -> None:
        """The normal way: Open, then frames; see the .proto."""
        state = StreamState()
        await _identify(context)
        caller = caller_of(context, self._tokens)
        peer = GrpcPeer(request_iterator, context)
        try:
            try:
                async with self._in_time():
                    opening = await anext(peer.messages())
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise DeadlineExceeded(f"no Open came within {self._stall_s:.0f} s") from None
            state.on(Event.OPEN if isinstance(opening, Open) else Event.FRAME)
            assert isinstance(opening, Open)
            if self._draining:
                raise Unavailable("the server is stopping; connect elsewhere")
            model = await self._generation(opening)
            opening.answers.check(model.manifest.task)
            admission = self._registry.open(
                model, opening.client, opening.resume_token, time.monotonic(), time.time(), caller,
                opening.spool, opening.follows,
            )  # fmt: skip
        except BitneckError as exc:
            await abort(context, exc)
        session = admission.session
        wanted = opening.references and model.kept_bytes
        session.keep(self._similar_bytes // model.kept_bytes if wanted else 0)
        self._metrics.session(model.name, admission.how)
        began = {"how": admission.how, "model": model.name, "client": session.client}
        began |= {"spool": session.spool} if session.spool else {}
        record("session begin", f"session {session.session_id}", who=caller.name, after=began)
        conversation = Conversation(
            self._engine, model, session, state, self._streams, self._metrics, self._tracer,
            idle_s=self._idle_s, stall_s=self._stall_s, caller=caller, token_number=admission.number,
            limits=self._limits, answering=Answering(opening.answers, brief=opening.brief),
        )  # fmt: skip
        conversation.enter()  # nothing that is asked of the session is missed from here on
        failure: BitneckError | None = None
        try:
            if caller.holder is not None and not self._tokens.valid(caller.holder):  # since the call began
                raise Unauthenticated(f"the token of {caller.holder} is not valid any more")
            asked = session.asked_point or ""
            if not session.told and not asked:  # `Opened` cannot say that the client chooses again
                conversation.push(SetPoint("", "asked for while the link was down"))
            session.told = True
            self._tell_if_draining(conversation)
            self._tell_of_bundle(session, conversation)
            opened = Opened(
                session_id=session.session_id,
                resume_token=admission.token,
                window=session.window,
                point=asked,
                references=session.reach,
                max_kbps=link_limit_kbps(session.policy),
            )
            async with self._in_time():
                await context.write(to_wire(opened))
            meter = peer.serve(session.window, tls=self._tls)
            if conversation.is_newest:
                session.attach(meter, time.monotonic())
            await conversation.run(peer, self._tracer.parent(context.invocation_metadata()))
        except TimeoutError:
            failure = DeadlineExceeded(f"Opened was not read for {self._stall_s:.0f} s")
        except BitneckError as exc:
            failure = exc
        finally:
            conversation.leave()
            if not self.connected(session):
                self._registry.disconnect(session, time.monotonic())
                if peer.left and not session.in_flight:  # nobody comes back to it, so it takes nobody's place
                    self._registry.forget(session.session_id)
        if isinstance(failure, Unauthenticated):
            self._registry.forget(session.session_id)
        if failure is not None:  # gRPC cannot write a status before what the client does not read: this may take long
            await abort(context, failure)

    async def Subscribe(  # type: ignore[override]  # noqa: N802  grpc.aio also takes a coroutine that writes
        self, request: pb.SubscribeRequest, context: Context
    ) -> None:
        """The answers to all devices, for a reader."""
        await _identify(context)
        await self._answers.serve(request, context)

    async def _generation(self, opening: Open) -> ServedModel:
        """The generation that a session's frames were coded for; for those of a spool, it may be of long ago."""
        if not opening.spool:
            return self._registry.generation(opening.model, opening.bundle_id)
        check_id(opening.spool, "spool")
        if self._earlier is None:
            return self._registry.generation(opening.model, opening.bundle_id)
        return await self._earlier(opening.model, opening.bundle_id)

    def push_point(self, session: Session, point: str, reason: str) -> bool:
        """Ask a session's client for another operating point, now.

        Returns:
            Whether the session is connected. If not, its client learns the point when it resumes.
        """
        stream = self._streams.get(session.session_id)
        session.told = stream is not None
        if stream is None:
            return False
        stream.push(SetPoint(point, reason, link_limit_kbps(session.policy)))
        return True

    def _in_time(self) -> asyncio.Timeout:
        """A limit for what a client has to do before its stream serves anything."""
        return asyncio.timeout(self._stall_s or None)

    def end_revoked(self) -> None:
        """End the streams of devices whose token is valid no more, and forget their sessions."""
        for conversation in list(self._streams.values()):
            holder = conversation.caller.holder
            if holder is not None and not self._tokens.valid(holder):
                conversation.expel(Unauthenticated(f"the token of {holder} is not valid any more"))

    def _tell_if_draining(self, conversation: Conversation) -> None:
        """Tell a stream that opened while the others were being told."""
        if self._draining:
            conversation.push(GoAway("the server is stopping"))

    def tell_of_bundles(self, model: str) -> int:
        """Tell the clients of a model that have another bundle than the one that they would get now.

        Returns:
            How many streams were told.
        """
        told = 0
        for session in self._registry.sessions(time.monotonic()):
            stream = self._streams.get(session.session_id)
            if stream is not None and session.model == model:
                told += self._tell_of_bundle(session, stream)
        return told

    def _tell_of_bundle(self, session: Session, stream: Conversation) -> bool:
        """The same for one session. Frames of a spool are coded already."""
        if session.spool or self._registry.suits(session.model, session.client, session.bundle_id):
            return False
        offered = self._registry.offered(session.model, session.client).bundle.bundle_id
        stream.push(NewBundle(offered, f"{session.client[:80]} gets this bundle now"))
        return True

    def connected(self, session: Session) -> bool:
        """Whether a session has a stream."""
        return session.session_id in self._streams

    def drain(self, reason: str) -> None:
        """Tell every client that the server is going away; new streams are refused from now on."""
        self._draining = True
        for stream in list(self._streams.values()):
            stream.push(GoAway(reason))

    @property
    def streams(self) -> int:
        """Open streams."""
        return len(self._streams)


async def _identify(context: Context) -> None:
    """Give the call an id for the logs: the client's own, or a new one. The client finds it in the metadata."""
    given = ""
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_HEADER:
            given = value if isinstance(value, str) else ""
    await context.send_initial_metadata(((REQUEST_ID_HEADER, new_request_id(given)),))
