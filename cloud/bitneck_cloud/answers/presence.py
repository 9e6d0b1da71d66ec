"""Which clients are here, and at which point and rate: told to sinks that retain it, once for each change."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime

from bitneck_cloud.answers.sinks.state import ClientState
from bitneck_cloud.fleet.tables import policy_dict
from bitneck_cloud.sessions.session import Session

__all__ = ["Presence"]


class Presence:
    """Remembers what was told of each client. Of a client with several sessions, the newest connected one counts.

    Sessions of spools do not count: their frames are of another time, and are sent beside a live session.

    Args:
        tell: called with each client's state when it is another one.
    """

    def __init__(self, tell: Callable[[ClientState], None]) -> None:
        self._tell = tell
        self._told: dict[str, ClientState] = {}

    def look(self, sessions: Iterable[Session], connected: Callable[[Session], bool], unix_s: float) -> None:
        """Tell what has changed since the last look.

        Args:
            sessions: of the server, the oldest first.
            connected: whether a session has a stream.
            unix_s: now, seconds since 1970.
        """
        at = datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="milliseconds")
        now: dict[str, ClientState] = {}
        for session in sessions:
            if connected(session) and not session.spool:
                rate = policy_dict(session.policy) if session.policy is not None else None
                now[session.client] = ClientState(
                    client=session.client, model=session.model, online=True, point=session.last_point, rate=rate
                )
        for name, state in now.items():
            before = self._told.get(name)
            if before is None or replace(before, at="") != state:
                self._told[name] = replace(state, at=at)
                self._tell(self._told[name])
        for name in self._told.keys() - now.keys():
            self._tell(replace(self._told.pop(name), online=False, at=at))
