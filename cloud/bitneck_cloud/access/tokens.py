"""Resume tokens, signed, so that any server with the key can resume a session. Pure: times come in as arguments.

A token is ``payload.signature``, both base64url: JSON of the session's id, its model and when it was issued, and its
HMAC-SHA256. It holds no secret of the session but gives the right to take it over, so it travels in ``Opened`` only.
"""

import base64
import binascii
import hashlib
import hmac
import json
import re
from dataclasses import dataclass

__all__ = ["ResumeToken", "TokenSigner"]

_MAX_CHARACTERS = 1024
_SESSION_ID = re.compile(r"s-[0-9a-f]{12}\Z")


@dataclass(frozen=True, slots=True)
class ResumeToken:
    """What a token says."""

    session_id: str
    model: str


class TokenSigner:
    """Makes and reads resume tokens.

    Args:
        key: secret, the same on every replica.
        max_age_s: seconds that a token is valid.
    """

    def __init__(self, key: bytes, *, max_age_s: float) -> None:
        self._key = key
        self._max_age_s = max_age_s

    def sign(self, token: ResumeToken, now: float) -> str:
        """A token as text.

        Args:
            token: what it says.
            now: seconds since 1970.
        """
        payload = _encode(json.dumps([token.session_id, token.model, int(now)], separators=(",", ":")).encode())
        return f"{payload}.{self._mac(payload)}"

    def read(self, text: str, now: float) -> ResumeToken | None:
        """The contents of a token; None if it is no token, too old, or signed with another key.

        Args:
            text: from the client.
            now: seconds since 1970.
        """
        payload, _, mac = text[:_MAX_CHARACTERS].partition(".")
        if not hmac.compare_digest(mac.encode(), self._mac(payload).encode()):
            return None
        try:
            session_id, model, issued = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        except (ValueError, TypeError, binascii.Error):
            return None
        if not isinstance(session_id, str) or not isinstance(model, str) or not isinstance(issued, int):
            return None
        if now - issued > self._max_age_s or not _SESSION_ID.match(session_id):
            return None
        return ResumeToken(session_id, model)

    def _mac(self, payload: str) -> str:
        return _encode(hmac.new(self._key, payload.encode(errors="replace"), hashlib.sha256).digest())


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
