"""A sink that is in the worker, as its sender in the server has it."""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from bitneck_cloud.answers.sinks.state import MOST_CLIENTS, Attempt, ClientState, Queued
from bitneck_cloud.answers.sinks.worker.link import Link, WorkerGone, dump_batch
from bitneck_cloud.answers.sinks.worker.process import WorkerProcess

__all__ = ["RemoteSink"]


class RemoteSink:
    """See `bitneck_cloud.answers.sinks.state.Sink`.

    What was delivered is known here only when the sink has said so. If the worker ends before that, the batch is sent
    again, and so are the states of all clients.

    Args:
        name: of the sink.
        worker: where it is.
        most: answers that a batch may have, until the sink says something else.
        most_bytes: bytes of them, likewise.
    """

    def __init__(self, name: str, worker: WorkerProcess, most: int, most_bytes: int) -> None:
        self._name, self._worker = name, worker
        self.most, self.most_bytes = most, most_bytes
        self._link: Link | None = None
        self._lock = threading.Lock()
        self._states: OrderedDict[str, ClientState] = OrderedDict()
        self._untold: OrderedDict[str, None] = OrderedDict()

    def restless(self) -> bool:
        """Whether there is no link, or a state to be told, or the sink is."""
        if self._link is None or self._untold:
            return True
        try:
            with self._linked() as link:
                return bool(link.call("restless"))
        except WorkerGone:
            return True

    def send(self, batch: Sequence[Queued]) -> Attempt:
        """Let the sink send a batch."""
        try:
            with self._linked() as link:
                self._tell_states(link)
                found = link.call("send", dump_batch(batch))
                return Attempt(**found | {"settled": tuple(found["settled"])})
        except WorkerGone as exc:
            return Attempt(error=str(exc))

    def tell(self, state: ClientState) -> None:
        """Keep the newest state of a client, for the next call and for the next worker."""
        with self._lock:
            self._states[state.client] = state
            self._states.move_to_end(state.client)
            self._untold[state.client] = None
            while len(self._states) > MOST_CLIENTS:
                gone, _ = self._states.popitem(last=False)
                self._untold.pop(gone, None)

    def close(self) -> None:
        """Let it say goodbye."""
        if self._link is not None:
            with contextlib.suppress(WorkerGone), self._linked() as link:
                link.call("close")

    @contextlib.contextmanager
    def _linked(self) -> Iterator[Link]:
        """The link, to the worker of now. It is let go if it ends in the block."""
        if self._link is None:
            self._link = self._worker.link(self._name)
            with self._lock:
                self._untold = OrderedDict.fromkeys(self._states)
        try:
            yield self._link
            self.most, self.most_bytes = self._link.most, self._link.most_bytes
        except WorkerGone:
            self._link = None
            raise

    def _tell_states(self, link: Link) -> None:
        with self._lock:
            told = [self._states[client] for client in self._untold]
            self._untold.clear()
        if told:
            try:
                link.call("tell", [asdict(state) for state in told])
            except BaseException:
                with self._lock:
                    self._untold.update(OrderedDict.fromkeys(state.client for state in told))
                raise
