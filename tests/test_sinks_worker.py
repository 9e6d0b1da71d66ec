"""The worker of the sinks: it ends, is killed in the middle of a delivery, hangs, or cannot be started."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import bitneck_testing
from bitneck.errors import InvalidConfig
from bitneck_cloud.answers.document import read_json
from bitneck_cloud.answers.sinks.outgoing import Outgoing
from bitneck_cloud.answers.sinks.settings import MqttTable, WebhookTable
from bitneck_cloud.answers.sinks.state import ClientState, Queued
from bitneck_cloud.answers.sinks.worker import link, process
from bitneck_cloud.answers.sinks.worker.link import SinkFailed, dumps
from bitneck_cloud.answers.sinks.worker.process import WorkerProcess
from bitneck_cloud.answers.sinks.worker.remote import RemoteSink
from bitneck_testing.consumers.broker import MOSQUITTO, Broker, Subscriber
from bitneck_testing.consumers.committer import Committer, only, outgoing, wait_for
from bitneck_testing.consumers.documents import answers
from bitneck_testing.consumers.receiver import Receiver, Reply
from bitneck_testing.measuring import children_of

TABLE: dict[str, Any] = {
    "kind": "webhook", "name": "hook", "secret": "0123456789abcdef", "linger_s": 0.0, "pause_s": 0.05,
    "max_pause_s": 0.2,
}  # fmt: skip


HANG_S = 60.0
PACKAGES = str(Path(bitneck_testing.__file__).parents[1])
"""Tests find these by a setting of pytest."""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver().running() as running:
        yield running


def pid_of(running: Outgoing) -> int:
    pid = running.pid
    assert pid is not None
    return pid


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def numbers(receiver: Receiver) -> list[int]:
    return [number for request in receiver.requests for number in request.numbers]


def test_a_worker_that_is_killed_in_the_middle_of_a_delivery(
    receiver: Receiver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is lost, the order is kept, and repeats have their old numbers."""
    receiver.replies = lambda _: Reply(delay_s=60.0)
    with outgoing(tmp_path, TABLE | {"url": receiver.url, "batch": 5}) as running:
        running.commit(answers(1, 20))
        for kill in range(1, 6):
            wait_for(lambda kill=kill: len(receiver.requests) == kill)  # type: ignore[misc]
            assert only(running).delivered == 0
            os.kill(pid_of(running), signal.SIGKILL)
        receiver.replies = lambda _: None
        wait_for(lambda: only(running).delivered == 20)
        assert not only(running).failing
    found = numbers(receiver)
    assert list(dict.fromkeys(found)) == list(range(1, 21))
    assert found.count(1) >= 5
    assert {request.headers["webhook-id"] for request in receiver.requests} == {
        "hook-1-5", "hook-6-10", "hook-11-15", "hook-16-20"
    }  # fmt: skip
    documents: dict[int, Any] = {}
    for request in receiver.requests:
        for each in request.answers:
            assert documents.setdefault(each["number"], each) == each
    assert "has ended (exit status -9); starting it anew" in caplog.text


@pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
def test_all_sinks_go_on_in_the_next_worker(receiver: Receiver, tmp_path: Path) -> None:
    """With the states of all clients: the broker may have lost what it kept."""
    topics = {"topic": "a/{client}", "state_topic": "state/{client}", "server_topic": "server/{server}"}
    with Broker(tmp_path / "broker") as broker, Subscriber.running(broker.port, "#") as subscriber:
        mqtt = {"kind": "mqtt", "name": "broker", "host": "127.0.0.1", "port": broker.port, "pause_s": 0.05} | topics

        def online(topic: str) -> list[bool]:
            return [each["online"] for each in subscriber.of(topic)]

        with outgoing(tmp_path, mqtt, TABLE | {"url": receiver.url}) as running:
            running.client_state(ClientState(client="door", model="tiny", online=True, point="p"))
            running.commit(answers(1, 3))
            wait_for(lambda: all(state.delivered == 3 for state in running.states()))
            wait_for(lambda: online("state/door"))
            os.kill(pid_of(running), signal.SIGKILL)
            wait_for(lambda: online("server/cloud-1") == [True, False, True])
            wait_for(lambda: online("state/door") == [True, True])
            running.commit(answers(4, 6))
            wait_for(lambda: all(state.delivered == 6 for state in running.states()))
        wait_for(lambda: online("server/cloud-1") == [True, False, True, False])
        wait_for(lambda: len(subscriber.of("a/cam-1")) == 6)
        assert [document["number"] for document in subscriber.of("a/cam-1")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("at_work", [False, True])
def test_it_ends_with_the_server(at_work: bool, receiver: Receiver, tmp_path: Path) -> None:
    """At once, also while it gets ready, or while a request is under way."""
    receiver.replies = lambda _: Reply(delay_s=60.0)
    committer = Committer(tmp_path, TABLE | {"url": receiver.url})
    (worker,) = children_of(committer.process.pid)
    if at_work:
        committer.ask("commit 1 3 3")
        wait_for(lambda: receiver.requests)
    committer.kill()
    wait_for(lambda: gone(worker), 5.0)


def test_signals_that_a_server_gets_do_not_end_it(receiver: Receiver, tmp_path: Path) -> None:
    with outgoing(tmp_path, TABLE | {"url": receiver.url}) as running:
        running.commit(answers(1, 1))
        wait_for(lambda: only(running).delivered == 1)
        pid = pid_of(running)
        assert os.getpgid(pid) == pid  # a terminal does not send it any
        assert os.getsid(pid) == os.getsid(0)  # in a session of its own, niceness would not count
        assert os.getpriority(os.PRIO_PROCESS, pid) == os.getpriority(os.PRIO_PROCESS, 0) + 5
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, each)
        running.commit(answers(2, 2))
        wait_for(lambda: only(running).delivered == 2)
        assert pid_of(running) == pid
    assert gone(pid)
    assert running.pid is None
    assert numbers(receiver) == [1, 2]


def test_a_worker_that_cannot_be_started_is_tried_again(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(tmp_path / "missing"))
        with outgoing(tmp_path, TABLE | {"url": receiver.url}) as running:
            running.commit(answers(1, 3))
            wait_for(lambda: only(running).failed > 2)
            assert only(running).failing
            assert only(running).last_error == "the worker of the sinks cannot be started: No such file or directory"
            patch.undo()
            wait_for(lambda: only(running).delivered == 3)


@pytest.mark.parametrize("size", [0, 100_000])
def test_a_worker_that_hangs_is_ended(
    size: int, receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also if a batch does not fit into its socket. A call that takes long is no such thing: it gives signs of life."""
    monkeypatch.setattr(process, "SILENCE_S", 3 * link.BEAT_S)
    with outgoing(tmp_path, TABLE | {"url": receiver.url}) as running:
        running.commit(answers(1, 1))
        wait_for(lambda: only(running).delivered == 1)
        monkeypatch.setattr(link, "SILENCE_S", 3 * link.BEAT_S)  # from now on: getting ready may take longer
        receiver.replies = lambda _: Reply(delay_s=4 * link.BEAT_S)
        running.commit(answers(2, 2))
        wait_for(lambda: only(running).delivered == 2)
        assert not only(running).failed
        receiver.replies = lambda _: None
        os.kill(pid_of(running), signal.SIGSTOP)
        running.commit([document | {"bundle": size * "x"} for document in answers(3, 7)])
        wait_for(lambda: only(running).failed)
        monkeypatch.setattr(link, "SILENCE_S", HANG_S)
        wait_for(lambda: only(running).delivered == 7)
    assert "does not answer any more, and is ended; starting it anew" in caplog.text
    assert numbers(receiver) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("stopped", [False, True])
def test_a_stopping_server_does_not_wait_for_long(
    stopped: bool, receiver: Receiver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor is a request that it ends a failure of the sink."""
    receiver.replies = lambda _: Reply(delay_s=60.0)
    with outgoing(tmp_path, TABLE | {"url": receiver.url, "timeout_s": 100.0}) as running:
        pid = pid_of(running)
        running.commit(answers(1, 2))
        wait_for(lambda: receiver.requests)
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        begin = time.monotonic()
    assert time.monotonic() - begin < 15.0
    assert gone(pid)
    assert caplog.text == ""
    assert not any(thread.name == "bitneck-sink-hook" for thread in threading.enumerate())


def test_files_need_no_worker(tmp_path: Path) -> None:
    with outgoing(tmp_path, {"kind": "jsonl", "name": "file", "path": tmp_path / "a.jsonl"}) as running:
        running.commit(answers(1, 3))
        wait_for(lambda: only(running).delivered == 3)
        assert running.pid is None


def test_a_worker_that_nobody_needs_now_is_no_zombie_for_long(receiver: Receiver, tmp_path: Path) -> None:
    receiver.replies = lambda _: Reply(503, {"Retry-After": "3600"})
    with outgoing(tmp_path, TABLE | {"url": receiver.url}) as running:
        running.commit(answers(1, 1))
        wait_for(lambda: only(running).failed)
        pid = pid_of(running)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not Path(f"/proc/{pid}").exists())


def test_its_standard_input_is_no_secret(receiver: Receiver, tmp_path: Path) -> None:
    """It ends only with the server, and a sink would read it without end."""
    worker = WorkerProcess([WebhookTable.model_validate(
        TABLE | {"url": receiver.url, "secret": None, "secret_file": "/dev/stdin"}
    )], "cloud-1")  # fmt: skip
    worker.start()
    try:
        with pytest.raises(InvalidConfig, match="secret_file"):
            RemoteSink("hook", worker, 100, 1 << 20).send([Queued(1, 0.0, b"{}")])
    finally:
        worker.close()


def test_modules_come_from_where_the_server_has_its_own(receiver: Receiver, tmp_path: Path) -> None:
    """Not from the working folder, and from no PYTHONPATH that the server's options shut out."""
    (tmp_path / "paho.py").write_text("raise SystemExit('foreign')")
    (tmp_path / "json.py").write_text("raise SystemExit('foreign')")
    config = tmp_path / "config.toml"
    config.write_text(
        tomli_w.dumps({"sinks": [TABLE | {"url": receiver.url}], "sinks_queue": str(tmp_path / "queue.db")})
    )
    main = "import sys; sys.path.insert(0, sys.argv.pop(1)); from bitneck_testing.consumers import committing_process"
    with subprocess.Popen(
        [sys.executable, "-I", "-c", f"{main}; committing_process.main()", PACKAGES, str(config)],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    ) as committing:  # fmt: skip
        assert committing.stdin is not None
        committing.stdin.write("commit 1 3 3\n")
        committing.stdin.flush()
        try:
            wait_for(lambda: numbers(receiver) == [1, 2, 3])
        finally:
            _, said = committing.communicate(timeout=30.0)
    assert committing.returncode == 0, said
    assert "foreign" not in said


def test_names_that_are_no_unicode_come_over() -> None:
    """As of a file whose name has other bytes."""
    assert read_json(dumps(["\udcff"])) == ["\udcff"]


def test_none_is_started_once_it_was_closed() -> None:
    worker = WorkerProcess([WebhookTable.model_validate(TABLE | {"url": "http://127.0.0.1:1/"})], "cloud-1")
    worker.close()
    worker.start()
    assert worker.pid is None


def test_errors_and_log_lines_come_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An internal one with its traceback."""
    caplog.set_level(logging.INFO)
    tables = [
        MqttTable.model_validate(
            {"kind": "mqtt", "name": "broker", "host": "localhost", "port": 1, "username": "me",
             "password_file": tmp_path / "missing"}
        ),
        WebhookTable.model_validate(TABLE | {"url": "http://127.0.0.1:1/", "maps": "png"}),
    ]  # fmt: skip
    worker = WorkerProcess(tables, "cloud-1")
    worker.start()
    try:
        broker, hook = (RemoteSink(table.name, worker, 100, 1 << 20) for table in tables)
        with pytest.raises(InvalidConfig, match="missing"):
            broker.send([])
        assert hook.restless()
        damaged = b'{"map":{"height":3,"width":3,"encoding":"runs","data":"AAAA"}}'
        assert "Connection refused" in hook.send([Queued(1, 0.0, damaged)]).error
        assert not hook.restless()
        (record,) = caplog.records
        assert (record.name, record.levelname) == ("bitneck_cloud.answers.sinks.maps", "WARNING")
        assert record.getMessage().startswith("answer None: its class map cannot be read")
        with pytest.raises(SinkFailed, match=r"^KeyError: 'encoding'") as bug:
            hook.send([Queued(1, 0.0, b'{"map":{"no":1}}')])
        assert "in with_map" in "".join(bug.value.__notes__)
    finally:
        worker.close()
