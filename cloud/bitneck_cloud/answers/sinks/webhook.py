"""Batches of answers to an HTTP server, signed as Standard Webhooks has it (https://www.standardwebhooks.com).

webhook-id: SINK-FIRST-LAST          webhook-timestamp: seconds since 1970
webhook-signature: v1,BASE64(HMAC-SHA256(key, "{id}.{timestamp}.{body}"))
"""

import base64
import hashlib
import hmac
import time
from collections.abc import Sequence
from datetime import UTC
from email.utils import parsedate_to_datetime
from urllib.parse import parse_qsl, urlsplit

import httpx

import bitneck
from bitneck.errors import InvalidConfig
from bitneck_cloud.answers.sinks.maps import with_map
from bitneck_cloud.answers.sinks.posting import Poster, Reply
from bitneck_cloud.answers.sinks.settings import WebhookTable, check_key, secret_of
from bitneck_cloud.answers.sinks.state import Attempt, ClientState, Queued

__all__ = ["WebhookSink", "retry_after_s", "signature"]

_NEVER = frozenset({400, 405, 406, 410, 411, 413, 414, 415, 422, 431, 501, 505})
"""Statuses that the same request will get again. Others of 400 and more may pass when something has been repaired."""
_ERROR_CHARACTERS = 300
_MOST_READ = 1 << 16
"""Bytes of an answer that are read."""


def signature(key: bytes, identity: str, timestamp: int, body: bytes) -> str:
    """The header ``webhook-signature``.

    Args:
        key: of both sides.
        identity: the header ``webhook-id``.
        timestamp: the header ``webhook-timestamp``, seconds since 1970.
        body: of the request.
    """
    signed = f"{identity}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()


def retry_after_s(text: str, now: float) -> float | None:
    """What the header ``Retry-After`` asks for; None if it makes no sense.

    Args:
        text: seconds, or a date.
        now: seconds since 1970.
    """
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(text[:12])
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    return max(0.0, (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - now)


class WebhookSink:
    """See `bitneck_cloud.answers.sinks.state.Sink`.

    A batch that is refused for good is sent again in halves, until the answer that is to blame is alone.

    Args:
        table: its settings.
    """

    def __init__(self, table: WebhookTable) -> None:
        self._table = table
        url = httpx.URL(table.url)
        self._url, self._where = url, f"{url.scheme}://{url.netloc.decode()}"  # what comes behind may be a secret
        if table.proxy:
            self._where += f", through the proxy {table.proxy}"
        self.most = table.batch
        self._poster: Poster | None = None

    @property
    def most_bytes(self) -> int:
        """Bytes of documents in one request."""
        return self._table.batch_bytes

    def restless(self) -> bool:
        """Never: without answers there is nothing to post."""
        return False

    def send(self, batch: Sequence[Queued]) -> Attempt:
        """Post a batch."""
        if not batch:
            return Attempt()
        try:
            key = check_key(secret_of(self._table.secret, self._table.secret_file) or "", "secret_file")
        except ValueError as exc:
            raise InvalidConfig(f"sink {self._table.name}: {exc}") from exc
        bodies = [with_map(each.body, self._table.maps) for each in batch]
        body = b'{"version":1,"sink":"%s","answers":[%s]}' % (self._table.name.encode(), b",".join(bodies))
        identity = f"{self._table.name}-{batch[0].id}-{batch[-1].id}"
        try:
            reply = self._post(body, identity, key)
        except TimeoutError:
            return Attempt(error=f"{self._where}: no answer within {self._table.timeout_s:g} s")
        except OSError as exc:
            return Attempt(error=f"{self._where}: {self._without_secrets(str(exc))}")
        return self._judge(len(batch), reply)

    def tell(self, state: ClientState) -> None:
        """A webhook has no state of clients."""

    def close(self) -> None:
        """Close the connection."""
        if self._poster is not None:
            self._poster.close()
            self._poster = None

    def _judge(self, answers: int, reply: Reply) -> Attempt:
        status = reply.status
        if 200 <= status < 300:
            self.most = min(self._table.batch, self.most * 2)
            return Attempt(("",) * answers)
        text = self._without_secrets(reply.body.decode(errors="replace"))[:_ERROR_CHARACTERS].strip()
        said = f"status {status}" + (f": {text}" if text else "")
        if 300 <= status < 400:
            return Attempt(error=f"{self._where}: {said}; it redirects, which is not followed: give the new url")
        if status not in _NEVER:
            return Attempt(error=f"{self._where}: {said}", retry_after_s=retry_after_s(reply.retry_after, time.time()))
        if answers > 1:
            self.most = answers // 2
            return Attempt()
        return Attempt((said,))

    def _without_secrets(self, text: str) -> str:
        """What the other side said, without what may be a secret of this sink: it may repeat what it was sent."""
        url = urlsplit(self._table.url)
        values = [value.get_secret_value() for value in self._table.headers.values()]
        secrets = {part for value in values for part in (value, *value.split())} | {url.query, url.path}
        secrets |= {value for _, value in parse_qsl(url.query)}
        for secret in sorted((each for each in secrets if len(each) > 1), key=len, reverse=True):
            text = text.replace(secret, "***")
        return text

    def _post(self, body: bytes, identity: str, key: bytes) -> Reply:
        timestamp = int(time.time())
        headers = {name: value.get_secret_value() for name, value in self._table.headers.items()} | {
            "Content-Type": "application/json",
            "User-Agent": f"bitneck/{bitneck.__version__}",
            "webhook-id": identity,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signature(key, identity, timestamp, body),
        }
        if self._poster is None:
            proxy = httpx.URL(self._table.proxy) if self._table.proxy else None
            self._poster = Poster(self._url, tls_ca=self._table.tls_ca, proxy=proxy)
        return self._poster.post(body, headers, within_s=self._table.timeout_s, most=_MOST_READ)
