"""From a device's frame to a sink: real processes, a server that is killed, a device that sends again."""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from bitneck.bundle import Bundle
from bitneck_cloud.access.bearers import BearerTokens, Role
from bitneck_cloud.answers.presence import Presence
from bitneck_cloud.answers.sinks.jsonl import JsonlSink
from bitneck_cloud.answers.sinks.outgoing import Outgoing
from bitneck_cloud.answers.sinks.settings import JsonlTable
from bitneck_cloud.answers.sinks.state import ClientState, Queued
from bitneck_cloud.sessions.session import Session
from bitneck_edge.answers.results import Answer
from bitneck_testing.consumers.broker import MOSQUITTO, Broker, Subscriber
from bitneck_testing.photographs import photo
from bitneck_testing.processes import ProcessFailed, Server, free_port, running_server, start_server
from bitneck_testing.streams import edge_client

KEY = "0123456789abcdef"


def config(folder: Path, sinks: str) -> tuple[str, ...]:
    """Flags of a server with these sinks."""
    file = folder / "cloud.toml"
    file.write_text(f'sinks_queue = "{folder / "queue.db"}"\ntoken_key = "{KEY}"\nserver_name = "here"\n{sinks}')
    return ("--config", str(file))


def documents(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


async def true(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until a condition is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        await asyncio.sleep(0.05)


async def test_each_answer_is_in_the_file_once_though_the_server_is_killed(tiny_bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    options = config(tmp_path, f'[[sinks]]\nkind = "jsonl"\nname = "file"\npath = "{file}"\n')
    port = free_port()
    servers: list[Server] = [start_server(tiny_bundle.root, options=options, grpc=f"127.0.0.1:{port}")]
    seen: list[Answer] = []
    try:
        async with edge_client(f"127.0.0.1:{port}", tmp_path, client="camera-1") as client:
            async for answer in client.stream([photo(k) for k in range(60)]):
                assert isinstance(answer, Answer)
                seen.append(answer)
                if len(seen) in (15, 40):  # without a word, while frames are under way
                    servers[-1].kill()
                    servers.append(start_server(tiny_bundle.root, options=options, grpc=f"127.0.0.1:{port}"))
            session = client.session_id
        assert len(seen) == 60
        await true(lambda: {each["seq"] for each in documents(file)} == set(range(1, 61)))
        assert servers[-1].stop() == 0
    finally:
        for server in servers:
            server.close()
    found = documents(file)
    numbers: dict[int, int] = {}
    for each in found:
        assert (each["client"], each["session"], each["server"]) == ("camera-1", session, "here")
        assert numbers.setdefault(each["seq"], each["number"]) == each["number"]  # a repeat keeps its number
    assert len(set(numbers.values())) == 60
    firsts = list(dict.fromkeys(each["number"] for each in found))
    assert firsts == sorted(firsts)  # in the order of answering
    labels = {each["seq"]: each["labels"][0]["name"] for each in found}
    assert all(labels[answer.seq] == answer.labels[0].name for answer in seen)


async def test_numbers_and_ids_after_a_restart_are_new_also_where_no_sink_wants_the_answers(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    table = f'[[sinks]]\nkind = "jsonl"\nname = "file"\npath = "{tmp_path / "a.jsonl"}"\nclient = "nobody"\n'
    last = ""
    told: list[Any] = []
    for _ in range(2):
        with running_server(tiny_bundle.root, options=config(tmp_path, table)) as server:
            async with edge_client(server.grpc, tmp_path, client="camera-1") as client:
                for k in range(3):
                    await client.infer(photo(k))
            parameters = {"after": "0"} if not last else {}
            headers = {"Last-Event-ID": last} if last else {}
            async with (
                asyncio.timeout(30),
                httpx.AsyncClient(headers=headers) as http,
                http.stream("GET", f"{server.http}/v1/answers", params=parameters) as response,
            ):
                async for line in response.aiter_lines():
                    field, _, value = line.partition(": ")
                    if field in ("event", "id"):
                        told.append(value)
                    elif field == "data" and told[-1] == "answer":
                        told.append(json.loads(value)["number"])
                    if field == "id" and told[-3:-1] in (["answer", 3], ["answer", 6]):
                        break
            last = told[-1]
    numbers = [it for it in told if isinstance(it, int)]
    assert numbers == [1, 2, 3, 4, 5, 6]
    ids = [told[k + 2] for k, it in enumerate(told) if it == "answer"]
    assert len({it.partition("-")[0] for it in ids}) == 2
    assert [it.partition("-")[2] for it in ids] == list("123456")
    assert told.count("missed") == 1
    assert told.index("missed") > told.index(3)


@pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
async def test_a_broker_learns_who_is_here_and_gets_answers(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with Broker(tmp_path / "broker") as broker, Subscriber.running(broker.port) as heard:
        table = f'[[sinks]]\nkind = "mqtt"\nname = "broker"\nhost = "127.0.0.1"\nport = {broker.port}\n'

        def state(**wanted: Any) -> bool:
            """Whether the client's newest state says so."""
            states = heard.of("bitneck-state/here/camera-1")
            return bool(states) and all(states[-1].get(name) == value for name, value in wanted.items())

        with running_server(tiny_bundle.root, options=config(tmp_path, table)) as server:
            async with edge_client(server.grpc, tmp_path, client="camera-1") as client:
                answer = await client.infer(photo())
                await true(lambda: state(online=True, point="s1-r2", rate=None))
                url = f"{server.http}/v1/sessions/{client.session_id}/rate"
                async with httpx.AsyncClient() as http:
                    (await http.put(url, json={"point": "s1-r1"})).raise_for_status()
                await true(lambda: state(online=True, rate={"point": "s1-r1"}))
            await true(lambda: state(online=False))
        (published,) = heard.of("bitneck/camera-1/tiny")
        assert published["labels"][0]["name"] == answer.labels[0].name


def test_a_damaged_queue_ends_the_start_with_one_sentence(tiny_bundle: Bundle, tmp_path: Path) -> None:
    table = f'[[sinks]]\nkind = "jsonl"\nname = "file"\npath = "{tmp_path / "answers.jsonl"}"\n'
    options = config(tmp_path, table)
    (tmp_path / "queue.db").write_bytes(b"no database" * 1000)
    with pytest.raises(ProcessFailed) as caught:
        start_server(tiny_bundle.root, options=options)
    text = str(caught.value)
    assert "exit status 1" in text
    assert "move it away to begin with an empty queue" in text
    assert "Traceback" not in text


def test_a_spool_that_is_sent_does_not_change_where_its_client_stands(tiny_bundle: Bundle) -> None:
    told: list[ClientState] = []
    presence = Presence(told.append)

    def session(identity: str, point: str, spool: str = "") -> Session:
        made = Session(
            session_id=identity, model="tiny", client="camera-1", ladder=tiny_bundle.manifest.ladder, window=4,
            assumed_fps=1.0, now=0.0, spool=spool,
        )  # fmt: skip
        made.last_point = point
        return made

    live, spooled = session("live", "s1-r2"), session("spooled", "s1-r1", "spool-1")
    for sessions in ([live], [live, spooled], [live], []):
        presence.look(sessions, lambda _session: True, 0.0)
    assert [(state.point, state.online) for state in told] == [("s1-r2", True), ("s1-r2", False)]


def test_a_file_is_as_old_as_its_first_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr("bitneck_cloud.answers.sinks.jsonl.time.time", lambda: now)
    path = tmp_path / "a.jsonl"
    sink = JsonlSink(JsonlTable(kind="jsonl", name="file", path=path, rotate_s=60))
    sink.send([])  # opens the file
    now += 3600
    for number in range(3):
        sink.send([Queued(number, now, b"{}")])
        now += 1
    sink.close()
    assert path.read_text() == "{}\n{}\n{}\n"
    assert list(tmp_path.iterdir()) == [path]


def test_nobody_can_pass_for_the_spool_of_another(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    table = JsonlTable(kind="jsonl", name="file", path=path)
    outgoing = Outgoing([table], tmp_path / "queue.db", server="here")
    outgoing.start()
    try:
        for number, (owner, seq) in enumerate([("device mallory", 1), ("device alice", 1), ("device alice", 1)], 1):
            document = {"client": owner, "model": "m", "session": "s", "spool": "one", "seq": seq, "number": number}
            outgoing.commit([document], [owner])
        end = time.monotonic() + 30
        while len(documents(path)) < 2:
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        outgoing.close()
    assert [(each["client"], each["number"]) for each in documents(path)] == [
        ("device mallory", 1),
        ("device alice", 2),
    ]


def test_a_file_of_another_program_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "important.txt"
    path.write_text("IMPORTANT, and no line ends")
    sink = JsonlSink(JsonlTable(kind="jsonl", name="file", path=path))
    assert "another program's" in sink.send([Queued(1, 0.0, b"{}")]).error
    sink.close()
    assert path.read_text() == "IMPORTANT, and no line ends"


def test_a_role_that_is_lowered_ends_what_it_allowed(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("read alice 0123456789abcdef\n")
    tokens = BearerTokens(Role.OPERATE, None, file)
    alice = tokens.find("0123456789abcdef")
    assert alice is not None
    file.write_text("metrics alice 0123456789abcdef\n# lowered\n")
    assert tokens.refresh()
    assert not tokens.valid(alice)
