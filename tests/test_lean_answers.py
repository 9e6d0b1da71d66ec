"""What comes back for a frame: all of an answer, labels, shares, a map or a part of it; and what that costs."""

import asyncio
import re
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest

from bitneck.bundle import Bundle
from bitneck.coding.class_map import decode_map, encode_map
from bitneck.coding.coarse_map import coarse
from bitneck.errors import InvalidConfig, ProtocolError
from bitneck.v2 import inference_pb2 as pb
from bitneck.wire.messages import Answers
from bitneck.wire.scores import unpacked_scores
from bitneck_edge.answers.results import Answer, Failure
from bitneck_testing.photographs import photo
from bitneck_testing.processes import Server
from bitneck_testing.rogue_servers import opened, rogue_server
from bitneck_testing.streams import Frames, answers_of, edge_client, open_stream, stub

HANG_S = 60.0


@pytest.mark.parametrize(
    ("model", "answers", "text"),
    [("tiny", pb.ANSWERS_MAP, "all, none, labels"), ("scene", pb.ANSWERS_LABELS, "shares, map, map/4"),
     ("tiny", 77, "unknown")],
)  # fmt: skip
async def test_answers_that_a_model_does_not_have_are_refused(
    server: Server, tiny_bundle: Bundle, scene_bundle: Bundle, model: str, answers: Any, text: str
) -> None:
    bundle = tiny_bundle if model == "tiny" else scene_bundle
    async with stub(server.grpc) as cloud, asyncio.timeout(HANG_S):
        call = cloud.Stream()
        await call.write(pb.ClientMessage(open=pb.Open(model=model, bundle_id=bundle.bundle_id, answers=answers)))
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()
        assert (await call.code()).name == "INVALID_ARGUMENT"
        assert text in await call.details()


async def test_the_device_says_so_before_it_sends_anything(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="a model for classification has no answers map; ask for all, none, labels"):
        async with edge_client(server.grpc, tmp_path, answers="map"):
            pass


async def test_labels_without_timings(server: Server, tmp_path: Path) -> None:
    async with edge_client(server.grpc, tmp_path) as it:
        whole = await it.infer(photo(4))
        most = server.session(it.session_id)["message_bytes_down"]
    async with edge_client(server.grpc, tmp_path, answers="labels") as it:
        answer = await it.infer(photo(4))
        assert server.session(it.session_id)["message_bytes_down"] < most
    assert answer.labels == whole.labels
    assert (answer.ms.queued, answer.ms.decode) == (0, 0)
    assert answer.ms.compute > 0


async def test_parts_of_a_class_map(server: Server, scene_bundle: Bundle, tmp_path: Path) -> None:
    found: dict[str, Answer] = {}
    for answers in Answers.of_task("segmentation"):
        async with edge_client(server.grpc, tmp_path, model="scene", answers=answers.value) as it:
            found[answers] = await it.infer(photo(4))
    assert found["none"].segmentation is None
    assert not {"labels", "classes"} & found["none"].to_dict().keys(), "it is no classification"
    whole = found["all"].segmentation
    assert whole is not None
    for name in ("map", "map/4", "shares"):
        part = found[name].segmentation
        assert part is not None
        assert {share.index for share in part.classes} <= {share.index for share in whole.classes}
        assert all(share.name for share in part.classes)
        if name == "map":
            assert (part.map == whole.map).all()
            assert part.classes == whole.classes
        elif name == "shares":
            assert part.map.shape == (0, 0)
            assert part.map_bytes == 0
            assert [s.share for s in part.classes] == pytest.approx([s.share for s in whole.classes], abs=1e-4)
        else:
            assert part.map.shape == whole.map.shape
            assert (coarse(part.map, 4) == coarse(whole.map, 4)).all()
            assert part.map_bytes == len(encode_map(coarse(whole.map, 4)))
            assert part.map_bytes < whole.map_bytes


async def test_a_client_without_the_manifest_gets_sizes_names_and_shares(server: Server, scene_bundle: Bundle) -> None:
    scenes = Frames(scene_bundle)
    async with stub(server.grpc) as cloud, asyncio.timeout(HANG_S):
        full = await open_stream(cloud, scene_bundle.bundle_id, model="scene", answers=pb.ANSWERS_MAP_4)
        coded = (await full.ask(scenes.frame(1))).result.output.segmentation
        assert (coded.height, coded.width, coded.step) == (24, 40, 4)
        assert decode_map(coded.map, height=6, width=10, number=5).shape == (6, 10)
        assert all(share.name for share in coded.classes)
        brief = await open_stream(cloud, scene_bundle.bundle_id, model="scene", brief=True, answers=pb.ANSWERS_SHARES)
        shares = (await brief.ask(scenes.frame(1))).result.output.segmentation
        assert not shares.map
        assert list(shares.index) == [share.index for share in coded.classes]
        assert unpacked_scores(shares.shares) == pytest.approx([share.share for share in coded.classes], abs=1e-4)


SHARE_LIES = {
    "a map": pb.Segmentation(height=24, width=40, map=encode_map(np.zeros((24, 40), np.uint8))),
    "nothing": pb.Segmentation(),
    "an unknown class": pb.Segmentation(index=[77], shares=b"\xff\xff"),
    "a share without its class": pb.Segmentation(index=[1, 2], shares=b"\xff\xff"),
    "a share above one": pb.Segmentation(classes=[pb.ClassShare(index=1, share=1.5)]),
    "no number": pb.Segmentation(classes=[pb.ClassShare(index=1, share=float("nan"))]),
}


async def test_shares_that_lie_fail_their_frame_alone(scene_bundle: Bundle, tmp_path: Path) -> None:
    lies = list(SHARE_LIES.values())

    async def converse(context: Any) -> None:
        await opened(context)
        while isinstance(message := await context.read(), pb.ClientMessage):
            seq = message.frame.seq
            found = lies[seq - 1] if seq <= len(lies) else pb.Segmentation(index=[1], shares=b"\xff\xff")
            await context.write(
                pb.ServerMessage(result=pb.Result(seq=seq, output=pb.Output(segmentation=found), cloud_us=1))
            )

    async with rogue_server(scene_bundle, converse) as (address, _), asyncio.timeout(HANG_S):
        async with edge_client(address, tmp_path, model="", answers="shares", retries=1) as it:
            found = [result async for result in it.stream([photo(0)] * (len(lies) + 1))]
    for name, result in zip(SHARE_LIES, found[:-1], strict=True):
        assert isinstance(result, Failure), name
        assert isinstance(result.error, ProtocolError), name
    assert isinstance(found[-1], Answer)


async def test_link_bytes_are_shown_and_counted(server: Server, tmp_path: Path) -> None:
    async with edge_client(server.grpc, tmp_path) as it:
        await answers_of(it, [photo(k) for k in range(3)])
        async with httpx.AsyncClient(base_url=server.http) as http:
            text = (await http.get("/metrics")).text
    up = re.search(r'bitneck_link_bytes_total\{direction="up",model="tiny"\} (\S+)', text)
    messages = re.search(r'bitneck_message_bytes_total\{direction="up",model="tiny"\} (\S+)', text)
    assert up is not None
    assert messages is not None
    assert float(up[1]) > 1.5 * float(messages[1]) > 0
