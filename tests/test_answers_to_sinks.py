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
from bitneck_edge.answers.results import Answer
from bitneck_testing.consumers.broker import MOSQUITTO, Broker, Subscriber
from bitneck_testing.photographs import photo
from bitneck_testing.processes import Server, free_port, running_server, start_server
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


@pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
async def test_a_broker_learns_who_is_here_and_gets_answers(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with Broker(tmp_path / "broker") as broker, Subscriber.running(broker.port) as heard:
        table = f'[[sinks]]\nkind = "mqtt"\nname = "broker"\nhost = "127.0.0.1"\nport = {broker.port}\n'

        def state(**wanted: Any) -> bool:
            """Whether the client's newest state says so."""
            states = heard.of("bitneck-state/camera-1")
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
