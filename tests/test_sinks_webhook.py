"""Webhooks: signed batches in order, and servers that fail, stall, redirect and refuse."""

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitneck_cloud.answers.sinks.webhook import retry_after_s, signature
from bitneck_testing.authority import Authority
from bitneck_testing.consumers.committer import Committer, only, outgoing, wait_for
from bitneck_testing.consumers.documents import answer, answers, coded_map
from bitneck_testing.consumers.receiver import Receiver, Reply, Request
from bitneck_testing.processes import free_port

KEY = "0123456789abcdef"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver().running() as running:
        yield running


def hook(url: str, **other: Any) -> dict[str, Any]:
    return {"kind": "webhook", "name": "hook", "url": url, "secret": KEY, "pause_s": 0.02, "max_pause_s": 0.1} | other


def test_the_signature_is_that_of_the_standard() -> None:
    """The example of its specification."""
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    assert (
        signature(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
        == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [("120", 120.0), (" 0 ", 0.0), ("-1", None), ("soon", None), ("", None), ("1e9", None),
     ("Fri, 01 Jan 2027 00:00:10 +99999999999999", None),
     ("Fri, 01 Jan 2027 00:00:10 GMT", 10.0), ("Fri, 01 Jan 2021 00:00:00 GMT", 0.0)],
)  # fmt: skip
def test_retry_after(text: str, expected: float | None) -> None:
    assert retry_after_s(text, 1798761600.0) == expected


def test_batches_are_signed_and_in_order(receiver: Receiver, tmp_path: Path) -> None:
    extra = {"headers": {"Authorization": "Bearer of-theirs"}, "batch": 40}
    with outgoing(tmp_path, hook(receiver.url, **extra)) as running:
        for first in range(1, 200, 10):
            running.commit(answers(first, first + 9))
        wait_for(lambda: only(running).delivered == 200)
    assert [number for request in receiver.requests for number in request.numbers] == list(range(1, 201))
    for request in receiver.requests:
        assert request.signed_with(KEY.encode())
        assert not request.signed_with(b"0123456789abcdeX")
        assert abs(int(request.headers["webhook-timestamp"]) - time.time()) < 60
        assert request.headers["authorization"] == "Bearer of-theirs"
        assert request.headers["content-type"] == "application/json"
        assert len(request.numbers) <= 40
        document = json.loads(request.body)
        assert (document["version"], document["sink"]) == (1, "hook")
    assert receiver.requests[0].answers[0] == answer(1)


def test_a_key_of_the_standard_comes_from_a_file_that_may_change(receiver: Receiver, tmp_path: Path) -> None:
    keys = [bytes(range(24)), bytes(range(32))]
    secret = tmp_path / "secret"
    secret.write_text("whsec_" + base64.b64encode(keys[0]).decode() + "\n")
    table = hook(receiver.url, secret_file=str(secret))
    del table["secret"]
    with outgoing(tmp_path, table) as running:
        running.commit(answers(1, 1))
        wait_for(lambda: only(running).delivered == 1)
        secret.unlink()
        running.commit(answers(2, 2))
        wait_for(lambda: only(running).failing)
        assert "cannot read the secret" in only(running).last_error
        secret.write_text("whsec_" + base64.b64encode(keys[1]).decode())
        wait_for(lambda: only(running).delivered == 2)
    assert [request.signed_with(key) for request, key in zip(receiver.requests, keys, strict=True)] == [True, True]


def test_failures_are_tried_again_under_the_same_numbers(receiver: Receiver, tmp_path: Path) -> None:
    failures = [500, 503, 429, 408, 401, 403, 404, 302, 307]

    def reply(_: Request) -> Reply | None:
        if not failures:
            return None
        return Reply(failures.pop(0), {"Location": "http://127.0.0.1:1/elsewhere"}, b"not \x1b[31mnow")

    receiver.replies = reply
    with outgoing(tmp_path, hook(receiver.url)) as running:
        running.commit(answers(1, 5))
        wait_for(lambda: only(running).delivered == 5)
        state = only(running)
        assert (state.failed, state.refused, state.failing) == (9, 0, False)
        assert "status 307: not" in state.last_error
        assert "\x1b" not in state.last_error
        assert "hush" not in state.last_error
        assert "it redirects, which is not followed" in state.last_error
    assert [request.numbers for request in receiver.requests] == [[1, 2, 3, 4, 5]] * 10
    assert len({request.headers["webhook-id"] for request in receiver.requests}) == 1


def test_retry_after_is_honoured(receiver: Receiver, tmp_path: Path) -> None:
    times: list[float] = []

    def reply(_: Request) -> Reply | None:
        times.append(time.monotonic())
        return Reply(503, {"Retry-After": "1"}) if len(times) == 1 else None

    receiver.replies = reply
    with outgoing(tmp_path, hook(receiver.url)) as running:
        running.commit(answers(1, 5))
        wait_for(lambda: only(running).delivered == 5)
    assert times[1] - times[0] >= 1.0


def test_what_can_never_pass_is_set_aside_alone(receiver: Receiver, tmp_path: Path) -> None:
    receiver.replies = lambda request: Reply(422, {}, b"no 37") if 37 in request.numbers else None
    with outgoing(tmp_path, hook(receiver.url)) as running:
        running.commit(answers(1, 100))
        wait_for(lambda: only(running).queued == 0)
        state = only(running)
        assert (state.delivered, state.refused, state.failed, state.failing) == (99, 1, 0, False)
    assert receiver.accepted == [number for number in range(1, 101) if number != 37]


def test_a_secret_that_the_server_repeats_is_not_told(receiver: Receiver, tmp_path: Path) -> None:
    """Nor half of it, where what is shown of the answer ends."""
    said = b"no: Bearer HEADERSECRET at /answers?key=hush" + b"." * 280 + b"HEADERSECRET"
    receiver.replies = lambda _: Reply(500, {}, said)
    table = hook(receiver.url, headers={"Authorization": "Bearer HEADERSECRET"})
    with outgoing(tmp_path, table) as running:
        running.commit(answers(1, 1))
        wait_for(lambda: only(running).failing)
        error = only(running).last_error
    assert "status 500: no: ***" in error
    assert not any(word in error for word in ("HEADER", "hush", "/answers"))


@pytest.mark.parametrize("delay", ["status", "body"])
def test_a_server_that_stalls_costs_a_bounded_time(delay: str, receiver: Receiver, tmp_path: Path) -> None:
    """Also one that sends its answer byte by byte."""
    slow = Reply(200, {}, b"x" * 50 if delay == "body" else b"", 0.2 if delay == "body" else 3.0)
    receiver.replies = lambda _: slow if len(receiver.requests) == 0 else None
    with outgoing(tmp_path, hook(receiver.url, timeout_s=0.5)) as running:
        begin = time.monotonic()
        running.commit(answers(1, 3))
        wait_for(lambda: only(running).delivered == 3)
        assert time.monotonic() - begin < 2.5
        assert "no answer within 0.5 s" in only(running).last_error


def test_a_server_that_is_away_for_a_while_gets_all_of_it(tmp_path: Path) -> None:
    port = free_port()
    receiver = Receiver()
    process = Committer(tmp_path, hook(f"http://127.0.0.1:{port}/"))
    try:
        process.ask("commit 1 300 5")
        assert process.state()["queued"] == 300
        with receiver.running(port=port):
            wait_for(lambda: len(receiver.accepted) >= 300)
        process.ask("commit 301 600 5")
        process.kill()  # between commit and delivery
        process = Committer(tmp_path, hook(f"http://127.0.0.1:{port}/"))
        with receiver.running(port=port):
            wait_for(lambda: process.state()["queued"] == 0)
        assert process.close() == 0
    finally:
        if process.process.poll() is None:
            process.kill()
    assert list(dict.fromkeys(receiver.accepted)) == list(range(1, 601))


def test_tls_with_an_authority_of_ones_own(tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path / "ca"), Authority(tmp_path / "stranger")
    with Receiver().running(tls=authority.issue("hook")) as receiver:
        with outgoing(tmp_path, hook(receiver.url, tls_ca=str(stranger.ca))) as running:
            running.commit(answers(1, 3))
            wait_for(lambda: only(running).failing)
            assert "certificate verify failed" in only(running).last_error
        assert not receiver.requests
        with outgoing(tmp_path, hook(receiver.url, tls_ca=str(authority.ca))) as running:
            wait_for(lambda: only(running).delivered == 3)


def test_maps_go_as_the_sink_says(receiver: Receiver, tmp_path: Path) -> None:
    coded = coded_map(np.arange(12, dtype=np.uint8).reshape(3, 4))
    tables = [hook(receiver.url, name=form, maps=form) for form in ("none", "runs", "png")]
    with outgoing(tmp_path, *tables) as running:
        assert running.wants_maps
        running.commit([answer(1, map=coded)])
        wait_for(lambda: [state.delivered for state in running.states()] == [1, 1, 1])
    got = {json.loads(request.body)["sink"]: request.answers[0]["map"] for request in receiver.requests}
    assert got["none"] is None
    assert got["runs"] == coded
    assert got["png"]["encoding"] == "png"
    assert base64.b64decode(got["png"]["data"]).startswith(b"\x89PNG")
