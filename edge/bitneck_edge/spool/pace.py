"""How many frames of a spool are sent together, and when: live frames come first. Pure: times come in as arguments.

A batch is answered before the next one is sent, so a live frame waits for the rest of one batch at most. Its size grows
while the link carries it in the time of an empty one, or little more, and shrinks by half when it does not.
"""

import math

__all__ = ["SpoolPace"]

_LIVE_S, _ALONE_S = 0.1, 0.5
"""How long a batch may take on the link, while live frames are sent and else."""
_FIRST_BYTES, _LEAST_BYTES, _MOST_BYTES = 600, 32, 1 << 15
"""Payload of a batch; a frame that has more goes alone."""
_LIVE_FOR_S = 2.0
_LIVE_WEIGHT = 0.3
_BASE_GROWTH = 1.02
"""Of the least time, with each batch: the way may have become a longer one."""
_MOST_PAUSE_S = 1.0


class SpoolPace:
    """The pace of one spool's frames.

    Attributes:
        most_bytes: payload of the next batch, beside that of its first frame.

    Args:
        kbps: of the link, at most; 0 for no limit.
    """

    def __init__(self, kbps: float = 0.0) -> None:
        self._kbps = kbps
        self.most_bytes = _FIRST_BYTES
        self._base_s = math.inf
        self._due = 0.0
        self._live_at = -math.inf
        self._live_kbps = 0.0
        self._seen: tuple[float, float] | None = None

    def live(self, link_bytes: float, waiting: bool, now: float) -> None:
        """What the live frames do.

        Args:
            link_bytes: of the busier direction, since the client was opened.
            waiting: whether a live frame waits for its answer.
            now: when.
        """
        if self._seen is not None and now > self._seen[0]:
            kbps = max(0.0, link_bytes - self._seen[1]) * 8e-3 / (now - self._seen[0])
            self._live_kbps += (kbps - self._live_kbps) * _LIVE_WEIGHT
        if waiting:
            self._live_at = now
        self._seen = now, link_bytes

    def batch(self, window: int, unanswered: int) -> int:
        """Frames of the next batch; 0 if live frames have the whole window.

        Args:
            window: frames that the server lets one device have unanswered.
            unanswered: live frames that wait for their answers.
        """
        return max(0, window - unanswered)

    def pause_s(self, max_kbps: float, now: float) -> float:
        """How long to wait before the next batch.

        Args:
            max_kbps: what the cloud asks of the device's link; 0 for no limit.
            now: when.
        """
        if self._left_kbps(max_kbps) <= 0:
            return _MOST_PAUSE_S
        return min(_MOST_PAUSE_S, max(0.0, self._due - now))

    def took(self, payload_bytes: int, seconds: float, link_bytes: float, max_kbps: float, now: float) -> None:
        """A batch was answered.

        Args:
            payload_bytes: of its frames.
            seconds: from its sending to its last answer.
            link_bytes: that it cost, of the busier direction.
            max_kbps: see `pause_s`.
            now: when.
        """
        self._base_s = min(self._base_s * _BASE_GROWTH, seconds)
        limit_s = _LIVE_S if now - self._live_at < _LIVE_FOR_S else _ALONE_S
        if seconds - self._base_s > limit_s:
            self.most_bytes = max(_LEAST_BYTES, min(self.most_bytes, payload_bytes) // 2)
        elif payload_bytes * 2 >= self.most_bytes:  # it was about as large as it might be
            self.most_bytes = min(_MOST_BYTES, self.most_bytes * 2)
        left = self._left_kbps(max_kbps)
        if math.isfinite(left):
            self._due = max(self._due, now - seconds) + link_bytes * 8e-3 / max(left, 1e-3)

    def _left_kbps(self, max_kbps: float) -> float:
        """What live frames leave of the limits."""
        left = self._kbps or math.inf
        return min(left, max_kbps - self._live_kbps) if max_kbps else left
