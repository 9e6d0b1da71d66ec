"""Segmentation from a photograph to files: edge and cloud as processes, beside a classifier, and answers that lie."""

import json
import subprocess
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from bitneck.bundle import Bundle
from bitneck.coding.class_map import count_classes, encode_map
from bitneck.coding.coarse_map import coarse
from bitneck.errors import BundleCorrupt, InvalidConfig, ModelFailure, ProtocolError
from bitneck.image import preprocess
from bitneck.manifest import Manifest
from bitneck.v2 import inference_pb2 as pb
from bitneck.wire.messages import CodedMap
from bitneck_cloud.api.wire import parse_frame
from bitneck_cloud.engine.outputs import frames_of_a_pass, output_of
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_edge.answers.maps import MapWriter, colours, indexed
from bitneck_edge.answers.results import Answer, ClassShare, Failure, Segmentation
from bitneck_edge.client import EdgeClient
from bitneck_edge.encoder import EdgeEncoder
from bitneck_testing.devices.answers import answer_to
from bitneck_testing.photographs import photo, photo_bytes
from bitneck_testing.processes import BIN, Server, edge
from bitneck_testing.rogue_servers import opened, rogue_server
from bitneck_testing.streams import Frames, open_stream, stub
from bitneck_testing.tiny_bundles import SCENE_CLASSES, SCENE_INPUT

H, W, K = SCENE_INPUT.height, SCENE_INPUT.width, len(SCENE_CLASSES)


@pytest.fixture(scope="module")
def street(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of odd names and sizes; two have one name."""
    folder = tmp_path_factory.mktemp("street")
    (folder / "left").mkdir()
    for k, name in enumerate(("a b;$(x).png", "left/one.png", "one.jpg", "-x.png", "ONE.png")):
        photo(k, (70 + k, 50)).save(folder / name)
    return folder


def expected(bundle: Bundle, point: str, image: Image.Image) -> NDArray[np.uint8]:
    """The class map by the bundle's own numerics, without server and client."""
    frames = Frames(bundle)
    encoder = frames.encoders[point]
    f = frames.chain.run(preprocess(image, SCENE_INPUT), 0, frames.chain.head_length(encoder.point.split))
    return frames.logits(point, encoder.encode(f).payload).argmax(axis=0).astype(np.uint8)


@pytest.mark.parametrize("point", ["s1-r1", "s1-r2", "s2-r1"])
async def test_a_photograph_becomes_a_class_map(
    server: Server, scene_bundle: Bundle, tmp_path: Path, point: str
) -> None:
    async with EdgeClient(server.grpc, model="scene", point=point, cache_dir=tmp_path, threads=1) as client:
        answer = await client.infer(photo(5))
    found = answer.segmentation
    assert found is not None
    assert answer.labels == ()
    assert (found.map == expected(scene_bundle, point, photo(5))).all()
    assert found.map.dtype == np.uint8
    assert len(found.classes) > 1
    assert [c.share for c in found.classes] == sorted((c.share for c in found.classes), reverse=True)
    for one in found.classes:
        assert one.name == SCENE_CLASSES[one.index]
        assert one.share == pytest.approx((found.map == one.index).mean())
    assert found.map_bytes == len(encode_map(found.map))
    document = answer.to_dict()
    assert document["map_bytes"] == found.map_bytes
    assert document["classes"][0] == {
        "index": found.classes[0].index,
        "name": found.classes[0].name,
        "share": found.classes[0].share,
    }
    assert not {"labels", "segmentation", "written", "map", "map_file"} & set(document)
    assert json.loads(json.dumps(document)) == document
    assert answer.without_map() == answer
    assert answer.bpp_payload == answer.payload_bytes * 8 / (H * W)


async def test_a_server_of_both_tasks(
    server: Server, tiny_bundle: Bundle, scene_bundle: Bundle, tmp_path: Path
) -> None:
    """Frames of a classifier and of a segmenter in turns: each gets its own kind of answer."""
    async with (
        EdgeClient(server.grpc, model="scene", cache_dir=tmp_path, threads=1) as scenes,
        EdgeClient(server.grpc, model="tiny", cache_dir=tmp_path, threads=1) as labels,
    ):
        for k in range(4):
            scene, label = await scenes.infer(photo(k)), await labels.infer(photo(k))
            assert scene.segmentation is not None
            assert (scene.segmentation.map == expected(scene_bundle, scenes.point, photo(k))).all()
            assert label.segmentation is None
            assert len(label.labels) == 5
            assert set(label.to_dict()) >= {"labels", "ms"}


def test_a_server_describes_both_tasks(server: Server) -> None:
    models = {m["name"]: m for m in httpx.get(f"{server.http}/v1/models").json()}
    scene_info, tiny_info = models["scene"], models["tiny"]
    assert (scene_info["task"], scene_info["classes"]) == ("segmentation", K)
    assert (scene_info["input_height"], scene_info["input_width"]) == (H, W)
    outputs = [
        {"name": "classes", "datatype": "UINT8", "shape": [1, H, W]},
        {"name": "shares", "datatype": "FP32", "shape": [1, K]},
    ]
    assert scene_info["outputs"] == outputs
    assert httpx.get(f"{server.http}/v2/models/scene").json()["outputs"] == outputs
    assert (tiny_info["task"], tiny_info["classes"]) == ("classification", 10)
    assert tiny_info["outputs"] == [{"name": "scores", "datatype": "FP32", "shape": [1, 10]}]


async def test_infer_without_a_session(server: Server, scene_bundle: Bundle) -> None:
    assert EdgeEncoder(scene_bundle, threads=1).labels == SCENE_CLASSES
    frame = Frames(scene_bundle).frame(1, "s2-r1", 3)
    async with stub(server.grpc) as cloud:
        request = pb.InferRequest(model="scene", bundle_id=scene_bundle.bundle_id, frame=frame)
        answer = (await cloud.Infer(request)).result.output.segmentation
    assert (answer.height, answer.width) == (H, W)
    assert answer.map == encode_map(expected(scene_bundle, "s2-r1", photo(3)))


def test_run_writes_maps_and_overlays(server: Server, scene_bundle: Bundle, street: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "maps"
    run = ("run", "--server", server.grpc, "--model", "scene", "--cache-dir", tmp_path / "cache", "--point", "s1-r2")
    done = edge(*run, "--out", out, "--json", street, street / "left")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    frames = document["frames"]
    assert len(frames) == 6
    files = [Path(frame[key]) for frame in frames for key in ("map_file", "overlay_file")]
    assert len({str(path).casefold() for path in files}) == 12
    assert {path.parent for path in files} == {out}
    assert set(files) == set(out.iterdir())
    assert all(
        set(path.name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") for path in files
    )
    assert {Path(frame["map_file"]).name for frame in frames} >= {"a_b_x_.map.png", "x.map.png"}
    for frame in frames:
        with Image.open(frame["file"]) as image:
            source = image.convert("RGB")
        with Image.open(frame["map_file"]) as image:
            assert image.mode == "P"
            assert image.size == source.size
            assert image.getpalette()[: 3 * K] == colours()[:K].reshape(-1).tolist()  # type: ignore[index]
            written = np.asarray(image)
        small = Image.fromarray(expected(scene_bundle, "s1-r2", source))
        assert (written == np.asarray(small.resize(source.size, Image.Resampling.NEAREST))).all()
        with Image.open(frame["overlay_file"]) as image:
            assert image.size == source.size
            mixed = np.asarray(image, dtype=np.float64)
        wanted = (np.asarray(source, dtype=np.float64) + colours()[written]) / 2
        assert np.abs(mixed - wanted).mean() < 12  # JPEG
        assert frame["classes"]
        assert frame["map_bytes"] > 0
    assert document["summary"]["map_bytes_mean"] == pytest.approx(np.mean([f["map_bytes"] for f in frames]))
    again = edge(*run, "--out", out, "--json", street, street / "left")
    assert again.returncode == 0
    assert set(files) == set(out.iterdir())


def test_people_read_classes_and_bytes(server: Server, street: Path, tmp_path: Path) -> None:
    run = ("run", "--server", server.grpc, "--model", "scene", "--cache-dir", tmp_path / "cache")
    table = edge(*run, street, tmp_path / "none.png")
    assert table.returncode == 2
    table = edge(*run, street)
    assert table.returncode == 0
    assert "back" in table.stdout
    assert "%" in table.stdout
    lines = edge(*run, "--verbose", street).stdout.splitlines()
    assert len(lines) == 5
    assert all(" back " in line and "%" in line for line in lines)


def test_out_is_for_segmentation(server: Server, street: Path, tmp_path: Path) -> None:
    run = ("run", "--server", server.grpc, "--cache-dir", tmp_path / "cache")
    refused = edge(*run, "--model", "tiny", "--out", tmp_path / "maps", street)
    assert (refused.returncode, "tiny is for classification" in refused.stderr) == (2, True)
    assert not (tmp_path / "maps").exists()
    (tmp_path / "file").write_text("")
    refused = edge(*run, "--model", "scene", "--out", tmp_path / "file" / "maps", street)
    assert (refused.returncode, "cannot be made" in refused.stderr) == (2, True)


def test_the_two_halves_on_files(scene_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(photo_bytes(2))
    done = edge("encode", tmp_path / "photo.png", "--bundle", scene_bundle.root, "--out", tmp_path / "frame.bin")
    assert done.returncode == 0, done.stderr
    command = [str(BIN / "bitneck-cloud"), "decode", str(tmp_path / "frame.bin"), "--bundle", str(scene_bundle.root)]
    document = json.loads(subprocess.run([*command, "--json"], capture_output=True, check=True).stdout)
    point = parse_frame((tmp_path / "frame.bin").read_bytes(), "frame").point
    classes = expected(scene_bundle, point, photo(2))
    assert document["map_bytes"] == len(encode_map(classes))
    assert {c["index"]: c["share"] for c in document["classes"]} == {
        int(k): pytest.approx((classes == k).mean()) for k in np.unique(classes)
    }
    lines = subprocess.run(command, capture_output=True, check=True, text=True).stdout.splitlines()
    assert len(lines) == 1 + len(document["classes"])


def honest(classes: NDArray[np.uint8]) -> pb.Segmentation:
    counts = count_classes(classes, 256)
    shares = [pb.ClassShare(index=k, share=counts[k] / classes.size) for k in range(256) if counts[k]]
    return pb.Segmentation(height=classes.shape[0], width=classes.shape[1], map=encode_map(classes), classes=shares)


GOOD = np.kron(np.arange(K, dtype=np.uint8)[:, None], np.ones((H // K + 1, W), dtype=np.uint8))[:H]


def altered(**values: Any) -> pb.Output:
    answer = honest(GOOD)
    for name, value in values.items():
        setattr(answer, name, value)
    return pb.Output(segmentation=answer)


LIES = {
    "nothing": (pb.Output(), "no class map"),
    "labels": (pb.Output(classification=pb.Classification(labels=[pb.Label(name="x", score=1)])), "no class map"),
    "another size": (altered(height=H * 1000), "expected 24x40"),
    "swapped": (altered(height=W, width=H), "expected 24x40"),
    "no bytes": (altered(map=b""), "cut short"),
    "noise": (altered(map=bytes(range(200))), "no class map"),
    "cut": (altered(map=honest(GOOD).map[:-3]), "cut short"),
    "too large": (altered(map=encode_map(np.vstack([GOOD] * 9))), "class map"),
    "unknown class": (pb.Output(segmentation=honest(GOOD + np.uint8(1))), "names class 5, there are 5"),
    "every fourth pixel": (altered(step=4, map=encode_map(coarse(GOOD, 4))), "each 4. pixel"),
    "other shares": (
        pb.Output(
            segmentation=pb.Segmentation(
                height=H, width=W, map=encode_map(GOOD), classes=[pb.ClassShare(index=k, share=0.2) for k in range(K)]
            )
        ),
        "shares",
    ),
    "no number": (
        pb.Output(
            segmentation=pb.Segmentation(
                height=H, width=W, map=encode_map(GOOD),
                classes=[pb.ClassShare(index=k, share=float("nan")) for k in range(K)],
            )
        ),
        "shares",
    ),
}  # fmt: skip


async def test_answers_that_lie_fail_their_frame_alone(scene_bundle: Bundle, tmp_path: Path) -> None:
    outputs = [output for output, _ in LIES.values()]

    async def converse(context: Any) -> None:
        await opened(context)
        while isinstance(message := await context.read(), pb.ClientMessage):
            seq = message.frame.seq
            output = outputs[seq - 1] if seq <= len(outputs) else pb.Output(segmentation=honest(GOOD))
            await context.write(pb.ServerMessage(result=pb.Result(seq=seq, output=output)))

    async with (
        rogue_server(scene_bundle, converse) as (address, _),
        EdgeClient(address, cache_dir=tmp_path, threads=1, retries=1) as client,
    ):
        results = [result async for result in client.stream([photo(0)] * (len(LIES) + 1))]
    for (name, (_, text)), result in zip(LIES.items(), results[:-1], strict=True):
        assert isinstance(result, Failure), name
        assert isinstance(result.error, ProtocolError), name
        assert text in str(result.error), name
    last = results[-1]
    assert isinstance(last, Answer)
    assert last.segmentation is not None
    assert (last.segmentation.map == GOOD).all()
    assert [c.name for c in last.segmentation.classes] == [SCENE_CLASSES[c.index] for c in last.segmentation.classes]


def test_a_frame_with_one_bad_logit_fails_alone(scene_bundle: Bundle) -> None:
    manifest = scene_bundle.manifest
    logits = np.random.default_rng(0).normal(size=(K, H, W)).astype(np.float32)
    output = output_of(manifest, SCENE_CLASSES, logits)
    assert isinstance(output, CodedMap)
    assert output.map == encode_map(logits.argmax(axis=0).astype(np.uint8))
    assert sum(c.share for c in output.classes) == pytest.approx(1)
    logits[2, 3, 4] = np.nan
    assert isinstance(output_of(manifest, SCENE_CLASSES, logits), ModelFailure)
    assert isinstance(output_of(manifest, SCENE_CLASSES, logits[:, :-1]), ModelFailure)
    assert isinstance(output_of(manifest, SCENE_CLASSES, logits[:-1]), ModelFailure)
    model = ServedModel(scene_bundle, threads=1)
    frames = Frames(scene_bundle)
    good = model.decode("s1-r1", frames.payload("s1-r1", 0))
    bad = np.full_like(good, np.nan)
    first, second, third = model.compute(["s1-r1"] * 3, [good, bad, good])
    assert isinstance(second, ModelFailure)
    assert isinstance(first, CodedMap)
    assert isinstance(third, CodedMap)
    assert first.map == third.map


def test_a_pass_is_bounded_in_memory(scene_bundle: Bundle) -> None:
    manifest = scene_bundle.manifest
    assert frames_of_a_pass(manifest, K) > 1000
    large = manifest.model_dump(mode="json")
    large["input"] |= {"height": 513, "width": 513}
    wide = Manifest.model_validate_json(json.dumps(large))
    assert frames_of_a_pass(wide, 21) == 3  # 22 MB each
    large["input"] |= {"height": 4000, "width": 4000}
    assert frames_of_a_pass(Manifest.model_validate_json(json.dumps(large)), 21) == 1
    for classes in (0, 257):
        with pytest.raises(BundleCorrupt, match="class map can name"):
            frames_of_a_pass(manifest, classes)


def test_colours_differ() -> None:
    assert len({tuple(colour) for colour in colours().tolist()}) == 256
    assert colours()[:3].tolist() == [[128, 0, 0], [0, 128, 0], [128, 128, 0]]


def answer(file: str, classes: NDArray[np.uint8]) -> Answer:
    return answer_to(file, Segmentation(map=classes, classes=(ClassShare(0, "x", 1.0),), map_bytes=1))


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "..",
        "",
        ".hidden",
        "a/b\\c",
        "\x00\n",
        "é" * 300,
        "video.mp4#12",
        "rtsp://u:p@h/live#3",
        "<3 bytes>",
    ],
)
def test_names_stay_in_the_folder(tmp_path: Path, name: str) -> None:
    out = tmp_path / "maps"
    writer = MapWriter(out)
    writer.prepare()
    for _ in range(3):
        written = writer.write(photo(0), answer(name, GOOD)).written
        assert written is not None
        assert Path(written.map_file).parent == out
    assert len(list(out.iterdir())) == 6
    assert [p.name for p in tmp_path.iterdir()] == ["maps"]
    assert not any(p.name.startswith((".", "-")) for p in out.iterdir())
    assert (out / "video-12.map.png").exists() == (name == "video.mp4#12")


def test_maps_that_cannot_be_written(tmp_path: Path) -> None:
    writer = MapWriter(tmp_path / "gone")
    with pytest.raises(InvalidConfig, match="cannot write"):
        writer.write(photo(0), answer("x.png", GOOD))
    (tmp_path / "x.png").write_bytes(photo_bytes(0))
    writer.prepare()
    done = writer.write(tmp_path / "x.png", answer("x.png", GOOD)).to_dict()
    assert done["map_file"].endswith("x-2.map.png")
    with Image.open(done["map_file"]) as image:
        assert image.size == (48, 40)
    assert indexed(Segmentation(map=GOOD, classes=(), map_bytes=0), (7, 9)).size == (7, 9)


async def test_both_kinds_of_stream_on_one_engine(server: Server, tiny_bundle: Bundle, scene_bundle: Bundle) -> None:
    """Frames of two models that wait together are computed apart."""
    frames = Frames(tiny_bundle)
    scenes = Frames(scene_bundle)
    async with stub(server.grpc) as cloud:
        one = await open_stream(cloud, tiny_bundle.bundle_id, model="tiny")
        two = await open_stream(cloud, scene_bundle.bundle_id, model="scene")
        for seq in range(1, 9):
            await one.send(frames.frame(seq, "s1-r2", seq))
            await two.send(scenes.frame(seq, "s1-r1", seq))
        labels = [await one.read() for _ in range(8)]
        maps = [await two.read() for _ in range(8)]
    assert all(m.result.output.HasField("classification") for m in labels)
    for message in maps:
        wanted = encode_map(expected(scene_bundle, "s1-r1", photo(message.result.seq)))
        assert message.result.output.segmentation.map == wanted


def test_names_follow_the_order_of_the_photographs_and_not_of_the_answers(tmp_path: Path) -> None:
    writer = MapWriter(tmp_path)
    files = ["a/one.png", "b/ONE.png", "c/one.png"]
    for file in files:
        writer.reserve(file)
    names = {}
    for file in reversed(files):
        written = writer.write(photo(0), answer(file, GOOD)).written
        assert written is not None
        names[file] = Path(written.map_file).name
    assert [names[file] for file in files] == ["one.map.png", "ONE-2.map.png", "one-3.map.png"]
