"""Answers that cannot be delivered: they are set aside, and hold nothing up; a broker's own trouble costs nothing."""

import time
from pathlib import Path
from typing import Any

import pytest

from bitneck_cloud.answers.sinks.state import ClientState
from bitneck_testing.consumers.committer import only, outgoing, wait_for
from bitneck_testing.consumers.documents import answer
from bitneck_testing.consumers.rogue_broker import CUT, SILENT, RogueBroker

UNSPECIFIED, IMPLEMENTATION, NOT_AUTHORIZED, QUOTA = 0x80, 0x83, 0x87, 0x97


def mqtt(port: int, **other: Any) -> dict[str, Any]:
    table = {"kind": "mqtt", "name": "broker", "host": "127.0.0.1", "port": port, "pause_s": 0.02, "max_pause_s": 0.05}
    return table | {"topic": "a/{client}", "server_topic": "", "state_topic": "", "timeout_s": 1.0} | other


def of(*clients: str, first: int = 1) -> list[dict[str, Any]]:
    return [answer(number, client=client) for number, client in enumerate(clients, start=first)]


def poison(verdict: int) -> Any:
    return lambda topic, _body: verdict if topic.endswith("/poison") else 0


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
@pytest.mark.parametrize("verdict", [CUT, SILENT])
def test_the_only_message_may_be_the_one_to_blame(protocol: str, verdict: int, tmp_path: Path) -> None:
    """No other message has to pass before."""
    with RogueBroker(poison(verdict)) as broker, outgoing(tmp_path, mqtt(broker.port, protocol=protocol)) as running:
        running.commit(of("poison"))
        wait_for(lambda: not only(running).queued)
        assert broker.seen == ["a/poison"] * 3
        assert only(running).dropped["connection"] == 1
        running.commit(of("cam-1", first=2))
        wait_for(lambda: only(running).delivered == 1)


@pytest.mark.parametrize("reason", [UNSPECIFIED, IMPLEMENTATION, QUOTA])
def test_a_message_that_is_refused_for_the_moment_again_and_again(reason: int, tmp_path: Path) -> None:
    """As soon as the broker takes another one, it is this one that it does not want."""
    with RogueBroker(poison(reason)) as broker, outgoing(tmp_path, mqtt(broker.port)) as running:
        running.commit(of("poison"))
        wait_for(lambda: only(running).failed >= 10)
        assert (only(running).queued, only(running).refused) == (1, 0)  # it holds nothing up
        running.commit(of("cam-1", "poison", "poison", "cam-2", first=2))
        wait_for(lambda: not only(running).queued)
        assert (only(running).delivered, only(running).refused, only(running).failing) == (2, 3, False)
        assert list(dict.fromkeys(broker.taken)) == ["a/cam-1", "a/cam-2"]  # some came twice


def test_a_broker_that_refuses_all_for_the_moment_loses_nothing_and_gets_all_in_order(tmp_path: Path) -> None:
    with RogueBroker(lambda _topic, _body: QUOTA) as broker, outgoing(tmp_path, mqtt(broker.port)) as running:
        running.commit(of(*(f"cam-{k}" for k in range(30))))
        wait_for(lambda: only(running).failed >= 20)
        assert only(running).queued == 30
        broker.verdict = lambda _topic, _body: 0
        wait_for(lambda: not only(running).queued)
        assert (only(running).delivered, only(running).refused) == (30, 0)
    assert broker.taken == [f"a/cam-{k}" for k in range(30)]


def test_a_broker_that_acknowledges_nothing_costs_few_messages(tmp_path: Path) -> None:
    with (
        RogueBroker(lambda _topic, _body: SILENT) as broker,
        outgoing(tmp_path, mqtt(broker.port, timeout_s=0.1)) as running,
    ):
        running.commit(of(*(f"cam-{k}" for k in range(30))))
        wait_for(lambda: only(running).failed >= 20)
        assert only(running).dropped["connection"] <= 2
        broker.verdict = lambda _topic, _body: 0
        wait_for(lambda: not only(running).queued)
        assert only(running).delivered >= 28


def test_a_broker_that_takes_longer_than_the_timeout_loses_nothing(tmp_path: Path) -> None:
    """It answers in order, so that what it says to something else comes behind the acknowledgement."""

    def slowly(_topic: str, _body: bytes) -> int:
        time.sleep(0.75)
        return 0

    with RogueBroker(slowly) as broker, outgoing(tmp_path, mqtt(broker.port, timeout_s=0.5)) as running:
        for number in range(1, 4):
            running.commit(of("cam-1", first=number))
            wait_for(lambda: not only(running).queued)
        running.commit(of("cam-2", "cam-3", "cam-4", first=4))  # sent at once, acknowledged one after the other
        wait_for(lambda: not only(running).queued)
        assert (only(running).delivered, only(running).dropped["connection"], only(running).failed) == (6, 0, 0)
    assert broker.seen == broker.taken == ["a/cam-1"] * 3 + ["a/cam-2", "a/cam-3", "a/cam-4"]


def test_a_message_that_the_protocol_cannot_carry_is_set_aside(tmp_path: Path) -> None:
    """Its topic has more bytes than fit; those before and behind it are delivered."""
    with RogueBroker(poison(CUT)) as broker, outgoing(tmp_path, mqtt(broker.port)) as running:
        running.commit(of("x" * 70_000))
        wait_for(lambda: only(running).refused == 1)
        running.commit(of("cam-1", "x" * 70_000, "cam-2", first=2))
        wait_for(lambda: not only(running).queued)
        assert (only(running).delivered, only(running).refused, broker.taken) == (2, 2, ["a/cam-1", "a/cam-2"])


@pytest.mark.parametrize("verdict", [CUT, SILENT])
def test_states_that_do_not_pass_hold_no_answers_up(verdict: int, tmp_path: Path) -> None:
    """Not even if the next one comes while the last one is given up, or if the broker wants no state at all."""

    def judge(topic: str, _body: bytes) -> int:
        return verdict if topic.startswith("state/") else 0

    table = {"state_topic": "state/{client}", "timeout_s": 0.2}
    with RogueBroker(judge) as broker, outgoing(tmp_path, mqtt(broker.port, **table)) as running:
        for number in range(1, 31):
            running.client_state(ClientState(client=f"cam-{number % 3}", model="tiny", online=True, point=str(number)))
            running.commit(of("cam-1", first=number))
            wait_for(lambda number=number: only(running).delivered == number)  # type: ignore[misc]
        assert only(running).dropped["connection"] == 0


def test_an_answer_at_which_the_sink_itself_fails_is_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No map that a server makes is like this one; it stands for a bug."""
    poisoned = answer(2, client="poison") | {"map": {"height": 1, "width": 1}}
    with RogueBroker(poison(0)) as broker, outgoing(tmp_path, mqtt(broker.port, maps="png")) as running:
        running.commit([answer(1, client="cam-1"), poisoned, answer(3, client="cam-2")])
        wait_for(lambda: not only(running).queued)
        assert (only(running).delivered, only(running).refused, broker.taken) == (2, 1, ["a/cam-1", "a/cam-2"])
        assert not only(running).failing
    assert "KeyError: 'encoding'" in caplog.text
    assert "in with_map" in caplog.text
