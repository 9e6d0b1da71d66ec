"""A real MQTT broker (mosquitto) as a process, and a subscriber to it."""

import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion

from bitneck_testing.processes import ProcessFailed, free_port

__all__ = ["MOSQUITTO", "Broker", "Subscriber"]

MOSQUITTO = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/sbin")
"""The broker's program; None where it is not installed."""
_START_S = 20.0


class Broker:
    """A broker that keeps sessions and retained messages over a restart.

    Args:
        folder: for its files.
        options: further lines of its configuration, such as ``max_packet_size 2000``.
        password: of the only user, ``sink``; empty to let everybody in.
        tls: certificate and key; None for plaintext.
        acl: lines of an access list.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        password: str = "",
        tls: tuple[Path, Path] | None = None,
        acl: str = "",
    ) -> None:
        self.port = free_port()
        self._config = folder / "mosquitto.conf"
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            f"listener {self.port} 127.0.0.1",
            f"allow_anonymous {'false' if password else 'true'}",
            "persistence true",
            f"persistence_location {folder}/",
            "autosave_interval 1",
            "autosave_on_changes true",
            "max_queued_messages 100000",
            f"log_dest file {folder}/log",
            *options,
        ]
        if password:
            file = folder / "passwords"
            file.touch(mode=0o600)
            subprocess.run(["mosquitto_passwd", "-b", str(file), "sink", password], check=True, capture_output=True)
            lines.append(f"password_file {file}")
        if tls is not None:
            lines += [f"certfile {tls[0]}", f"keyfile {tls[1]}"]
        if acl:
            (folder / "acl").write_text(acl)
            lines.append(f"acl_file {folder}/acl")
        # Started by root it would become another user, who cannot read the files above.
        self._config.write_text("user root\n" + "\n".join(lines) + "\n")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of its process, while it runs."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it takes connections.

        Raises:
            ProcessFailed: it does not.
        """
        assert MOSQUITTO is not None
        self._process = subprocess.Popen([MOSQUITTO, "-c", str(self._config)], stderr=subprocess.DEVNULL)
        limit = time.monotonic() + _START_S
        while time.monotonic() < limit and self._process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)
        raise ProcessFailed(f"mosquitto did not start: {self._config.with_name('log').read_text()}")

    def kill(self) -> None:
        """End it at once (SIGKILL)."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Subscriber:
    """Collects what is published. It comes back by itself after the broker was away, and misses nothing meanwhile.

    Attributes:
        messages: topic, JSON document and whether it was retained, in the order of arrival.
    """

    def __init__(self) -> None:
        self.messages: list[tuple[str, dict[str, Any], bool]] = []
        self._subscribed = threading.Event()

    @classmethod
    @contextmanager
    def running(cls, port: int, topic: str = "#", *, ca: Path | None = None, password: str = "") -> Iterator[Self]:
        """One for the length of a block.

        Args:
            port: of the broker on loopback.
            topic: filter.
            ca: PEM file of the authority to trust; None for plaintext.
            password: of the user ``sink``.
        """
        self = cls()
        client = paho.Client(CallbackAPIVersion.VERSION2, client_id=f"subscriber-{id(self)}", clean_session=False)
        client.reconnect_delay_set(1, 1)
        if password:
            client.username_pw_set("sink", password)
        if ca is not None:
            client.tls_set(str(ca))

        def subscribe(*_: Any) -> None:
            client.subscribe(topic, qos=1)

        client.on_message = self._on_message
        client.on_subscribe = lambda *_: self._subscribed.set()
        client.on_connect = subscribe
        client.connect("127.0.0.1", port)
        client.loop_start()
        try:
            if not self._subscribed.wait(_START_S):
                raise ProcessFailed("the subscriber is not subscribed")
            yield self
        finally:
            client.disconnect()
            client.loop_stop()

    def of(self, topic: str) -> list[dict[str, Any]]:
        """The documents of one topic so far."""
        return [document for at, document, _ in list(self.messages) if at == topic]

    def _on_message(self, _client: Any, _data: Any, message: Any) -> None:
        self.messages.append((message.topic, json.loads(message.payload), bool(message.retain)))
