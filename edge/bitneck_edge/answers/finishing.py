"""What a program does with each answer before it gets it, such as writing a class map: in threads of its own.

A disk may not answer. That costs the answers that wait for it, and nothing else: other frames, and the end of the
program, do not wait.
"""

from collections.abc import Callable

from bitneck.disk_thread import DiskThread
from bitneck.errors import Unavailable
from bitneck_edge.answers.results import Answer
from bitneck_edge.sources.photo import Photo

__all__ = ["Finishing"]

_THREADS = 4
_MOST_S = 30.0
"""A slow card takes the pictures of an answer in this time."""


class Finishing:
    """Calls a function with each photograph and its answer, a few at once.

    Args:
        finish: it blocks, and returns the answer that the program gets; None for the answer as it is.
    """

    def __init__(self, finish: Callable[[Photo, Answer], Answer] | None) -> None:
        self._finish = finish
        self._threads = _threads()

    async def __call__(self, photo: Photo, answer: Answer) -> Answer:
        """What the function makes of an answer.

        Raises:
            Unavailable: it did not return in time. While no thread gets on, that is so at once.
            Exception: what the function raises.
        """
        if self._finish is None:
            return answer
        thread = min(self._threads, key=lambda each: (each.stuck, each.answers))
        if thread.stuck:
            raise _too_late(answer)
        thread.answers += 1
        try:
            return await thread.disk.within(_MOST_S, self._finish, photo, answer)
        except TimeoutError as exc:
            raise _too_late(answer) from exc
        finally:
            thread.answers -= 1

    def close(self) -> None:
        """Wait no more for what has begun. Further answers get threads of their own."""
        for thread in self._threads:
            thread.disk.end()
        self._threads = _threads()


class _Thread:
    """One of the threads.

    Attributes:
        disk: does its work.
        answers: that wait for it.
    """

    def __init__(self, name: str) -> None:
        self.disk = DiskThread(name)
        self.answers = 0

    @property
    def stuck(self) -> bool:
        """Whether it is at one answer for longer than any may take."""
        return self.disk.stuck_s > _MOST_S


def _threads() -> list[_Thread]:
    return [_Thread(f"bitneck-finish-{place}") for place in range(_THREADS)]


def _too_late(answer: Answer) -> Unavailable:
    return Unavailable(
        f"{answer.file}: its answer came, but what was to be done with it has not ended within {_MOST_S:.0f} s; does "
        "the disk that it is written to answer?"
    )
