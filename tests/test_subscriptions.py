"""Subscriptions to answers: server-sent events and gRPC, filters, resumption, roles, slow readers. Real servers."""

import asyncio
import base64
import contextlib
import io
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import jsonschema
import numpy as np
import pytest
from PIL import Image

from bitneck.bundle import Bundle
from bitneck.coding.class_map import decode_map
from bitneck.coding.colours import colours
from bitneck.v2 import inference_pb2 as pb
from bitneck.v2 import inference_pb2_grpc as pb_grpc
from bitneck_testing.processes import Server, running_server
from bitneck_testing.streams import Frames, Stream, open_stream, sealed, stub

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = jsonschema.Draft202012Validator(json.loads((ROOT / "docs" / "answer.schema.json").read_text()))
METRICS, READ, OPERATE, SHORT = (f"a-token-for-{name}" for name in ("metrics", "reading", "operating", "a-while"))
DEVICE = "a-token-for-devices"
HANG_S = 60.0
HEARTBEAT_S = 0.5
NARROW = [("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
"""Options of a channel that takes 64 KiB before its client reads, not megabytes."""


@dataclass
class Event:
    """A server-sent event; `name` is empty for one that only sets the id."""

    name: str
    data: Any
    id: str

    @property
    def number(self) -> int:
        return int(self.id.partition("-")[2])


@asynccontextmanager
async def events(server: Server, token: str = READ, **parameters: Any) -> AsyncIterator[AsyncIterator[Event]]:
    """Subscribe over HTTP: the block begins when the subscription has begun."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    if (last := parameters.pop("last_event_id", None)) is not None:
        headers["Last-Event-ID"] = last
    async with (
        httpx.AsyncClient(timeout=HANG_S, headers=headers) as http,
        http.stream("GET", f"{server.http}/v1/answers", params=parameters) as response,
    ):
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        found = _parsed(response.aiter_lines())
        first = await anext(found)
        assert (first.name, first.data) == ("", None)
        yield found


async def _parsed(lines: AsyncIterator[str]) -> AsyncIterator[Event]:
    event = Event("", None, "")
    async for line in lines:
        field, _, value = line.partition(": ")
        if field == "event":
            event.name = value
        elif field == "data":
            event.data = json.loads(value)
        elif field == "id":
            event.id = value
        elif not line:
            yield event
            event = Event("", None, event.id)


async def take(source: AsyncIterator[Event], count: int) -> list[Event]:
    """The next events that are no signs of life."""
    found: list[Event] = []
    async with asyncio.timeout(HANG_S):
        while len(found) < count:
            if (event := await anext(source)).name:
                found.append(event)
    return found


async def heartbeats(source: AsyncIterator[Event]) -> Event:
    """The next sign of life; nothing else may come before it."""
    async with asyncio.timeout(HANG_S):
        event = await anext(source)
    assert event.name == ""
    return event


async def rest(source: AsyncIterator[Event]) -> list[Event]:
    async with asyncio.timeout(HANG_S):
        return [event async for event in source if event.name]


@asynccontextmanager
async def session(server: Server, bundle: Bundle, **values: Any) -> AsyncIterator[Stream]:
    """A device's stream, with its token."""
    async with grpc.aio.insecure_channel(server.grpc, interceptors=[_WithToken()]) as channel:
        stream = await open_stream(
            pb_grpc.SplitInferenceStub(channel), bundle.bundle_id, model=bundle.manifest.name, **values
        )
        yield stream
        await stream.call.done_writing()


class _WithToken(grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        metadata = (("authorization", f"Bearer {DEVICE}"),)
        return await continuation(details._replace(metadata=grpc.aio.Metadata(*metadata)), requests)


async def subscribed(
    stub: Any, token: str = READ, **fields: Any
) -> tuple[grpc.aio.UnaryStreamCall[pb.SubscribeRequest, pb.AnswerEvent], pb.AnswerEvent]:
    """Subscribe over gRPC: the call, and its first event."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    call = stub.Subscribe(pb.SubscribeRequest(**fields), metadata=metadata)
    async with asyncio.timeout(HANG_S):
        first = await call.read()
    assert isinstance(first, pb.AnswerEvent), await call.details()
    return call, first


async def told(call: Any) -> pb.AnswerEvent:
    """The next event that is no sign of life."""
    async with asyncio.timeout(HANG_S):
        while not (event := await call.read()).WhichOneof("event"):
            pass
    assert isinstance(event, pb.AnswerEvent)
    return event


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokens") / "operators.txt"
    file.write_text(f"metrics prometheus {METRICS}\nread console {READ}\noperate alice {OPERATE}\nread bob {SHORT}\n")
    return file


@pytest.fixture(scope="module")
def server(tiny_bundle: Bundle, scene_bundle: Bundle, token_file: Path) -> Iterator[Server]:
    options = ("--http-tokens", str(token_file), "--device-token", DEVICE, "--server-name", "cloud-7",
               "--heartbeat-s", str(HEARTBEAT_S), "--log-format", "json", "--max-connections", "300")  # fmt: skip
    with running_server(tiny_bundle.root, scene_bundle.root, options=options) as running:
        yield running


@pytest.fixture(scope="module")
def scenes(scene_bundle: Bundle) -> Frames:
    return Frames(scene_bundle)


def ask(server: Server, path: str, token: str = READ) -> httpx.Response:
    return httpx.get(server.http + path, headers={"Authorization": f"Bearer {token}"})


def change(file: Path, old: str, new: str) -> None:
    file.write_text(file.read_text().replace(old, new))


def metric(server: Server, name: str) -> float:
    text = ask(server, "/metrics", METRICS).text
    lines = [line for line in text.splitlines() if line.startswith(name) and line[len(name)] in " {"]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


async def eventually(true: Callable[[], bool]) -> None:
    limit = time.monotonic() + HANG_S
    while not true():
        assert time.monotonic() < limit, "it did not come true in time"
        await asyncio.sleep(0.05)


# The document


async def test_an_answer_is_told_as_the_device_got_it(server: Server, tiny_bundle: Bundle, frames: Frames) -> None:
    async with events(server, client="camera-1") as source, session(server, tiny_bundle, client="camera-1") as device:
        captured = 1_700_000_000_123_456
        frame = frames.frame(7, "s1-r2", seed=3, captured_unix_us=captured)
        got = (await device.ask(frame)).result
        (event,) = await take(source, 1)
    SCHEMA.validate(event.data)
    labels = got.output.classification.labels
    assert [each["index"] for each in event.data["labels"]] == [each.index for each in labels]
    assert [each["name"] for each in event.data["labels"]] == [each.name for each in labels]
    assert [each["score"] for each in event.data["labels"]] == pytest.approx([x.score for x in labels], abs=1e-6)
    told = {key: event.data[key] for key in ("server", "client", "model", "session", "spool", "seq", "map", "point")}
    assert told == {
        "server": "cloud-7", "client": "camera-1", "model": "tiny", "session": device.opened.session_id,
        "spool": None, "seq": 7, "map": None, "point": "s1-r2",
    }  # fmt: skip
    assert event.data["captured"] == "2023-11-14T22:13:20.123456Z"
    assert event.data["bundle"] == tiny_bundle.bundle_id
    assert event.data["payload_bytes"] == len(frame.payload)
    assert event.data["link_bytes"] > len(frame.payload)
    assert event.data["ms"]["compute"] == got.timings.compute_us / 1e3
    assert event.number == event.data["number"]


async def test_link_bytes_of_the_frames_add_up_to_the_sessions(
    server: Server, tiny_bundle: Bundle, frames: Frames
) -> None:
    async with events(server, client="adding") as source, session(server, tiny_bundle, client="adding") as device:
        for seq in range(1, 21):
            await device.ask(frames.frame(seq))
        whole = ask(server, f"/v1/sessions/{device.opened.session_id}").json()
        total = sum(event.data["link_bytes"] for event in await take(source, 20))
    crossed = whole["link_bytes_up"] + whole["link_bytes_down"]
    assert 0.85 * crossed <= total <= 1.01 * crossed  # the last answer comes behind the last document


async def test_a_class_map_goes_as_runs_or_as_a_picture(server: Server, scene_bundle: Bundle, scenes: Frames) -> None:
    frame = scenes.frame(1, "s1-r2", seed=5)
    wanted = scenes.logits("s1-r2", frame.payload).argmax(axis=0)
    async with (
        events(server, model="scene", map="runs") as runs,
        events(server, model="scene", map="png") as pictures,
        events(server, model="scene") as bare,
        session(server, scene_bundle, answers=pb.ANSWERS_SHARES) as device,
    ):
        await device.ask(frame)
        documents = [(await take(source, 1))[0].data for source in (runs, pictures, bare)]
    for document in documents:
        SCHEMA.validate(document)
        assert {each["index"]: each["share"] for each in document["shares"]} == pytest.approx(
            {int(k): float((wanted == k).mean()) for k in np.unique(wanted)}, abs=1e-6
        )
    coded, picture = (base64.b64decode(document["map"]["data"]) for document in documents[:2])
    assert documents[2]["map"] is None
    np.testing.assert_array_equal(decode_map(coded, height=24, width=40, number=5), wanted)
    image = Image.open(io.BytesIO(picture), formats=("PNG",))
    np.testing.assert_array_equal(np.asarray(image), wanted)
    assert image.getpalette()[:15] == colours()[:5].reshape(-1).tolist()  # type: ignore[index]


async def test_a_frame_of_a_spool_has_its_map_too(server: Server, scene_bundle: Bundle, scenes: Frames) -> None:
    async with (
        events(server, model="scene", map="runs") as source,
        session(server, scene_bundle, spool="0123456789abcdef", answers=pb.ANSWERS_SHARES) as device,
    ):
        frame = scenes.frame(1, "s1-r2", seed=5)
        await device.ask(frame)
        (event,) = await take(source, 1)
    SCHEMA.validate(event.data)
    assert event.data["spool"] == "0123456789abcdef"
    wanted = scenes.logits("s1-r2", frame.payload).argmax(axis=0)
    np.testing.assert_array_equal(
        decode_map(base64.b64decode(event.data["map"]["data"]), height=24, width=40, number=5), wanted
    )


async def test_a_coarse_map_says_its_own_size(server: Server, scene_bundle: Bundle, scenes: Frames) -> None:
    async with (
        events(server, model="scene", map="png") as source,
        session(server, scene_bundle, answers=pb.ANSWERS_MAP_4) as device,
    ):
        await device.ask(scenes.frame(1))
        (event,) = await take(source, 1)
    SCHEMA.validate(event.data)
    assert (event.data["map"]["height"], event.data["map"]["width"]) == (6, 10)
    assert Image.open(io.BytesIO(base64.b64decode(event.data["map"]["data"])), formats=("PNG",)).size == (10, 6)


async def test_a_single_frame_is_told_under_a_session_of_its_own(
    server: Server, tiny_bundle: Bundle, frames: Frames
) -> None:
    async with events(server) as source, stub(server.grpc) as cloud:
        for _ in range(2):
            request = pb.InferRequest(bundle_id=tiny_bundle.bundle_id, model="tiny", frame=frames.frame(5))
            await cloud.Infer(request, metadata=(("authorization", f"Bearer {DEVICE}"),))
        first, second = (event.data for event in await take(source, 2))
    for document in (first, second):
        SCHEMA.validate(document)
        assert (document["seq"], document["link_bytes"], document["client"]) == (5, None, "")
    assert first["session"] != second["session"]
    assert second["number"] == first["number"] + 1


async def test_text_of_a_client_is_cleaned(server: Server, tiny_bundle: Bundle, frames: Frames) -> None:
    name = "cam\x1b[2J\r\ndata: forged\n\n\u202e"
    async with events(server, client="cam*forged*") as source, session(server, tiny_bundle, client=name) as device:
        await device.ask(frames.frame(1, captured_unix_us=2**64 - 1))
        (event,) = await take(source, 1)
    SCHEMA.validate(event.data)
    assert event.data["client"] == "cam\ufffd[2J\ufffd\ufffddata: forged\ufffd\ufffd\ufffd"
    assert event.data["captured"] is None


# Once each, in order


async def test_each_answer_is_told_once_also_when_its_frame_is_sent_again(
    server: Server, tiny_bundle: Bundle, frames: Frames
) -> None:
    async with events(server, client="twice") as source:
        async with session(server, tiny_bundle, client="twice") as device:
            for seq in (1, 2, 2, 1, 3):
                assert (await device.ask(frames.frame(seq))).result.seq == seq
            token = device.opened.resume_token
        async with session(server, tiny_bundle, client="twice", token=token) as device:
            for seq in (3, 2, 4):
                assert (await device.ask(frames.frame(seq))).result.seq == seq
        bad = frames.frame(5)
        bad.crc32c ^= 1
        async with session(server, tiny_bundle, client="twice") as device:
            assert (await device.ask(bad)).HasField("fault")
            await device.ask(frames.frame(6))
        found = await take(source, 5)
        await heartbeats(source)
    assert [event.data["seq"] for event in found] == [1, 2, 3, 4, 6]
    assert [event.data["number"] for event in found] == sorted(event.data["number"] for event in found)


# Filters


async def test_filters_choose(server: Server, tiny_bundle: Bundle, scene_bundle: Bundle, frames: Frames,
                              scenes: Frames) -> None:  # fmt: skip
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(session(server, tiny_bundle, client="yard-1"))
        second = await stack.enter_async_context(session(server, tiny_bundle, client="gate-2"))
        third = await stack.enter_async_context(session(server, scene_bundle, client="gate-3"))
        best = [(await it.ask(f.frame(1, seed=9))).result.output for it, f in
                ((first, frames), (second, frames), (third, scenes))]  # fmt: skip
        label, share = best[0].classification.labels[0], best[2].segmentation.classes[0]
        weak = best[0].classification.labels[-1]
        filters: dict[str, tuple[dict[str, Any], set[str]]] = {
            "everything": ({}, {"yard-1", "gate-2", "gate-3"}),
            "a client": ({"client": "yard-1"}, {"yard-1"}),
            "a pattern": ({"client": ["gate-?", "none"]}, {"gate-2", "gate-3"}),
            "a model": ({"model": "scene"}, {"gate-3"}),
            "a session": ({"session": second.opened.session_id}, {"gate-2"}),
            "a name": ({"class": label.name, "min_score": 0.999 * label.score}, {"yard-1", "gate-2"}),
            "an index": ({"class": str(share.index), "model": "scene"}, {"gate-3"}),
            "too little": ({"class": weak.name, "min_score": weak.score + 0.01}, set()),
            "the best": ({"min_score": max(label.score, share.share) + 0.001}, set()),
            "both": ({"client": "gate*", "model": ["tiny"]}, {"gate-2"}),
        }
        sources = {name: await stack.enter_async_context(events(server, **it)) for name, (it, _) in filters.items()}
        for device, of in ((first, frames), (second, frames), (third, scenes)):
            await device.ask(of.frame(2, seed=9))
        for name, (_, clients) in filters.items():
            found = await take(sources[name], len(clients))
            assert {event.data["client"] for event in found} == clients, name
            await heartbeats(sources[name])


@pytest.mark.parametrize(
    ("query", "status", "text"),
    [
        ("model=nothing", 404, "there are: tiny, scene"),
        ("class=clas+3", 400, "nearest names are 'class 3'"),
        ("class=10&model=tiny", 400, "no served model has a class '10'"),
        ("class=%D9%A3", 400, "no served model has a class"),
        ("min_score=1.5", 422, "min_score"),
        ("min_score=nan", 422, "min_score"),
        ("map=gif", 422, "map"),
        ("after=5", 400, "no id of an answer"),
        ("after=%0d%0aevil", 400, "no id of an answer"),
        ("&".join(f"client={k}" for k in range(65)), 400, "at most 64"),
        ("client=" + 129 * "x", 400, "a pattern has 1 to 128 characters, got 129"),
        ("session=" + 257 * "x", 400, "at most 256 characters"),
        ("client=@night", 400, "there is no group 'night' in the settings"),
    ],
)
def test_bad_requests_are_refused_with_the_reason(server: Server, query: str, status: int, text: str) -> None:
    response = ask(server, f"/v1/answers?{query}")
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert text in response.json()["detail"]


async def test_grpc_refuses_the_same(server: Server) -> None:
    for fields, code, text in (
        ({"model": ["nothing"]}, "NOT_FOUND", "there are: tiny, scene"),
        ({"classes": ["clas 3"]}, "INVALID_ARGUMENT", "nearest names"),
        ({"min_score": float("nan")}, "INVALID_ARGUMENT", "give 0 to 1"),
        ({"map": 9}, "INVALID_ARGUMENT", "runs or png"),
        ({"after": "00000000-x"}, "INVALID_ARGUMENT", "no id"),
    ):
        async with stub(server.grpc) as cloud:
            call = cloud.Subscribe(pb.SubscribeRequest(**fields), metadata=(("authorization", f"Bearer {READ}"),))
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call.read()
        assert (refused.value.code().name, text in (refused.value.details() or "")) == (code, True), fields


# Resumption


async def test_a_subscriber_goes_on_where_it_stopped(server: Server, tiny_bundle: Bundle, frames: Frames) -> None:
    async with session(server, tiny_bundle, client="resume") as device:
        async with events(server, client="resume") as source:
            await device.ask(frames.frame(1))
            (first,) = await take(source, 1)
        for seq in range(2, 6):  # nobody is there
            await device.ask(frames.frame(seq))
        async with events(server, client="resume", last_event_id=first.id, after="0") as source:
            assert [event.data["seq"] for event in await take(source, 4)] == [2, 3, 4, 5]
            idle = await heartbeats(source)
        async with events(server, client="resume", after=first.id) as source:
            assert (await take(source, 1))[0].data["seq"] == 2
        async with events(server, client="resume", after="0") as source:
            assert (await take(source, 1))[0].data["seq"] == 1
        async with events(server, client="resume", after=idle.id) as source:
            await device.ask(frames.frame(6))
            assert (await take(source, 1))[0].data["seq"] == 6
    ahead = f"{first.id.partition('-')[0]}-999999999"
    response = ask(server, f"/v1/answers?after={ahead}")
    assert response.status_code == 400
    assert "still to come" in response.json()["detail"]


async def test_an_id_of_another_run_is_recognized(server: Server, tiny_bundle: Bundle, frames: Frames) -> None:
    async with session(server, tiny_bundle, client="before") as device:
        await device.ask(frames.frame(1))
    async with events(server, client="before", last_event_id="0123abcd-77") as source:
        missed, answer = await take(source, 2)
        assert (missed.name, missed.data["count"], answer.name) == ("missed", None, "answer")
        assert "another run" in missed.data["reason"]
        assert missed.number < answer.number


async def test_what_is_gone_is_told(tiny_bundle: Bundle, frames: Frames) -> None:
    with running_server(tiny_bundle.root, options=("--kept-answers", "5")) as server:
        async with stub(server.grpc) as cloud, asyncio.timeout(HANG_S):
            device = await open_stream(cloud, tiny_bundle.bundle_id)
            async with events(server, token="") as source:
                await device.ask(frames.frame(1))
                (first,) = await take(source, 1)
            for seq in range(2, 21):
                await device.ask(frames.frame(seq))
            async with events(server, token="", last_event_id=first.id) as source:
                missed, *answers = await take(source, 6)
            assert (missed.name, missed.data["count"]) == ("missed", 14)
            assert [event.data["seq"] for event in answers] == [16, 17, 18, 19, 20]
            assert missed.number == 15
            text = ask(server, "/metrics").text
            assert "bitneck_missed_answers_total 14.0" in text
            assert 'bitneck_published_answers_total{model="tiny"} 20.0' in text
            await device.call.done_writing()


# Who may read


def test_http_asks_for_the_role(server: Server) -> None:
    url = f"{server.http}/v1/answers"
    for token, status in (("", 401), (DEVICE, 401), (METRICS, 403)):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        assert httpx.get(url, headers=headers).status_code == status
    for token in (READ, OPERATE):
        with httpx.stream("GET", url, headers={"Authorization": f"Bearer {token}"}) as response:
            assert response.status_code == 200


async def test_grpc_asks_for_the_role(server: Server, tiny_bundle: Bundle, frames: Frames) -> None:
    async with stub(server.grpc) as cloud:
        for token, code in (("", "UNAUTHENTICATED"), (DEVICE, "UNAUTHENTICATED"), (METRICS, "PERMISSION_DENIED")):
            call = cloud.Subscribe(pb.SubscribeRequest(), metadata=(("authorization", f"Bearer {token}"),))
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call.read()
            assert refused.value.code().name == code
        for token in (READ, OPERATE):
            call, _ = await subscribed(cloud, token)
            call.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as refused:  # a reader is no device
            await cloud.GetManifest(
                pb.GetManifestRequest(model="tiny"), metadata=(("authorization", f"Bearer {READ}"),)
            )
        assert refused.value.code().name == "UNAUTHENTICATED"


async def test_grpc_without_tokens_of_the_control_api_opens_to_nobody(tiny_bundle: Bundle) -> None:
    with running_server(tiny_bundle.root) as server:
        async with stub(server.grpc) as cloud:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await cloud.Subscribe(pb.SubscribeRequest()).read()
        assert refused.value.code().name == "UNAUTHENTICATED"
        assert "set http_tokens" in (refused.value.details() or "")
        async with events(server, token=""):  # loopback, and no token is set: HTTP is open, as ever
            pass


async def test_a_revoked_token_ends_its_subscriptions(server: Server, token_file: Path) -> None:
    async with events(server, SHORT) as mine, events(server, READ) as other, stub(server.grpc) as cloud:
        call, _ = await subscribed(cloud, SHORT)
        try:
            change(token_file, SHORT, f"{SHORT}-new")
            (end,) = await rest(mine)
            assert end.name == "end"
            assert "read bob is not valid" in end.data["reason"]
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                async with asyncio.timeout(HANG_S):
                    while True:
                        await call.read()
            assert refused.value.code().name == "UNAUTHENTICATED"
            await heartbeats(other)
        finally:
            change(token_file, f"{SHORT}-new", SHORT)
    await eventually(lambda: ask(server, "/v1/sessions", f"{SHORT}-new").status_code == 401)


async def test_subscriptions_are_audited_and_counted(server: Server) -> None:
    await eventually(lambda: metric(server, "bitneck_subscribers") == 0)
    async with events(server, OPERATE, client="audited-*"):
        assert metric(server, "bitneck_subscribers") == 1
    await eventually(lambda: metric(server, "bitneck_subscribers") == 0)
    lines = [json.loads(line) for line in server.read_log().splitlines() if "subscription" in line]
    begun = next(line for line in lines if line["action"] == "subscription begin" and "audited-*" in str(line["after"]))
    assert begun["who"].startswith("operate alice")
    ended = next(line for line in lines if line["action"] == "subscription end" and line["target"] == begun["target"])
    assert ended["before"] == {"sent": 0, "missed": 0}


# gRPC


async def test_grpc_tells_the_same(server: Server, tiny_bundle: Bundle, scene_bundle: Bundle, frames: Frames,
                                   scenes: Frames) -> None:  # fmt: skip
    async with (
        stub(server.grpc) as cloud,
        events(server, client="same", map="png") as source,
        session(server, tiny_bundle, client="same") as device,
        session(server, scene_bundle, client="same") as camera,
    ):
        call, first = await subscribed(cloud, client=["same"], map=pb.MAP_FORM_PNG)
        await device.ask(frames.frame(1))
        await camera.ask(scenes.frame(1))
        theirs = await take(source, 2)
        ours = [await told(call) for _ in range(2)]
        assert [(event.id, json.loads(event.document)) for event in ours] == [(it.id, it.data) for it in theirs]
        call.cancel()
        again, _ = await subscribed(cloud, client=["same"], after=first.id)
        assert [(await told(again)).id for _ in range(2)] == [event.id for event in ours]
        alive = await again.read()
        assert (alive.WhichOneof("event"), alive.id) == (None, ours[1].id)
        foreign, _ = await subscribed(cloud, after="0123abcd-5")
        missed = (await told(foreign)).missed
        assert not missed.HasField("count")


# The end of the server


async def test_a_stopping_server_tells_its_subscribers_everything_first(
    tiny_bundle: Bundle, frames: Frames, token_file: Path
) -> None:
    options = ("--http-tokens", str(token_file), "--log-format", "json")
    with running_server(tiny_bundle.root, options=options) as server:
        async with events(server) as source, stub(server.grpc) as cloud, asyncio.timeout(HANG_S):
            call, _ = await subscribed(cloud)
            device = await open_stream(cloud, tiny_bundle.bundle_id)
            for seq in range(1, 9):
                await device.send(frames.frame(seq))
            stopped = asyncio.create_task(asyncio.to_thread(server.stop))
            for _ in range(9):
                await device.read()  # 8 answers and GoAway
            await device.call.done_writing()
            *answers, end = await rest(source)
            assert [event.data["seq"] for event in answers] == list(range(1, 9))
            assert (end.name, end.data) == ("end", {"reason": "the server is stopping"})
            assert [json.loads((await told(call)).document)["seq"] for _ in range(8)] == list(range(1, 9))
            with pytest.raises(grpc.aio.AioRpcError) as over:
                await call.read()
            assert over.value.code().name == "UNAVAILABLE"
            assert await stopped == 0


# Slow and many


def silent(server: Server, address: str, parameters: str = "") -> socket.socket:
    """A subscriber over HTTP that reads nothing, with a small buffer."""
    it = socket.socket()
    it.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    it.bind((address, 0))
    host, _, port = server.http.removeprefix("http://").partition(":")
    it.connect((host, int(port)))
    it.sendall(f"GET /v1/answers?{parameters} HTTP/1.1\r\nHost: {host}:{port}\r\n"
               f"Authorization: Bearer {READ}\r\n\r\n".encode())  # fmt: skip
    return it


async def test_a_hundred_subscribers_that_read_nothing_slow_nobody(
    scene_bundle: Bundle, scenes: Frames, token_file: Path
) -> None:
    """They take places and nothing else: frames go on, memory stays, a reader misses nothing, and they are ended."""
    options = ("--http-tokens", str(token_file), "--stall-s", "2", "--max-subscribers", "102", "--log-format", "json",
               "--max-calls-per-connection", "64")  # fmt: skip
    payload = scenes.payload("s1-r2", 0)
    with running_server(scene_bundle.root, options=options) as server, contextlib.ExitStack() as sockets:
        async with (
            asyncio.timeout(2 * HANG_S),
            stub(server.grpc) as cloud,
            grpc.aio.insecure_channel(server.grpc, options=NARROW) as narrow,
        ):
            for number in range(60):
                address = "127.0.0.2" if number < 30 else "127.0.0.3"
                sockets.enter_context(silent(server, address, "map=png"))
            metadata = (("authorization", f"Bearer {READ}"),)
            request = pb.SubscribeRequest(map=pb.MAP_FORM_PNG)
            calls = [pb_grpc.SplitInferenceStub(narrow).Subscribe(request, metadata=metadata) for _ in range(40)]
            await eventually(lambda: metric(server, "bitneck_subscribers") == 100)
            async with events(server) as source, events(server):
                full = ask(server, "/v1/answers")
                assert full.status_code == 429
                assert "max_subscribers" in full.json()["detail"]
                device = await open_stream(cloud, scene_bundle.bundle_id)
                reading = asyncio.create_task(take(source, 600))
                before = 0.0
                for seq in range(1, 601):
                    message = await device.ask(sealed(seq=seq, point="s1-r2", payload=payload))
                    assert message.HasField("result")
                    if seq == 300:
                        before = server.resident_mib
                assert [event.data["seq"] for event in await reading] == list(range(1, 601))
                assert server.resident_mib < before + 30.0
            await eventually(lambda: metric(server, "bitneck_subscribers") == 0)
            await device.call.done_writing()
            for call in calls:
                call.cancel()


async def test_a_slow_subscriber_is_told_what_it_missed(scene_bundle: Bundle, scenes: Frames, token_file: Path) -> None:
    payload, many = scenes.payload("s1-r2", 0), 1500
    options = ("--http-tokens", str(token_file), "--kept-answers", "20", "--log-format", "json")
    with running_server(scene_bundle.root, options=options) as server, silent(server, "127.0.0.2") as slow:
        async with asyncio.timeout(2 * HANG_S), stub(server.grpc) as cloud:
            await eventually(lambda: metric(server, "bitneck_subscribers") == 1)
            device = await open_stream(cloud, scene_bundle.bundle_id)
            for seq in range(1, many + 1):
                await device.send(sealed(seq=seq, point="s1-r2", payload=payload))
                if seq > 10:
                    await device.read()
            for _ in range(10):
                await device.read()
            await device.call.done_writing()
            reader, writer = await asyncio.open_connection(sock=slow)
            while await reader.readline() != b"\r\n":
                pass
            source = _parsed(_lines(reader))
            numbers, missed = [], 0
            while not numbers or numbers[-1] < many:
                (event,) = await take(source, 1)
                if event.name == "missed":
                    assert event.number == numbers[-1] + event.data["count"]
                    missed += event.data["count"]
                else:
                    assert not missed or event.number > missed
                    numbers.append(event.number)
            writer.close()
        assert missed > 0
        assert len(numbers) + missed == many
        assert numbers == sorted(set(numbers))
        assert metric(server, "bitneck_missed_answers_total") == missed


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[str]:
    """The lines of a body in chunks."""
    text = b""
    while size := int(await reader.readline(), 16):
        text += await reader.readexactly(size)
        await reader.readexactly(2)
        *lines, text = text.split(b"\n")
        for line in lines:
            yield line.decode()
