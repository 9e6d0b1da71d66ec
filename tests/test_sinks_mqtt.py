"""MQTT with a real broker: order, repeats, TLS and passwords, brokers that are killed, links that are cut."""

import asyncio
import contextlib
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bitneck_cloud.answers.document import json_of
from bitneck_cloud.answers.sinks.mqtt import connection
from bitneck_cloud.answers.sinks.mqtt.sink import MqttSink
from bitneck_cloud.answers.sinks.settings import MqttTable
from bitneck_cloud.answers.sinks.state import Attempt, ClientState, Queued
from bitneck_testing.authority import Authority
from bitneck_testing.consumers.broker import MOSQUITTO, Broker, Subscriber
from bitneck_testing.consumers.committer import Committer, only, outgoing, wait_for
from bitneck_testing.consumers.documents import answer, answers
from bitneck_testing.links import Proxy

pytestmark = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with Broker(tmp_path_factory.mktemp("broker")) as running:
        yield running


def mqtt(port: int, **other: Any) -> dict[str, Any]:
    table = {"kind": "mqtt", "name": "broker", "host": "127.0.0.1", "port": port, "pause_s": 0.05, "max_pause_s": 0.2}
    return table | {"topic": "answers/{client}/{model}", "server_topic": "", "state_topic": ""} | other


def numbers(subscriber: Subscriber, topic: str = "answers/cam-1/tiny") -> list[int]:
    return [document["number"] for document in subscriber.of(topic)]


def in_order(found: list[int]) -> bool:
    """Whether numbers only go back to begin again from there, without a gap."""
    newest = 0
    for before, number in zip([0, *found], found, strict=False):
        if number > newest + 1 or (number <= newest and number > before + 1):
            return False
        newest = max(newest, number)
    return True


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_answers_come_in_order_and_whole(protocol: str, broker: Broker, tmp_path: Path) -> None:
    topic = f"v{protocol}/{{client}}/{{model}}/{{point}}/{{session}}/{{server}}"
    with Subscriber.running(broker.port, f"v{protocol}/#") as subscriber:
        with outgoing(tmp_path, mqtt(broker.port, protocol=protocol, topic=topic)) as running:
            for first in range(1, 300, 20):
                running.commit(answers(first, first + 19))
            running.commit([answer(301, seq=301, client="../#/+\n\x00", session="s-2")])
            wait_for(lambda: only(running).delivered == 301)
            wait_for(lambda: len(subscriber.messages) == 301)
    place = f"v{protocol}/cam-1/tiny/s1-r1/s-1/cloud-1"
    assert numbers(subscriber, place) == list(range(1, 301))
    assert subscriber.of(place)[0] == answer(1)
    assert subscriber.messages[-1][0] == f"v{protocol}/..%2F%23%2F%2B%0A%00/tiny/s1-r1/s-2/cloud-1"
    assert subscriber.messages[-1][1]["client"] == "../#/+\n\x00"


# A handshake that fails leaves its socket to the garbage collector: the client library does not close it.
@pytest.mark.filterwarnings("ignore:.*SSLSocket:pytest.PytestUnraisableExceptionWarning")
def test_tls_with_a_password(tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path / "ca"), Authority(tmp_path / "stranger")
    secret = tmp_path / "password"
    secret.write_text("wrong\n")
    broker = Broker(tmp_path / "broker", password="right", tls=authority.issue("broker"))
    table = mqtt(broker.port, tls=True, tls_ca=str(authority.ca), username="sink", password_file=str(secret))
    with broker, Subscriber.running(broker.port, "answers/#", ca=authority.ca, password="right") as subscriber:
        with outgoing(tmp_path, mqtt(broker.port)) as running:
            running.commit(answers(1, 3))
            wait_for(lambda: only(running).failing)  # plaintext, where TLS is spoken
        with outgoing(tmp_path, table | {"tls_ca": str(stranger.ca)}) as running:
            wait_for(lambda: "certificate verify failed" in only(running).last_error)
        with outgoing(tmp_path, table) as running:
            wait_for(lambda: "Not authorized" in only(running).last_error)
            assert only(running).queued == 3
            secret.write_text("right\n")
            wait_for(lambda: only(running).delivered == 3)
            wait_for(lambda: not only(running).failing)
        wait_for(lambda: numbers(subscriber) == [1, 2, 3])


def test_a_broker_that_is_killed_and_started_again_gets_all_of_it(tmp_path: Path) -> None:
    broker = Broker(tmp_path / "broker")
    broker.start()
    try:
        with Subscriber.running(broker.port, "answers/#") as subscriber:
            process = Committer(tmp_path, mqtt(broker.port))
            try:
                process.ask("commit 1 40 4")
                wait_for(lambda: len(numbers(subscriber)) == 40)
                wait_for(lambda: process.state()["queued"] == 0)  # the broker's acknowledgements have come too
                broker.kill()
                process.ask("commit 41 200 4")
                process.kill()  # and the server is restarted meanwhile
                process = Committer(tmp_path, mqtt(broker.port))
                process.ask("commit 191 400 4")
                wait_for(lambda: process.state()["failing"])
                assert process.state()["queued"] == 360
                broker.start()
                wait_for(lambda: process.state()["queued"] == 0)
                wait_for(lambda: 400 in numbers(subscriber))
                assert process.close() == 0
            finally:
                if process.process.poll() is None:
                    process.kill()
    finally:
        broker.kill()
    assert list(dict.fromkeys(numbers(subscriber))) == list(range(1, 401))
    assert in_order(numbers(subscriber))


async def test_a_link_that_is_cut_costs_nothing_but_repeats(broker: Broker, tmp_path: Path) -> None:
    async with Proxy(f"127.0.0.1:{broker.port}", delay_s=0.005) as link:
        port = int(link.address.rpartition(":")[2])
        with Subscriber.running(broker.port, "cut/#") as subscriber:
            with outgoing(tmp_path, mqtt(port, topic="cut/{client}", timeout_s=1.0)) as running:

                async def wait(met: Any) -> None:
                    await asyncio.to_thread(wait_for, met)

                for round_ in range(4):
                    await asyncio.to_thread(running.commit, answers(round_ * 100 + 1, round_ * 100 + 100))
                    await wait(lambda round_=round_: len(numbers(subscriber, "cut/cam-1")) >= round_ * 100 + 30)
                    if round_ == 3:
                        link.silence()  # the connection stays, and says nothing
                        await wait(lambda: "no acknowledgement within 1 s" in only(running).last_error)
                    link.cut()
                    link.mend()
                    await wait(lambda: not only(running).queued)
            await wait(lambda: 400 in numbers(subscriber, "cut/cam-1"))
    found = numbers(subscriber, "cut/cam-1")
    assert list(dict.fromkeys(found)) == list(range(1, 401))
    assert in_order(found)


def test_what_the_broker_refuses_is_set_aside(tmp_path: Path) -> None:
    acl = "topic readwrite answers/cam-1/#\ntopic read #\n"
    with Broker(tmp_path / "broker", "max_packet_size 2000", acl=acl) as broker:
        with outgoing(tmp_path, mqtt(broker.port)) as running:
            running.commit([answer(1), answer(2, client="cam-2"), large(3)])
            running.commit([answer(4)])
            wait_for(lambda: not only(running).queued)
            assert (only(running).delivered, only(running).refused, only(running).failing) == (2, 2, False)


def large(number: int, **other: Any) -> dict[str, Any]:
    return answer(number, labels=[{"index": 0, "name": "x" * 3000, "score": 1}], **other)


def test_a_message_at_which_the_broker_ends_the_connection_is_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """MQTT 3.1.1 has no other way to say that a message is too large."""
    with Broker(tmp_path / "broker", "max_packet_size 2000") as broker:
        with Subscriber.running(broker.port, "answers/#") as subscriber:
            with outgoing(tmp_path, mqtt(broker.port, protocol="3.1.1")) as running:
                running.commit([*answers(1, 5), large(6), *answers(7, 30), large(31), large(32), answer(33)])
                wait_for(lambda: not only(running).queued)
                wait_for(lambda: not only(running).failing)
                state = only(running)
                assert (state.delivered, state.refused, state.dropped["connection"]) == (30, 0, 3)
                running.commit(answers(34, 40))
                wait_for(lambda: 40 in numbers(subscriber))
            found = numbers(subscriber)
            assert list(dict.fromkeys(found)) == [k for k in range(1, 41) if k not in (6, 31, 32)]
    assert caplog.text.count("the connection ended 3 times in a row when it was sent") == 3


def test_a_broker_that_ends_the_connection_at_every_message_costs_few_of_them(tmp_path: Path) -> None:
    """It is not the messages that are to blame. States of clients, which it takes, are no proof of the contrary."""
    table = {"protocol": "3.1.1", "state_topic": "state/{client}"}
    broker = Broker(tmp_path / "broker", "max_packet_size 250")
    with outgoing(tmp_path, mqtt(broker.port, **table)) as running:
        with broker:
            running.client_state(ClientState(client="a", model="tiny", online=True, point=None))
            running.commit(answers(1, 50))
            wait_for(lambda: only(running).failed >= 20)
            assert only(running).dropped["connection"] <= 2
            config = broker._config.read_text()
        broker._config.write_text(config.replace("max_packet_size 250", ""))
        with broker:
            wait_for(lambda: not only(running).queued)
            assert only(running).delivered >= 48


def test_a_state_at_which_the_broker_ends_the_connection_holds_nothing_up(tmp_path: Path) -> None:
    table = {"protocol": "3.1.1", "state_topic": "state/{client}"}
    long = "x" * 120
    with Broker(tmp_path / "broker", "max_packet_size 400") as broker:
        with Subscriber.running(broker.port, "state/#") as subscriber:
            with outgoing(tmp_path, mqtt(broker.port, topic="a", **table)) as running:
                for client in ("a", long, "b"):
                    running.client_state(
                        ClientState(client=client, model="tiny", online=True, point=client if client == long else None)
                    )
                wait_for(lambda: subscriber.of("state/a") and subscriber.of("state/b"))
                wait_for(lambda: not only(running).failing)
            assert not subscriber.of(f"state/{long}")


async def test_losses_that_are_not_a_messages_fault_set_nothing_aside(broker: Broker, tmp_path: Path) -> None:
    """The link is cut in the middle of a message again and again, at another one each time."""
    async with Proxy(f"127.0.0.1:{broker.port}", delay_s=0.02) as link:
        port = int(link.address.rpartition(":")[2])
        with outgoing(tmp_path, mqtt(port, topic="lossy/{client}", protocol="3.1.1")) as running:
            await asyncio.to_thread(running.commit, answers(1, 400))
            for _ in range(8):
                before = only(running).delivered

                def further(before: int = before) -> bool:
                    return only(running).delivered > before or not only(running).queued

                await asyncio.to_thread(wait_for, further)
                link.cut()
                link.mend()
            await asyncio.to_thread(wait_for, lambda: not only(running).queued)
            assert (only(running).delivered, only(running).dropped["connection"]) == (400, 0)


def test_states_of_clients_are_retained(broker: Broker, tmp_path: Path) -> None:
    table = mqtt(broker.port, state_topic="state/{client}", server_topic="server/{server}")
    on = ClientState(client="door/1", model="tiny", online=True, point="s1-r1", rate={"max_kbps": 20.0}, at="now")
    process = Committer(tmp_path, table)
    with Subscriber.running(broker.port, "server/#") as watching:
        wait_for(lambda: watching.of("server/cloud-1"))
        process.kill()
        wait_for(lambda: [each["online"] for each in watching.of("server/cloud-1")][-2:] == [True, False])
        with outgoing(tmp_path, table | {"client": "door/*"}) as running:
            running.client_state(on)
            running.client_state(ClientState(client="cam-2", model="tiny", online=True))
            wait_for(lambda: [each["online"] for each in watching.of("server/cloud-1")][-1])
            with Subscriber.running(broker.port, "state/#") as late:
                wait_for(lambda: late.of("state/door%2F1"))
            assert late.messages == [
                (
                    "state/door%2F1",
                    {"version": 1, "server": "cloud-1", "client": "door/1", "model": "tiny", "online": True,
                     "point": "s1-r1", "rate": {"max_kbps": 20.0}, "at": "now"},
                    late.messages[0][2],
                )
            ]  # fmt: skip
        wait_for(lambda: not watching.of("server/cloud-1")[-1]["online"])
        # It was online when that server ended; the next one knows that it is not.
        with outgoing(tmp_path, table), Subscriber.running(broker.port, "state/#") as late:
            wait_for(lambda: late.of("state/door%2F1") and not late.of("state/door%2F1")[-1]["online"])


def test_a_connection_without_answers_is_kept(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """By looking after it once a second, as its sender does."""
    monkeypatch.setattr(connection, "_KEEPALIVE_S", 2)  # a broker ends a connection that is silent for 1.5 times that
    table = mqtt(broker.port, topic="kept/{client}", server_topic="kept-server/{server}")
    sink = MqttSink(MqttTable.model_validate(table), "cloud-1")
    batch = [Queued(number, 0.0, json_of(each).encode()) for number, each in enumerate(answers(1, 6))]
    with Subscriber.running(broker.port, "kept-server/#") as subscriber, contextlib.closing(sink):
        assert sink.send(batch[:3]) == Attempt(("", "", ""))
        end = time.monotonic() + 12.0
        while time.monotonic() < end:
            assert not sink.restless()
            time.sleep(1.0)
        assert sink.send(batch[3:]) == Attempt(("", "", ""))
        greetings = subscriber.of("kept-server/cloud-1")
    assert [greeting["online"] for greeting in greetings] == [True]


def test_a_server_with_thousands_of_connections_publishes(broker: Broker, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    with Subscriber.running(broker.port, "answers/#") as subscriber, contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        while (opened := os.open(os.devnull, os.O_RDONLY)) < 1100:
            stack.callback(os.close, opened)
        stack.callback(os.close, opened)
        with outgoing(tmp_path, mqtt(broker.port)) as running:
            running.commit(answers(1, 3))
            wait_for(lambda: only(running).delivered == 3)
        wait_for(lambda: numbers(subscriber) == [1, 2, 3])
