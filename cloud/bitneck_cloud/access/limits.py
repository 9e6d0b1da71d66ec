"""What one caller may have at once and send in a second. Pure: times come in as arguments."""

from collections import Counter, OrderedDict

from bitneck.errors import Overloaded

__all__ = ["CallerLimits", "TokenBucket"]

_MIN_BURST_BYTES = 65536.0
_MIN_BURST_FRAMES = 16.0
_MOST_BUCKETS = 4096


class TokenBucket:
    """An amount that refills at a constant rate.

    Args:
        per_s: that comes back each second.
        burst: what it holds at most, and at first.
        now: seconds, any monotonic clock.
    """

    def __init__(self, per_s: float, burst: float, now: float) -> None:
        self._per_s = per_s
        self._burst = burst
        self._left = burst
        self._at = now

    def take(self, amount: float, now: float) -> bool:
        """Take an amount if it is there."""
        self._left = min(self._burst, self._left + (now - self._at) * self._per_s)
        self._at = now
        if amount > self._left:
            return False
        self._left -= amount
        return True

    @staticmethod
    def of_bytes(per_s: float, now: float) -> "TokenBucket":
        """One for bytes: a burst is a second's worth, or 64 KiB."""
        return TokenBucket(per_s, max(per_s, _MIN_BURST_BYTES), now)

    @staticmethod
    def of_frames(per_s: float, now: float) -> "TokenBucket":
        """One for frames: a burst is a second's worth, or 16."""
        return TokenBucket(per_s, max(per_s, _MIN_BURST_FRAMES), now)


class CallerLimits:
    """Counts the calls that each caller has open, and the frames and bytes that it sends.

    Args:
        max_calls: calls of one kind that a caller may have open; 0 for no limit.
        max_frames_per_s: frames a second of all its calls in the long run; 0 for no limit.
        max_bytes_per_s: payload bytes a second of its single frames (``Infer``); 0 for no limit. The bytes of a session
            are its own limit.
    """

    def __init__(self, *, max_calls: int = 0, max_frames_per_s: float = 0.0, max_bytes_per_s: float = 0.0) -> None:
        self._max_calls = max_calls
        self._frames_per_s = max_frames_per_s
        self._bytes_per_s = max_bytes_per_s
        self._open: Counter[tuple[str, str]] = Counter()
        self._frames: OrderedDict[str, TokenBucket] = OrderedDict()
        self._bytes: OrderedDict[str, TokenBucket] = OrderedDict()

    def begin(self, caller: str, kind: str, most: int | None = None) -> None:
        """A call begins.

        Args:
            caller: its name.
            kind: of call; each is counted by itself.
            most: calls of this kind, in place of `max_calls`.

        Raises:
            Overloaded: the caller has too many of them open.
        """
        most = self._max_calls if most is None else most
        if most and self._open[caller, kind] >= most:
            raise Overloaded(f"{most} calls of this caller are open already; end some, or try again later")
        self._open[caller, kind] += 1

    def end(self, caller: str, kind: str) -> None:
        """A call that began has ended."""
        self._open[caller, kind] -= 1
        if self._open[caller, kind] <= 0:
            del self._open[caller, kind]

    def frame(self, caller: str, now: float) -> None:
        """A frame came, whatever it holds.

        Raises:
            Overloaded: more frames came than the caller may send.
        """
        if self._frames_per_s and not self._bucket(self._frames, caller, now).take(1.0, now):
            raise Overloaded(f"this caller may send {self._frames_per_s:g} frames a second; send fewer")

    def single(self, caller: str, payload_bytes: int, now: float) -> None:
        """A frame without a session came.

        Raises:
            Overloaded: more bytes came than the caller may send.
        """
        if self._bytes_per_s and not self._bucket(self._bytes, caller, now).take(payload_bytes, now):
            raise Overloaded(f"this caller may send {self._bytes_per_s:.0f} payload bytes a second; send fewer frames")

    def _bucket(self, buckets: OrderedDict[str, TokenBucket], caller: str, now: float) -> TokenBucket:
        bucket = buckets.get(caller)
        if bucket is None:
            make = TokenBucket.of_frames if buckets is self._frames else TokenBucket.of_bytes
            rate = self._frames_per_s if buckets is self._frames else self._bytes_per_s
            bucket = buckets[caller] = make(rate, now)
            if len(buckets) > _MOST_BUCKETS:
                buckets.popitem(last=False)
        buckets.move_to_end(caller)
        return bucket
