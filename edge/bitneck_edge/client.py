"""The edge client: photographs in, answers out.

async with EdgeClient("cloud.example:50051") as client:
    answer = await client.infer(Path("photo.jpg"))
    async for answer in client.stream(paths):
        ...
"""

import asyncio
import contextlib
import logging
import math
import random
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from PIL import Image

from bitneck.bundle import Bundle
from bitneck.errors import BitneckError, BundleMismatch, ProtocolError, Unavailable
from bitneck.frames import crc32c_hex
from bitneck.v1 import inference_pb2 as pb
from bitneck_edge.cache import cached_bundle, default_cache_dir
from bitneck_edge.encoder import EdgeEncoder, EncodedPhoto, Photo
from bitneck_edge.link import Link, LinkSettings, Received, Sent
from bitneck_edge.remote import fetch_file, fetch_manifest, stub_of
from bitneck_edge.results import Answer, Failure, Label, StageTimes, Switch
from bitneck_edge.settings import EdgeSettings

__all__ = ["EdgeClient", "fetch_bundle"]

_LOG = logging.getLogger(__name__)
_RETRY_PAUSE_S = 0.3


async def fetch_bundle(
    settings: EdgeSettings, progress: Callable[[int, int], None] = lambda _done, _all: None
) -> Bundle:
    """The edge's half of the server's bundle, from the cache or from the server.

    Args:
        settings: server, cache and limits.
        progress: called with (bytes fetched, bytes to fetch).

    Raises:
        Unavailable: no server after the retries.
        BundleMismatch: not the bundle that `settings.bundle_id` asks for.
        BundleCorrupt: what arrived is damaged.
        InvalidConfig: the cache cannot be written.
    """
    access = settings.access
    async with access.channel() as channel:
        stub = stub_of(channel)
        attempt = 0
        while True:
            attempt += 1
            try:
                offer = await fetch_manifest(stub, settings.model, access, settings.connect_timeout_s)
                break
            except BitneckError as exc:
                passing = isinstance(exc, Unavailable) or exc.grpc_status == "DEADLINE_EXCEEDED"
                if not passing:
                    raise
                if attempt > settings.retries:
                    raise Unavailable(
                        f"no bitneck server answers at {settings.server} ({attempt} attempts): {exc}; "
                        "check the address, that `bitneck-cloud serve` runs there, and whether it wants TLS "
                        "(--tls-ca, --tls-cert)"
                    ) from exc
                await asyncio.sleep(_RETRY_PAUSE_S * 2 ** min(attempt, 4) * random.uniform(0.5, 1.5))  # noqa: S311
        if settings.bundle_id and offer.bundle_id != settings.bundle_id:
            raise BundleMismatch(f"{settings.server} serves bundle {offer.bundle_id}, expected {settings.bundle_id}")

        def fetch(path: str) -> AsyncGenerator[bytes]:
            return fetch_file(stub, offer.model, offer.bundle_id, path, access, settings.answer_timeout_s)

        cache_dir = settings.cache_dir or default_cache_dir()
        return await cached_bundle(cache_dir, offer.manifest_json, offer.bundle_id, fetch, progress)


class EdgeClient:
    """A session with a cloud server. Use it as an asynchronous context manager.

    Args:
        server: HOST:PORT; None for the settings' own.
        settings: everything else.
        on_fetch: progress of a bundle's download, (bytes done, bytes in all).
        on_switch: called when the operating point changes.
        **values: single settings, such as ``point="s1-r2"``, in place of a `settings` object.

    Raises:
        InvalidConfig: a setting is refused.
    """

    def __init__(
        self,
        server: str | None = None,
        *,
        settings: EdgeSettings | None = None,
        on_fetch: Callable[[int, int], None] = lambda _done, _all: None,
        on_switch: Callable[[Switch], None] = lambda _switch: None,
        **values: Any,
    ) -> None:
        self.settings = settings or EdgeSettings.load({"server": server, **values})
        self.switches: list[Switch] = []
        self._on_fetch = on_fetch
        self._on_switch = on_switch
        self._encoder: EdgeEncoder | None = None
        self._link: Link | None = None
        self._point = ""
        self._last_seq = 0
        self._encoding = asyncio.Lock()

    async def __aenter__(self) -> Self:
        """Fetch what is missing of the bundle, load the head, open the session.

        Raises:
            BitneckError: see `fetch_bundle` and `bitneck_edge.link.Link.open`.
        """
        bundle = await fetch_bundle(self.settings, self._on_fetch)
        encoder = EdgeEncoder(bundle, threads=self.settings.threads)
        if self.settings.point:
            encoder.ladder[self.settings.point]  # refuse an unknown one before a session is opened
        link = Link(
            LinkSettings(
                access=self.settings.access,
                model=bundle.manifest.name,
                bundle_id=bundle.bundle_id,
                client=self.settings.client,
                connect_timeout_s=self.settings.connect_timeout_s,
                answer_timeout_s=self.settings.answer_timeout_s,
                retries=self.settings.retries,
            ),
            self._switch,
        )
        self._encoder, self._link = encoder, link
        try:
            await link.open()
            self._point = self.settings.point or link.initial_point or encoder.ladder.best.id
            await asyncio.to_thread(encoder.point_encoder, self._point)
        except BaseException:
            await link.close()
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the session."""
        await self.close()

    async def close(self) -> None:
        """End the session now; frames that are not answered fail with `Unavailable`. Leaving the block does it too."""
        if self._link is not None:
            await self._link.close()

    @property
    def encoder(self) -> EdgeEncoder:
        """The edge's half of the network.

        Raises:
            Unavailable: outside the ``async with`` block.
        """
        if self._encoder is None:
            raise Unavailable("the client is not open: use it inside `async with`")
        return self._encoder

    @property
    def bundle(self) -> Bundle:
        """The bundle in use."""
        return self.encoder.bundle

    @property
    def session_id(self) -> str:
        """The session's id, for the control API."""
        return self._opened().session_id

    @property
    def reconnects(self) -> int:
        """How often the link was opened again."""
        return self._opened().reconnects

    @property
    def failure(self) -> BitneckError | None:
        """Why the link is of no more use: no further photograph can be answered. None while it is."""
        return self._opened().failure

    @property
    def point(self) -> str:
        """The operating point of the next frame. Assign another to switch; the control API can do so too."""
        return self._point

    @point.setter
    def point(self, point_id: str) -> None:
        self.encoder.ladder[point_id]
        self._change(point_id, "set by the program")

    async def infer(self, photo: Photo) -> Answer:
        """One photograph, one answer.

        Raises:
            ImageError: it cannot be read.
            BitneckError: the cloud could not answer, or cannot be reached.
        """
        encoded, sent = await self._encode_and_send(photo)
        return await self._answer(_name(photo), encoded, sent)

    async def stream(
        self, photos: Iterable[Photo] | AsyncIterable[Photo], *, stop: asyncio.Event | None = None
    ) -> AsyncGenerator[Answer | Failure]:
        """Many photographs: encoding goes on while earlier frames are answered. Results come in order.

        A photograph that cannot be read or answered gives a `Failure`, and the next one goes on. Once the link has
        failed for good (see `failure`) every further photograph gives one at once. Memory is bounded by the window.

        Args:
            photos: in order; taken one by one.
            stop: set it to end after the frames that are under way.
        """
        under_way: asyncio.Queue[tuple[str, EncodedPhoto, Sent] | Failure | None] = asyncio.Queue(
            maxsize=max(1, self.window)
        )
        producer = asyncio.create_task(self._produce(photos, under_way, stop or asyncio.Event()))
        try:
            while (item := await under_way.get()) is not None:
                if isinstance(item, Failure):
                    yield item
                    continue
                name, encoded, sent = item
                try:
                    yield await self._answer(name, encoded, sent)
                except BitneckError as exc:
                    yield Failure(name, exc)
            await producer
        finally:
            producer.cancel()
            await asyncio.gather(producer, return_exceptions=True)

    @property
    def window(self) -> int:
        """Frames that may be unanswered, as the server granted."""
        return self._opened().window

    async def _produce(
        self,
        photos: Iterable[Photo] | AsyncIterable[Photo],
        under_way: asyncio.Queue[tuple[str, EncodedPhoto, Sent] | Failure | None],
        stop: asyncio.Event,
    ) -> None:
        """Encode and send one after another; None marks the end, also where the source of photographs fails."""
        try:
            async with contextlib.aclosing(_each(photos)) as source:
                async for photo in source:
                    if stop.is_set():
                        break
                    try:
                        encoded, sent = await self._encode_and_send(photo)
                    except BitneckError as exc:
                        await under_way.put(Failure(_name(photo), exc))
                        continue
                    await under_way.put((_name(photo), encoded, sent))
        except Exception:
            await under_way.put(None)
            raise
        await under_way.put(None)

    async def _encode_and_send(self, photo: Photo) -> tuple[EncodedPhoto, Sent]:
        """One photograph at a time is encoded, in a thread, at the point of that moment."""
        link = self._opened()
        async with self._encoding:
            if link.failure is not None:
                raise link.failure
            encoded = await asyncio.to_thread(self.encoder.encode, photo, self._point)
            sent = await link.send(encoded.point, encoded.encoded.payload, deadline_ms=self.settings.deadline_ms)
            self._last_seq = sent.seq
        return encoded, sent

    async def _answer(self, name: str, encoded: EncodedPhoto, sent: Sent) -> Answer:
        received: Received = await sent.answer
        labels = _labels(received.result)
        timings = received.result.timings
        queued, decode, compute = timings.queued_us / 1e3, timings.decode_us / 1e3, timings.compute_us / 1e3
        round_trip = (received.at - sent.at) * 1e3
        edge = encoded.load_ms + encoded.preprocess_ms + encoded.head_ms + encoded.encode_ms
        payload = encoded.encoded.payload
        pixels = self.bundle.manifest.input.pixels
        return Answer(
            file=name,
            seq=sent.seq,
            point=encoded.point,
            split=encoded.split,
            payload_bytes=len(payload),
            wire_bytes=sent.wire_bytes,
            bpp_payload=len(payload) * 8 / pixels,
            bpp_wire=sent.wire_bytes * 8 / pixels,
            payload_crc32c=crc32c_hex(payload),
            symbols_crc32c=crc32c_hex(encoded.encoded.symbols.astype("<i4").tobytes()),
            labels=labels,
            ms=StageTimes(
                load=encoded.load_ms,
                preprocess=encoded.preprocess_ms,
                head=encoded.head_ms,
                encode=encoded.encode_ms,
                link=max(0.0, round_trip - queued - decode - compute),
                queued=queued,
                decode=decode,
                compute=compute,
                total=edge + round_trip,
            ),
        )

    def _opened(self) -> Link:
        if self._link is None:
            raise Unavailable("the client is not open: use it inside `async with`")
        return self._link

    def _switch(self, point_id: str, reason: str) -> None:
        """The cloud asks for another operating point; for none where it leaves the choice to us again."""
        if not point_id:
            _LOG.info("%s: the cloud leaves the choice to this client; staying at %s", reason, self._point)
            return
        if point_id not in self.encoder.ladder:
            _LOG.warning("the cloud asks for %r, which this bundle does not have; staying at %s", point_id, self._point)
            return
        self._change(point_id, reason)

    def _change(self, point_id: str, reason: str) -> None:
        if point_id == self._point or not self._point:
            self._point = point_id
            return
        switch = Switch(self._last_seq, self._point, point_id, reason)
        self._point = point_id
        self.switches.append(switch)
        self._on_switch(switch)


async def _each(photos: Iterable[Photo] | AsyncIterable[Photo]) -> AsyncGenerator[Photo]:
    if isinstance(photos, AsyncIterable):
        async for photo in photos:
            yield photo
    else:
        for photo in photos:
            yield photo


def _labels(result: pb.Result) -> tuple[Label, ...]:
    """The labels of an answer.

    Raises:
        ProtocolError: none, or one whose score is no number.
    """
    labels = tuple(Label(x.index, x.name, x.score) for x in result.output.classification.labels)
    if not labels or not all(math.isfinite(label.score) for label in labels):
        raise ProtocolError(
            f"the answer to frame {result.seq} has {len(labels)} labels, expected one or more, each with a finite score"
        )
    return labels


def _name(photo: Photo) -> str:
    match photo:
        case Path():
            return str(photo)
        case Image.Image():
            return str(getattr(photo, "filename", "") or "<image>")
        case _:
            return f"<{len(photo)} bytes>"
