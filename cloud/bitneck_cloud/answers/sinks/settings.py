"""What an operator says of a sink: one table ``[[sinks]]`` of the config file for each."""

import base64
import binascii
import ipaddress
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

import httpx
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, field_validator, model_validator

from bitneck.errors import InvalidConfig
from bitneck.settings.model import Address, Table
from bitneck_cloud.answers.filters import AnswerFilter, Wanted
from bitneck_cloud.answers.sinks.topics import check_topic
from bitneck_cloud.fleet.patterns import Groups

__all__ = [
    "JsonlTable",
    "MqttTable",
    "SinkTable",
    "SinkTables",
    "WebhookTable",
    "check_key",
    "check_sinks",
    "secret_of",
]

_MIN_SECRET_BYTES = 16
_HOST = re.compile(r"[A-Za-z0-9._:-]{1,253}")
_PROXY = re.compile(r"https?://[^\s@/?#]+/?")
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}")
_OWN_HEADERS = {"content-type", "content-length", "host", "connection", "transfer-encoding"}
_STANDARD_SECRET = "whsec_"  # noqa: S105  the mark of a key in base64, as Standard Webhooks has it


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Values = Annotated[tuple[str, ...], BeforeValidator(_several)]
"""One text, or a list of texts."""


def _check_host(host: str) -> str:
    """Refuse what no name server can know.

    Raises:
        ValueError: a port, a scheme, brackets or spaces, or no host at all.
    """
    if not _HOST.fullmatch(host) or (":" in host and not _is_ipv6(host)):
        raise ValueError(f"{host[:80]!r} is no host: give a name or an address alone, and the port as port")
    try:
        host.encode("idna")  # what looks names up does the same
    except UnicodeError as exc:
        raise ValueError(f"{host[:80]!r} is no host ({exc})") from exc
    return host


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


class SinkTable(Table):
    """What all sinks have in common."""

    name: Annotated[
        str,
        Field(
            pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$",
            description="Name of the sink, in metrics and in the queue. Under another name it is another sink.",
        ),
    ]
    client: Annotated[
        Values,
        Field(description="Clients whose answers it gets: names, patterns, or @GROUP. One text, or a list."),
    ] = ()
    model: Annotated[Values, Field(description="Models: ids or patterns, likewise.")] = ()
    session: Annotated[Values, Field(description="Sessions: ids, likewise.")] = ()
    classes: Annotated[
        Values,
        Field(
            alias="class",
            description="Classes: names, patterns or indices, likewise. One of them must be in the answer.",
        ),
    ] = ()
    min_score: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Least score, or share of a class map, of such a class; without class, of the best one.",
        ),
    ] = 0.0
    maps: Annotated[
        Literal["none", "runs", "png"], Field(description="How class maps go along: not at all, as runs, or as PNG.")
    ] = "none"
    queue_bytes: Annotated[
        int, Field(ge=4096, le=1 << 40, description="Bytes of answers that may wait. The oldest fall out.")
    ] = 256 << 20
    queue_age_s: Annotated[
        float, Field(gt=0, le=31_536_000, description="Seconds that an answer may wait. Older ones fall out.")
    ] = 259_200.0
    max_answer_bytes: Annotated[
        int, Field(ge=1024, le=64 << 20, description="Bytes of one answer, at most. Larger ones fall out.")
    ] = 1 << 20
    linger_s: Annotated[
        float, Field(ge=0, le=60, description="Seconds that an answer waits for others to go with it.")
    ] = 0.1
    pause_s: Annotated[float, Field(gt=0, le=3600, description="Seconds to wait after a first failure.")] = 1.0
    max_pause_s: Annotated[
        float, Field(gt=0, le=3600, description="Seconds to wait after many failures in a row, at most.")
    ] = 60.0
    timeout_s: Annotated[
        float, Field(gt=0, le=300, description="Seconds that a connection or one request may take.")
    ] = 10.0

    @property
    def wanted(self) -> Wanted:
        """The answers that it gets."""
        return Wanted(
            client=self.client, model=self.model, session=self.session, classes=self.classes, min_score=self.min_score
        )

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.pause_s > self.max_pause_s:
            raise ValueError(f"pause_s {self.pause_s:g} is longer than max_pause_s {self.max_pause_s:g}")
        if self.max_answer_bytes > self.queue_bytes:
            raise ValueError(f"queue_bytes {self.queue_bytes} has no room for one answer of max_answer_bytes")
        return self


class MqttTable(SinkTable):
    """Messages to an MQTT broker, one for each answer."""

    kind: Literal["mqtt"]
    host: Annotated[str, AfterValidator(_check_host), Field(description="Name or address of the broker.")]
    port: Annotated[
        int | None, Field(ge=1, le=65535, description="Its port. Without it, 8883 with TLS and 1883 without.")
    ] = None
    protocol: Annotated[
        Literal["5", "3.1.1"],
        Field(description="Version of MQTT. With 3.1.1 a broker cannot say that it refuses a message."),
    ] = "5"
    tls: Annotated[bool, Field(description="Speak TLS.")] = False
    tls_ca: Annotated[
        Path | None, Field(description="PEM file of the authorities to trust. Without it, the system's.")
    ] = None
    tls_cert: Annotated[Path | None, Field(description="PEM file of a client certificate.")] = None
    tls_key: Annotated[Path | None, Field(description="PEM file of its key.")] = None
    username: Annotated[str, Field(max_length=1024, description="Name to sign in with.")] = ""
    password: Annotated[SecretStr | None, Field(description="Its password. Better give password_file.")] = None
    password_file: Annotated[Path | None, Field(description="File of the password. It is read at each connection.")] = (
        None
    )
    client_id: Annotated[
        str, Field(max_length=128, description="Id at the broker. Without it, the sink's name and a random end.")
    ] = ""
    topic: Annotated[
        str, Field(description="Topic of answers; {client}, {model}, {point}, {session} and {server} are filled in.")
    ] = "bitneck/{client}/{model}"
    state_topic: Annotated[
        str, Field(description="Topic of each client's retained state; {client} and {server}. Empty for none.")
    ] = "bitneck-state/{server}/{client}"
    server_topic: Annotated[
        str, Field(description="Topic that says whether this server is online, retained; {server}. Empty for none.")
    ] = "bitneck-server/{server}"
    insecure: Annotated[bool, Field(description="Allow plaintext to other machines.")] = False

    @model_validator(mode="after")
    def _check_mqtt(self) -> Self:
        for name, known in (
            ("topic", ("client", "model", "point", "session", "server")),
            ("state_topic", ("client", "server")),
            ("server_topic", ("server",)),
        ):
            if template := getattr(self, name):
                check_topic(template, known, name)
            elif name == "topic":
                raise ValueError("topic is empty; give one such as bitneck/{client}/{model}")
        if self.state_topic and "{client}" not in self.state_topic:
            raise ValueError("state_topic needs {client}: else clients would overwrite one another's state")
        if not self.tls and (self.tls_ca or self.tls_cert or self.tls_key):
            raise ValueError("tls_ca, tls_cert and tls_key need tls = true")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together: give both, or none")
        if self.password is not None and self.password_file is not None:
            raise ValueError("give password or password_file, not both")
        if (self.password or self.password_file) and not self.username:
            raise ValueError("a password needs a username")
        if not (self.tls or self.insecure or Address(self.host, 0).loopback):
            raise ValueError(
                f"answers would go to {self.host} in plaintext: give tls = true, or insecure = true where you trust "
                "the network"
            )
        return self


class WebhookTable(SinkTable):
    """Batches of answers to an HTTP server, signed as Standard Webhooks has it."""

    kind: Literal["webhook"]
    url: Annotated[str, Field(max_length=2048, description="Where batches are posted to.")]
    secret: Annotated[
        SecretStr | None,
        Field(description="Key of the signature: a text, or whsec_ and base64. Better give secret_file."),
    ] = None
    secret_file: Annotated[Path | None, Field(description="File of the key. It is read for each batch.")] = None
    headers: Annotated[dict[str, SecretStr], Field(description="Further headers, such as Authorization.")] = {}  # noqa: RUF012  a field
    linger_s: Annotated[
        float,
        Field(ge=0, le=60, description="Seconds that an answer waits for others: a request costs as much as many."),
    ] = 0.25
    batch: Annotated[int, Field(ge=1, le=10_000, description="Answers in one request, at most.")] = 100
    batch_bytes: Annotated[int, Field(ge=1024, le=64 << 20, description="Bytes of one request, at most.")] = 1 << 20
    tls_ca: Annotated[
        Path | None, Field(description="PEM file of the authorities to trust. Without it, those of certifi.")
    ] = None
    proxy: Annotated[
        str, Field(max_length=2048, description="URL of a proxy to go through: http or https, without a user.")
    ] = ""
    insecure: Annotated[bool, Field(description="Allow plaintext to other machines.")] = False

    @field_validator("headers")
    @classmethod
    def _check_headers(cls, headers: dict[str, SecretStr]) -> dict[str, SecretStr]:
        for name, value in headers.items():
            text = value.get_secret_value()
            if not _HEADER.fullmatch(name) or not re.fullmatch(r"[\x20-\x7e]*", text) or text != text.strip():
                raise ValueError(
                    f"{name[:64]!r} is no header, or its value has other characters than ASCII's, or outer spaces"
                )
            if name.lower() in _OWN_HEADERS or name.lower().startswith("webhook-"):
                raise ValueError(f"the header {name} is set by the sink itself")
        return headers

    @model_validator(mode="after")
    def _check_webhook(self) -> Self:
        try:
            url = urlsplit(self.url)
            host, port = url.hostname or "", url.port
        except ValueError as exc:
            raise ValueError(f"url is none ({exc})") from exc
        if (
            url.scheme not in ("http", "https")
            or not host
            or port == 0
            or not self.url.isprintable()
            or " " in self.url
        ):
            raise ValueError("url is not http://HOST[:PORT]/PATH or https://HOST[:PORT]/PATH, or it has spaces")
        if self.proxy and not _PROXY.fullmatch(self.proxy):
            raise ValueError("proxy is not http://HOST:PORT or https://HOST:PORT")
        try:
            for each in filter(None, (self.url, self.proxy)):
                _check_host(httpx.URL(each).raw_host.decode())
        except (httpx.InvalidURL, ValueError) as exc:
            raise ValueError(f"url or proxy cannot be used ({exc})") from exc
        if url.username is not None or url.fragment:
            raise ValueError("url has a user or a fragment; give credentials as a header instead")
        if self.secret is None and self.secret_file is None:
            raise ValueError("give secret or secret_file: batches are signed")
        if self.secret is not None and self.secret_file is not None:
            raise ValueError("give secret or secret_file, not both")
        if self.secret is not None:
            check_key(self.secret.get_secret_value(), "secret")
        if url.scheme == "http" and not (self.insecure or Address(host, 0).loopback):
            raise ValueError(
                f"answers would go to {host} in plaintext: use https, or insecure = true where you trust the network"
            )
        return self


class JsonlTable(SinkTable):
    """Lines of a file, one for each answer."""

    kind: Literal["jsonl"]
    path: Annotated[Path, Field(description="The file that grows. Full ones get a time in their name.")]
    linger_s: Annotated[
        float,
        Field(
            ge=0,
            le=60,
            description="Seconds that an answer waits for others: they are forced to the disk together.",
        ),
    ] = 1.0
    rotate_bytes: Annotated[int, Field(ge=1024, le=1 << 40, description="Bytes after which another file is begun.")] = (
        64 << 20
    )
    rotate_s: Annotated[float, Field(gt=0, le=31_536_000, description="Seconds after which another file is begun.")] = (
        86_400.0
    )
    keep: Annotated[
        int, Field(ge=0, le=100_000, description="Full files that are kept; 0 for all of them. The oldest go.")
    ] = 100
    fsync: Annotated[
        Literal["batch", "never"],
        Field(description="Force each batch to the disk before it leaves the queue, or let the system do it."),
    ] = "batch"


SinkTables = Annotated[MqttTable | WebhookTable | JsonlTable, Field(discriminator="kind")]
"""One table, told apart by its ``kind``."""


def check_sinks(sinks: Sequence[SinkTable], queue: Path | None, groups: Groups) -> None:
    """Refuse sinks that do not go together, and filters that are none.

    Args:
        sinks: of a server.
        queue: file of their queue.
        groups: of clients.

    Raises:
        ValueError: no file for the queue, one name twice, one file for two things, or a filter that is refused.
    """
    if sinks and queue is None:
        raise ValueError("sinks need a queue on a local disk: give sinks_queue, such as sinks_queue = 'sinks.db'")
    names: set[str] = set()
    files = {queue.absolute()} if queue is not None else set()
    for sink in sinks:
        if sink.name in names:
            raise ValueError(f"two sinks have the name {sink.name!r}; give each its own")
        names.add(sink.name)
        try:
            AnswerFilter(sink.wanted, groups)
        except InvalidConfig as exc:
            raise ValueError(f"sink {sink.name!r}: {exc}") from exc
        if isinstance(sink, JsonlTable):
            if (path := sink.path.absolute()) in files:
                raise ValueError(f"sink {sink.name!r}: {sink.path} is written by something else too")
            files.add(path)


def secret_of(value: SecretStr | None, file: Path | None) -> str | None:
    """A secret from the settings or from its file, without the line's end; None if there is none.

    Raises:
        InvalidConfig: the file cannot be read.
    """
    if file is None:
        return value.get_secret_value() if value is not None else None
    try:
        return file.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidConfig(f"{file}: cannot read the secret ({getattr(exc, 'strerror', '') or 'not UTF-8'})") from exc


def check_key(text: str, name: str) -> bytes:
    """The key that a webhook's secret stands for: what follows ``whsec_`` in base64, or the text itself.

    Raises:
        ValueError: it is too short, or no base64.
    """
    if text.startswith(_STANDARD_SECRET):
        try:
            key = base64.b64decode(text.removeprefix(_STANDARD_SECRET), validate=True)
        except binascii.Error as exc:
            raise ValueError(f"{name} begins with {_STANDARD_SECRET}, and what follows is no base64") from exc
    else:
        key = text.encode()
    if len(key) < _MIN_SECRET_BYTES:
        raise ValueError(f"{name} is too short: give at least {_MIN_SECRET_BYTES} random bytes")
    return key
