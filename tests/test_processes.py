"""Edge and cloud as two processes on loopback, and the command lines as a user meets them."""

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from bitneck.bundle import Bundle
from bitneck_cloud.api.wire import parse_frame
from bitneck_models.data.photos import LabelledPhoto
from bitneck_models.measure.evaluate import evaluate
from bitneck_testing.photographs import photo, photo_bytes
from bitneck_testing.processes import BIN, Server, edge, running_server, start_server, wait_for_session
from bitneck_testing.tiny_bundles import make_tiny_bundle


@pytest.fixture(scope="module")
def server(tiny_bundle: Bundle) -> Iterator[Server]:
    with running_server(tiny_bundle.root) as running:
        yield running


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for k in range(6):
        (folder / f"{k}.png").write_bytes(photo_bytes(k))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def run_json(server: Server, cache: Path, *arguments: object) -> dict[str, Any]:
    done = edge("run", "--server", server.grpc, "--cache-dir", cache, "--json", *arguments)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_a_folder_goes_there_and_back(server: Server, cache: Path, photos: Path, tiny_bundle: Bundle) -> None:
    document = run_json(server, cache, "--point", "s1-r2", photos)
    assert document["bundle_id"] == tiny_bundle.bundle_id
    assert [Path(f["file"]).name for f in document["frames"]] == [f"{k}.png" for k in range(6)]
    assert [f["seq"] for f in document["frames"]] == list(range(1, 7))
    for frame in document["frames"]:
        assert frame["point"] == "s1-r2"
        assert frame["bpp_payload"] == pytest.approx(frame["payload_bytes"] * 8 / 1024)
        assert frame["message_bytes"] > frame["payload_bytes"]
        assert len(frame["labels"]) == 5
        stages = [ms for name, ms in frame["ms"].items() if name != "total"]
        assert all(ms >= 0 for ms in stages)
        assert frame["ms"]["total"] == pytest.approx(sum(stages), rel=0.01)
    assert document["summary"]["frames"] == 6


def test_run_encode_and_decode_give_the_same_symbols(
    server: Server, cache: Path, photos: Path, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    for point in ("s1-r1", "s1-r2", "s2-r1"):
        (streamed,) = run_json(server, cache, "--point", point, photos / "3.png")["frames"]
        out = tmp_path / "frame.bin"
        symbols = ("--symbols", tmp_path / "edge.npy")
        source = ("--server", server.grpc, "--cache-dir", cache) if point == "s1-r1" else ("--bundle", tiny_bundle.root)
        encoded = json.loads(
            edge("encode", photos / "3.png", *source, "--point", point, "--out", out, *symbols, "--json").stdout
        )
        command = [str(BIN / "bitneck-cloud"), "decode", str(out), "--bundle", str(tiny_bundle.root), "--json"]
        decoded = json.loads(
            subprocess.run(
                [*command, "--symbols", str(tmp_path / "cloud.npy")], capture_output=True, text=True, check=True
            ).stdout
        )
        assert streamed["symbols_crc32c"] == encoded["symbols_crc32c"] == decoded["symbols_crc32c"]
        measured = evaluate(tiny_bundle, [LabelledPhoto(photos / "3.png", 0)])
        (result,) = [p for p in measured.points if p.id == point]
        assert (result.rate.symbols_crc32c, result.rate.payload_bytes_mean) == (
            streamed["symbols_crc32c"],
            streamed["payload_bytes"],
        )
        assert result.rate.bpp_wire == streamed["bpp_wire"]
        assert streamed["payload_crc32c"] == encoded["payload_crc32c"]
        assert streamed["payload_bytes"] == len(parse_frame(out.read_bytes(), "frame").payload)
        assert [x["index"] for x in streamed["labels"]] == [x["index"] for x in decoded["labels"]]
        np.testing.assert_array_equal(np.load(tmp_path / "edge.npy"), np.load(tmp_path / "cloud.npy"))
        assert encoded["payload_bytes"] <= encoded["ideal_bytes"] * 1.01 + 4


def test_people_get_tables_and_lines(server: Server, cache: Path, photos: Path) -> None:
    options = ("--server", server.grpc, "--cache-dir", cache)
    table = edge("run", *options, photos)
    assert table.returncode == 0
    assert table.stderr.startswith("6 frames: 6 answered, 0 failed")
    assert "3.png" in table.stdout
    verbose = edge("run", *options, "--verbose", photos)
    assert len(verbose.stdout.splitlines()) == 6
    assert len(verbose.stderr.splitlines()) == 1
    points = edge("points", *options, "--json")
    assert [p["id"] for p in json.loads(points.stdout)["points"]] == ["s1-r1", "s2-r1", "s1-r2"]
    assert edge("--version").stdout.strip() == "0.1.0"


def bad_inputs(folder: Path, server: str) -> list[tuple[tuple[object, ...], int, str]]:
    (folder / "text.jpg").write_bytes(b"words")
    photo(0, (300, 200)).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:700])
    (folder / "empty").mkdir()
    (folder / "good.png").write_bytes(photo_bytes(0))
    good, ok = folder / "good.png", ("--server", server)
    return [
        ((*ok, folder / "none.jpg"), 2, "none.jpg: no such file"),
        ((*ok, folder / "text.jpg"), 2, "text.jpg: not an image"),
        ((*ok, folder / "cut.jpg"), 2, "cut.jpg: damaged or cut short"),
        ((*ok, folder / "empty"), 2, "no photographs in this folder"),
        ((*ok, "--point", "s9", good), 2, "this bundle has: s1-r1, s2-r1, s1-r2"),
        ((*ok, "--point", "../x", good), 2, "no operating point"),
        ((*ok, "--model", "nope", good), 2, "there are: tiny"),
        (("--server", "nowhere", good), 2, "not HOST:PORT"),
        (("--server", "127.0.0.1:99999", good), 2, "a port is at most 65535"),
        ((*ok, "--bundle-id", "sha256:" + "0" * 64, good), 1, "expected sha256:000"),
        ((*ok, "--config", folder / "none.toml", good), 2, "none.toml"),
    ]


def test_bad_input_is_told_clearly(server: Server, cache: Path, tmp_path: Path) -> None:
    for arguments, code, text in bad_inputs(tmp_path, server.grpc):
        done = edge("run", "--json", "--cache-dir", cache, *arguments)
        assert done.returncode == code, (arguments, done.stderr)
        assert text in done.stderr.replace("\n", " "), arguments
        assert "Traceback" not in done.stderr
        assert done.stdout == "" or json.loads(done.stdout)["frames"] == []


def test_a_bad_photograph_in_a_folder_does_not_stop_the_rest(server: Server, cache: Path, tmp_path: Path) -> None:
    for name, data in (("a.png", photo_bytes(0)), ("b.png", b"broken"), ("c.png", photo_bytes(1))):
        (tmp_path / name).write_bytes(data)
    done = edge("run", "--json", "--server", server.grpc, "--cache-dir", cache, tmp_path)
    document = json.loads(done.stdout)
    assert done.returncode == 1
    assert [Path(f["file"]).name for f in document["frames"]] == ["a.png", "c.png"]
    assert [Path(f["file"]).name for f in document["failed"]] == ["b.png"]


def test_no_server_there(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(photo_bytes(0))
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # listens, and never speaks
        free = socket.create_server(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        for address in (f"127.0.0.1:{port}", f"127.0.0.1:{deaf.getsockname()[1]}"):
            options = ("--server", address, "--cache-dir", tmp_path / "c", "--retries", 1, "--connect-timeout-s", 0.5)
            done = edge("run", *options, tmp_path / "a.png")
            assert (done.returncode, done.stdout) == (1, "")
            assert address in done.stderr
            assert "2 attempts" in done.stderr
            assert "Traceback" not in done.stderr


def test_the_rate_changes_in_the_middle_of_a_stream(server: Server, cache: Path, photos: Path) -> None:
    command = [str(BIN / "bitneck-edge"), "run", "--server", server.grpc, "--cache-dir", str(cache), "--json"]
    command += ["--client", "midstream", "--point", "s1-r2", "--fps", "40", "--repeat", "20", str(photos)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        session = wait_for_session(server, "midstream")
        reply = httpx.put(f"{server.http}/v1/sessions/{session}/rate", json={"max_bytes_per_frame": 5})
        assert reply.json()["point"] == "s1-r1"
        out, _ = process.communicate(timeout=60)
    document = json.loads(out)
    frames = document["frames"]
    assert [f["seq"] for f in frames] == list(range(1, 121))  # none lost, none twice
    points = [f["point"] for f in frames]
    first_low = points.index("s1-r1")
    assert first_low > 0
    assert set(points[:first_low]) == {"s1-r2"}
    assert set(points[first_low:]) == {"s1-r1"}
    (switch,) = document["switches"]
    assert (switch["from"], switch["to"]) == ("s1-r2", "s1-r1")
    assert "max_bytes_per_frame" in switch["reason"]
    assert points[switch["after_seq"]] in ("s1-r2", "s1-r1")
    assert first_low - switch["after_seq"] <= 1  # at most the frame that was being encoded is late


def test_a_server_killed_in_mid_stream_and_started_again(tiny_bundle: Bundle, cache: Path, photos: Path) -> None:
    first = start_server(tiny_bundle.root)
    second: list[Server] = []
    command = [str(BIN / "bitneck-edge"), "run", "--server", first.grpc, "--cache-dir", str(cache), "--json"]
    command += ["--client", "survivor", "--fps", "40", "--repeat", "20", "--retries", "20", str(photos)]
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            wait_for_session(first, "survivor")
            first.kill()
            second.append(start_server(tiny_bundle.root, grpc=first.grpc))
            out, _ = process.communicate(timeout=90)
        document = json.loads(out)
        assert [f["seq"] for f in document["frames"]] == list(range(1, 121))
        assert document["failed"] == []
        assert document["summary"]["reconnects"] >= 1
    finally:
        for running in [first, *second]:
            if running.process.poll() is None:
                assert running.stop() == 0
            assert running.process.stdout is not None
            running.process.stdout.close()
            running.log.close()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_prints_what_it_has(
    server: Server, cache: Path, photos: Path, signum: signal.Signals
) -> None:
    client = f"stopped-{signum.name.lower()}"
    command = [str(BIN / "bitneck-edge"), "run", "--server", server.grpc, "--cache-dir", str(cache), "--json"]
    command += ["--client", client, "--fps", "20", "--repeat", "1000", str(photos)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for_session(server, client)
        process.send_signal(signum)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signum
    seqs = [f["seq"] for f in json.loads(out)["frames"]]
    assert err.startswith(f"{len(seqs)} frames: {len(seqs)} answered")
    assert len(err.splitlines()) == 1
    assert seqs == list(range(1, len(seqs) + 1))
    assert len(seqs) > 5


def test_a_corrupted_bundle_on_the_device(own_tiny_bundle: Bundle, photos: Path, tmp_path: Path) -> None:
    path = own_tiny_bundle.root / "units" / "s1-r2" / "encoder.onnx"
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    done = edge("encode", photos / "0.png", "--bundle", own_tiny_bundle.root, "--out", tmp_path / "o")
    assert done.returncode == 1
    assert "encoder.onnx has SHA-256" in done.stderr
    assert not (tmp_path / "o").exists()


def test_the_edge_runs_without_torch_and_fastapi(tiny_bundle: Bundle, photos: Path, tmp_path: Path) -> None:
    arguments = ["encode", str(photos / "0.png"), "--bundle", str(tiny_bundle.root), "--out", str(tmp_path / "o")]
    code = f"""
import sys
for name in ("torch", "torchvision", "timm", "onnx", "fastapi", "uvicorn", "bitneck_cloud", "bitneck_models"):
    sys.modules[name] = None  # importing it fails from here on
sys.argv = ["bitneck-edge", *{arguments!r}]
from bitneck_edge.cli.main import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "o").stat().st_size > 0


def test_many_clients_at_once(server: Server, cache: Path, photos: Path) -> None:
    run_json(server, cache, photos / "0.png")  # fills the cache
    results: list[dict[str, Any]] = []
    points = ("s1-r1", "s1-r2", "s2-r1", "s1-r2")
    threads = [
        threading.Thread(
            target=lambda p=p: results.append(run_json(server, cache, "--point", p, "--repeat", 5, photos))
        )
        for p in points
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == len(points)
    assert all(len(r["frames"]) == 30 for r in results)


def test_bundles_of_the_same_name_do_not_mix(tmp_path: Path, photos: Path) -> None:
    ids = set()
    for seed in (1, 2):
        bundle = make_tiny_bundle(tmp_path / f"b{seed}", seed=seed)
        with running_server(bundle.root) as own:
            document = run_json(own, tmp_path / "cache", photos)
            assert document["bundle_id"] == bundle.bundle_id
            ids.add(document["bundle_id"])
    assert len(ids) == 2
    assert len(list((tmp_path / "cache" / "manifests").iterdir())) == 2


def test_commands_that_only_ask_for_the_bundle_take_a_token(tiny_bundle: Bundle, photos: Path, tmp_path: Path) -> None:
    with running_server(tiny_bundle.root, options=("--device-token", "for-devices-only")) as server:
        common = ("--server", server.grpc, "--cache-dir", tmp_path / "cache")
        refused = edge("points", *common)
        assert refused.returncode != 0
        assert "--token" in refused.stderr
        shown = json.loads(edge("points", *common, "--token", "for-devices-only", "--json").stdout)
        assert [point["id"] for point in shown["points"]] == [point.id for point in tiny_bundle.manifest.ladder]
        settings = tmp_path / "settings.toml"
        settings.write_text(f'server = "{server.grpc}"\ntoken = "for-devices-only"\n')
        out = tmp_path / "frame.bin"
        done = edge("encode", photos / "0.png", "--out", out, "--config", settings, "--cache-dir", tmp_path / "cache")
        assert (done.returncode, out.is_file()) == (0, True), done.stderr


STOPPED_EARLY = {
    "SystemExit out of a stream": "async for answer in client.stream([photo] * 50): sys.exit(3)",
    "an infer that was cancelled": (
        "task = asyncio.create_task(client.infer(photo)); await asyncio.sleep(0.005); task.cancel(); sys.exit(3)"
    ),
    "no close at all": "asyncio.create_task(client.infer(photo)); await asyncio.sleep(0.005); sys.exit(3)",
}


@pytest.mark.parametrize("way", STOPPED_EARLY)
def test_a_program_ends_quietly_while_photographs_are_encoded(server: Server, tmp_path: Path, way: str) -> None:
    """A thread inside ONNX Runtime would abort the process at its exit."""
    photo(0, (3000, 2000)).save(tmp_path / "large.jpg")
    enter = "client = await client.__aenter__()" if way == "no close at all" else "async with client:"
    body = STOPPED_EARLY[way]
    block = f"    {enter}\n    {body}" if way == "no close at all" else f"    {enter}\n        {body}"
    code = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom bitneck_edge import EdgeClient\n"
        f"photo = Path({str(tmp_path / 'large.jpg')!r})\n"
        "async def main():\n"
        f"    client = EdgeClient({server.grpc!r}, cache_dir={str(tmp_path / 'cache')!r})\n{block}\n"
        "asyncio.run(main())\n"
    )
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert (done.returncode, "terminate called" in done.stderr) == (3, False), done.stderr


def test_a_reader_that_goes_away_ends_a_run_quietly(server: Server, tmp_path: Path) -> None:
    photo(0, (1500, 1000)).save(tmp_path / "large.jpg")
    command = [BIN / "bitneck-edge", "run", "--server", server.grpc, "--cache-dir", tmp_path / "cache", "--verbose"]
    command += ["--point", "s1-r2", "--repeat", "200", tmp_path / "large.jpg"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.readline()
        running.stdout.close()
        assert running.wait(60) == 1
        assert running.stderr.read() == b""


def test_a_proxy_is_not_asked_for_loopback(server: Server, cache: Path, photos: Path) -> None:
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy"), "http://127.0.0.1:9")
    command = ("run", "--server", server.grpc, "--cache-dir", cache, "--retries", "0", photos / "0.png")
    done = edge(*command, env=proxies)
    assert done.returncode == 0, done.stderr
