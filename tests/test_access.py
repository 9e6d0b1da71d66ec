"""Who may call: roles, token files, browsers, resume tokens, plaintext, and the audit log. Real servers and sockets."""

import asyncio
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from bitneck.bundle import Bundle
from bitneck.errors import InvalidConfig, Unauthenticated
from bitneck.settings.model import Address
from bitneck.v2 import inference_pb2 as pb
from bitneck.v2 import inference_pb2_grpc as pb_grpc
from bitneck_cloud.access.bearers import BearerTokens, Role
from bitneck_cloud.access.callers import host_of
from bitneck_cloud.api.http_guard import KnownHosts
from bitneck_cloud.observe import audit
from bitneck_edge.client import EdgeClient
from bitneck_edge.settings import EdgeSettings
from bitneck_testing.authority import Authority
from bitneck_testing.photographs import photo
from bitneck_testing.processes import BIN, Server, running_server
from bitneck_testing.streams import Frames, open_stream, stub

METRICS, READ, OPERATE, ALICE = (f"a-token-for-{name}" for name in ("metrics", "reading", "operating", "alice"))
CAMERA, OTHER = "a-token-for-camera-7", "a-token-for-camera-8"


def bearer(token: str, **headers: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}", **headers}


@pytest.fixture(scope="module")
def guarded(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose control API has tokens of each role."""
    file = tmp_path_factory.mktemp("tokens") / "operators.txt"
    file.write_text(f"# role name token\nmetrics prometheus {METRICS}\nread grafana {READ}\n\noperate alice {ALICE}\n")
    options = ("--http-token", OPERATE, "--http-tokens", str(file), "--log-format", "json")
    with running_server(tiny_bundle.root, options=options) as server:
        yield server


@pytest.fixture(scope="module")
def unguarded(tiny_bundle: Bundle) -> Iterator[Server]:
    options = ("--http-host", "console.example", "--log-format", "json")
    with running_server(tiny_bundle.root, options=options) as server:
        yield server


def logged(server: Server, action: str) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in server.read_log().splitlines() if line.startswith("{"))
    return [line for line in lines if line.get("action") == action]


async def eventually(true: Callable[[], bool], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true in time"
        await asyncio.sleep(0.05)


# Roles


@pytest.mark.parametrize(
    ("token", "metrics", "read", "change"),
    [(METRICS, 200, 403, 403), (READ, 200, 200, 403), (OPERATE, 200, 200, 200), (ALICE, 200, 200, 200)],
)
def test_a_token_does_what_its_role_allows(guarded: Server, token: str, metrics: int, read: int, change: int) -> None:
    with httpx.Client(base_url=guarded.http, headers=bearer(token), follow_redirects=True) as http:
        assert http.get("/metrics").status_code == metrics
        for path in ("/v1/models", "/v1/sessions", "/v2", "/docs", "/redoc", "/openapi.json"):
            assert http.get(path).status_code == read, path
        assert http.put("/v1/rate", json={"auto": True}).status_code == change
        assert http.post("/v1/models/tiny/reload").status_code == change


def test_without_a_token_nothing_is_parsed_or_shown(guarded: Server) -> None:
    with httpx.Client(base_url=guarded.http) as http:
        for path in ("/v1/models", "/metrics", "/docs", "/redoc", "/openapi.json", "/nowhere", "/docs/oauth2-redirect"):
            assert http.get(path).status_code == 401, path
        bad = http.put("/v1/rate", content=b"{not json", headers={"Content-Type": "application/json"})
        assert bad.status_code == 401
        assert bad.headers["www-authenticate"] == "Bearer"
        for wrong in ("", "Bearer", f"Basic {OPERATE}", f"Bearer {OPERATE}x", f"Bearer {OPERATE[:-1]}"):
            assert http.get("/v1/models", headers={"Authorization": wrong}).status_code == 401, wrong
        for path in ("/healthz", "/readyz"):
            assert http.get(path).status_code == http.head(path).status_code == 200


def test_a_file_of_tokens_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "operators.txt"
    file.write_text(f"operate alice {ALICE}\n")
    tokens = BearerTokens(Role.OPERATE, None, file)
    alice = tokens.find(ALICE)
    assert alice is not None
    assert str(alice) == "operate alice"
    assert tokens.find("") is None
    assert not tokens.refresh()
    file.write_text(f"operate alice {ALICE}\noperate alice {OPERATE}\n")  # a token is replaced: both are valid
    assert tokens.refresh()
    assert tokens.valid(alice)
    assert tokens.find(OPERATE) is not None
    file.write_text("operate alice short\n")
    assert not tokens.refresh()
    assert tokens.valid(alice)
    file.write_text("# nobody\n")
    assert tokens.refresh()
    assert tokens.find(ALICE) is None
    assert not tokens.valid(alice)
    assert tokens.needed  # an empty file opens nothing
    file.unlink()
    assert not tokens.refresh()
    assert tokens.needed


@pytest.mark.parametrize(
    ("role", "text", "message"),
    [
        (Role.OPERATE, "operate alice", "line 1 is not ROLE NAME TOKEN"),
        (Role.OPERATE, f"# x\nroot alice {ALICE}", "line 2 is not"),
        (Role.OPERATE, f"device alice {ALICE}", "line 1 is not"),
        (Role.OPERATE, "read alice fifteen-letters", "line 1: the token of alice is too short"),
        (Role.DEVICE, f"camera:7 {CAMERA}", "a name has"),
        (Role.DEVICE, f"a {CAMERA}\nb {CAMERA}", "same token"),
        (Role.DEVICE, "\udcff", "cannot read"),
    ],
)
def test_wrong_token_files_are_refused_without_showing_tokens(
    tmp_path: Path, role: Role, text: str, message: str
) -> None:
    file = tmp_path / "tokens.txt"
    file.write_text(text, errors="surrogateescape")
    with pytest.raises(InvalidConfig, match=message) as refused:
        BearerTokens(role, None, file)
    assert CAMERA not in str(refused.value)
    assert ALICE not in str(refused.value)
    with pytest.raises(InvalidConfig, match="no token file"):
        BearerTokens(role, None, tmp_path)


# Browsers


@pytest.mark.parametrize("host", ["evil.example", "127.evil.example", "localhost.evil.example", "[::2]:80", "", "@"])
def test_a_host_that_is_not_known_gets_nothing(unguarded: Server, host: str) -> None:
    for path in ("/v1/sessions", "/metrics", "/docs"):
        reply = httpx.get(unguarded.http + path, headers={"Host": host})
        assert (reply.status_code, reply.headers["content-type"]) == (421, "application/problem+json")
    assert httpx.get(unguarded.http + "/readyz", headers={"Host": host}).status_code == 200  # probes use addresses


@pytest.mark.parametrize("host", ["localhost", "localhost:8080", "127.0.0.1:1", "[::1]:8080", "Console.Example:443"])
def test_known_hosts_are_served(unguarded: Server, host: str) -> None:
    assert httpx.get(unguarded.http + "/v1/models", headers={"Host": host}).status_code == 200


def test_pages_of_other_origins_change_nothing(unguarded: Server) -> None:
    with httpx.Client(base_url=unguarded.http) as http:
        own = unguarded.http
        for origin in ("https://evil.example", "null", "http://localhost:1", "http://127.0.0.1"):
            for send in (http.get("/v1/models", headers={"Origin": origin}),
                         http.put("/v1/rate", json={"auto": True}, headers={"Origin": origin})):  # fmt: skip
                assert send.status_code == 403, origin
        assert http.put("/v1/rate", json={"auto": True}, headers={"Origin": own}).status_code == 200
        assert http.put("/v1/rate", json={"auto": True}, headers={"Origin": "https://console.example"}).is_success
        reload = "/v1/models/tiny/reload"
        for headers in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}):
            refused = http.post(reload, headers=headers)
            assert refused.status_code == 403
            assert "X-Bitneck-Request".lower() in refused.json()["detail"]
        assert (
            http.put("/v1/rate", content=b'{"auto": true}', headers={"Content-Type": "text/plain"}).status_code == 403
        )
        assert http.post(reload, headers={"X-Bitneck-Request": "1"}).is_success
        assert http.post(reload, json={}).is_success


def test_beyond_loopback_every_name_is_known_until_some_are_named() -> None:
    assert "anything.example:8080" in KnownHosts((), Address("0.0.0.0", 8080))
    named = KnownHosts(("cloud.example",), Address("0.0.0.0", 8080))
    assert "cloud.example:8080" in named
    assert "other.example" not in named
    assert not KnownHosts((), Address("0.0.0.0", 1)).allows_origin("https://evil.example", "cloud.example")


# Devices


async def test_a_device_token_is_taken_back_alone(tiny_bundle: Bundle, tmp_path: Path, frames: Frames) -> None:
    file = tmp_path / "devices.txt"
    file.write_text(f"camera-7 {CAMERA}\ncamera-8 {OTHER}\n")
    options = ("--device-tokens", str(file), "--log-format", "json")
    with running_server(tiny_bundle.root, options=options) as server:
        async with stub(server.grpc) as cloud:
            streams = {}
            for token in (CAMERA, OTHER):
                call = cloud.Stream(metadata=(("authorization", f"Bearer {token}"),))
                await call.write(_open(tiny_bundle))
                assert (await call.read()).HasField("opened")
                streams[token] = call
            file.write_text(f"camera-8 {OTHER}\n")
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                async with asyncio.timeout(15):
                    await streams[CAMERA].read()
            assert ended.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert "device camera-7" in str(ended.value.details())
            await streams[OTHER].write(_frame(frames, 1))
            assert (await streams[OTHER].read()).result.seq == 1
        with pytest.raises(Unauthenticated):
            async with EdgeClient(server.grpc, cache_dir=tmp_path / "cache", retries=0, token=CAMERA):
                pass
        async with EdgeClient(server.grpc, cache_dir=tmp_path / "cache", retries=0, token=OTHER) as client:
            assert (await client.infer(photo(1))).labels
        who = {line["who"] for line in logged(server, "session begin")}
        assert who == {"device camera-7", "device camera-8"}
        assert logged(server, "session end")[0]["before"]["client"] == "test"
        log = server.read_log()
    assert CAMERA not in log
    assert OTHER not in log


def _open(bundle: Bundle, token: str = "") -> Any:
    return pb.ClientMessage(open=pb.Open(bundle_id=bundle.bundle_id, client="test", resume_token=token))


def _frame(frames: Frames, seq: int) -> Any:
    return pb.ClientMessage(frame=frames.frame(seq))


# Resume tokens


async def test_an_old_resume_token_takes_nothing_over(unguarded: Server, tiny_bundle: Bundle, frames: Frames) -> None:
    async with stub(unguarded.grpc) as cloud:
        first = await open_stream(cloud, tiny_bundle.bundle_id)
        answer = await first.ask(frames.frame(1))
        second = await open_stream(cloud, tiny_bundle.bundle_id, token=first.opened.resume_token)
        assert second.opened.session_id == first.opened.session_id
        # Perhaps the second `Opened` was lost: no frame has come yet, so the first token still counts.
        third = await open_stream(cloud, tiny_bundle.bundle_id, token=first.opened.resume_token)
        assert third.opened.session_id == first.opened.session_id
        assert await third.ask(frames.frame(1)) == answer
        for old in (first, second):
            thief = await open_stream(cloud, tiny_bundle.bundle_id, token=old.opened.resume_token)
            assert thief.opened.session_id != first.opened.session_id
        assert (await third.ask(frames.frame(2))).result.seq == 2  # nobody took its stream
        fourth = await open_stream(cloud, tiny_bundle.bundle_id, token=third.opened.resume_token)
        assert fourth.opened.session_id == first.opened.session_id


async def test_a_resume_token_is_bound_to_the_certificate(tiny_bundle: Bundle, tmp_path: Path, frames: Frames) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    options = ("--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(authority.ca))
    devices = {name: authority.issue(name) for name in ("seven", "eight")}
    devices["renewed"] = authority.issue("seven")
    with running_server(tiny_bundle.root, options=options) as server:
        ids, token = {}, ""
        for name in ("seven", "eight", "renewed"):
            cert, key = devices[name]
            credentials = grpc.ssl_channel_credentials(authority.ca.read_bytes(), key.read_bytes(), cert.read_bytes())
            async with grpc.aio.secure_channel(server.grpc, credentials) as channel:
                stream = await open_stream(pb_grpc.SplitInferenceStub(channel), tiny_bundle.bundle_id, token=token)
                ids[name] = stream.opened.session_id
                token = token or stream.opened.resume_token
        assert ids["eight"] != ids["seven"]
        assert ids["renewed"] == ids["seven"]  # a renewed certificate has the same names


# Plaintext


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--grpc", "0.0.0.0:0"), "grpc would send plaintext"),
        (("--grpc", "[::]:0"), "grpc would send plaintext"),
        (("--grpc", "127.0.0.1:0", "--http", "0.0.0.0:0", "--http-token", OPERATE), "http would send plaintext"),
        (("--grpc", "0.0.0.0:0", "--http", "0.0.0.0:0", "--insecure"), "open to the network"),
        (("--http-tokens", "/nowhere.txt"), "no token file"),
    ],
)
def test_a_server_does_not_open_doors_unasked(tiny_bundle: Bundle, options: tuple[str, ...], text: str) -> None:
    listen = () if "--http" in options else ("--http", "127.0.0.1:0")
    command = [BIN / "bitneck-cloud", "serve", "--bundle", tiny_bundle.root, *listen, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, text in done.stderr) == (2, True), done.stderr
    assert "Traceback" not in done.stderr


def test_insecure_allows_plaintext_and_says_so(tiny_bundle: Bundle) -> None:
    with running_server(tiny_bundle.root, options=("--insecure",), grpc="0.0.0.0:0") as server:
        assert "plaintext" in server.read_log()
        assert "every device that reaches" in server.read_log()


def test_an_edge_sends_no_token_over_plaintext() -> None:
    for server in ("cloud.example:50051", "10.0.0.7:1", "127.evil.example:50051", "[fe80::1]:1"):
        with pytest.raises(InvalidConfig, match="--insecure"):
            EdgeSettings.load({"server": server, "token": CAMERA})
        assert EdgeSettings.load({"server": server, "insecure": True}).insecure
        assert EdgeSettings.load({"server": server, "tls": True}).access.tls
    assert not EdgeSettings.load({"server": "localhost:1"}).access.tls


def test_the_edges_command_refuses_plaintext(tmp_path: Path) -> None:
    environment = {**os.environ, "BITNECK_EDGE_TOKEN": CAMERA}
    command = [BIN / "bitneck-edge", "points", "--server", "192.0.2.1:50051"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 2
    assert "would be plaintext" in done.stderr
    assert CAMERA not in done.stderr


# The audit log


async def test_the_audit_log_says_who_changed_what(guarded: Server, tiny_bundle: Bundle, frames: Frames) -> None:
    async with stub(guarded.grpc) as cloud, httpx.AsyncClient(base_url=guarded.http) as http:
        stream = await open_stream(cloud, tiny_bundle.bundle_id, client="gate\n2")
        path = f"/v1/sessions/{stream.opened.session_id}/rate"
        headers = bearer(ALICE, **{"X-Request-Id": "audit-1"})
        assert (await http.put(path, json={"point": "s1-r1"}, headers=headers)).is_success
        assert (await http.put(path, json={"max_kbps": 50}, headers=headers)).is_success
        assert (await http.put("/v1/rate", json={"auto": True}, headers=bearer(OPERATE))).is_success
        assert (await http.post("/v1/models/tiny/reload", headers=headers)).is_success
        for _ in range(40):
            assert (await http.get("/v1/models", headers=bearer("x" * 20))).status_code == 401
    of_session = [x for x in logged(guarded, "PUT rate") if stream.opened.session_id in x["target"]]
    assert [x["after"] for x in of_session] == [{"point": "s1-r1"}, {"max_kbps": 50.0}]
    assert of_session[1]["before"] == {"point": "s1-r1"}
    assert {x["who"] for x in of_session} == {"operate alice (127.0.0.1)"}
    assert {x["request_id"] for x in of_session} == {"audit-1"}
    reloads = logged(guarded, "reload")
    assert (reloads[-1]["target"], reloads[-1]["before"], reloads[-1]["after"]) == (
        "tiny", tiny_bundle.bundle_id, tiny_bundle.bundle_id,
    )  # fmt: skip
    begun = [x for x in logged(guarded, "session begin") if stream.opened.session_id in x["target"]]
    assert begun[0]["after"] == {"how": "new", "model": "tiny", "client": "gate\N{REPLACEMENT CHARACTER}2"}
    refusals = [x for x in logged(guarded, "refusal") if x["after"] == "UNAUTHENTICATED"]
    assert 1 <= len(refusals) <= 3  # not one for each of the calls
    assert CAMERA not in guarded.read_log()
    assert ALICE not in guarded.read_log()


def test_refusals_are_summed_and_bounded(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="bitneck_cloud.audit")
    log = audit.RefusalLog()
    for caller in range(5000):
        for _ in range(3):
            log.refused(f"address 10.0.{caller >> 8}.{caller & 255}", "UNAUTHENTICATED")
    assert len(caplog.records) <= 300
    log.flush(time.monotonic() + 10)
    assert len(caplog.records) <= 300
    log.flush(time.monotonic() + 70)
    assert len(caplog.records) <= 600
    assert "address 10.0.0.0: UNAUTHENTICATED, 2 more times in" in caplog.text
    sums = sum(record.repeats for record in caplog.records if hasattr(record, "repeats"))
    firsts = sum(not hasattr(record, "repeats") for record in caplog.records)
    assert sums + firsts == 15000


def test_the_address_of_a_peer() -> None:
    assert host_of("ipv4:10.0.0.7:40022") == "10.0.0.7"
    assert host_of("ipv6:%5B2001:db8::1%5D:40022") == "2001:db8::1"
    assert host_of("unix:/run/x") == "unix"
    assert host_of("") == "(unknown)"
