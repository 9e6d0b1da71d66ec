"""What a device tells of itself: metrics, reports to the server, the summary line, tables and CSV."""

import asyncio
import csv
import io
import math
import os
import pty
import re
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from bitneck.bundle import Bundle
from bitneck.errors import ImageError, InvalidConfig
from bitneck.v2 import inference_pb2 as pb
from bitneck.wire.link_bytes import LinkBytes
from bitneck.wire.messages import Device
from bitneck_cloud.api.wire import from_wire
from bitneck_edge.client import EdgeClient
from bitneck_edge.link.wire import client_message
from bitneck_edge.observe.buckets import FINE_S, SCRAPED_S, Buckets
from bitneck_edge.observe.http import serve_page
from bitneck_edge.observe.metrics import Exposition
from bitneck_edge.observe.temperature import temperatures_c
from bitneck_edge.settings import EdgeSettings
from bitneck_edge.spool.bounds import SpoolCounts
from bitneck_edge.spool.sender import Sender
from bitneck_edge.spool.spooling import Spooling
from bitneck_testing.photographs import add_photos, photo
from bitneck_testing.processes import BIN, Server, edge, edge_run, free_port

DEVICE = Device(
    pictures=7, answered=4, failed=2, dropped=3, reconnects=1, unanswered=1, head_us=12_000, encode_us=900,
    answer_us=70_000, temperature_c=-3.5,
)  # fmt: skip


@given(st.lists(st.floats(2e-4, 3000), min_size=1, max_size=200), st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_quantiles_are_within_one_percent(values: list[float], q: float) -> None:
    buckets = Buckets(FINE_S)
    for value in values:
        buckets.add(value)
    exact = sorted(values)[max(1, math.ceil(q * len(values))) - 1]
    assert buckets.quantile(q) == pytest.approx(exact, rel=0.0101)
    assert buckets.cumulative()[-1] == (math.inf, len(values))


def test_buckets_without_values_and_with_endless_ones() -> None:
    buckets = Buckets(SCRAPED_S)
    assert buckets.quantile(0.5) == 0.0
    buckets.add(1e9)
    buckets.add(0.0)
    assert (buckets.quantile(1.0), buckets.quantile(0.0)) == (SCRAPED_S[-1], SCRAPED_S[0])


def test_temperatures_are_read_where_they_make_sense(tmp_path: Path) -> None:
    zones = [("cpu", "45500"), ("cpu", "51000"), ("gpu", "-274000"), ("\x1b[31mred", "20000"), ("off", "n/a")]
    for k, (name, value) in enumerate(zones):
        zone = tmp_path / f"thermal_zone{k}"
        zone.mkdir()
        (zone / "type").write_text(name + "\n")
        (zone / "temp").write_text(value + "\n")
    (tmp_path / "cooling_device0").mkdir()
    assert temperatures_c(tmp_path) == {"cpu": 51.0, "\N{REPLACEMENT CHARACTER}[31mred": 20.0}
    assert temperatures_c(tmp_path / "nowhere") == {}


@pytest.mark.parametrize("temperature", [-3.5, 0.0, None])
def test_a_report_survives_the_wire(temperature: float | None) -> None:
    sent = Device(**{name: getattr(DEVICE, name) for name in DEVICE.__slots__} | {"temperature_c": temperature})
    data = client_message(sent).SerializeToString()
    assert len(data) < 40
    assert from_wire(pb.ClientMessage.FromString(data)) == sent


def test_a_report_of_what_cannot_be_is_cut() -> None:
    far = from_wire(pb.ClientMessage(device=pb.Device(temperature=2_000_000_000)))
    assert isinstance(far, Device)
    assert far.temperature_c is None
    assert from_wire(pb.ClientMessage(device=pb.Device())) == Device(
        pictures=0, answered=0, failed=0, dropped=0, reconnects=0, unanswered=0, head_us=0, encode_us=0, answer_us=0
    )


def test_settings_that_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="report_s of 5 s is too often"):
        EdgeSettings.load({"report_s": 5.0})
    with pytest.raises(InvalidConfig, match="everybody on the network could read the metrics"):
        EdgeSettings.load({"metrics": "0.0.0.0:9101"})
    with pytest.raises(InvalidConfig, match="HOST:PORT"):
        EdgeSettings.load({"metrics": "9101"})
    assert EdgeSettings.load({"metrics": "0.0.0.0:9101", "insecure": True}).metrics == "0.0.0.0:9101"


def samples(text: str) -> dict[str, float]:
    return {
        sample.name + "".join(f"/{value}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_metrics_and_reports_of_a_client(server: Server, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    async with (
        EdgeClient(
            server.grpc, model="tiny", cache_dir=tmp_path / "cache", point="s1-r1", metrics=address, report_s=10
        ) as client,
        httpx.AsyncClient() as http,
    ):
        for k in range(3):
            await client.infer(photo(k))
        with pytest.raises(ImageError):
            await client.infer(b"no picture")
        results = [result async for result in client.stream([photo(4), tmp_path / "nowhere.png"])]
        assert len(results) == 2
        before = client.link_bytes
        text = (await http.get(f"http://{address}/metrics")).text
        found = samples(text)
        assert found["bitneck_edge_pictures_total"] == 6
        assert found["bitneck_edge_answers_total"] == found["bitneck_edge_head_seconds_count"] == 4
        assert found["bitneck_edge_failures_total/ImageError"] == 2
        assert found["bitneck_edge_connected"] == found["bitneck_edge_point/s1-r1"] == 1
        assert found["bitneck_edge_unanswered_frames"] == found["bitneck_edge_reconnects_total"] == 0
        assert 0 < found["bitneck_edge_head_seconds_sum"] < found["bitneck_edge_answer_seconds_sum"]
        assert found["bitneck_edge_link_bytes_total/up"] >= before.up
        assert found["process_resident_memory_bytes"] > 1e7

        first = server.session(client.session_id)["device"]
        assert (first["answered"], first["head_ms"]) == (0, None)
        state = client.state()
        from bitneck_edge.observe.state import Report

        report = Report()
        await client._tell(report.device(state))
        after = client.link_bytes
        assert 60 < after.up - before.up < 200
        for _ in range(100):
            second = server.session(client.session_id)["device"]
            if second["pictures"] == 6:
                break
            await asyncio.sleep(0.05)
        assert (second["pictures"], second["answered"], second["failed"], second["dropped"]) == (6, 4, 2, 0)
        assert second["head_ms"] > 0
        assert second["answer_ms"] > second["head_ms"]
        again = report.device(state)
        assert (again.answered, again.head_us, again.answer_us) == (4, 0, 0)
        session = server.session(client.session_id)
        assert session["frames_answered"] == 4
        assert session["faults"] == {}
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*address.split(":"))


async def test_the_page_is_there_before_the_server_and_tells_of_its_loss(tiny_bundle: Bundle, tmp_path: Path) -> None:
    from bitneck_testing.processes import start_server

    port, grpc = free_port(), f"127.0.0.1:{free_port()}"
    client = EdgeClient(grpc, cache_dir=tmp_path / "cache", metrics=f"127.0.0.1:{port}", retries=-1)
    opening = asyncio.create_task(client.__aenter__())
    async with httpx.AsyncClient() as http:

        async def connected(wanted: float) -> dict[str, float]:
            async with asyncio.timeout(60):
                while True:
                    try:
                        found = samples((await http.get(f"http://127.0.0.1:{port}/metrics")).text)
                    except httpx.ConnectError:
                        found = {}
                    if found.get("bitneck_edge_connected") == wanted:
                        return found
                    await asyncio.sleep(0.1)

        assert (await connected(0.0))["bitneck_edge_answers_total"] == 0
        server = await asyncio.to_thread(start_server, tiny_bundle.root, grpc=grpc)
        try:
            await opening
            await connected(1.0)
            await asyncio.to_thread(server.kill)
            await connected(0.0)
        finally:
            server.close()
        await client.close()
        await client.close()


async def test_an_address_that_is_taken_is_refused(server: Server, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InvalidConfig, match=r"cannot listen.*--metrics"):
            async with EdgeClient(server.grpc, model="tiny", cache_dir=tmp_path / "cache", metrics=address):
                pass


async def test_the_state_of_a_client_with_a_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its metrics have the spool's counts, and the bytes that cross the link for its frames."""
    client = EdgeClient("127.0.0.1:9", spool=tmp_path)
    assert "spool" not in Exposition(client.state).render().decode()
    spooling = client._spooling = await Spooling.open(client.settings, lambda: None, lambda _result: None)
    assert spooling is not None
    monkeypatch.setattr(Sender, "link_bytes", LinkBytes(70.0, 30.0))
    counts = SpoolCounts(spooled=9, sent=5, kept=3, unknown=2, dropped=1, bytes=700)
    monkeypatch.setattr(Sender, "counts", counts)
    found = samples(Exposition(client.state).render().decode())
    assert (found["bitneck_edge_link_bytes_total/up"], found["bitneck_edge_link_bytes_total/down"]) == (70, 30)
    names = (
        "spooled_total", "sent_total", "dropped_total", "kept_frames", "unknown_frames", "bytes", "waiting_frames",
        "opened",
    )  # fmt: skip
    assert [found[f"bitneck_edge_spool_{name}"] for name in names] == [9, 5, 1, 3, 2, 700, 0, 1]
    await spooling.close()


async def test_strange_requests_to_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitneck_edge.observe import http

    monkeypatch.setattr(http, "_REQUEST_S", 1.0)
    async with serve_page("127.0.0.1:0", lambda: b"fine 1\n") as where, httpx.AsyncClient() as client:
        url = f"http://{where}"
        statuses = [
            (await client.get(f"{url}/metrics")).status_code,
            (await client.get(f"{url}/metrics?name=x")).status_code,
            (await client.get(f"http://localhost:{where.port}/metrics")).status_code,
            (await client.get(url)).status_code,
            (await client.post(f"{url}/metrics", content=b"x")).status_code,
            (await client.get(f"{url}/metrics", headers={"Host": "evil.example"})).status_code,
            (await client.get(f"{url}/metrics", headers={"X": "y" * 20_000})).status_code,
        ]
        assert statuses == [200, 200, 200, 404, 405, 421, 400]
        head = await client.head(f"{url}/metrics")
        assert (head.status_code, head.reason_phrase, head.content) == (200, "OK", b"")
        assert head.headers["content-length"] == "7"

        async def talk(data: bytes) -> bytes:
            reader, writer = await asyncio.open_connection(where.host, where.port)
            writer.write(data)
            try:
                return await asyncio.wait_for(reader.read(), 10)
            except ConnectionError:
                return b""
            finally:
                writer.close()

        assert (await talk(b"\0\1\2 no http\r\n\r\n")).startswith(b"HTTP/1.1 400")
        silent = [asyncio.create_task(talk(b"GET /met")) for _ in range(12)]  # four too many end at once
        assert await asyncio.gather(*silent) == [b""] * 12
        assert (await client.get(f"{url}/metrics")).text == "fine 1\n"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_the_summary_line_and_csv(server: Server, cache: Path, tmp_path: Path) -> None:
    add_photos(tmp_path / "photos", range(3))
    (tmp_path / "photos" / "broken,\nname.png").write_bytes(b"no picture")
    done = subprocess.run(
        edge_run(server.grpc, cache, "--model", "tiny", "--point", "s1-r1", "--csv", tmp_path / "photos"),
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert len(rows) == 4
    good = [row for row in rows if not row["error"]]
    assert [Path(row["file"]).name for row in good] == ["00.png", "01.png", "02.png"]
    assert all(
        row["point"] == "s1-r1" and row["answer"].startswith("class ") and row["reference"] == "0" for row in good
    )
    assert all(float(row["total_ms"]) >= float(row["head_ms"]) > 0 and 0 < float(row["share"]) <= 1 for row in good)
    (bad,) = [row for row in rows if row["error"]]
    assert bad["file"].endswith("broken,\nname.png")
    assert re.fullmatch(
        r"4 frames: 3 answered, 1 failed, 0 dropped; [\d.]+ a second; latency p50 \d+ ms, p95 \d+ ms; "
        r"link [\d.]+ (?:bytes|kB) up, [\d.]+ (?:bytes|kB) down",
        done.stderr.splitlines()[-1],
    )


def test_a_class_map_and_a_run_without_answers_as_csv(server: Server, cache: Path, tmp_path: Path) -> None:
    add_photos(tmp_path / "photos", range(1))
    for model, options, answer in (("scene", (), True), ("tiny", ("--answers", "none"), False)):
        done = subprocess.run(
            edge_run(server.grpc, cache, "--model", model, *options, "--csv", tmp_path / "photos"),
            capture_output=True, text=True, timeout=90, check=True,
        )  # fmt: skip
        (row,) = csv.DictReader(io.StringIO(done.stdout))
        assert bool(row["answer"]) is bool(row["share"]) is answer


def test_points_as_csv(server: Server, cache: Path, tiny_bundle: Bundle) -> None:
    done = edge("points", "--server", server.grpc, "--model", "tiny", "--cache-dir", cache, "--csv")
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [row["id"] for row in rows] == [point.id for point in tiny_bundle.manifest.ladder]
    assert float(rows[0]["payload_bytes"]) > 0
    refused = edge("points", "--server", server.grpc, "--model", "tiny", "--csv", "--json")
    assert (refused.returncode, "give one" in refused.stderr) == (2, True)


def on_a_terminal(command: list[str], columns: int) -> str:
    """What a command shows on a terminal of some width."""
    shown = b""
    parent, child = pty.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "dumb", "NO_COLOR": "1"}
    with subprocess.Popen(command, stdout=child, stderr=subprocess.DEVNULL, env=environment, close_fds=True) as process:
        os.close(child)
        try:
            while data := os.read(parent, 65536):
                shown += data
        except OSError:  # Linux: the last writer has closed it
            pass
        assert process.wait(90) == 0
    os.close(parent)
    return shown.decode().replace("\r\n", "\n")


def test_tables_fit_80_columns_and_are_whole_when_piped(server: Server, cache: Path, tmp_path: Path) -> None:
    name = "photograph-of-a-street-with-a-rather-long-name.png"
    add_photos(tmp_path / "photos", range(1))
    (tmp_path / "photos" / "00.png").rename(tmp_path / "photos" / name)
    command = edge_run(server.grpc, cache, "--model", "tiny", tmp_path / "photos")
    piped = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout
    assert name in piped
    assert "…" not in piped
    for model in ("tiny", "scene"):
        command[command.index("--model") + 1] = model
        rows = on_a_terminal(command, 80).splitlines()
        assert len(rows) == 3
        assert max(map(len, rows)) <= 80
        assert len(re.findall(r"\d+\.\d+", rows[2])) >= 4, rows  # no number is cut


def test_completion_in_bash() -> None:
    script = """
        eval "$(_BITNECK_EDGE_COMPLETE=source_bash bitneck-edge)"
        try() {
            COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
            _bitneck_edge_completion "$1"
            echo "${COMPREPLY[@]}"
        }
        try bitneck-edge doc
        try bitneck-edge run --watc
        try bitneck-edge run --precision ''
    """
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    command = ["bash", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.stdout.splitlines() == ["doctor", "--watch", "auto int8 float32"], done.stderr


def test_the_page_needs_nothing_that_is_not_asked_for() -> None:
    code = (
        "import sys, bitneck_edge.client; bad = {'prometheus_client', 'h11', 'watchdog'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
