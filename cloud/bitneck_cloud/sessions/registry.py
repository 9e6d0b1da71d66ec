"""The served models with their generations, the open sessions, and the rules of their rates."""

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bitneck.errors import BundleMismatch, Overloaded, UnknownModel, UnknownSession
from bitneck.ids import MAX_CLIENT_CHARACTERS
from bitneck.text import clean_text
from bitneck_cloud.access.callers import ANONYMOUS, Caller
from bitneck_cloud.access.tokens import ResumeToken, TokenSigner
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_cloud.fleet.patterns import Clients
from bitneck_cloud.fleet.rules import RateRule, RuleBook
from bitneck_cloud.sessions.session import Session

__all__ = ["Admission", "Registry", "new_session_id"]


@dataclass(frozen=True, slots=True)
class Admission:
    """The result of `Registry.open`.

    Attributes:
        session: the one that was opened.
        token: its fresh resume token.
        number: of that token.
        how: ``new``, ``resumed`` or ``adopted``.
    """

    session: Session
    token: str
    number: int
    how: str


class Registry:
    """Sessions by id, and the served models by name.

    After a reload, the old generation stays as long as sessions use it, and at least until the next reload. A client
    that fetched its manifest a moment before can still connect.

    Args:
        models: what is served.
        window: see `CloudSettings`, like the others.
        max_sessions: likewise.
        max_sessions_per_caller: likewise.
        resume_s: likewise.
        assumed_fps: likewise.
        max_bytes_per_s: likewise.
        signer: of resume tokens.
        adopt: whether to accept signed tokens of unknown sessions, because other servers have the same key.
        ended: called once with each session that is forgotten.
    """

    def __init__(
        self,
        models: Iterable[ServedModel],
        *,
        window: int,
        max_sessions: int,
        resume_s: float,
        assumed_fps: float,
        max_bytes_per_s: float,
        signer: TokenSigner,
        adopt: bool,
        max_sessions_per_caller: int = 0,
        ended: Callable[[Session], None] = lambda _session: None,
    ) -> None:
        self.rules = RuleBook()
        self._generations: dict[str, list[ServedModel]] = {model.name: [model] for model in models}
        self._window = window
        self._max_sessions = max_sessions
        self._max_per_caller = max_sessions_per_caller
        self._resume_s = resume_s
        self.assumed_fps = assumed_fps
        self._max_bytes_per_s = max_bytes_per_s
        self._signer = signer
        self._adopt = adopt
        self._ended = ended
        self._sessions: dict[str, Session] = {}
        self._candidates: dict[str, tuple[ServedModel, Clients]] = {}  # by model, with the clients that get it
        self._withheld: set[str] = set()  # models whose candidate is not to be had just now
        self._earlier: dict[str, list[ServedModel]] = {}  # by model, the one that was loaded last first

    @property
    def models(self) -> Mapping[str, ServedModel]:
        """The newest generation of each model, by name."""
        return {name: generations[0] for name, generations in self._generations.items()}

    def model(self, name: str) -> ServedModel:
        """The newest generation of a served model. An empty name means the only model.

        Raises:
            UnknownModel: no model with this name, or no name although several are served.
        """
        if not name and len(self._generations) == 1:
            return next(iter(self._generations.values()))[0]
        if not name:
            raise UnknownModel(f"several models are served, name one of them (--model): {', '.join(self._generations)}")
        if name not in self._generations:
            raise UnknownModel(f"no model {name[:80]!r} is served; there are: {', '.join(self._generations)}")
        return self._generations[name][0]

    def generation(self, name: str, bundle_id: str, *, earlier: bool = False) -> ServedModel:
        """The generation of a model that a client has.

        Args:
            name: of the model.
            bundle_id: of the generation.
            earlier: also look among those that were loaded for spools, and that may go at any time.

        Raises:
            UnknownModel: see `model`.
            BundleMismatch: this generation is not served.
        """
        newest = self.model(name)
        found = self._generations[newest.name] + (self._earlier.get(newest.name, []) if earlier else [])
        if (candidate := self.candidate(newest.name)) is not None:
            found = [candidate, *found]
        for model in found:
            if model.bundle.bundle_id == bundle_id:
                return model
        raise BundleMismatch(
            f"the client has bundle {bundle_id[:80] or '(none)'}, this server has {newest.bundle.bundle_id}; "
            "get its manifest and files again"
        )

    def still_served(self, name: str, bundle_id: str) -> ServedModel | None:
        """A generation of a model that sessions may be using, or that is the candidate; None if it is gone."""
        try:
            return self.generation(name, bundle_id)
        except BundleMismatch:
            return None

    def swap(self, model: ServedModel) -> None:
        """Add a new generation of a served model. Unused generations are dropped, except the one before.

        If it was the candidate, it is one no more.

        Raises:
            UnknownModel: no model with this name is served.
        """
        self.model(model.name)
        if self.candidate(model.name) is model:
            del self._candidates[model.name]
            self._withheld.discard(model.name)
        self._keep(model.name, [model, self._generations[model.name][0]])

    def _keep(self, name: str, first: Sequence[ServedModel]) -> None:
        """Keep generations of a model, the newest one first; behind them those that sessions use. One of each bundle.

        Without the last, a canary that is begun and ended again and again would add a generation each time.
        """
        used = {session.bundle_id for session in self._sessions.values() if session.model == name}
        kept: dict[str, ServedModel] = {}
        for model in (*first, *(old for old in self._generations[name] if old.bundle.bundle_id in used)):
            kept.setdefault(model.bundle.bundle_id, model)
        self._generations[name] = list(kept.values())

    def candidate(self, name: str) -> ServedModel | None:
        """The generation of a model that only some clients get; None if there is none."""
        candidate, _ = self._candidates.get(name, (None, None))
        return candidate

    def offered(self, name: str, client: str) -> ServedModel:
        """The generation that a client gets: the candidate if it is for this name and can be had, else the newest.

        Args:
            name: of the model; see `model`.
            client: the client's name, as it says itself. One that says none gets the newest.

        Raises:
            UnknownModel: see `model`.
        """
        newest = self.model(name)
        tried = self._tried_by(newest.name, client)
        return newest if tried is None or newest.name in self._withheld else tried

    def suits(self, name: str, client: str, bundle_id: str) -> bool:
        """Whether a client may stay with a bundle: it is offered, or a candidate for it that it has fetched already.

        Args:
            name: of a served model.
            client: the client's name, as it says itself.
            bundle_id: that it has.
        """
        stays = self.offered(name, client), self._tried_by(name, client)
        return bundle_id in [each.bundle.bundle_id for each in stays if each is not None]

    def _tried_by(self, name: str, client: str) -> ServedModel | None:
        """The candidate, if it is for this client's name."""
        candidate, clients = self._candidates.get(name, (None, None))
        if candidate is None or clients is None or not client:
            return None
        return candidate if clients.matches(clean_text(client[:MAX_CLIENT_CHARACTERS])) else None

    def withheld(self, name: str) -> bool:
        """Whether a model's candidate goes to no client that does not have it."""
        return name in self._withheld

    def withhold(self, name: str, *, withheld: bool) -> None:
        """Offer a model's candidate to no client that does not have it, or offer it again."""
        if withheld:
            self._withheld.add(name)
        else:
            self._withheld.discard(name)

    def begin(self, candidate: ServedModel, clients: Clients) -> None:
        """Give some clients a candidate, from now on.

        Raises:
            UnknownModel: no model with this name is served.
        """
        self.model(candidate.name)
        self._candidates[candidate.name] = candidate, clients

    def withdraw(self, name: str) -> None:
        """Give the candidate to no more clients. It stays for the sessions that use it, as one generation before."""
        candidate, _ = self._candidates.pop(name)
        self._withheld.discard(name)
        newest, *before = self._generations[name]
        self._keep(name, [newest, candidate, *before[:1]])

    def add_earlier(self, model: ServedModel) -> None:
        """Add a generation of long ago. Of such ones, one that no session uses stays, beside those that are used."""
        used = {session.bundle_id for session in self._sessions.values() if session.model == model.name}
        before = self._earlier.get(model.name, [])
        self._earlier[model.name] = [model, *(old for old in before if old.bundle.bundle_id in used)]

    def open(
        self,
        model: ServedModel,
        client: str,
        token: str,
        now: float,
        wall: float,
        caller: Caller = ANONYMOUS,
        spool: str = "",
        follows: str = "",
    ) -> Admission:
        """Open a new session, or resume the one that a resume token names.

        An unknown, expired or replaced token, or one of another caller, gives a new session: the client sees another
        session id. A token is replaced once a frame has come on the stream whose ``Opened`` had a newer one.

        Args:
            model: the generation that the client has.
            client: its name.
            token: a resume token, or nothing.
            now: seconds, a monotonic clock.
            wall: seconds since 1970.
            caller: who opens it.
            spool: id of the spool that its frames come from; such a session is asked for no rate.
            follows: resume token of the session that a new one takes the place of. The rate that was asked of that one
                is asked of this one too, if a point of its bundle fits it.

        Raises:
            Overloaded: too many sessions, in all or of this caller.
        """
        self.expire(now)
        said, session = self._named(token, model.name, wall, caller, spool)
        if said is not None and session is not None:
            session.token_number = max(session.token_number, said.number)
            session.disconnected_at = None
            if session.bundle_id != model.bundle.bundle_id:
                session.move(model.ladder, model.bundle.bundle_id)
            return self._admission(session, "resumed", wall, caller)
        self._make_room(caller.name)
        adopted = said if self._adopt else None
        session = Session(
            session_id=adopted.session_id if adopted is not None else new_session_id(),
            model=model.name,
            client=clean_text(client[:MAX_CLIENT_CHARACTERS]),
            ladder=model.ladder,
            window=self._window,
            assumed_fps=self.assumed_fps,
            now=now,
            bundle_id=model.bundle.bundle_id,
            max_bytes_per_s=self._max_bytes_per_s,
            caller=caller.name,
            spool=spool,
        )
        if adopted is not None:
            session.token_number = session.oldest_token = adopted.number
        self._sessions[session.session_id] = session
        _, before = self._named(follows, model.name, wall, caller, spool)
        if not spool and before is not None and before.policy is not None and session.fits(before.policy):
            session.set_policy(before.policy)
        elif not spool and (rule := self.rule_for(session)) is not None:
            session.set_policy(rule.policy)
        return self._admission(session, "adopted" if adopted is not None else "new", wall, caller)

    def _named(
        self, token: str, model: str, wall: float, caller: Caller, spool: str
    ) -> tuple[ResumeToken | None, Session | None]:
        """What a resume token says, and the session that it names; None for what it is not good for."""
        said = self._signer.read(token, wall, caller.binding) if token else None
        if said is None or said.model != model:
            return None, None
        session = self._sessions.get(said.session_id)
        if session is not None and (said.number < session.oldest_token or session.spool != spool):
            return None, None
        return said, session

    def rule_for(self, session: Session) -> RateRule | None:
        """The rule that gives a session its rate; None if none does, and the client's own choice stands."""
        matching = self.rules.matching(session.model, session.client)
        return next((rule for rule in matching if session.fits(rule.policy)), None)

    def _make_room(self, caller: str) -> None:
        """Forget a session that gives way to a new one of this caller, if there are too many.

        The longest disconnected one that never had a frame gives way first. One that had frames is kept as promised.

        Raises:
            Overloaded: none gives way.
        """
        if self._max_per_caller:
            own = [session for session in self._sessions.values() if session.caller == caller]
            if len(own) >= self._max_per_caller and not self._give_way(own):
                raise Overloaded(f"{self._max_per_caller} sessions of this caller are open already; try again later")
        if len(self._sessions) >= self._max_sessions and not self._give_way(self._sessions.values()):
            raise Overloaded(f"{self._max_sessions} sessions are open already; try again later")

    def _give_way(self, sessions: Iterable[Session]) -> bool:
        idle = [s for s in sessions if s.disconnected_at is not None and not s.accepted]
        if not idle:
            return False
        self.forget(min(idle, key=lambda session: session.disconnected_at or 0.0).session_id)
        return True

    def _admission(self, session: Session, how: str, wall: float, caller: Caller) -> Admission:
        session.token_number += 1
        number = session.token_number
        token = ResumeToken(session.session_id, session.model, number, caller.binding)
        return Admission(session, self._signer.sign(token, wall), number, how)

    def disconnect(self, session: Session, now: float) -> None:
        """The session's stream ended; the session stays for a while."""
        session.disconnected_at = now

    def expire(self, now: float) -> None:
        """Forget the sessions that were disconnected for too long."""
        gone = [
            s.session_id
            for s in self._sessions.values()
            if s.disconnected_at is not None and now - s.disconnected_at > self._resume_s
        ]
        for session_id in gone:
            self.forget(session_id)

    def forget(self, session_id: str) -> None:
        """End a session. Its token gives a new one from here on, unless another server has the session."""
        if (session := self._sessions.pop(session_id, None)) is not None:
            self._ended(session)

    @property
    def count(self) -> int:
        """Sessions, disconnected ones included."""
        return len(self._sessions)

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


def new_session_id() -> str:
    """An id that no other session has."""
    return "s-" + secrets.token_hex(6)
