"""Real servers for tests: `bitneck-cloud serve` in its own process, on free ports, stopped and checked afterwards."""

import json
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

BIN = Path(sys.executable).parent
START_S = 60.0
STOP_S = 30.0


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    ready: dict[str, Any]
    log: IO[bytes]

    @property
    def grpc(self) -> str:
        return str(self.ready["grpc"])

    @property
    def http(self) -> str:
        return f"http://{self.ready['http']}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(STOP_S)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_S)

    def read_log(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")


def start_server(*bundles: Path, options: tuple[str, ...] = (), grpc: str = "127.0.0.1:0") -> Server:
    command = [str(BIN / "bitneck-cloud"), "serve", "--json", "--grpc", grpc, "--http", "127.0.0.1:0", *options]
    for bundle in bundles:
        command += ["--bundle", str(bundle)]
    log = tempfile.TemporaryFile()  # noqa: SIM115  it outlives this function
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], START_S)
    line = process.stdout.readline() if readable else b""
    server = Server(process, json.loads(line) if line else {}, log)
    if not line:
        process.kill()
        process.wait()
        raise AssertionError(f"the server did not start: {server.read_log()}")
    return server


@contextmanager
def running_server(*bundles: Path, options: tuple[str, ...] = ()) -> Iterator[Server]:
    server = start_server(*bundles, options=options)
    try:
        yield server
        if server.process.poll() is None:
            code = server.stop()
            assert code == 0, f"the server ended with {code}: {server.read_log()}"
        assert "Traceback" not in server.read_log(), server.read_log()
    finally:
        if server.process.poll() is None:
            server.kill()
        assert server.process.stdout is not None
        server.process.stdout.close()
        server.log.close()
