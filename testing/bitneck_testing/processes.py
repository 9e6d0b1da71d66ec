"""The commands of bitneck as processes: cloud servers on free ports, and edges that send to them.

Nothing outlives its `with` block: `running_server` and `child_process` stop what they started, and kill what does not
stop in time.
"""

import json
import multiprocessing
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx

from bitneck.settings.model import Address
from bitneck_testing.measuring import resident_mib

__all__ = [
    "BIN",
    "QUIET",
    "ProcessFailed",
    "Server",
    "child_process",
    "edge",
    "edge_run",
    "free_port",
    "heeding_interrupts",
    "run_json",
    "running_server",
    "spawned_server",
    "start_server",
    "wait_for_session",
]

BIN = Path(sys.executable).parent
"""The folder of the commands of this environment."""
ANY_PORT = "127.0.0.1:0"
_HEED = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
QUIET = ("--log-level", "warning")
"""Options for a server of a benchmark, so that logging takes no time."""
START_S, STOP_S = 120.0, 30.0
"""A process that is not ready, or has not stopped, after this time counts as failed."""


class ProcessFailed(Exception):
    """A process did not start, ended with an error, or did not do what was awaited of it."""


@dataclass
class Server:
    """A running `bitneck-cloud serve`.

    Attributes:
        process: the process; its standard output is a pipe.
        ready: the JSON document that it printed when it was ready.
        log: its standard error.
    """

    process: subprocess.Popen[bytes]
    ready: dict[str, Any]
    log: IO[bytes]

    @property
    def grpc(self) -> str:
        """HOST:PORT of gRPC."""
        return str(self.ready["grpc"])

    @property
    def http(self) -> str:
        """URL of the control API."""
        return f"http://{self.ready['http']}"

    @property
    def resident_mib(self) -> float:
        """Resident memory now, MiB."""
        return resident_mib(self.process.pid)

    def session(self, session_id: str) -> dict[str, Any]:
        """A session, as the control API shows it."""
        document: dict[str, Any] = httpx.get(f"{self.http}/v1/sessions/{session_id}").json()
        return document

    def kill(self) -> None:
        """End it at once, without a chance to say goodbye."""
        self.process.kill()
        self.process.wait(STOP_S)

    def stop(self) -> int:
        """Ask it to stop (SIGTERM) and wait.

        Returns:
            The exit status.

        Raises:
            subprocess.TimeoutExpired: it runs on after `STOP_S` seconds.
        """
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_S)

    def read_log(self) -> str:
        """All that it has logged."""
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def close(self) -> None:
        """Kill it if it still runs, and close its pipe and its log."""
        if self.process.poll() is None:
            self.kill()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.log.close()


def start_server(
    *bundles: Path, options: Sequence[str] = (), grpc: str = ANY_PORT, program: Path = BIN / "bitneck-cloud"
) -> Server:
    """Start `bitneck-cloud serve` and wait until it is ready. The caller stops it.

    Args:
        bundles: folders of the bundles to serve.
        options: further flags.
        grpc: HOST:PORT to listen on; port 0 takes a free one.
        program: the command, for one of another environment.

    Raises:
        ProcessFailed: it was not ready within `START_S` seconds; the message holds its log.
    """
    command = [str(program), "serve", "--json", "--grpc", grpc, "--http", ANY_PORT, *options]
    for bundle in bundles:
        command += ["--bundle", str(bundle)]
    log = tempfile.TemporaryFile()  # noqa: SIM115  it outlives this function
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], START_S)
    line = process.stdout.readline() if readable else b""
    server = Server(process, json.loads(line) if line else {}, log)
    if not line:
        server.process.kill()
        server.process.wait()
        text = server.read_log()
        server.close()
        raise ProcessFailed(f"the server did not start (exit status {process.returncode}): {text}")
    return server


@contextmanager
def running_server(
    *bundles: Path, options: Sequence[str] = (), grpc: str = ANY_PORT, program: Path = BIN / "bitneck-cloud"
) -> Iterator[Server]:
    """A server for the length of a block; see `start_server`.

    Raises:
        ProcessFailed: it did not start, did not end with status 0 when asked to, or has a traceback in its log.
    """
    server = start_server(*bundles, options=options, grpc=grpc, program=program)
    try:
        yield server
        if server.process.poll() is None and (status := server.stop()) != 0:
            raise ProcessFailed(f"the server ended with {status}: {server.read_log()}")
        if "Traceback" in (text := server.read_log()):
            raise ProcessFailed(f"the server logged a traceback: {text}")
    finally:
        server.close()


def heeding_interrupts(command: Sequence[object]) -> list[str]:
    """A command that heeds SIGINT, also where a test runs in the background of a shell, which ignores it.

    `preexec_fn` could do that too, but it forks this process, and gRPC aborts in a child of a process that uses it.
    """
    return [sys.executable, "-c", _HEED, *(str(part) for part in command)]


@contextmanager
def child_process(command: Sequence[object], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process with a pipe at its standard output, for the length of a block."""
    child = subprocess.Popen([str(part) for part in command], text=True, stdout=subprocess.PIPE, **options)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        for pipe in (child.stdin, child.stdout, child.stderr):
            if pipe is not None:
                pipe.close()


def edge_run(server: str, cache: Path, *arguments: object, program: Path = BIN / "bitneck-edge") -> list[str]:
    """The command line of `bitneck-edge run`, over plaintext.

    Args:
        server: HOST:PORT of the cloud.
        cache: folder for the files that the edge fetches.
        arguments: further flags, and the photographs.
        program: the command, for one of another environment.
    """
    plaintext = () if Address.parse(server).loopback else ("--insecure",)
    command = [program, "run", "--server", server, *plaintext, "--cache-dir", cache, *arguments]
    return [str(part) for part in command]


def edge(*arguments: object, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `bitneck-edge` to its end, which must come within 90 seconds; its output is captured.

    Args:
        arguments: of the command line.
        env: variables to add to the environment.
    """
    command = [str(BIN / "bitneck-edge"), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=90, env=os.environ | (env or {}), check=False
    )


def run_json(command: Sequence[object]) -> dict[str, Any]:
    """Run a command that prints one JSON document.

    Raises:
        ProcessFailed: it ended with another status than 0; the message has what it wrote to standard error.
    """
    parts = [str(part) for part in command]
    done = subprocess.run(parts, capture_output=True, check=False)
    if done.returncode != 0:
        raise ProcessFailed(f"{' '.join(parts)} ended with {done.returncode}: {done.stderr.decode(errors='replace')}")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def wait_for_session(server: Server, client: str, *, answers: int = 6) -> str:
    """Wait until a client has been answered some times.

    Args:
        server: the cloud.
        client: the name that the client gave itself.
        answers: how many frames must have been answered.

    Returns:
        The id of the client's session.

    Raises:
        ProcessFailed: the control API did not show such a session within `START_S` seconds.
    """
    limit = time.monotonic() + START_S
    while time.monotonic() < limit:
        for session in httpx.get(f"{server.http}/v1/sessions").json():
            if session["client"] == client and session["frames_answered"] >= answers:
                return str(session["id"])
        time.sleep(0.05)
    raise ProcessFailed(f"no session of {client} with {answers} answers appeared in the control API")


@contextmanager
def spawned_server(serve: Callable[..., None], *arguments: object) -> Iterator[str]:
    """A Python function that serves, in a process of its own, so that it takes no time from this one.

    Args:
        serve: called with `arguments` and a queue; it puts its address there and serves until it is ended. It must be
            importable by name.
        arguments: picklable.

    Yields:
        The address.
    """
    context = multiprocessing.get_context("spawn")
    address: multiprocessing.Queue[str] = context.Queue()
    process = context.Process(target=serve, args=(*arguments, address), daemon=True)
    process.start()
    try:
        yield address.get(timeout=START_S)
    finally:
        process.terminate()
        process.join()


def free_port() -> int:
    """A TCP port of the loopback that is free now.

    It is none of those that systems give to connections (from 32,768 on): a test may take it seconds later, and one of
    the many connections of other tests would have it then.
    """
    dice = random.SystemRandom()
    for _ in range(100):
        port = dice.randrange(20_000, 32_000)
        with socket.socket() as it, suppress(OSError):
            it.bind(("127.0.0.1", port))
            return port
    raise ProcessFailed("no TCP port from 20,000 to 32,000 is free")
