"""Resume tokens, signed, so that any server with the key can resume a session. Pure: times come in as arguments.

A token is ``payload.signature``, both base64url: JSON of the session's id, its model, when it was issued, its number
and what it is bound to, and its HMAC-SHA256. It holds no secret of the session but gives the right to take it over, so
it travels in ``Opened`` only.
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
    """What a token says.

    Attributes:
        session_id: of the session that it resumes.
        model: of that session.
        number: how many tokens of the session were issued before it.
        binding: the caller that it was issued to, see `bitneck_cloud.access.callers.Caller`; empty for any.
    """

    session_id: str
    model: str
    number: int = 0
    binding: str = ""


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
        said = [token.session_id, token.model, int(now), token.number, _short(token.binding)]
        payload = _encode(json.dumps(said, separators=(",", ":")).encode())
        return f"{payload}.{self._mac(payload)}"

    def read(self, text: str, now: float, binding: str = "") -> ResumeToken | None:
        """The contents of a token; None if it is no token, too old, signed with another key, or issued to another.

        Args:
            text: from the client.
            now: seconds since 1970.
            binding: of the caller that shows it.
        """
        payload, _, mac = text[:_MAX_CHARACTERS].partition(".")
        if not hmac.compare_digest(mac.encode(), self._mac(payload).encode()):
            return None
        try:
            said = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
            session_id, model, issued, number, bound = said if len(said) > 3 else (*said, 0, "")  # of version 0.1
        except (ValueError, TypeError, binascii.Error):
            return None
        if not all(isinstance(part, str) for part in (session_id, model, bound)):
            return None
        if not all(isinstance(part, int) for part in (issued, number)):
            return None
        if now - issued > self._max_age_s or not _SESSION_ID.match(session_id) or bound != _short(binding):
            return None
        return ResumeToken(session_id, model, number, binding)

    def _mac(self, payload: str) -> str:
        return _encode(hmac.new(self._key, payload.encode(errors="replace"), hashlib.sha256).digest())


def _short(binding: str) -> str:
    """A binding as a token holds it: nothing in it says who the caller is."""
    return _encode(hashlib.sha256(binding.encode(errors="replace")).digest()[:16]) if binding else ""


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
