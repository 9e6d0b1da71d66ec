"""A device that has the bundle: points by their position, answers without names, scores of 16 bits."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitneck.bundle import Bundle
from bitneck.errors import GRPC_CODES, ProtocolError
from bitneck.v2 import inference_pb2 as pb
from bitneck.wire.frames import seal_frame, wire_bytes
from bitneck.wire.scores import packed_scores, unpacked_scores
from bitneck_edge.answers.results import Answer
from bitneck_edge.client import EdgeClient
from bitneck_edge.link.wire import frame_to_wire
from bitneck_testing.photographs import photo
from bitneck_testing.processes import Server, running_server
from bitneck_testing.rogue_servers import opened, rogue_server
from bitneck_testing.streams import Frames, open_stream, stub
from bitneck_testing.tiny_bundles import make_tiny_bundle


@given(scores=st.lists(st.floats(0, 1), max_size=20))
def test_scores_of_16_bits(scores: list[float]) -> None:
    data = packed_scores(scores)
    assert len(data) == 2 * len(scores)
    assert unpacked_scores(data) == pytest.approx(scores, abs=1e-5)


def test_scores_that_are_none() -> None:
    assert unpacked_scores(packed_scores([float("nan"), float("inf"), -1.0, 2.0])) == [0.0, 1.0, 0.0, 1.0]
    assert unpacked_scores(b"\xff\xff\x01") == [1.0]


def test_a_frame_of_28_bytes_of_payload_is_a_message_of_41() -> None:
    frame = seal_frame(seq=100, point="s1-r1", payload=bytes(28), position=3)
    assert wire_bytes(frame) == len(pb.ClientMessage(frame=frame_to_wire(frame)).SerializeToString()) == 41
    named = seal_frame(seq=100, point="s1-r1", payload=bytes(28))
    assert wire_bytes(named) == len(pb.ClientMessage(frame=frame_to_wire(named)).SerializeToString()) == 46


@pytest.fixture(scope="module")
def server(tiny_bundle: Bundle) -> Any:
    with running_server(tiny_bundle.root) as running:
        yield running


async def test_points_by_position_and_answers_without_names(
    server: Server, tiny_bundle: Bundle, frames: Frames
) -> None:
    ids = [point.id for point in tiny_bundle.manifest.points]
    async with stub(server.grpc) as cloud:
        full = await open_stream(cloud, tiny_bundle.bundle_id)
        brief = await open_stream(cloud, tiny_bundle.bundle_id, brief=True)
        for number, point in enumerate(ids, start=1):
            frame = frames.frame(number, point=point)
            expected = (await full.ask(frame)).result
            frame.point, frame.position = "", number
            answer = (await brief.ask(frame)).result
            labels = expected.output.classification.labels
            assert list(answer.output.classification.index) == [label.index for label in labels]
            scores = unpacked_scores(answer.output.classification.scores)
            assert scores == pytest.approx([label.score for label in labels], abs=1e-5)
            assert not answer.output.classification.labels
            assert answer.timings.received_unix_us == 0
            assert answer.ByteSize() < 0.6 * expected.ByteSize()
        again = await open_stream(cloud, tiny_bundle.bundle_id, token=brief.opened.resume_token)
        kept = (await again.ask(frame)).result  # a client that resumes without the labels gets the names
        assert [label.index for label in kept.output.classification.labels] == [label.index for label in labels]


async def test_positions_that_are_refused(server: Server, tiny_bundle: Bundle, frames: Frames) -> None:
    count = len(tiny_bundle.manifest.points)
    async with stub(server.grpc) as cloud:
        stream = await open_stream(cloud, tiny_bundle.bundle_id, brief=True)
        for seq, (position, code) in enumerate(((count + 1, "NOT_FOUND"), (2**32 - 1, "NOT_FOUND")), start=1):
            frame = frames.frame(seq)
            frame.point, frame.position = "", position
            assert (await stream.ask(frame)).fault.code == GRPC_CODES[code]
        frame = frames.frame(3, point="s1-r1")
        frame.point, frame.position = (
            "",
            1 + next(k for k, point in enumerate(tiny_bundle.manifest.points) if point.id != "s1-r1"),
        )
        fault = (await stream.ask(frame)).fault  # the CRC covers the id
        assert fault.code == GRPC_CODES["DATA_LOSS"]
        assert (await stream.ask(frames.frame(4))).HasField("result")


async def test_the_device_has_the_names(server: Server, tiny_bundle: Bundle, tmp_path: Path) -> None:
    async with EdgeClient(server.grpc, cache_dir=tmp_path, threads=1, point="s1-r2") as client:
        answer = await client.infer(photo(1))
    names = tiny_bundle.labels()
    assert [label.name for label in answer.labels] == [names[label.index] for label in answer.labels]
    assert sum(label.score for label in answer.labels) <= 1.001


async def test_a_reload_may_move_the_points(tmp_path: Path) -> None:
    """Positions belong to the manifest that Open names; a client of the new bundle has the new ones."""
    first = make_tiny_bundle(tmp_path / "served")
    moved = first.manifest.model_copy(update={"points": first.manifest.points[::-1]})
    with running_server(first.root) as running:
        values: dict[str, Any] = {"cache_dir": tmp_path / "cache", "threads": 1, "point": "s1-r1"}
        async with EdgeClient(running.grpc, **values) as client:
            before = await client.infer(photo(1))
            (first.root / "manifest.json").write_bytes(moved.to_json())
            async with httpx.AsyncClient(base_url=running.http, headers={"X-Bitneck-Request": "1"}) as http:
                assert (await http.post("/v1/models/tiny/reload")).status_code == 200
            results = [result async for result in client.stream([photo(1)] * 10)]
    assert [r.point for r in results if isinstance(r, Answer)] == ["s1-r1"] * 10
    assert all(isinstance(r, Answer) and r.labels[0].index == before.labels[0].index for r in results)


@pytest.mark.parametrize(("index", "scores"), [([1, 2], b"\x00"), ([99], b"\x00\x00"), ([2**32 - 1], b"\x00\x00")])
async def test_answers_that_do_not_fit(tiny_bundle: Bundle, tmp_path: Path, index: list[int], scores: bytes) -> None:
    async def converse(context: Any) -> None:
        await opened(context)
        message = await context.read()
        output = pb.Output(classification=pb.Classification(index=index, scores=scores))
        await context.write(pb.ServerMessage(result=pb.Result(seq=message.frame.seq, output=output)))

    async with rogue_server(tiny_bundle, converse) as (address, _):
        async with EdgeClient(address, cache_dir=tmp_path, threads=1) as client:
            with pytest.raises(ProtocolError, match="labels"):
                await client.infer(photo(1))
