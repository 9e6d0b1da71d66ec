"""The open sessions, and the rate that new ones begin with."""

import secrets
from collections.abc import Iterator, Mapping

from bitneck.errors import Overloaded, RateUnreachable, UnknownModel, UnknownPoint, UnknownSession
from bitneck.ladder import RatePolicy
from bitneck_cloud.models import ServedModel
from bitneck_cloud.session import Session

__all__ = ["Registry"]

_MAX_CLIENT_CHARACTERS = 128


class Registry:
    """Sessions by id and by resume token, and the served models by name.

    Args:
        models: what is served.
        window: see `CloudSettings`, like the others.
        max_sessions: likewise.
        resume_s: likewise.
        assumed_fps: likewise.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        *,
        window: int,
        max_sessions: int,
        resume_s: float,
        assumed_fps: float,
    ) -> None:
        self.models = models
        self.new_session_policy: RatePolicy | None = None
        self._window = window
        self._max_sessions = max_sessions
        self._resume_s = resume_s
        self._assumed_fps = assumed_fps
        self._sessions: dict[str, Session] = {}
        self._tokens: dict[str, str] = {}

    def model(self, name: str) -> ServedModel:
        """A served model; an empty name stands for the only one.

        Raises:
            UnknownModel: none of this name, or no name where several are served.
        """
        if not name and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise UnknownModel(f"no model {name[:80]!r} is served; there are: {', '.join(self.models)}")
        return self.models[name]

    def open(self, model: ServedModel, client: str, token: str, now: float) -> tuple[Session, str, bool]:
        """A new session, or the one that a resume token names.

        An unknown or expired token gives a new session: the client sees another session id.

        Returns:
            The session, its token, and whether it was resumed.

        Raises:
            Overloaded: too many sessions.
        """
        self.expire(now)
        session = self._sessions.get(self._tokens.get(token, ""))
        if session is not None and session.model == model.name:
            session.disconnected_at = None
            return session, token, True
        if len(self._sessions) >= self._max_sessions:
            raise Overloaded(f"{self._max_sessions} sessions are open already; try again later")
        session = Session(
            session_id="s-" + secrets.token_hex(6),
            model=model.name,
            client=client[:_MAX_CLIENT_CHARACTERS],
            ladder=model.ladder,
            window=self._window,
            assumed_fps=self._assumed_fps,
            now=now,
        )
        token = secrets.token_urlsafe(24)
        self._sessions[session.session_id] = session
        self._tokens[token] = session.session_id
        if self.new_session_policy is not None:
            try:
                session.set_policy(self.new_session_policy)
            except (RateUnreachable, UnknownPoint):
                session.policy = None  # another model's ladder: the client's own choice stands
        return session, token, False

    def disconnect(self, session: Session, now: float) -> None:
        """The session's stream ended; the session stays for a while."""
        session.disconnected_at = now

    def expire(self, now: float) -> None:
        """Forget the sessions that were disconnected for too long."""
        gone = {
            s.session_id
            for s in self._sessions.values()
            if s.disconnected_at is not None and now - s.disconnected_at > self._resume_s
        }
        if gone:
            self._sessions = {k: s for k, s in self._sessions.items() if k not in gone}
            self._tokens = {token: k for token, k in self._tokens.items() if k not in gone}

    def sessions(self, now: float) -> Iterator[Session]:
        """The sessions, oldest first."""
        self.expire(now)
        return iter(tuple(self._sessions.values()))

    def session(self, session_id: str, now: float) -> Session:
        """A session by id.

        Raises:
            UnknownSession: there is none.
        """
        self.expire(now)
        if session_id not in self._sessions:
            raise UnknownSession(f"no session {session_id[:80]!r} is open; GET /v1/sessions lists them")
        return self._sessions[session_id]
