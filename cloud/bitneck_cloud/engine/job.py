"""One frame on its way through the engine.

    WAITING --take--> TAKEN         settle: from both to SETTLED
                                    abandon: from both to ABANDONED

An abandoned frame is dropped if it still waits. If the engine has taken it, its result reaches nobody.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from bitneck.coding.conditional_codec import Reference
from bitneck.errors import BitneckError, DeadlineExceeded, ModelFailure
from bitneck.wire.messages import Output
from bitneck_cloud.answers.answered import Answered, Origin
from bitneck_cloud.engine.served_model import ServedModel

__all__ = ["INTERNAL_ERROR", "Computed", "Job", "JobState"]

_LOG = logging.getLogger(__name__)

INTERNAL_ERROR = "an internal error; the server's log says why"


@dataclass(frozen=True, slots=True)
class Computed:
    """A frame's output, the microseconds that it took, and the number of frames in its batch."""

    output: Output
    queued_us: int
    decode_us: int
    compute_us: int
    batch: int


class JobState(Enum):
    """Where a frame stands."""

    WAITING = auto()
    TAKEN = auto()
    SETTLED = auto()
    ABANDONED = auto()


class Job:
    """One frame on its way through the engine.

    Attributes:
        state: see the module; changes on the event loop only.
        submitted: when it was made, on `time.monotonic`'s clock.
        taken: when the engine took it, on the same clock.
        decode_s: seconds that decoding took.
        kept: its symbols, once it is decoded, if later frames may refer to it.

    Args:
        model: the model that computes it.
        point: its operating point.
        payload: its coded bytes.
        deadline: on `time.monotonic`'s clock, or None.
        reference: what the payload is coded against; None if it is coded by itself.
        keep: whether later frames may refer to this one.
        turn: the caller and its session, which take turns with others.
        map_step: pixels of the input from one pixel of a class map to the next.
        origin: where the frame came from; None if its answer is for nobody else.
    """

    def __init__(
        self,
        model: ServedModel,
        point: str,
        payload: bytes,
        deadline: float | None,
        *,
        reference: Reference | None = None,
        keep: bool = False,
        turn: tuple[str, str] = ("", ""),
        map_step: int = 1,
        origin: Origin | None = None,
    ) -> None:
        self.origin = origin
        self.model = model
        self.map_step = map_step
        self.point = point
        self.deadline = deadline
        self.turn = turn
        self.state = JobState.WAITING
        self.submitted = time.monotonic()
        self.taken = 0.0
        self.decode_s = 0.0
        self.kept: Reference | None = None
        self._on_settled: Callable[[Job, Computed | BitneckError], None] | None = None
        self._payload = payload
        self._reference = reference
        self._keep = keep
        self._latent: NDArray[np.float32] | BitneckError | None = None
        self._lock = threading.Lock()

    @property
    def wanted(self) -> bool:
        """Whether someone still waits for the result."""
        return self.state in (JobState.WAITING, JobState.TAKEN)

    def on_settled(self, callback: "Callable[[Job, Computed | BitneckError], None]") -> None:
        """Set the callback that `settle` calls."""
        self._on_settled = callback

    def take(self, now: float) -> None:
        """The engine computes it now."""
        if self.state is not JobState.WAITING:
            raise AssertionError(f"a frame that is {self.state.name} cannot be taken")
        self.state, self.taken = JobState.TAKEN, now

    def abandon(self) -> bool:
        """Nobody waits for it any more. False if it was settled before."""
        if self.wanted:
            self.state = JobState.ABANDONED
        return self.state is JobState.ABANDONED

    def settle(self, result: Computed | BitneckError) -> None:
        """Call the callback with the result, once. Later results, and results of abandoned frames, are ignored."""
        if not self.wanted:
            return
        self.state = JobState.SETTLED
        if self._on_settled is not None:
            self._on_settled(self, result)

    def answered(self, result: Computed | BitneckError) -> Answered | None:
        """What others may know of its answer; None if there is none, or nobody waits for the result."""
        if self.origin is None or not self.wanted or not isinstance(result, Computed):
            return None
        return Answered(
            origin=self.origin,
            model=self.model.name,
            bundle=self.model.bundle.bundle_id,
            point=self.point,
            output=result.output,
            queued_us=result.queued_us,
            decode_us=result.decode_us,
            compute_us=result.compute_us,
        )

    def count(self, result: Computed | BitneckError) -> None:
        """Count its answer, or its fault, if its bundle is compared with another one."""
        if isinstance(result, BitneckError):
            self.model.count_fault(result)
        elif self.model.tally is not None and self.origin is not None:
            origin = self.origin
            self.model.tally.answered(self.point, origin.payload_bytes, origin.link_bytes, result.output)

    def late(self, now: float) -> DeadlineExceeded | None:
        """The error of a frame whose deadline has passed."""
        if self.deadline is None or now <= self.deadline:
            return None
        return DeadlineExceeded(
            f"the frame waited {(now - self.deadline) * 1e3:.0f} ms beyond its deadline; it was dropped"
        )

    def decode(self) -> NDArray[np.float32] | BitneckError:
        """The latent, or the error. It is decoded once, by the thread that asks first."""
        with self._lock:
            if self._latent is None:
                begin = time.perf_counter()
                try:
                    if self._keep or self._reference is not None:
                        latent, kept = self.model.decode_similar(self.point, self._payload, self._reference)
                        self._latent, self.kept = latent, kept if self._keep else None
                    else:
                        self._latent = self.model.decode(self.point, self._payload)
                except BitneckError as exc:
                    self._latent = exc
                except Exception:  # noqa: BLE001  a bug: this frame fails alone
                    _LOG.exception("decoding a frame of %s failed", self.point)
                    self._latent = ModelFailure(INTERNAL_ERROR)
                self.decode_s = time.perf_counter() - begin
            return self._latent

    def decode_ahead(self) -> None:
        """`decode`, if the frame is still wanted. Decode threads call it. `decode` returns an error again later."""
        if self.wanted and self.late(time.monotonic()) is None:
            self.decode()
