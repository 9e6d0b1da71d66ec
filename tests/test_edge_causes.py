"""Why a device has no connection, what it does then, and how its programs end. Real servers, sockets and processes."""

import asyncio
import contextlib
import json
import multiprocessing
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bitneck.bundle import Bundle
from bitneck.errors import InvalidConfig, Unauthenticated, Unavailable, Unreachable
from bitneck_edge.bundles.store import default_cache_dir
from bitneck_edge.client import EdgeClient
from bitneck_edge.link.diagnosis import proxy_variable
from bitneck_edge.sync import SyncEdgeClient
from bitneck_testing.authority import Authority
from bitneck_testing.photographs import photo, photo_bytes
from bitneck_testing.processes import BIN, Server, free_port, heeding_interrupts, running_server
from bitneck_testing.rogue_servers import rogue_server

ROOT = Path(__file__).parents[1]
HANG_S = 60.0
TOKEN = "a-token-of-the-devices"


@pytest.fixture(scope="module")
def server(tiny_bundle: Bundle) -> Iterator[Server]:
    with running_server(tiny_bundle.root) as running:
        yield running


@pytest.fixture(scope="module")
def guarded(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Authority]]:
    """A server with mutual TLS and a token."""
    authority = Authority(tmp_path_factory.mktemp("tls"))
    cert, key = authority.issue("server")
    options = (
        "--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(authority.ca), "--device-token", TOKEN,
    )  # fmt: skip
    with running_server(tiny_bundle.root, options=options) as running:
        yield running, authority


async def error_of(address: str, cache: Path, **values: Any) -> tuple[Exception, float]:
    """The error of a client that cannot connect, and the seconds until it came."""
    begin = time.monotonic()
    with pytest.raises((Unavailable, Unauthenticated)) as caught:
        async with EdgeClient(address, cache_dir=cache, **{"retries": 0, "connect_timeout_s": 2.0} | values):
            pass
    return caught.value, time.monotonic() - begin


async def test_each_cause_is_named(guarded: tuple[Server, Authority], server: Server, tmp_path: Path) -> None:
    secured, authority = guarded
    stranger = Authority(tmp_path / "other")
    device, device_key = authority.issue("device")
    other, other_key = stranger.issue("device")
    good = {"tls_ca": authority.ca, "tls_cert": device, "tls_key": device_key}
    never = {"retries": 10_000}  # trying again would take for ever
    cases: list[tuple[str, dict[str, Any], str, type[Exception]]] = [
        (f"127.0.0.1:{free_port()}", {}, "connection refused", Unavailable),
        ("no-such-host.invalid:1", {"insecure": True}, "the name no-such-host.invalid", Unavailable),
        (secured.grpc, never, "the server wants TLS", Unreachable),
        (server.grpc, {"tls_ca": authority.ca} | never, "the server has no TLS", Unreachable),
        (secured.grpc, good | {"tls_ca": stranger.ca} | never, "the server's certificate is refused", Unreachable),
        (secured.grpc, {"tls_ca": authority.ca} | never, "--tls-cert", Unreachable),
        (secured.grpc, good | {"tls_cert": other, "tls_key": other_key} | never, "certificate", Unreachable),
        (secured.grpc, good | never, "bearer token", Unauthenticated),
        (server.http.removeprefix("http://"), never, "no gRPC server", Unreachable),
    ]
    said = set()
    for address, values, text, kind in cases:
        async with asyncio.timeout(HANG_S):
            error, _ = await error_of(address, tmp_path / "cache", **values)
        assert text in str(error), (address, error)
        assert type(error) is kind, (address, error)
        assert "\n" not in str(error)
        said.add(str(error))
    assert len({text.partition(": ")[2] for text in said}) >= len(cases) - 1  # only the two certificates read alike
    async with EdgeClient(secured.grpc, cache_dir=tmp_path / "cache", token=TOKEN, **good) as client:
        assert (await client.infer(photo(1))).labels


async def test_a_proxy_is_named_and_never_asked_for_loopback(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", f"http://user:secret@127.0.0.1:{free_port()}")
    error, _ = await error_of("192.0.2.1:50051", tmp_path / "cache", insecure=True)
    assert "https_proxy" in str(error)
    assert "no_proxy" in str(error)
    assert "secret" not in str(error)
    async with EdgeClient(server.grpc, cache_dir=tmp_path / "cache") as client:
        assert (await client.infer(photo(1))).labels
    monkeypatch.setenv("no_proxy", "192.0.2.1, .example")
    assert proxy_variable("192.0.2.1") == proxy_variable("cloud.example") == ""
    assert proxy_variable("cloud.test") == "https_proxy"
    monkeypatch.setenv("grpc_proxy", "http://127.0.0.1:1")
    assert proxy_variable("cloud.test") == "grpc_proxy"


def edge(*arguments: object, **values: Any) -> subprocess.CompletedProcess[str]:
    command = [str(part) for part in (BIN / "bitneck-edge", *arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, **values)


def test_one_line_for_each_cause_on_the_command_line(guarded: tuple[Server, Authority], tmp_path: Path) -> None:
    secured, authority = guarded
    for options in ((), ("--tls",), ("--tls-ca", authority.ca)):
        done = edge("points", "--server", secured.grpc, "--cache-dir", tmp_path / "c", *options)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1, done.stderr


# A lost server


async def test_a_client_that_gave_up_tries_again_at_the_next_call(tiny_bundle: Bundle, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    values: dict[str, Any] = {"cache_dir": tmp_path, "retries": 0, "connect_timeout_s": 1.0, "answer_timeout_s": 2.0}
    async with asyncio.timeout(HANG_S), contextlib.AsyncExitStack() as stack:
        with running_server(tiny_bundle.root, grpc=address):
            client = await stack.enter_async_context(EdgeClient(address, **values))
            assert (await client.infer(photo(1))).labels
        for _ in range(2):
            with pytest.raises(Unavailable):
                await client.infer(photo(1))
        assert client.failure is not None
        together = await asyncio.gather(*[client.infer(photo(1)) for _ in range(20)], return_exceptions=True)
        assert {type(error) for error in together} == {Unavailable}
        with running_server(tiny_bundle.root, grpc=address):
            assert (await client.infer(photo(1))).labels
            assert client.failure is None
            assert len([r async for r in client.stream([photo(k) for k in range(5)])]) == 5
        with running_server(tiny_bundle.root, grpc=address):
            results = [r async for r in client.stream([photo(k) for k in range(5)])]
            assert len(results) == 5
        await client.close()
        with pytest.raises(Unavailable):
            await client.infer(photo(1))


def test_a_lost_server_is_one_error_on_the_command_line(tiny_bundle: Bundle, tmp_path: Path) -> None:
    for k in range(6):
        (tmp_path / f"{k}.png").write_bytes(photo_bytes(k))
    address = f"127.0.0.1:{free_port()}"
    command = [
        BIN / "bitneck-edge", "run", "--server", address, "--cache-dir", tmp_path / "c", "--json-lines", "--fps", "20",
        "--repeat", "50", "--retries", "0", tmp_path,
    ]  # fmt: skip
    with running_server(tiny_bundle.root, grpc=address) as server:
        child = subprocess.Popen([str(p) for p in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert json.loads(child.stdout.readline())["labels"]
        server.kill()
        out, err = child.communicate(timeout=90)
    failed = [line for line in out.splitlines() if '"error"' in line]
    assert len(failed) > 100  # each photograph has its line in the results
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) <= 3, errors
    assert "have no answer, because the server was lost" in errors[-1]
    assert "--retries -1" in errors[-1]
    assert child.returncode == 1


# What does nothing says so


def test_settings_that_would_do_nothing(server: Server, tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(photo_bytes(1))
    out = tmp_path / "a.frame"
    encoded = edge("encode", tmp_path / "a.png", "--bundle", tiny_bundle.root, "--out", out, "--point", "auto")
    assert (encoded.returncode, "--point: 'auto' needs a link" in encoded.stderr) == (2, True), encoded.stderr
    assert not out.exists()
    options = ("--point", "auto", "--max-edge-ms", "0.000001", "--cache-dir", tmp_path / "c")
    run = edge("run", "--server", server.grpc, *options, tmp_path / "a.png")
    assert run.returncode == 0
    assert "no split point keeps max_edge_ms" in run.stderr


async def test_fetching_is_not_counted_as_answering(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(photo_bytes(1))

    async def slowly(_path: str) -> None:
        await asyncio.sleep(0.5)

    async with rogue_server(tiny_bundle, before_fetch=slowly) as (address, rogue), asyncio.timeout(HANG_S):
        begin = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            str(BIN / "bitneck-edge"), "run", "--server", address, "--cache-dir", str(tmp_path / "c"), "--json",
            str(tmp_path / "a.png"), stdout=subprocess.PIPE,
        )  # fmt: skip
        out, _ = await process.communicate()
        fetching = 0.5 * len(rogue.fetched)
    summary = json.loads(out)["summary"]
    assert fetching >= 1.5
    assert 1 / summary["frames_per_s"] < time.monotonic() - begin - fetching + 0.1


# Forks


def _child(work: Any, answers: Any) -> None:
    try:
        work()
        answers.put("no error")
    except InvalidConfig as exc:
        answers.put(str(exc))


def test_a_fork_is_told_to_spawn(server: Server, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    with SyncEdgeClient(server.grpc, cache_dir=tmp_path) as client:
        assert client.infer(photo(1)).labels

        def another() -> None:
            with SyncEdgeClient(server.grpc, cache_dir=tmp_path):
                pass

        for work in (lambda: client.infer(photo(1)), another):
            answers = context.Queue()
            child = context.Process(target=_child, args=(work, answers))
            child.start()
            try:
                assert "spawn" in answers.get(timeout=HANG_S)
            finally:
                child.kill()
                child.join()
        assert client.infer(photo(1)).labels  # the parent is not harmed


# How programs end


def test_a_full_disk_is_one_line(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(photo_bytes(1))
    photographs = [tmp_path / "a.png"] * 2
    runs = [("run", *photographs, *form) for form in (("--json",), ("--csv",), ())]
    for command in (*runs, ("points", "--json"), ("points",)):
        with Path("/dev/full").open("w") as full:
            parts = [BIN / "bitneck-edge", *command, "--server", server.grpc, "--cache-dir", tmp_path / "c"]
            done = subprocess.run([str(p) for p in parts], stdout=full, stderr=subprocess.PIPE, text=True, timeout=90)
        assert done.returncode == 1
        assert done.stderr.strip() == "error: output: No space left on device"


def test_closed_streams_are_no_traceback(server: Server, tmp_path: Path) -> None:
    quoted = f"{BIN / 'bitneck-edge'} run - --server {server.grpc} --cache-dir {tmp_path / 'c'}"
    closed = subprocess.run(["sh", "-c", f"{quoted} <&-"], capture_output=True, text=True, timeout=90)
    assert (closed.returncode, "standard input is closed" in closed.stderr) == (2, True), closed.stderr
    unwritten = subprocess.run(["sh", "-c", f"{quoted} </dev/null >&-"], capture_output=True, text=True, timeout=90)
    assert "Traceback" not in unwritten.stderr


def test_a_user_without_a_home_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_uid: int) -> Any:
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(InvalidConfig, match="--cache-dir"):
        default_cache_dir()


def test_files_that_cannot_be_written_are_one_line(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(photo_bytes(1))
    frame = tmp_path / "a.frame"
    done = edge("encode", tmp_path / "a.png", "--bundle", tiny_bundle.root, "--out", frame)
    assert done.returncode == 0, done.stderr
    results = shutil.copytree(ROOT / "docs" / "results", tmp_path / "results")
    commands = {
        "/proc/no/symbols.npy": ("bitneck-cloud", "decode", frame, "--bundle", tiny_bundle.root, "--symbols"),
        str(tmp_path / "nowhere" / "page.md"): ("bitneck-models", "report", results, "--out"),
    }
    for target, (program, *arguments) in commands.items():
        parts = [str(part) for part in (BIN / program, *arguments, target)]
        done = subprocess.run(parts, capture_output=True, text=True, timeout=90)
        assert done.returncode == 1
        assert done.stderr == f"error: {target}: No such file or directory\n"


def test_an_interrupt_while_modules_are_imported_is_quiet(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, builtins\n"
        "real = builtins.__import__\n"
        "def interrupting(name, *rest):\n"
        "    if name.startswith('bitneck_edge'):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(name, *rest)\n"
        "from bitneck.commands import edge\n"
        "builtins.__import__ = interrupting\n"
        "sys.argv = ['bitneck-edge', '--help']\n"
        "edge()\n"
    )
    command = heeding_interrupts((sys.executable, "-c", code))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr == ""
