"""Settings of the edge client. This is their only home: flags, variables, help and documents are made from it."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import SecretStr, model_validator
from pydantic_settings import SettingsConfigDict

from bitneck.settings.model import Address, Settings, setting
from bitneck_edge.link.remote import Access

__all__ = ["AUTO", "EdgeSettings"]

AUTO = "auto"
"""In place of an operating point: the client chooses, frame by frame."""

_LEAST_REPORT_S = 10.0

_SERVER, _RATE, _DEVICE, _LINK, _SPOOL = "Server", "Bit rate", "Device", "Link", "Spool"


class EdgeSettings(Settings):
    """Flags, then ``BITNECK_EDGE_*``, then the file, then these defaults."""

    model_config = SettingsConfigDict(env_prefix="BITNECK_EDGE_")

    server: Annotated[str, setting("HOST:PORT of the cloud server.", _SERVER)] = "127.0.0.1:50051"
    bundle: Annotated[Path | None, setting("Folder of a bundle, to use in place of a server.", _SERVER)] = None
    model: Annotated[str, setting("Which of the server's models. Not needed if it has only one.", _SERVER)] = ""
    client: Annotated[str, setting("Name of this device in the cloud's logs and lists.", _SERVER, max_length=128)] = (
        "bitneck-edge"
    )
    bundle_id: Annotated[
        str,
        setting(
            "Accept this bundle only (sha256:...). Without it, any bundle that the server has.",
            _SERVER,
            pattern=r"^(sha256:[0-9a-f]{64})?$",
        ),
    ] = ""
    token: Annotated[
        SecretStr | None,
        setting(
            "Bearer token of this device. Better give it in BITNECK_EDGE_TOKEN: other users can read a command line.",
            _SERVER,
        ),
    ] = None
    tls: Annotated[bool, setting("Encrypt the link.", _SERVER)] = False
    tls_ca: Annotated[
        Path | None,
        setting(
            "PEM file of the authorities that may sign the server's certificate; without it, the system's. Turns TLS "
            "on, as the next two do.",
            _SERVER,
        ),
    ] = None
    tls_cert: Annotated[Path | None, setting("PEM file of this device's certificate.", _SERVER)] = None
    tls_key: Annotated[Path | None, setting("PEM file of the key of tls_cert.", _SERVER)] = None
    insecure: Annotated[
        bool,
        setting(
            "Allow plaintext to a server on another machine. Everybody on the way can then read the token and the "
            "frames, and answer in the server's place. Also allows metrics beyond loopback.",
            _SERVER,
        ),
    ] = False

    point: Annotated[
        str,
        setting(
            "Operating point to begin with, or 'auto' to choose one for each frame by what link and device can do. "
            "Without it, the cloud's choice or the most accurate one; until its files are here, one of those that are.",
            _RATE,
        ),
    ] = ""
    latency_ms: Annotated[
        int,
        setting("With point 'auto': milliseconds from a picture to its answer, at most.", _RATE, ge=1, le=3_600_000),
    ] = 300
    max_edge_ms: Annotated[
        float,
        setting(
            "With point 'auto': milliseconds that head and encoder may take. This decides among split points; 0 is no "
            "limit.",
            _RATE,
            ge=0,
            le=3_600_000,
        ),
    ] = 0.0
    similar: Annotated[
        Literal["auto", "on", "off"],
        setting(
            "Code a picture against an earlier one if that is smaller. 'auto' does so for videos, cameras and streams.",
            _RATE,
        ),
    ] = "auto"
    key_every: Annotated[
        int, setting("Code at least one of this many frames without an earlier one.", _RATE, ge=1, le=1_000_000)
    ] = 100

    cache_dir: Annotated[
        Path | None, setting("Folder in which bundles are kept; without it, the user's cache folder.", _DEVICE)
    ] = None
    exact: Annotated[
        bool,
        setting(
            "Decode and resize pictures as in training. Without it a JPEG is decoded no finer than the network needs, "
            "and only what the network sees is resized, which takes a fraction of the time.",
            _DEVICE,
        ),
    ] = False
    precision: Annotated[
        Literal["auto", "int8", "float32"],
        setting(
            "What the head and the encoders compute in. 'auto' takes int8 where the bundle has it and it is faster on "
            "this device, which is measured once.",
            _DEVICE,
        ),
    ] = "auto"
    threads: Annotated[
        int,
        setting("Threads of ONNX Runtime inside one operator of the head; 0 for every core.", _DEVICE, ge=0, le=1024),
    ] = 0
    workers: Annotated[
        int,
        setting("Pictures that are encoded at once; 0 for two, or one on a single core.", _DEVICE, ge=0, le=64),
    ] = 0
    metrics: Annotated[
        str,
        setting(
            "HOST:PORT of a page with this device's metrics for Prometheus, such as 127.0.0.1:9101; without it, none. "
            "The page is plaintext and asks for no token, so beyond loopback it needs insecure.",
            _DEVICE,
        ),
    ] = ""

    answers: Annotated[
        Literal["all", "none", "labels", "shares", "map", "map/4"],
        setting(
            "What comes back to the device: 'all', 'none', or without the times of each stage the 'labels', and for "
            "segmentation the 'shares' of the classes, the class 'map', or 'map/4', every fourth pixel of it.",
            _LINK,
        ),
    ] = "all"
    pack: Annotated[
        int,
        setting(
            "Frames in one message, no more than the window. More of them save bytes, and wait for each other; with "
            "point 'auto', latency_ms then counts from the last one.",
            _LINK,
            ge=1,
            le=256,
        ),
    ] = 1
    pack_ms: Annotated[
        int,
        setting(
            "With pack: milliseconds that a frame waits for others, at most; less than answer_timeout_s.",
            _LINK,
            ge=1,
            le=3_600_000,
        ),
    ] = 5000
    in_flight: Annotated[
        int,
        setting(
            "Frames that may be unanswered; 0 for the server's window, or with --newest as many as the round trip "
            "needs.",
            _LINK,
            ge=0,
            le=1024,
        ),
    ] = 0
    deadline_ms: Annotated[
        int,
        setting("Milliseconds after receipt until the cloud drops a frame; 0 for never.", _LINK, ge=0, le=3_600_000),
    ] = 0
    connect_timeout_s: Annotated[float, setting("Seconds for one attempt to connect.", _LINK, gt=0, le=600)] = 3.0
    answer_timeout_s: Annotated[
        float,
        setting(
            "Seconds until an unanswered frame, or a pause in a download, means that the link is dead.",
            _LINK,
            gt=0,
            le=3600,
        ),
    ] = 15.0
    going_over_s: Annotated[
        float,
        setting(
            "The longest time, in seconds, before another bundle that the server has for this device is fetched. Each "
            "device waits for a time of its own, so that not all of them fetch at once.",
            _LINK,
            ge=0,
            le=3600,
        ),
    ] = 10.0
    fetch_kbps: Annotated[
        float,
        setting(
            "Kilobits a second for files that come in the background, while frames are answered; 0 for no limit.",
            _LINK,
            ge=0,
            le=1e7,
        ),
    ] = 0.0
    report_s: Annotated[
        float,
        setting(
            "Seconds between reports in which the device tells the server how it is, for the list of sessions: 10 or "
            "more; 0 for none. A report costs 100 to 120 bytes of the link up, 22 more under TLS.",
            _LINK,
            ge=0,
            le=86_400,
        ),
    ] = 0.0
    retries: Annotated[
        int, setting("Attempts to connect after the first one; -1 tries for ever.", _LINK, ge=-1, le=1_000_000)
    ] = 3

    spool: Annotated[
        Path | None,
        setting(
            "Folder in which frames are kept while no server answers; they are sent later. The link is then never "
            "given up. Each process needs a folder of its own.",
            _SPOOL,
        ),
    ] = None
    spool_mb: Annotated[
        float, setting("Megabytes that the spool may have; a day at one frame a second is 10.", _SPOOL, ge=1, le=1e5)
    ] = 100.0
    spool_age: Annotated[
        float, setting("Hours that a frame stays in the spool, since it was captured.", _SPOOL, gt=0, le=100_000)
    ] = 168.0
    spool_first: Annotated[
        Literal["oldest", "newest"],
        setting("Which frames fall out of a full spool: the oldest ones, or the newest, which do not get in.", _SPOOL),
    ] = "oldest"
    spool_kbps: Annotated[
        float,
        setting(
            "Kilobits a second on the link, at most, for frames of the spool; 0 for what live frames leave.",
            _SPOOL,
            ge=0,
            le=1e7,
        ),
    ] = 0.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        Address.parse(self.server)
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together: give both, or none")
        if self.pack > 1 and self.pack_ms >= self.answer_timeout_s * 1e3:
            raise ValueError(
                f"a frame would wait {self.pack_ms} ms for its pack, and the link count as dead after "
                f"{self.answer_timeout_s:g} s: lower pack_ms (--pack-ms), or raise answer_timeout_s"
            )
        if 0 < self.report_s < _LEAST_REPORT_S:
            raise ValueError(
                f"report_s of {self.report_s:g} s is too often for a thin link: give {_LEAST_REPORT_S:g} or more, or 0"
            )
        if self.metrics and not Address.parse(self.metrics).loopback and not self.insecure:
            raise ValueError(
                f"everybody on the network could read the metrics at {self.metrics}: give a loopback address such as "
                "127.0.0.1:9101, or allow it with insecure (--insecure) where you trust the network"
            )
        if not self.access.tls and not self.insecure and not Address.parse(self.server).loopback:
            raise ValueError(
                f"the link to {self.server} would be plaintext: give tls (--tls, --tls-ca FILE), or allow it with "
                "insecure (--insecure) where you trust the network"
            )
        return self

    @property
    def access(self) -> Access:
        """Where the cloud is, and how it lets this device in."""
        return Access(
            address=self.server,
            tls=self.tls or self.tls_ca is not None or self.tls_cert is not None,
            ca=self.tls_ca,
            cert=self.tls_cert,
            key=self.tls_key,
            token=self.token.get_secret_value() if self.token is not None else "",
        )
