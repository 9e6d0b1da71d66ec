"""The edge client without ``async``.

with SyncEdgeClient("cloud.example:50051", point="auto") as client:
    answer = client.infer(Path("photo.jpg"))
    for answer in client.stream(paths):
        ...

An event loop runs in a thread of its own; the client's methods may be called from any thread.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from types import TracebackType
from typing import Any, Self, TypeVar

from bitneck.errors import BitneckError, Unavailable
from bitneck_edge.answers.results import Answer, Failure, Switch
from bitneck_edge.client import EdgeClient
from bitneck_edge.link.remote import check_process
from bitneck_edge.settings import EdgeSettings
from bitneck_edge.sources.capture import Capture
from bitneck_edge.sources.photo import PhotoLike
from bitneck_edge.sources.threads import in_thread
from bitneck_edge.spool.outage import HandOut

__all__ = ["SyncEdgeClient"]

T = TypeVar("T")


class SyncEdgeClient:
    """A session with a cloud server. Use it as a context manager.

    Args:
        server: HOST:PORT; None for the settings' own.
        settings: everything else.
        on_switch: called, in the client's own thread, when the operating point changes.
        on_spooled: see `EdgeClient`; called in the client's own thread.
        **values: single settings, such as ``point="s1-r3"``, in place of a `settings` object.

    Raises:
        InvalidConfig: a setting is refused.
    """

    def __init__(
        self,
        server: str | None = None,
        *,
        settings: EdgeSettings | None = None,
        on_switch: Callable[[Switch], None] = lambda _switch: None,
        on_spooled: HandOut = lambda _result: None,
        **values: Any,
    ) -> None:
        self.client = EdgeClient(server, settings=settings, on_switch=on_switch, on_spooled=on_spooled, **values)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # nothing is given to a loop that ends
        self._waiting: set[Future[Any]] = set()

    def __enter__(self) -> Self:
        """See `EdgeClient.__aenter__`."""
        loop = self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=loop.run_forever, name="bitneck-client", daemon=True)
        self._thread.start()
        try:
            self._run(self.client.__aenter__())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the session."""
        self.close()

    def close(self) -> None:
        """End the session; frames that are not answered fail with `Unavailable`, also those of other threads."""
        if self._loop is not None:
            with contextlib.suppress(Unavailable):  # another thread closes it
                self._run(self.client.close())
            self._end()

    def infer(self, photo: PhotoLike | Capture) -> Answer:
        """One photograph, one answer; see `EdgeClient.infer`."""
        return self._run(self.client.infer(photo))

    def stream(
        self, photos: Iterable[PhotoLike | Capture], *, ordered: bool = True, newest_first: bool = False
    ) -> Iterator[Answer | Failure]:
        """Many photographs; see `EdgeClient.stream`. `photos` is read in a thread of its own."""

        async def begin() -> AsyncGenerator[Answer | Failure]:
            source = in_thread(lambda: iter(photos))
            return self.client.stream(source, ordered=ordered, newest_first=newest_first)

        results = self._run(begin())
        try:
            while (result := self._run(_next(results))) is not None:
                yield result
        finally:
            with contextlib.suppress(Unavailable):
                self._run(results.aclose())

    @property
    def point(self) -> str:
        """The operating point of the next frame; see `EdgeClient.point`."""
        return self.client.point

    @point.setter
    def point(self, point_id: str) -> None:
        async def change() -> None:
            self.client.point = point_id

        self._run(change())

    @property
    def session_id(self) -> str:
        """The session's id, for the control API."""
        return self.client.session_id

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            check_process()  # in a fork the client's thread is not there
            with self._lock:
                loop = self._loop
                if loop is None:
                    raise Unavailable("the client is not open: use it inside `with`")
                future = asyncio.run_coroutine_threadsafe(work, loop)
                self._waiting.add(future)
        except BitneckError:
            work.close()
            raise
        future.add_done_callback(self._waiting.discard)
        try:
            return future.result()
        except CancelledError:
            if self._loop is loop:
                raise
            raise Unavailable("the client was closed while a call waited for its answer") from None
        except BaseException:
            future.cancel()  # an interrupt in this thread ends the work in the client's thread too
            raise

    def _end(self) -> None:
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None and self._thread is not None:
            asyncio.run_coroutine_threadsafe(_finish(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join()
            loop.close()
            for future in list(self._waiting):  # begun after the loop's last task
                future.cancel()


async def _finish() -> None:
    """Cancel the rest of streams that the program left early."""
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()


async def _next(results: AsyncGenerator[Answer | Failure]) -> Answer | Failure | None:
    return await anext(results, None)
