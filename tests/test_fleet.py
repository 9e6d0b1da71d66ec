"""Rules of rates by patterns, groups, what is kept over restarts, and clients that are gone. Real servers and files."""

import asyncio
import json
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from bitneck.bundle import Bundle
from bitneck.errors import FixedByFile
from bitneck_cloud.fleet.control import Fleet
from bitneck_cloud.fleet.patterns import Groups
from bitneck_cloud.fleet.rules import RuleBook
from bitneck_cloud.fleet.state_file import StateFile
from bitneck_cloud.settings import CloudSettings
from bitneck_testing.photographs import photo
from bitneck_testing.processes import BIN, Server, running_server, start_server
from bitneck_testing.streams import Frames, answers_of, edge_client, open_stream, stub

GROUPS = {"doors": ("door-*", "gate"), "night": ("cam-1?",)}
CONFIG = '[groups]\ndoors = ["door-*", "gate"]\nnight = ["cam-1?"]\n'


async def eventually(true: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not await true():
        assert time.monotonic() < end, "it did not come true in time"
        await asyncio.sleep(0.05)


# A server


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("fleet") / "cloud.toml"
    file.write_text(CONFIG)
    return file


@pytest.fixture(scope="module")
def fleet(tiny_bundle: Bundle, scene_bundle: Bundle, config: Path) -> Iterator[Server]:
    """A server of both small bundles that keeps its state, with groups. Tests clean their rules up."""
    options = ("--config", str(config), "--state-db", str(config.parent / "state.db"), "--log-format", "json")
    with running_server(tiny_bundle.root, scene_bundle.root, options=options) as running:
        yield running


@pytest.fixture
async def http(fleet: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=fleet.http, headers={"X-Bitneck-Request": "1"}) as client:
        yield client
        for rule in (await client.get("/v1/rate")).json()["rules"]:
            key = {"model": rule["model"], "clients": rule["clients"]}
            assert (await client.delete("/v1/rate", params=key)).status_code == 200


async def point_of(cloud: Any, bundle: Bundle, client: str) -> str:
    """The point that a new session of this client is asked for; empty if the client chooses."""
    stream = await open_stream(cloud, bundle.bundle_id, client=client, model=bundle.manifest.name)
    stream.call.cancel()
    return str(stream.opened.point)


async def test_new_sessions_get_the_rate_of_their_rule(
    fleet: Server, http: httpx.AsyncClient, tiny_bundle: Bundle, scene_bundle: Bundle
) -> None:
    for body in (
        {"max_bytes_per_frame": 13},  # as clients of the API before patterns: for everybody
        {"clients": "cam-*", "model": "tiny", "point": "s1-r1"},
        {"clients": "@doors", "auto": True},
        {"clients": "cam-7", "point": "s1-r2"},
    ):
        reply = await http.put("/v1/rate", json=body)
        assert reply.status_code == 200, reply.text
        assert reply.json()["running"] is None
    async with stub(fleet.grpc) as cloud:
        asked = {name: await point_of(cloud, tiny_bundle, name) for name in ("x", "cam-1", "cam-7", "door-1", "gate")}
        assert asked == {"x": "s2-r1", "cam-1": "s1-r1", "cam-7": "s1-r2", "door-1": "", "gate": ""}
        shown = (await http.get("/v1/rate")).json()
        assert (shown["source"], shown["changeable"]) == ("database", True)
        assert shown["groups"] == {name: list(patterns) for name, patterns in GROUPS.items()}
        assert [rule["clients"] for rule in shown["rules"]] == ["cam-7", "@doors", "cam-*", "*"]
        assert shown["rules"][2]["policy"] == {"point": "s1-r1"}
        assert shown["rules"][2]["points"] == {"tiny": "s1-r1"}
        assert shown["rules"][0]["by"] == "anyone (127.0.0.1)"
        # a rule whose point the other model lacks is passed over there
        (await http.put("/v1/rate", json={"clients": "cam-*", "model": "sc*", "min_accuracy": 0.0})).raise_for_status()
        scene = [await point_of(cloud, scene_bundle, name) for name in ("cam-1", "x")]
        assert scene[0] != ""
        assert (await http.delete("/v1/rate", params={"clients": "cam-7"})).json()["policy"] == {"point": "s1-r2"}
        assert await point_of(cloud, tiny_bundle, "cam-7") == "s1-r1"
        newest = (await http.get("/v1/rate/changes", params={"limit": 1})).json()
        assert newest[0]["before"] == {"point": "s1-r2"}
        assert (newest[0]["after"], newest[0]["clients"], newest[0]["running"]) == (None, "cam-7", False)


@pytest.mark.parametrize(
    ("method", "query", "body", "status", "text"),
    [
        ("PUT", {}, {"clients": "@nobody", "auto": True}, 400, "no group 'nobody' in the settings; there are: doors"),
        ("PUT", {}, {"clients": "x" * 129, "auto": True}, 422, "clients"),
        ("PUT", {}, {"clients": "cam\n*", "auto": True}, 400, "control characters"),
        ("PUT", {}, {"clients": "", "auto": True}, 422, "clients"),
        ("PUT", {}, {"model": "nope", "auto": True}, 404, "there are: tiny, scene"),
        ("PUT", {}, {"clients": "cam-*"}, 400, "exactly one"),
        ("PUT", {}, {"client": "cam-*", "auto": True}, 422, "client"),
        ("PUT", {}, {"clients": "cam-*", "point": "nope"}, 404, "tiny: "),
        ("PUT", {}, {"clients": "cam-*", "auto": True, "running": "perhaps"}, 422, "running"),
        ("DELETE", {"clients": "cam-x"}, None, 404, "no rule has the model '*' and the clients 'cam-x'"),
        ("DELETE", {"clients": "x" * 129}, None, 422, "clients"),
        ("GET", {"client": "x" * 129}, None, 422, "client"),
        ("GET", {"client": "a\x07"}, None, 400, "control characters"),
        ("GET", {"limit": 5000}, None, 422, "limit"),
    ],
)
async def test_what_is_refused(
    http: httpx.AsyncClient, method: str, query: dict[str, Any], body: Any, status: int, text: str
) -> None:
    path = "/v1/clients" if method == "GET" else "/v1/rate"
    reply = await http.request(method, path, params=query, json=body)
    assert (reply.status_code, text in reply.json()["detail"]) == (status, True), reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    assert (await http.get("/v1/rate")).json()["rules"] == []


async def test_running_sessions_are_told_at_once(
    fleet: Server, http: httpx.AsyncClient, tiny_bundle: Bundle, frames: Frames
) -> None:
    (await http.put("/v1/rate", json={"clients": "run-9", "point": "s1-r2"})).raise_for_status()
    async with stub(fleet.grpc) as cloud:
        one, nine, other, away = [
            await open_stream(cloud, tiny_bundle.bundle_id, client=name, model="tiny")
            for name in ("run-1", "run-9", "other", "run-away")
        ]
        spooled = await open_stream(cloud, tiny_bundle.bundle_id, client="run-spool", model="tiny", spool="s-1")
        assert (await away.ask(frames.frame(1))).HasField("result")
        await away.call.done_writing()
        assert await away.call.read() is grpc.aio.EOF
        path = f"/v1/sessions/{one.opened.session_id}/rate"
        (await http.put(path, json={"point": "s2-r1"})).raise_for_status()
        assert (await one.read()).set_point.point == "s2-r1"
        await asyncio.sleep(0.2)
        reply = await http.put("/v1/rate", json={"clients": "run-*", "point": "s1-r1", "running": True})
        running = {"told": 1, "waiting": 1, "unreachable": 0, "overruled": 1, "points": {"tiny": {"s1-r1": 2}}}
        assert reply.json()["running"] == running, reply.text
        told = await one.read()  # without a frame in between
        assert (told.set_point.point, told.set_point.reason) == ("s1-r1", "control API: point=s1-r1")
        back = await open_stream(cloud, tiny_bundle.bundle_id, away.opened.resume_token, "run-away", "tiny")
        assert (back.opened.session_id, back.opened.point) == (away.opened.session_id, "s1-r1")
        for stream in (nine, other, spooled):  # none was told anything: the next message is the answer
            assert (await stream.ask(frames.frame(1))).HasField("result")
        unreachable = {"clients": "run-1", "max_kbps": 16.0, "model": "tiny", "running": True}
        for seq in range(1, 20):  # hundreds of frames a second: 16 kbit/s is not enough for them
            assert (await one.ask(frames.frame(seq, "s1-r1"))).HasField("result")
        refused = (await http.put("/v1/rate", json=unreachable)).json()
        assert (refused["running"]["unreachable"], refused["running"]["points"]) == (1, {})
        removed = await http.delete("/v1/rate", params={"clients": "run-*", "running": True})
        assert removed.json()["running"]["told"] == 2, removed.text
        assert removed.json()["running"]["points"] == {"tiny": {"auto": 2}}
        assert (await one.read()).set_point.point == ""  # no rule is left that fits: the client chooses


async def test_a_session_that_opens_while_a_rule_changes_gets_the_rule(
    fleet: Server, http: httpx.AsyncClient, tiny_bundle: Bundle
) -> None:
    """What is asked for after `Opened` was made, and before the stream counts as running, is not lost."""
    async with stub(fleet.grpc) as cloud:

        async def opened_with(name: str, point: str) -> None:
            stream = await open_stream(cloud, tiny_bundle.bundle_id, client=name, model="tiny")
            got = stream.opened.point
            async with asyncio.timeout(10):
                while got != point:
                    got = (await stream.read()).set_point.point
            stream.call.cancel()

        for k in range(8):
            point = ("s1-r1", "s2-r1")[k % 2]
            put = http.put("/v1/rate", json={"clients": "race-*", "point": point, "running": True})
            names = [f"race-{k}-{n}" for n in range(8)]
            reply, *_ = await asyncio.gather(put, *(opened_with(name, point) for name in names))
            assert reply.status_code == 200


async def test_a_pattern_reaches_a_running_client_from_the_first_frame_encoded_after_it_arrives(
    fleet: Server, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    arrived, paused = asyncio.Event(), asyncio.Event()

    async def camera() -> AsyncIterator[Any]:
        for k in range(40):
            if k == 20:
                paused.set()
                await arrived.wait()
            yield photo(k % 3)
            await asyncio.sleep(0.01)

    async def operator() -> None:
        await paused.wait()
        body = {"clients": "moving-[0-9]", "point": "s1-r1", "running": True}
        assert (await http.put("/v1/rate", json=body)).json()["running"]["told"] == 1
        await asyncio.sleep(0.3)  # on loopback it has arrived by then, although no frame was sent
        arrived.set()

    async with asyncio.timeout(60):
        async with edge_client(fleet.grpc, tmp_path, point="s1-r1") as client:
            await client.infer(photo(0))  # the device has the files of that point from here on
        async with edge_client(fleet.grpc, tmp_path, client="moving-1") as client:
            _, answers = await asyncio.gather(operator(), answers_of(client, camera()))
    assert [answer.point for answer in answers] == ["s1-r2"] * 20 + ["s1-r1"] * 20


async def test_a_rule_is_deleted_while_it_is_set(http: httpx.AsyncClient) -> None:
    body = {"clients": "both", "auto": True}
    for _ in range(10):
        put, deleted = await asyncio.gather(
            http.put("/v1/rate", json=body), http.delete("/v1/rate", params={"clients": "both"})
        )
        assert put.status_code == 200
        assert deleted.status_code in (200, 404), deleted.text
        await http.delete("/v1/rate", params={"clients": "both"})


def logged(server: Server, action: str) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in server.read_log().splitlines() if line.startswith("{"))
    return [line for line in lines if line.get("action") == action]


async def test_changes_are_audited(fleet: Server, http: httpx.AsyncClient) -> None:
    for body in ({"point": "s1-r1"}, {"max_kbps": 50.0, "running": True}):
        (await http.put("/v1/rate", json={"clients": "audited-*", **body})).raise_for_status()
    (await http.delete("/v1/rate", params={"clients": "audited-*"})).raise_for_status()
    put = [line for line in logged(fleet, "PUT rate") if "audited-*" in line["target"]]
    assert [(line["before"], line["after"], line["who"]) for line in put] == [
        (None, {"point": "s1-r1"}, "anyone (127.0.0.1)"),
        ({"point": "s1-r1"}, {"max_kbps": 50.0}, "anyone (127.0.0.1)"),
    ]
    assert [line["target"].partition(" of ")[0] for line in put] == ["new sessions", "sessions"]
    (deleted,) = [line for line in logged(fleet, "DELETE rate") if "audited-*" in line["target"]]
    assert (deleted["before"], deleted["after"]) == ({"max_kbps": 50.0}, None)


async def test_clients_are_listed_when_they_are_gone(
    fleet: Server, http: httpx.AsyncClient, tiny_bundle: Bundle, frames: Frames
) -> None:
    async with stub(fleet.grpc) as cloud:
        stream = await open_stream(cloud, tiny_bundle.bundle_id, client="gone\x1b[2J-1", model="tiny")
        size = 0
        for seq in range(1, 4):
            frame = frames.frame(seq, "s1-r1")
            size += len(frame.payload)
            assert (await stream.ask(frame)).HasField("result")
        assert (await stream.ask(frames.frame(4, "s1-r1", seed=1, deadline_ms=0))).HasField("result")
        broken = frames.frame(5)
        broken.crc32c += 1
        assert (await stream.ask(broken)).HasField("fault")
        here = (await http.get("/v1/clients", params={"client": "gone*"})).json()["clients"]
        await stream.call.done_writing()
        assert await stream.call.read() is grpc.aio.EOF

    async def gone() -> bool:
        found = (await http.get("/v1/clients", params={"client": "gone*", "connected": False})).json()
        return int(found["total"]) == 1

    await eventually(gone)
    (client,) = (await http.get("/v1/clients", params={"client": "gone*"})).json()["clients"]
    assert client["client"] == "gone\N{REPLACEMENT CHARACTER}[2J-1"
    assert (here[0]["connected"], client["connected"], client["point"]) == (True, False, "s1-r1")
    assert (client["frames"], client["faults"], client["model"]) == (4, 1, "tiny")
    assert client["payload_bytes"] > size > 0
    assert client["link_bytes_up"] > client["payload_bytes"]
    assert client["link_bytes_down"] > 0
    assert client["caller"] == "address 127.0.0.1"
    assert client["last_seen"] >= here[0]["last_seen"]
    assert (await http.get("/v1/clients", params={"client": "gone*", "offset": 1})).json() == {
        "total": 1,
        "clients": [],
    }


async def test_roles(tiny_bundle: Bundle, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("metrics m a-token-for-metrics\nread r a-token-for-reading\noperate o a-token-for-alice\n")
    with running_server(tiny_bundle.root, options=("--http-tokens", str(tokens))) as own:
        async with httpx.AsyncClient(base_url=own.http) as http:
            for token, read, change in (("metrics", 403, 403), ("reading", 200, 403), ("alice", 200, 200)):
                headers = {"Authorization": f"Bearer a-token-for-{token}"}
                for path in ("/v1/clients", "/v1/rate", "/v1/rate/changes"):
                    assert (await http.get(path, headers=headers)).status_code == read
                assert (await http.put("/v1/rate", json={"auto": True}, headers=headers)).status_code == change
                assert (await http.delete("/v1/rate", headers=headers)).status_code == change
            shown = (await http.get("/v1/rate", headers=headers)).json()
            assert (shown["source"], "state_db" in shown["note"]) == ("memory", True)
            paths = (await http.get("/openapi.json", headers=headers)).json()["paths"]
            assert set(paths["/v1/rate"]) == {"get", "put", "delete"}
            assert {"get"} == set(paths["/v1/clients"])
            body = paths["/v1/rate"]["put"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
            schema = (await http.get("/openapi.json", headers=headers)).json()["components"]["schemas"]
            assert {"point", "max_kbps", "auto", "clients", "model", "running"} <= set(
                schema[body.rpartition("/")[2]]["properties"]
            )


# What is kept


async def test_rules_changes_and_clients_survive_a_restart(
    tiny_bundle: Bundle, frames: Frames, config: Path, tmp_path: Path
) -> None:
    options = ("--config", str(config), "--state-db", str(tmp_path / "state.db"))
    first = start_server(tiny_bundle.root, options=options)
    try:
        async with httpx.AsyncClient(base_url=first.http) as http, stub(first.grpc) as cloud:
            for body in ({"clients": "@night", "point": "s1-r1"}, {"clients": "cam-*", "point": "s1-r2"}):
                (await http.put("/v1/rate", json=body)).raise_for_status()
            before = (await http.get("/v1/rate")).json()
            stream = await open_stream(cloud, tiny_bundle.bundle_id, client="cam-11")
            assert (await stream.ask(frames.frame(1, "s1-r1"))).HasField("result")

            async def written() -> bool:
                return "cam-11" in (tmp_path / "state.db-wal").read_bytes().decode(errors="replace")

            await eventually(written)  # every few seconds
            first.kill()  # no chance to write anything more
    finally:
        first.close()
    with running_server(tiny_bundle.root, options=options) as second:
        async with httpx.AsyncClient(base_url=second.http) as http, stub(second.grpc) as cloud:
            assert (await http.get("/v1/rate")).json() == before
            assert [x["clients"] for x in (await http.get("/v1/rate/changes")).json()] == ["cam-*", "@night"]
            assert await point_of(cloud, tiny_bundle, "cam-12") == "s1-r1"
            (gone,) = (await http.get("/v1/clients", params={"client": "cam-11"})).json()["clients"]
            assert (gone["connected"], gone["frames"], gone["point"]) == (False, 1, "s1-r1")
            again = await open_stream(cloud, tiny_bundle.bundle_id, client="cam-11")
            assert (await again.ask(frames.frame(1, "s1-r1"))).HasField("result")
            (back,) = (await http.get("/v1/clients", params={"client": "cam-11"})).json()["clients"]
            assert (back["connected"], back["frames"]) == (True, 2)
            again.call.cancel()
    state = StateFile.open(tmp_path / "state.db")  # what was left is written at the end
    assert [record.frames for record in state.clients() if record.client == "cam-11"] == [2]
    state.close()


async def test_rules_of_the_config_file_are_fixed(tiny_bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "replica.toml"
    rates = '[[rates]]\nclients = "cam-*"\npoint = "s1-r1"\n'
    file.write_text(f'token_key = "a shared key of some length"\n{rates}')
    with running_server(tiny_bundle.root, options=("--config", str(file))) as own:
        async with httpx.AsyncClient(base_url=own.http, headers={"X-Bitneck-Request": "1"}) as http:
            for reply in (await http.put("/v1/rate", json={"auto": True}), await http.delete("/v1/rate")):
                assert (reply.status_code, reply.json()["title"]) == (409, "FixedByFile")
                assert "this change would be lost" in reply.json()["detail"]
            shown = (await http.get("/v1/rate")).json()
            assert (shown["source"], shown["changeable"], "config file" in shown["note"]) == ("file", False, True)
            assert [(rule["clients"], rule["by"]) for rule in shown["rules"]] == [("cam-*", "the config file")]
            async with stub(own.grpc) as cloud:
                assert await point_of(cloud, tiny_bundle, "cam-1") == "s1-r1"
                stream = await open_stream(cloud, tiny_bundle.bundle_id)
                assert stream.opened.point == ""
                path = f"/v1/sessions/{stream.opened.session_id}/rate"
                assert (await http.put(path, json={"point": "s1-r1"})).status_code == 200  # a session's own rate


async def test_an_empty_list_of_rates_is_fixed_too(tmp_path: Path) -> None:
    file = tmp_path / "replica.toml"
    file.write_text("rates = []\n")
    settings = CloudSettings.load({}, file)
    assert (settings.rates, settings.rates_are_fixed, CloudSettings.load({}).rates_are_fixed) == ((), True, False)
    fixed = Fleet(Groups(), RuleBook(), None, 10)
    with pytest.raises(FixedByFile):
        await fixed.delete(("*", "*"), running=False)


def refused_start(bundle: Bundle, path: Path) -> str:
    """The one sentence with which a server ends that cannot use its state database."""
    command = [BIN / "bitneck-cloud", "serve", "--bundle", bundle.root, "--state-db", path]
    addresses = ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"]
    done = subprocess.run([*command, *addresses], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    return done.stderr


def test_two_servers_cannot_have_one_database(tiny_bundle: Bundle, fleet: Server, config: Path) -> None:
    assert fleet.process.poll() is None
    assert "is open in another process" in refused_start(tiny_bundle, config.parent / "state.db")
